"""Layouts with a chosen and a rejected answer, where they or the prompt are lists of turns."""

from tests.layouts.specs import (
    BAD,
    BAD_NEXT,
    EARLIER,
    GOOD,
    GOOD_NEXT,
    LATER,
    NEXT,
    ONE,
    QUESTION,
    SYSTEM,
    TOLD,
    TOLD_TWO,
    TWO,
    Layout,
    Refused,
    assistant,
    either,
    gpt,
    human,
    layout,
    parts,
    system,
    user,
)

WHOLE_GOOD, WHOLE_BAD = [user(), assistant()], [user(), assistant(BAD)]
FIRST_OR_LAST = either([[user()]], [LATER])
LONG_GOOD, LONG_BAD = [*LATER, assistant(GOOD_NEXT)], [*LATER, assistant(BAD_NEXT)]

TURNS: tuple[Layout, ...] = (
    layout(
        "ultrafeedback, score columns",
        "princeton-nlp/gemma2-ultrafeedback-armorm; Magpie-Llama-3.1-Pro-DPO",
        {
            "uuid": "u",
            "instruction": QUESTION,
            "chosen": WHOLE_GOOD,
            "rejected": WHOLE_BAD,
            "gen_input_configs": {"temperature": 0.8},
            "response": GOOD,
            "all_rm_scores": [1.0, -1.0],
        },
        pairs=[ONE],
    ),
    layout(
        "openhermes preferences",
        "argilla/OpenHermesPreferences",
        {
            "source": "s",
            "category": None,
            "prompt": QUESTION,
            "candidates_completions": [BAD, GOOD],
            "candidate_policies": ["m", "n"],
            "ranks": [2, 1],
            "rank_str": "[2, 1]",
            "chosen_policy": "n",
            "rejected_policy": "m",
            "chosen": WHOLE_GOOD,
            "rejected": WHOLE_BAD,
        },
        pairs=[ONE],
        container="parquet",
    ),
    layout(
        "openhermes dpo binarized",
        "argilla/OpenHermes2.5-dpo-binarized-alpha: the conversation of the first set is kept beside",
        {
            "category": None,
            "system_prompt": None,
            "conversations": [human(), gpt()],
            "input": QUESTION,
            "generations": [GOOD, BAD],
            "rating": [5.0, 1.0],
            "chosen": WHOLE_GOOD,
            "rejected": WHOLE_BAD,
            "chosen_score": 5.0,
            "rejected_score": 1.0,
        },
        pairs=[ONE],
    ),
    layout(
        "capybara",
        "argilla/distilabel-capybara-dpo-7k-binarized",
        {
            "source": "s",
            "conversation": [{"input": QUESTION, "output": GOOD}, {"input": NEXT, "output": GOOD_NEXT}],
            "original_response": GOOD_NEXT,
            "generation_prompt": ["<s>[INST] x [/INST]"],
            "raw_generation_responses": [BAD_NEXT],
            "new_generations": [BAD_NEXT],
            "prompt": NEXT,
            "chosen": LONG_GOOD,
            "rejected": LONG_BAD,
            "rating_chosen": 5,
            "rating_rejected": 1,
            "chosen_model": "m",
            "rejected_model": "n",
        },
        pairs=[TWO],
    ),
    layout(
        "helpsteer3, binarized beside",
        "ktolnos/helpsteer3v2_filtered: context, responses, verdict, and the pair itself",
        {
            "domain": "d",
            "language": "l",
            "context": LATER,
            "response1": BAD_NEXT,
            "response2": GOOD_NEXT,
            "overall_preference": 2,
            "individual_preference": [],
            "chosen": [assistant(GOOD_NEXT)],
            "rejected": [assistant(BAD_NEXT)],
            "preference_strength": 2,
        },
        pairs=either([TWO], Refused()),
    ),
    layout(
        "inf-orm magnitude",
        "infly/INF-ORM-Preference-Magnitude-80K",
        {"chosen": LONG_GOOD, "rejected": LONG_BAD, "source": "s", "magnitude": 3.0},
        pairs=[TWO],
        container="parquet",
    ),
    layout(
        "spin",
        "UCLA-AGI/SPIN_iter0: real is preferred to generated",
        {"real": WHOLE_GOOD, "generated": WHOLE_BAD},
        pairs=either([ONE], Refused()),
        container="parquet",
    ),
    layout(
        "system turn in both",
        "chosen and rejected begin with a system turn",
        {"chosen": [system(), *LONG_GOOD], "rejected": [system(), *LONG_BAD]},
        pairs=[TOLD_TWO],
    ),
    layout(
        "system column, whole conversations",
        "OpenRLHF-like data with a system column",
        {"system": SYSTEM, "chosen": WHOLE_GOOD, "rejected": WHOLE_BAD},
        pairs=[TOLD],
    ),
    layout(
        "the same system twice",
        "a system column beside conversations that begin with it",
        {"system": SYSTEM, "chosen": [system(), *WHOLE_GOOD], "rejected": [system(), *WHOLE_BAD]},
        pairs=[TOLD],
    ),
    layout(
        "question with earlier turns in chosen",
        "a prompt in text, then chosen and rejected that go on for several turns",
        {
            "prompt": QUESTION,
            "chosen": [assistant(), user(NEXT), assistant(GOOD_NEXT)],
            "rejected": [assistant(), user(NEXT), assistant(BAD_NEXT)],
        },
        pairs=[TWO],
        prompts=FIRST_OR_LAST,
    ),
    layout(
        "messages go on in the answers",
        "prompt as messages, then chosen and rejected that go on for several turns",
        {
            "prompt": [user()],
            "chosen": [assistant(), user(NEXT), assistant(GOOD_NEXT)],
            "rejected": [assistant(), user(NEXT), assistant(BAD_NEXT)],
        },
        pairs=[TWO],
        prompts=FIRST_OR_LAST,
    ),
    layout(
        "last question as prompt",
        "WildFeedback-like: prompt repeats the last user turn",
        {"prompt": NEXT, "chosen": LONG_GOOD, "rejected": LONG_BAD},
        pairs=[TWO],
    ),
    layout(
        "first question as prompt",
        "ultrafeedback_binarized-like: prompt repeats the first user turn",
        {"prompt": QUESTION, "chosen": LONG_GOOD, "rejected": LONG_BAD},
        pairs=[TWO],
        prompts=FIRST_OR_LAST,
    ),
    layout(
        "one message a side",
        "microsoft/WildFeedback: chosen is one message",
        {"conversation_hash": "c", "prompt": LATER, "chosen": assistant(GOOD_NEXT), "rejected": assistant(BAD_NEXT)},
        pairs=[TWO],
    ),
    layout(
        "sharegpt, strings as answers",
        "LLaMA-Factory-like with text answers",
        {"conversations": [human(), gpt(), human(NEXT)], "chosen": GOOD_NEXT, "rejected": BAD_NEXT},
        pairs=[TWO],
        container="json",
    ),
    layout(
        "sharegpt with system turn",
        "LLaMA-Factory sharegpt with a system column",
        {"conversations": [human()], "system": SYSTEM, "chosen": gpt(), "rejected": gpt(BAD)},
        {"conversations": [{"from": "system", "value": SYSTEM}, human()], "chosen": gpt(), "rejected": gpt(BAD)},
        pairs=[TOLD, TOLD],
        container="json",
    ),
    layout(
        "simpo sharegpt",
        "DongfuJiang/simpo_v2_ultrafeedback",
        {"chosen": gpt(), "rejected": gpt(BAD), "id": "1", "conversations": [human()]},
        pairs=[ONE],
        container="parquet",
    ),
    layout(
        "torchtune conversations",
        "torchtune PreferenceDataset with chosen_conversations",
        {"chosen_conversations": LONG_GOOD, "rejected_conversations": LONG_BAD},
        pairs=[TWO],
    ),
    layout(
        "chatbot roles",
        "Cohere: roles User, Chatbot, System",
        {
            "prompt": [{"role": "System", "content": SYSTEM}, {"role": "User", "content": QUESTION}],
            "chosen": [{"role": "Chatbot", "content": GOOD}],
            "rejected": [{"role": "Chatbot", "content": BAD}],
        },
        pairs=[TOLD],
    ),
    layout(
        "role and text",
        "AI-ModelScope/hh_rlhf_cn: context of role and text",
        {
            "context": [
                {"role": "human", "text": QUESTION},
                {"role": "assistant", "text": GOOD},
                {"role": "human", "text": NEXT},
            ],
            "chosen": {"role": "assistant", "text": GOOD_NEXT},
            "rejected": {"role": "assistant", "text": BAD_NEXT},
        },
        pairs=either([TWO], Refused()),
    ),
    layout(
        "pair in parts",
        "TRL's conversational form with lists of text parts",
        {
            "prompt": [parts("system", SYSTEM), parts("user", QUESTION)],
            "chosen": [parts("assistant", GOOD)],
            "rejected": [parts("assistant", BAD)],
        },
        pairs=[TOLD],
    ),
    layout(
        "messages beside the pair",
        "allenai/ultrafeedback_binarized_cleaned; messages repeats chosen",
        {
            "prompt": QUESTION,
            "prompt_id": "p",
            "chosen": WHOLE_GOOD,
            "rejected": WHOLE_BAD,
            "messages": WHOLE_GOOD,
            "source": "s",
        },
        pairs=[ONE],
        container="parquet",
    ),
    layout(
        "messages and a rejected answer",
        "ms-swift: messages end in the chosen answer",
        {"messages": [system(), *LONG_GOOD], "rejected_response": BAD_NEXT},
        pairs=[TOLD_TWO],
    ),
    layout(
        "conversation before the pair",
        "prompt as messages in `messages`, pair in text",
        {"messages": [system(), user()], "chosen": GOOD, "rejected": BAD},
        pairs=[TOLD],
    ),
    layout(
        "history as messages",
        "an application's log",
        {"history": EARLIER, "prompt": NEXT, "chosen": GOOD_NEXT, "rejected": BAD_NEXT},
        pairs=[TWO],
    ),
    layout(
        "history with system",
        "an application's log with instructions",
        {"system": SYSTEM, "history": EARLIER, "prompt": NEXT, "chosen": GOOD_NEXT, "rejected": BAD_NEXT},
        pairs=[TOLD_TWO],
    ),
    layout(
        "prompter and assistant in text",
        "tasksource/oasst1_pairwise_rlhf_reward",
        {
            "lang": "en",
            "parent_id": "p",
            "prompt": f"prompter: {QUESTION}\nassistant: {GOOD}\nprompter: {NEXT}",
            "chosen": GOOD_NEXT,
            "rejected": BAD_NEXT,
        },
        pairs=either([TWO], Refused()),
    ),
    layout(
        "messages as text of JSON",
        "a chat set after a round through CSV",
        {
            "prompt": '[{"role": "system", "content": "'
            + SYSTEM
            + '"}, {"role": "user", "content": "'
            + QUESTION
            + '"}]',
            "chosen": '[{"role": "assistant", "content": "' + GOOD + '"}]',
            "rejected": '[{"role": "assistant", "content": "' + BAD + '"}]',
        },
        pairs=[TOLD],
        container="csv",
    ),
    layout(
        "messages as text of Python",
        "pandas to_csv of lists of dictionaries",
        {
            "chosen": "[{'role': 'user', 'content': '"
            + QUESTION
            + "'}, {'role': 'assistant', 'content': '"
            + GOOD
            + "'}]",
            "rejected": "[{'role': 'user', 'content': '"
            + QUESTION
            + "'}, {'role': 'assistant', 'content': '"
            + BAD
            + "'}]",
        },
        pairs=either([ONE], Refused()),
        container="csv",
    ),
)
