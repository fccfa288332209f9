"""What must be refused: it would lose what changes meaning, contradicts itself, or leaves the pair open."""

from tests.layouts.specs import (
    ASIDE,
    BAD,
    BAD_NEXT,
    GOOD,
    GOOD_NEXT,
    LATER,
    NEXT,
    NO_PAIRS,
    ONE,
    QUESTION,
    SYSTEM,
    TOLD,
    Fields,
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

IMAGE = {"type": "image_url", "image_url": {"url": "https://example.org/light.png"}}
PIXELS = {"bytes": None, "path": "light.png"}
ASKED = [[user()]]


def pair(**others: object) -> Fields:
    """A pair in text with further columns."""
    return {"prompt": QUESTION, "chosen": GOOD, "rejected": BAD, **others}


LOST: tuple[Layout, ...] = (
    layout(
        "llava",
        "liuhaotian/LLaVA-Instruct-150K",
        {"id": "1", "image": "light.jpg", "conversations": [human(f"<image>\n{QUESTION}"), gpt()]},
        pairs=NO_PAIRS,
        prompts=Refused(),
        container="json",
    ),
    layout(
        "rlaif-v",
        "openbmb/RLAIF-V-Dataset: image as bytes, question in text",
        {
            "ds_name": "d",
            "image": PIXELS,
            "question": QUESTION,
            "chosen": GOOD,
            "rejected": BAD,
            "origin_dataset": "o",
            "idx": 1,
            "image_path": "p",
        },
        pairs=Refused(),
        prompts=Refused(),
        container="parquet",
    ),
    layout(
        "image_url parts",
        "OpenAI's chat format with an image",
        {
            "prompt": [{"role": "user", "content": [{"type": "text", "text": QUESTION}, IMAGE]}],
            "chosen": [assistant()],
            "rejected": [assistant(BAD)],
        },
        pairs=Refused("images"),
        prompts=Refused("images"),
    ),
    layout(
        "input_audio parts",
        "OpenAI's chat format with audio",
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}],
                },
                assistant(),
            ]
        },
        pairs=NO_PAIRS,
        prompts=Refused("images"),
    ),
    layout(
        "audios column",
        "ms-swift, LLaMA-Factory: audio beside messages",
        {"messages": [user(f"<audio>{QUESTION}"), assistant()], "audios": ["light.wav"], "rejected_response": BAD},
        pairs=Refused(),
        prompts=Refused(),
    ),
    layout("videos column", "LLaMA-Factory", pair(videos=["light.mp4"]), pairs=Refused(), prompts=Refused()),
    layout(
        "images column, no mark in the text",
        "TRL's vision form in plain text",
        pair(images=["light.png"]),
        pairs=Refused(),
        prompts=Refused(),
    ),
    layout(
        "images in the third row",
        "two rows without images, one with",
        pair(images=[]),
        {"prompt": NEXT, "chosen": GOOD_NEXT, "rejected": BAD_NEXT, "images": None},
        {"prompt": NEXT, "chosen": GOOD, "rejected": BAD, "images": ["light.png"]},
        pairs=[ONE, ([user(NEXT)], GOOD_NEXT, BAD_NEXT)],
    ),
    layout(
        "arena vision",
        "lmarena-ai/VisionArena-Battle: images beside conversations",
        {
            "images": [PIXELS],
            "model_a": "m",
            "model_b": "n",
            "winner": "model_a",
            "conversation_a": [user(), assistant()],
            "conversation_b": [user(), assistant(BAD)],
        },
        pairs=Refused(),
        prompts=Refused(),
    ),
    layout(
        "arena 140k with an image",
        "lmarena-ai/arena-human-preference-140k: an image part",
        {
            "winner": "model_a",
            "conversation_a": [
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": QUESTION, "image": None, "mimeType": None},
                        {"type": "image", "text": None, "image": "u", "mimeType": "image/png"},
                    ],
                },
                parts("assistant", GOOD),
            ],
            "conversation_b": [
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": QUESTION, "image": None, "mimeType": None},
                        {"type": "image", "text": None, "image": "u", "mimeType": "image/png"},
                    ],
                },
                parts("assistant", BAD),
            ],
        },
        pairs=Refused("images"),
        prompts=Refused("images"),
    ),
    layout(
        "reasoning key",
        "OpenRouter's and vLLM's `reasoning` beside content",
        {"prompt": [user()], "chosen": [{**assistant(), "reasoning": "Count."}], "rejected": [assistant(BAD)]},
        pairs=Refused("reasoning"),
        prompts=ASKED,
    ),
    layout(
        "thinking key",
        "gpt-oss data: `thinking` beside content",
        {"messages": [user(), {**assistant(), "thinking": "Count."}, user(NEXT), assistant(GOOD_NEXT)]},
        pairs=NO_PAIRS,
        prompts=Refused("reasoning"),
    ),
    layout(
        "reasoning of null",
        "data whose turns have a reasoning key that is empty",
        {
            "prompt": [{**user(), "reasoning_content": None}],
            "chosen": [{**assistant(), "reasoning_content": None}],
            "rejected": [{**assistant(BAD), "reasoning_content": ""}],
        },
        pairs=[ONE],
    ),
    layout(
        "think tags",
        "answers with <think> in their text are text",
        {
            "prompt": [user()],
            "chosen": [assistant(f"<think>\nCount.\n</think>\n\n{GOOD}")],
            "rejected": [assistant(f"<think>\nNo.\n</think>\n\n{BAD}")],
        },
        pairs=either(
            [([user()], f"<think>\nCount.\n</think>\n\n{GOOD}", f"<think>\nNo.\n</think>\n\n{BAD}")],
            Refused("reasoning"),
        ),
    ),
    layout(
        "reasoning column",
        "reasoning beside the pair as columns",
        pair(chosen_reasoning="Count.", rejected_reasoning="No."),
        pairs=either([ONE], Refused()),
    ),
    layout(
        "tool calls in earlier turns",
        "OpenAI's chat format",
        {
            "messages": [
                user(),
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [{"id": "1", "type": "function", "function": {"name": "steps", "arguments": "{}"}}],
                },
                {"role": "tool", "tool_call_id": "1", "content": "213"},
                assistant(),
            ]
        },
        pairs=NO_PAIRS,
        prompts=either(ASKED, Refused()),
    ),
    layout(
        "a call as the rejected answer",
        "TRL: rejected calls a function",
        {
            "prompt": [user()],
            "chosen": [assistant()],
            "rejected": [
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [{"type": "function", "function": {"name": "steps", "arguments": {}}}],
                }
            ],
        },
        pairs=Refused(),
        prompts=ASKED,
    ),
    layout(
        "function_call",
        "older OpenAI: function_call in a turn",
        {
            "messages": [
                user(),
                {"role": "assistant", "content": None, "function_call": {"name": "steps", "arguments": "{}"}},
                {"role": "function", "name": "steps", "content": "213"},
                user(NEXT),
            ]
        },
        pairs=NO_PAIRS,
        prompts=Refused(),
    ),
    layout(
        "prefix",
        "xinlai/Math-Step-DPO-10K: the answer goes on from steps that are given",
        pair(initial_reason_steps="Step 1: count.\nStep 2:"),
        pairs=Refused(),
        prompts=either(Refused(), ASKED),
    ),
    layout(
        "a prompt that ends in the answer's beginning",
        "prefilled answers",
        {
            "prompt": [user(), assistant("Two hundred")],
            "chosen": [assistant(" and twelve.")],
            "rejected": [assistant(" and two.")],
        },
        pairs=Refused(),
        prompts=either(Refused(), ASKED),
    ),
    layout(
        "documents",
        "Cohere's grounded chats: documents beside messages",
        {"messages": [user(), assistant()], "documents": [{"title": "t", "snippet": ASIDE}]},
        pairs=NO_PAIRS,
        prompts=Refused(),
    ),
    layout(
        "system under another name",
        "instructions beside a pair",
        pair(system_instruction=SYSTEM),
        pairs=either([TOLD], Refused()),
    ),
    layout(
        "persona",
        "a persona beside a pair: no name of a system prompt that is known",
        pair(persona="a guide"),
        pairs=either([ONE], Refused()),
    ),
    layout(
        "history under another name",
        "conversation_history beside a pair",
        {"conversation_history": LATER[:2], "prompt": NEXT, "chosen": GOOD_NEXT, "rejected": BAD_NEXT},
        pairs=either([(LATER, GOOD_NEXT, BAD_NEXT)], Refused()),
    ),
    layout(
        "chat_history",
        "LangChain's chat_history beside a question",
        {"chat_history": [QUESTION, GOOD], "question": NEXT, "chosen": GOOD_NEXT, "rejected": BAD_NEXT},
        pairs=either([(LATER, GOOD_NEXT, BAD_NEXT)], Refused()),
    ),
    layout(
        "a named speaker",
        "turns with a name",
        {"prompt": [{**user(), "name": "Ada"}], "chosen": [assistant()], "rejected": [assistant(BAD)]},
        pairs=either([([{**user(), "name": "Ada"}], GOOD, BAD)], Refused()),
        prompts=either([[{**user(), "name": "Ada"}]], Refused()),
    ),
    layout(
        "kwargs of the template",
        "TRL and smoltalk2: chat_template_kwargs beside a pair",
        pair(chat_template_kwargs={"custom_instructions": SYSTEM}),
        pairs=either([TOLD], Refused()),
    ),
    layout("prefill", "HelpSteer-like: a response prefix", pair(prefix="Two hundred"), pairs=either(Refused(), [ONE])),
)

OPEN: tuple[Layout, ...] = (
    layout(
        "only chosen",
        "an SFT set with a chosen column",
        {"prompt": QUESTION, "chosen": GOOD},
        pairs=NO_PAIRS,
        prompts=ASKED,
    ),
    layout(
        "rejected is null everywhere",
        "a pair set whose rejected answers are missing",
        {"prompt": QUESTION, "chosen": GOOD, "rejected": None},
        pairs=NO_PAIRS,
        prompts=ASKED,
    ),
    layout(
        "rejected is empty",
        "an empty answer",
        {"prompt": QUESTION, "chosen": GOOD, "rejected": "  "},
        pairs=NO_PAIRS,
        prompts=ASKED,
    ),
    layout(
        "both the same",
        "identical answers",
        {"prompt": QUESTION, "chosen": GOOD, "rejected": GOOD},
        pairs=NO_PAIRS,
        prompts=ASKED,
    ),
    layout(
        "a prompt that contradicts chosen",
        "prompt is another question than that in chosen",
        {"prompt": NEXT, "chosen": [user(), assistant()], "rejected": [user(), assistant(BAD)]},
        pairs=Refused(),
        prompts=either([[user(NEXT)]], Refused()),
    ),
    layout(
        "sides with other questions",
        "chosen and rejected answer different questions",
        {"chosen": [user(), assistant()], "rejected": [user(NEXT), assistant(BAD)]},
        pairs=Refused(),
        prompts=either(ASKED, Refused()),
    ),
    layout(
        "sides with other systems",
        "chosen and rejected have different system turns",
        {"chosen": [system(), user(), assistant()], "rejected": [system("Be brief."), user(), assistant(BAD)]},
        pairs=Refused(),
        prompts=either([[system(), user()]], Refused()),
    ),
    layout(
        "a system column that contradicts the turns",
        "system in a column and another in the conversation",
        {
            "system": "Be brief.",
            "chosen": [system(), user(), assistant()],
            "rejected": [system(), user(), assistant(BAD)],
        },
        pairs=Refused(),
        prompts=Refused(),
    ),
    layout(
        "diverging dialogues",
        "red teaming: other questions after other answers",
        {
            "chosen": [user(), assistant(), user(NEXT), assistant(GOOD_NEXT)],
            "rejected": [user(), assistant(BAD), user("Why?"), assistant(BAD_NEXT)],
        },
        pairs=Refused(),
        prompts=either(ASKED, [LATER], Refused()),
    ),
    layout(
        "one side longer",
        "rejected ends a turn earlier",
        {"chosen": [*LATER, assistant(GOOD_NEXT)], "rejected": [user(), assistant(BAD)]},
        pairs=Refused(),
        prompts=either([LATER], ASKED, Refused()),
    ),
    layout(
        "chosen ends with the user",
        "conversations without an answer",
        {"chosen": [user()], "rejected": [user(NEXT)]},
        pairs=Refused(),
        prompts=either(ASKED, Refused()),
    ),
    layout(
        "prompt and question differ",
        "two columns that could be the prompt",
        {"prompt": QUESTION, "question": NEXT, "chosen": GOOD, "rejected": BAD},
        pairs=either(Refused(), [ONE]),
        prompts=either(Refused(), ASKED),
    ),
    layout(
        "messages that contradict prompt",
        "a conversation that holds another question than the prompt",
        {"prompt": QUESTION, "messages": [user(NEXT), assistant(GOOD_NEXT)], "chosen": GOOD, "rejected": BAD},
        pairs=either(Refused(), [ONE]),
        prompts=either(Refused(), ASKED),
    ),
    layout(
        "two verdicts that differ",
        "two pairs of answers with two verdicts",
        {"prompt": QUESTION, "response_a": GOOD, "response_b": BAD, "winner": "a", "chosen": BAD, "rejected": GOOD},
        pairs=either(Refused(), [([user()], BAD, GOOD)]),
    ),
    layout(
        "no prompt", "answers without a question", {"chosen": GOOD, "rejected": BAD}, pairs=Refused(), prompts=Refused()
    ),
    layout("numbers", "a table of numbers", {"a": 1, "b": 2.5, "c": None}, pairs=NO_PAIRS, prompts=Refused()),
    layout(
        "classification",
        "a labelled text",
        {"text": ASIDE, "label": 1},
        pairs=NO_PAIRS,
        prompts=either([[user(ASIDE)]], Refused()),
    ),
    layout(
        "translation",
        "two languages",
        {"translation": {"en": QUESTION, "fr": "Combien ?"}},
        pairs=NO_PAIRS,
        prompts=Refused(),
    ),
    layout(
        "squad",
        "rajpurkar/squad: a context, a question, answers with offsets",
        {
            "id": "1",
            "title": "t",
            "context": ASIDE,
            "question": QUESTION,
            "answers": {"text": ["storm"], "answer_start": [33]},
        },
        pairs=NO_PAIRS,
        prompts=either(
            [[user(f"{ASIDE}\n{QUESTION}")]],
            [[user(f"{QUESTION}\n{ASIDE}")]],
            [[user(f"{QUESTION}\n\n{ASIDE}")]],
            [[user(f"{ASIDE}\n\n{QUESTION}")]],
            Refused(),
        ),
    ),
    layout(
        "multiple choice",
        "ARC: a question and its choices",
        {"id": "1", "question": QUESTION, "choices": {"text": ["213", "12"], "label": ["A", "B"]}, "answerKey": "A"},
        pairs=NO_PAIRS,
        prompts=either(ASKED, Refused()),
    ),
    layout(
        "mmlu",
        "cais/mmlu: choices as a list, the answer as an index",
        {"question": QUESTION, "subject": "s", "choices": ["12", "213", "7", "1"], "answer": 1},
        pairs=NO_PAIRS,
        prompts=either(ASKED, Refused()),
    ),
    layout(
        "pairs of sentences",
        "natural language inference",
        {"premise": ASIDE, "hypothesis": "There was a storm.", "label": 0},
        pairs=NO_PAIRS,
        prompts=Refused(),
    ),
    layout(
        "model-written evals",
        "Anthropic/model-written-evals: behaviour, no preference",
        {"question": QUESTION, "answer_matching_behavior": " (A)", "answer_not_matching_behavior": " (B)"},
        pairs=NO_PAIRS,
        prompts=either(ASKED, Refused()),
    ),
)
