"""What annotation tools, chat applications and trees of messages export, and text that has a template's marks."""

from tests.layouts.specs import (
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
    TOLD_TWO,
    TWO,
    Fields,
    Layout,
    Refused,
    assistant,
    either,
    human,
    layout,
    system,
    user,
)

CHATML = f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
COUNT = f"{GOOD}\n\nCount them."


def llama(role: str, text: str) -> str:
    """A turn in Llama 3's template."""
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n{text}<|eot_id|>"


def node(
    name: str, parent: str | None, text: str, role: str = "assistant", rank: int | None = None, **others: object
) -> Fields:
    """A message of a tree, as a row."""
    return {
        "message_id": name,
        "parent_id": parent,
        "user_id": "u",
        "created_date": "2023-01-01T00:00:00+00:00",
        "text": text,
        "role": role,
        "lang": "en",
        "review_count": 3,
        "review_result": True,
        "deleted": False,
        "rank": rank,
        "synthetic": False,
        "model_name": None,
        "detoxify": None,
        "message_tree_id": "1",
        "tree_state": "ready_for_export",
        "emojis": None,
        "labels": None,
        **others,
    }


def reply(text: str, role: str, rank: int | None, *replies: Fields) -> Fields:
    """A message of a tree, with those that answer it."""
    return {"message_id": text[:3], "text": text, "role": role, "rank": rank, "replies": list(replies)}


def chat(**annotations: int) -> Fields:
    """Open WebUI's chat: one question with two answers below it."""
    texts = {"m2": GOOD, "m3": BAD}
    answers = {
        name: {
            "id": name,
            "parentId": "m1",
            "childrenIds": [],
            "role": "assistant",
            "content": text,
            "annotation": {"rating": annotations[name]},
        }
        if name in annotations
        else {"id": name, "parentId": "m1", "childrenIds": [], "role": "assistant", "content": text}
        for name, text in texts.items()
    }
    question = {"id": "m1", "parentId": None, "childrenIds": ["m2", "m3"], "role": "user", "content": QUESTION}
    return {"title": "t", "chat": {"history": {"messages": {"m1": question, **answers}, "currentId": "m2"}}}


EXPORTS: tuple[Layout, ...] = (
    layout(
        "oasst, two levels",
        "OpenAssistant/oasst2: a tree of rows with three answers, and answers below the best",
        node("1", None, QUESTION, "prompter"),
        node("2", "1", BAD, rank=1),
        node("3", "1", GOOD, rank=0),
        node("4", "3", NEXT, "prompter", rank=0),
        node("5", "4", GOOD_NEXT, rank=0),
        node("6", "4", BAD_NEXT, rank=1),
        pairs=[ONE, TWO],
        container="parquet",
    ),
    layout(
        "oasst, deleted and unranked",
        "OpenAssistant/oasst1: a deleted answer, and one without a rank, are no candidates",
        node("1", None, QUESTION, "prompter"),
        node("2", "1", GOOD, rank=0),
        node("3", "1", BAD, rank=1),
        node("4", "1", "Gone.", rank=2, deleted=True),
        node("5", "1", "Unranked."),
        pairs=[ONE],
    ),
    layout(
        "oasst trees, two levels",
        "OpenAssistant's trees in JSON lines",
        {
            "message_tree_id": "1",
            "tree_state": "ready_for_export",
            "prompt": reply(
                QUESTION,
                "prompter",
                None,
                reply(
                    GOOD,
                    "assistant",
                    0,
                    reply(NEXT, "prompter", None, reply(BAD_NEXT, "assistant", 1), reply(GOOD_NEXT, "assistant", 0)),
                ),
                reply(BAD, "assistant", 1),
            ),
        },
        pairs=either([ONE, TWO], [TWO, ONE]),
    ),
    layout(
        "label studio, json-min",
        "Label Studio's JSON_MIN of the pairwise template",
        {
            "id": 1,
            "prompt": QUESTION,
            "answer1": BAD,
            "answer2": GOOD,
            "pw": "right",
            "annotator": 1,
            "annotation_id": 2,
            "created_at": "2025-01-01T00:00:00Z",
            "updated_at": "2025-01-01T00:00:00Z",
            "lead_time": 3.5,
        },
        {
            "id": 2,
            "prompt": NEXT,
            "answer1": GOOD_NEXT,
            "answer2": BAD_NEXT,
            "pw": "left",
            "annotator": 1,
            "annotation_id": 3,
            "created_at": "2025-01-01T00:00:00Z",
            "updated_at": "2025-01-01T00:00:00Z",
            "lead_time": 3.5,
        },
        pairs=either([ONE, ([user(NEXT)], GOOD_NEXT, BAD_NEXT)], Refused()),
        container="json",
    ),
    layout(
        "label studio, csv",
        "Label Studio's CSV of the pairwise template",
        {
            "id": 1,
            "prompt": QUESTION,
            "answer1": BAD,
            "answer2": GOOD,
            "comparison": "right",
            "annotator": 1,
            "annotation_id": 2,
            "lead_time": 3.5,
        },
        pairs=either([ONE], Refused()),
        container="csv",
    ),
    layout(
        "label studio, cancelled",
        "Label Studio's JSON: one annotation was skipped, one task has none",
        {
            "id": 1,
            "data": {"prompt": QUESTION, "answer1": BAD, "answer2": GOOD},
            "annotations": [
                {"id": 8, "was_cancelled": True, "result": []},
                {
                    "id": 9,
                    "was_cancelled": False,
                    "result": [
                        {
                            "from_name": "pw",
                            "to_name": "answer1,answer2",
                            "type": "pairwise",
                            "value": {"selected": "right"},
                        }
                    ],
                },
            ],
            "predictions": [],
        },
        {
            "id": 2,
            "data": {"prompt": NEXT, "answer1": GOOD_NEXT, "answer2": BAD_NEXT},
            "annotations": [],
            "predictions": [],
        },
        pairs=[ONE],
        prompts=either([[user()], [user(NEXT)]], [[user()]], Refused()),
        container="json",
    ),
    layout(
        "label studio, annotators differ",
        "Label Studio's JSON: one says left, one says right",
        {
            "id": 1,
            "data": {"prompt": QUESTION, "answer1": BAD, "answer2": GOOD},
            "annotations": [
                {
                    "id": 8,
                    "was_cancelled": False,
                    "result": [
                        {
                            "from_name": "pw",
                            "to_name": "answer1,answer2",
                            "type": "pairwise",
                            "value": {"selected": "left"},
                        }
                    ],
                },
                {
                    "id": 9,
                    "was_cancelled": False,
                    "result": [
                        {
                            "from_name": "pw",
                            "to_name": "answer1,answer2",
                            "type": "pairwise",
                            "value": {"selected": "right"},
                        }
                    ],
                },
            ],
            "predictions": [],
        },
        pairs=NO_PAIRS,
        prompts=either([[user()]], Refused()),
        container="json",
    ),
    layout(
        "open webui, one thumb",
        "Open WebUI: the other answer has no rating",
        {
            "id": "f",
            "type": "rating",
            "data": {"rating": 1, "model_id": "m", "sibling_model_ids": ["n"]},
            "meta": {"arena": True, "chat_id": "c", "message_id": "m2"},
            "snapshot": {"chat": chat(m2=1)},
        },
        pairs=either([ONE], Refused()),
        prompts=either([[user()]], Refused()),
        container="json",
    ),
    layout(
        "argilla 1",
        "Argilla 1.x FeedbackDataset: a ranking question",
        {
            "instruction": QUESTION,
            "response_1": BAD,
            "response_2": GOOD,
            "ranking": [
                {
                    "user_id": "u",
                    "value": {"rank": [2, 1], "value": ["response_1", "response_2"]},
                    "status": "submitted",
                }
            ],
            "ranking-suggestion": None,
            "external_id": "1",
            "metadata": "{}",
        },
        pairs=either([ONE], Refused()),
    ),
    layout(
        "argilla 2, with a suggestion",
        "Argilla 2.x: a person's answer wins over a suggestion",
        {
            "id": "r",
            "status": "completed",
            "instruction": QUESTION,
            "response-1": BAD,
            "response-2": GOOD,
            "preference.responses": ["response-2"],
            "preference.responses.users": ["u"],
            "preference.responses.status": ["submitted"],
            "preference.suggestion": "response-1",
            "preference.suggestion.agent": "a",
        },
        pairs=either([ONE], Refused()),
    ),
    layout(
        "prodigy",
        "Prodigy's choice interface",
        {
            "text": QUESTION,
            "options": [{"id": "A", "text": BAD}, {"id": "B", "text": GOOD}],
            "accept": ["B"],
            "answer": "accept",
            "_input_hash": 1,
            "_task_hash": 2,
        },
        pairs=either([ONE], Refused()),
        prompts=either([[user()]], Refused()),
    ),
    layout(
        "potato",
        "potato's pairwise output: annotations by instance",
        {
            "instance_id": "1",
            "displayed_text": f"A: {GOOD} B: {BAD}",
            "label_annotations": {"preference": {"A": "true"}},
            "span_annotations": [],
        },
        pairs=NO_PAIRS,
        prompts=Refused(),
    ),
    layout(
        "langsmith",
        "LangSmith's chat examples",
        {
            "inputs": {"messages": [{"role": "user", "content": QUESTION}]},
            "outputs": {"message": {"role": "assistant", "content": GOOD}},
        },
        pairs=NO_PAIRS,
        prompts=either([[user()]], Refused()),
    ),
    layout(
        "langchain",
        "LangChain's serialized messages",
        {
            "prompt": [{"type": "system", "content": SYSTEM}, {"type": "human", "content": QUESTION}],
            "chosen": [{"type": "ai", "content": GOOD}],
            "rejected": [{"type": "ai", "content": BAD}],
        },
        pairs=either([TOLD], Refused()),
    ),
    layout(
        "langchain data",
        "LangChain's messages_to_dict",
        {
            "prompt": [{"type": "human", "data": {"content": QUESTION}}],
            "chosen": [{"type": "ai", "data": {"content": GOOD}}],
            "rejected": [{"type": "ai", "data": {"content": BAD}}],
        },
        pairs=either([ONE], Refused()),
    ),
    layout(
        "langfuse",
        "Langfuse dataset items",
        {
            "id": "1",
            "input": {"messages": [system(), user()]},
            "expectedOutput": GOOD,
            "metadata": {"a": 1},
            "status": "ACTIVE",
        },
        pairs=NO_PAIRS,
        prompts=either([[system(), user()]], Refused()),
        container="json",
    ),
    layout(
        "promptfoo",
        "promptfoo's DPO export: lists of answers, strings",
        {"chosen": [GOOD], "rejected": [BAD], "vars": {"system": SYSTEM, "question": QUESTION}, "assert": None},
        pairs=either([TOLD], Refused()),
        container="json",
    ),
    layout(
        "openai, system and text",
        "OpenAI's preference format with a system message",
        {
            "input": {"messages": [system(), *LATER]},
            "preferred_output": [assistant(GOOD_NEXT)],
            "non_preferred_output": [assistant(BAD_NEXT)],
        },
        pairs=[TOLD_TWO],
    ),
    layout(
        "openai, parquet",
        "the same after pyarrow: tools is an empty list",
        {
            "input": {"messages": [system(), user()], "tools": [], "parallel_tool_calls": True},
            "preferred_output": [assistant()],
            "non_preferred_output": [assistant(BAD)],
        },
        pairs=[TOLD],
        container="parquet",
    ),
)

TEMPLATED: tuple[Layout, ...] = (
    layout(
        "chatml with system",
        "mlabonne/chatml_dpo_pairs",
        {
            "prompt": f"<|im_start|>system\n{SYSTEM}<|im_end|>\n{CHATML}",
            "chosen": f"{GOOD}<|im_end|>\n",
            "rejected": f"{BAD}<|im_end|>\n",
        },
        pairs=[TOLD],
    ),
    layout(
        "chatml, whole conversations",
        "chosen and rejected as whole text",
        {
            "chosen": f"{CHATML}{GOOD}<|im_end|>\n",
            "rejected": f"{CHATML}{BAD}<|im_end|>\n",
        },
        pairs=[ONE],
    ),
    layout(
        "llama 3, two turns",
        "text of Llama 3's template",
        {
            "prompt": f"<|begin_of_text|>{llama('system', SYSTEM)}{llama('user', QUESTION)}{llama('assistant', GOOD)}"
            f"{llama('user', NEXT)}<|start_header_id|>assistant<|end_header_id|>\n\n",
            "chosen": f"{GOOD_NEXT}<|eot_id|>",
            "rejected": f"{BAD_NEXT}<|eot_id|>",
        },
        pairs=[TOLD_TWO],
    ),
    layout(
        "gemma",
        "text of Gemma's template",
        {
            "prompt": f"<bos><start_of_turn>user\n{QUESTION}<end_of_turn>\n<start_of_turn>model\n",
            "chosen": f"{GOOD}<end_of_turn>\n",
            "rejected": f"{BAD}<end_of_turn>\n",
        },
        pairs=either([ONE], Refused()),
    ),
    layout(
        "mistral",
        "text of Mistral's template",
        {"prompt": f"<s>[INST] {QUESTION} [/INST]", "chosen": f" {GOOD}</s>", "rejected": f" {BAD}</s>"},
        pairs=either([ONE], Refused()),
    ),
    layout(
        "llama 2",
        "text of Llama 2's template with a system",
        {
            "prompt": f"<s>[INST] <<SYS>>\n{SYSTEM}\n<</SYS>>\n\n{QUESTION} [/INST]",
            "chosen": f" {GOOD} </s>",
            "rejected": f" {BAD} </s>",
        },
        pairs=either([TOLD], Refused()),
    ),
    layout(
        "zephyr",
        "text of Zephyr's template",
        {
            "prompt": f"<|system|>\n{SYSTEM}</s>\n<|user|>\n{QUESTION}</s>\n<|assistant|>\n",
            "chosen": f"{GOOD}</s>",
            "rejected": f"{BAD}</s>",
        },
        pairs=either([TOLD], Refused()),
    ),
    layout(
        "nemo extra ids",
        "NeMo-Aligner's template",
        {
            "prompt": f"<extra_id_0>System\n{SYSTEM}\n<extra_id_1>User\n{QUESTION}\n<extra_id_1>Assistant\n",
            "chosen_response": f"{GOOD}\n<extra_id_1>",
            "rejected_response": f"{BAD}\n<extra_id_1>",
        },
        pairs=either([TOLD], Refused()),
    ),
    layout(
        "alpaca prompt",
        "the alpaca template as plain text: nothing but text",
        {"prompt": f"### Instruction:\n{QUESTION}\n\n### Response:\n", "chosen": GOOD, "rejected": BAD},
        pairs=either([ONE], [([user(f"### Instruction:\n{QUESTION}\n\n### Response:\n")], GOOD, BAD)], Refused()),
    ),
    layout(
        "a mark in the middle",
        "an answer that talks about <|im_start|>",
        {"prompt": QUESTION, "chosen": f"{GOOD} The mark is <|im_start|>user.", "rejected": BAD},
        pairs=NO_PAIRS,
        prompts=[[user()]],
    ),
    layout(
        "a system in a hh transcript",
        "transcript with a system line in front",
        {
            "chosen": f"{SYSTEM}\n\nHuman: {QUESTION}\n\nAssistant: {GOOD}",
            "rejected": f"{SYSTEM}\n\nHuman: {QUESTION}\n\nAssistant: {BAD}",
        },
        pairs=either([TOLD], Refused()),
    ),
    layout(
        "hh, longer",
        "Anthropic/hh-rlhf: three turns, an empty line within an answer",
        {
            "chosen": f"\n\nHuman: {QUESTION}\n\nAssistant: {COUNT}\n\nHuman: {NEXT}\n\nAssistant: {GOOD_NEXT}",
            "rejected": f"\n\nHuman: {QUESTION}\n\nAssistant: {COUNT}\n\nHuman: {NEXT}\n\nAssistant: {BAD_NEXT}",
        },
        pairs=[([user(), assistant(COUNT), user(NEXT)], GOOD_NEXT, BAD_NEXT)],
    ),
    layout(
        "hh that part early",
        "Anthropic/hh-rlhf: conversations that part before their last answer",
        {
            "chosen": f"\n\nHuman: {QUESTION}\n\nAssistant: {GOOD}\n\nHuman: {NEXT}\n\nAssistant: {GOOD_NEXT}",
            "rejected": f"\n\nHuman: {QUESTION}\n\nAssistant: {BAD}",
        },
        pairs=NO_PAIRS,
        prompts=either([[user()]], [LATER], Refused()),
    ),
    layout(
        "a question that quotes a dialogue",
        "plain text with a name and a colon",
        {"prompt": "Who says this? Human: I have counted.", "chosen": "The keeper.", "rejected": "Nobody."},
        pairs=either([([user("Who says this? Human: I have counted.")], "The keeper.", "Nobody.")], Refused()),
    ),
    layout(
        "sharegpt in a prompt",
        "conversations in the prompt column",
        {"prompt": [human()], "chosen": [{"from": "gpt", "value": GOOD}], "rejected": [{"from": "gpt", "value": BAD}]},
        pairs=[ONE],
    ),
    layout(
        "user and assistant transcript",
        "USER: ASSISTANT: of Vicuna",
        {"prompt": f"USER: {QUESTION} ASSISTANT:", "chosen": f" {GOOD}", "rejected": f" {BAD}"},
        pairs=either([ONE], [([user(f"USER: {QUESTION} ASSISTANT:")], GOOD, BAD)], Refused()),
    ),
)
