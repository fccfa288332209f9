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
    TOLD_TWO,
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


def calling(**others: object) -> Fields:
    """A turn that calls a function."""
    call = {"type": "function", "function": {"name": "steps", "arguments": {}}, **others}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


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
        pairs=Refused(),
        prompts=Refused(),
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
        prompts=either(
            ASKED, [[user(), calling(id="1"), {"role": "tool", "tool_call_id": "1", "content": "213"}]], Refused()
        ),
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
        pairs=either([([user()], GOOD, calling())], Refused()),
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
        prompts=either(
            [[user(), calling(), {"role": "tool", "name": "steps", "content": "213"}, user(NEXT)]], Refused()
        ),
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

MORE: tuple[Layout, ...] = (
    layout(
        "empty tool calls",
        "answers of a vLLM server: tool_calls is an empty list in each message",
        {
            "prompt": [{**user(), "tool_calls": None}],
            "chosen": [{**assistant(), "tool_calls": []}],
            "rejected": [{**assistant(BAD), "tool_calls": None}],
        },
        pairs=[ONE],
    ),
    layout(
        "nulls of a table",
        "Parquet fills the keys that other messages have with null",
        {
            "prompt": [{**user(), "name": None, "tool_calls": None, "tool_call_id": None, "weight": None}],
            "chosen": [{**assistant(), "name": None, "refusal": None}],
            "rejected": [{**assistant(BAD), "name": None, "audio": None}],
        },
        pairs=[ONE],
    ),
    layout(
        "a system turn of nothing",
        "messages that begin with an empty system turn",
        {"prompt": [system(""), user()], "chosen": [assistant()], "rejected": [assistant(BAD)]},
        pairs=either([ONE], [([system(""), user()], GOOD, BAD)]),
    ),
    layout(
        "blank system column",
        "a system column of blanks",
        {"system": "  ", "prompt": QUESTION, "chosen": GOOD, "rejected": BAD},
        pairs=[ONE],
    ),
    layout(
        "prompt as one message",
        "prompt is a dictionary",
        {"prompt": user(), "chosen": assistant(), "rejected": assistant(BAD)},
        pairs=[ONE],
    ),
    layout(
        "prompt as OpenAI's request",
        "prompt is a dictionary with messages",
        {"prompt": {"messages": [system(), user()]}, "chosen": GOOD, "rejected": BAD},
        pairs=either([TOLD], Refused()),
    ),
    layout(
        "answers that are numbers",
        "answers were read as numbers",
        {"prompt": QUESTION, "chosen": 213, "rejected": 12},
        pairs=either([([user()], "213", "12")], Refused()),
        prompts=ASKED,
    ),
    layout(
        "answers that look like JSON",
        "answers in JSON are text",
        {"prompt": QUESTION, "chosen": '{"steps": 213}', "rejected": "[1, 2]"},
        pairs=[([user()], '{"steps": 213}', "[1, 2]")],
    ),
    layout(
        "answers that are lists in JSON",
        "answers are JSON lists of strings",
        {"prompt": QUESTION, "chosen": '["213"]', "rejected": '["12"]'},
        pairs=[([user()], '["213"]', '["12"]')],
    ),
    layout(
        "answers in JSON that look like turns",
        "a question asks for a chat as JSON: the answers have roles and contents",
        {
            "prompt": [user("Write a chat as JSON.")],
            "chosen": [assistant('[{"role": "user", "content": "Hi"}]')],
            "rejected": [assistant("No.")],
        },
        pairs=[([user("Write a chat as JSON.")], '[{"role": "user", "content": "Hi"}]', "No.")],
    ),
    layout(
        "an answer with a human in it",
        "a story whose text has an empty line and a speaker",
        {
            "prompt": [user("Write a play.")],
            "chosen": [assistant("Ada: Up.\n\nHuman: Down.\n\nAssistant: Enough.")],
            "rejected": [assistant("No.")],
        },
        pairs=either([([user("Write a play.")], "Ada: Up.\n\nHuman: Down.\n\nAssistant: Enough.", "No.")], Refused()),
    ),
    layout(
        "words and blanks of other scripts",
        "text that is not ASCII",
        {
            "prompt": "Wie viele Stufen? \U0001f5fc\u202e\u0000x".replace("\u0000", ""),
            "chosen": "二百十二。\u00a0",
            "rejected": "\ufeffمتعدد",
        },
        pairs=[([user("Wie viele Stufen? \U0001f5fc\u202ex")], "二百十二。\u00a0", "\ufeffمتعدد")],
    ),
    layout(
        "a lone surrogate",
        "text that JSON can spell and Unicode cannot",
        {"prompt": QUESTION, "chosen": "\ud83d", "rejected": BAD},
        pairs=Refused("Unicode"),
        prompts=ASKED,
    ),
    layout(
        "deep nesting",
        "metadata that is nested deeply",
        pair(meta={"a": [{"b": {"c": [[[[{"d": None}]]]]}}]}),
        pairs=[ONE],
    ),
    layout(
        "empty lists",
        "columns of empty lists",
        pair(history=[], images=[], tools=None, system=None, context="", documents=[]),
        pairs=[ONE],
    ),
    layout(
        "dates",
        "answers that are dates",
        {"prompt": QUESTION, "chosen": "2024-02-29", "rejected": "2024-02-28T10:00:00"},
        pairs=[([user()], "2024-02-29", "2024-02-28T10:00:00")],
        container="csv",
    ),
    layout(
        "words that pandas takes for missing",
        "answers are None, NA and null",
        {"prompt": QUESTION, "chosen": "None", "rejected": "NA"},
        {"prompt": NEXT, "chosen": "null", "rejected": "nan"},
        pairs=[([user()], "None", "NA"), ([user(NEXT)], "null", "nan")],
        container="csv",
    ),
    layout("duplicates", "the same pair twice", pair(), pair(), pairs=[ONE, ONE]),
    layout(
        "extra turns of a log",
        "messages of an application with time stamps",
        {
            "messages": [{**user(), "timestamp": 1, "id": "a"}, {**assistant(), "timestamp": 2, "id": "b"}],
            "rejected_response": BAD,
        },
        pairs=either([ONE], Refused()),
        prompts=either(ASKED, Refused()),
    ),
    layout(
        "an unknown role",
        "a turn of a moderator",
        {
            "prompt": [{"role": "moderator", "content": "Be kind."}, user()],
            "chosen": [assistant()],
            "rejected": [assistant(BAD)],
        },
        pairs=Refused("role"),
        prompts=Refused("role"),
    ),
    layout(
        "system in the middle",
        "a system turn between others",
        {
            "prompt": [user(), assistant(), system(), user(NEXT)],
            "chosen": [assistant(GOOD_NEXT)],
            "rejected": [assistant(BAD_NEXT)],
        },
        pairs=either(Refused(), [([user(), assistant(), system(), user(NEXT)], GOOD_NEXT, BAD_NEXT)]),
        prompts=either(Refused(), [[user(), assistant(), system(), user(NEXT)]]),
    ),
    layout(
        "two users in a row",
        "two questions, one answer",
        {"prompt": [user(), user(NEXT)], "chosen": [assistant()], "rejected": [assistant(BAD)]},
        pairs=either([([user(), user(NEXT)], GOOD, BAD)], Refused()),
        prompts=either([[user(), user(NEXT)]], Refused()),
    ),
    layout(
        "content of null",
        "a turn without content",
        {
            "prompt": [user(), {"role": "assistant", "content": None}, user(NEXT)],
            "chosen": [assistant()],
            "rejected": [assistant(BAD)],
        },
        pairs=Refused(),
        prompts=Refused(),
    ),
    layout(
        "refusal beside content",
        "OpenAI: an answer that is a refusal",
        {
            "prompt": [user()],
            "chosen": [assistant()],
            "rejected": [{"role": "assistant", "content": None, "refusal": "I cannot say."}],
        },
        pairs=either([([user()], GOOD, "I cannot say.")], Refused()),
        prompts=ASKED,
    ),
    layout(
        "columns are given",
        "data.columns for names that nothing knows",
        {"q": QUESTION, "sys": SYSTEM, "good": GOOD, "bad": BAD},
        pairs=[TOLD],
        columns={"prompt": "q", "system": "sys", "chosen": "good", "rejected": "bad"},
    ),
    layout(
        "columns are given, with dots",
        "data.columns as paths",
        {"in": {"q": QUESTION, "sys": SYSTEM}, "out": [{"text": GOOD}, {"text": BAD}]},
        pairs=[TOLD],
        columns={"prompt": "in.q", "system": "in.sys", "chosen": "out.0.text", "rejected": "out.1.text"},
    ),
    layout(
        "columns are given, a verdict",
        "data.columns for a verdict of one's own",
        {"q": QUESTION, "x": BAD, "y": GOOD, "best": 1},
        pairs=[ONE],
        columns={"prompt": "q", "answers": ["x", "y"], "verdict": "best", "means": "index"},
    ),
    layout(
        "columns are given, one is missing",
        "data.columns names a column that no row has",
        pair(),
        pairs=Refused("good"),
        prompts=either(Refused(), ASKED),
        columns={"chosen": "good"},
    ),
    layout(
        "columns are given, a system is not used",
        "data.columns sets system to null",
        pair(system=SYSTEM),
        pairs=[ONE],
        columns={"system": None},
    ),
    layout(
        "a column that has a dot",
        "a name with a dot wins over the path",
        {"data.prompt": QUESTION, "chosen": GOOD, "rejected": BAD},
        pairs=[ONE],
        columns={"prompt": "data.prompt"},
    ),
    layout(
        "system from a late row on",
        "system only where it is needed",
        *[pair(system=None)] * 3,
        {**pair(system=SYSTEM)},
        pairs=[ONE, ONE, ONE, TOLD],
    ),
    layout(
        "prompts in two names",
        "two files joined: question in one, prompt in the other",
        {"prompt": QUESTION, "question": None, "chosen": GOOD, "rejected": BAD},
        {"prompt": None, "question": NEXT, "chosen": GOOD_NEXT, "rejected": BAD_NEXT},
        pairs=either(
            [ONE], [ONE, ([user(NEXT)], GOOD_NEXT, BAD_NEXT)], [([user(NEXT)], GOOD_NEXT, BAD_NEXT)], Refused()
        ),
        prompts=either(ASKED, [[user()], [user(NEXT)]], Refused()),
    ),
    layout(
        "two layouts in one file",
        "rows of text, then rows of verdicts",
        pair(),
        {"prompt": NEXT, "response_a": BAD_NEXT, "response_b": GOOD_NEXT, "winner": "b"},
        pairs=either([ONE], Refused()),
        prompts=either([[user()], [user(NEXT)]], Refused()),
    ),
    layout(
        "text and turns in one column",
        "some prompts are text, some are turns",
        pair(),
        {"prompt": LATER, "chosen": [assistant(GOOD_NEXT)], "rejected": [assistant(BAD_NEXT)]},
        pairs=[ONE, (LATER, GOOD_NEXT, BAD_NEXT)],
    ),
    layout(
        "input beside messages",
        "OpenAI's input is messages, not a text to add",
        {"instruction": QUESTION, "input": [user(NEXT)], "chosen": GOOD, "rejected": BAD},
        pairs=Refused(),
        prompts=Refused(),
    ),
    layout(
        "input is null in some rows",
        "alpaca rows with and without an input",
        {"instruction": QUESTION, "input": None, "chosen": GOOD, "rejected": BAD},
        {"instruction": NEXT, "input": ASIDE, "chosen": GOOD_NEXT, "rejected": BAD_NEXT},
        pairs=[ONE, ([user(f"{NEXT}\n{ASIDE}")], GOOD_NEXT, BAD_NEXT)],
    ),
    layout(
        "label as a class",
        "a pair with a label of something else",
        pair(label="helpful", score=0.5, rank=1),
        pairs=[ONE],
    ),
    layout(
        "winner beside a pair",
        "a pair with the name of the better model",
        pair(winner="model_a", model_a="m", model_b="n"),
        pairs=[ONE],
    ),
    layout("response beside a pair", "Dahoas: response repeats chosen", pair(response=GOOD), pairs=[ONE]),
    layout(
        "response beside a pair, another one",
        "a reference answer in `response`",
        pair(response="213."),
        pairs=either([ONE], Refused()),
    ),
    layout(
        "input is a number",
        "an instruction whose input is no text",
        {"instruction": "Double it.", "input": 12, "chosen": "24", "rejected": "12"},
        pairs=either([([user("Double it.\n12")], "24", "12")], Refused()),
    ),
    layout(
        "input is an object",
        "an instruction whose input is no text",
        {"instruction": QUESTION, "input": {"light": "Brann"}, "chosen": GOOD, "rejected": BAD},
        pairs=Refused(),
        prompts=Refused(),
    ),
    layout(
        "an empty prompt column",
        "conversations whose prompt column is empty, as a table writes null",
        {"prompt": "", "chosen": [user(), assistant()], "rejected": [user(), assistant(BAD)]},
        pairs=[ONE],
        prompts=either(ASKED, Refused()),
    ),
    layout(
        "scores of NaN",
        "a score that could not be computed",
        {"prompt": QUESTION, "responses": [BAD, GOOD], "scores": [float("nan"), 1.0]},
        {"prompt": QUESTION, "responses": [BAD, GOOD], "scores": [0.0, 1.0]},
        pairs=[ONE],
    ),
    layout(
        "empty lists as text",
        "LLaMA-Factory's columns after a table of text",
        pair(history="[]", tools="[]", images="[]"),
        pairs=[ONE],
    ),
    layout(
        "a document as context",
        "an object with a title and a text is no turn",
        pair(context={"title": "Stairs", "text": ASIDE}),
        pairs=Refused(),
        prompts=Refused(),
    ),
    layout(
        "scores that contradict the winner",
        "two ways to tell which answer is better differ",
        {"prompt": QUESTION, "response_a": GOOD, "response_b": BAD, "winner": "a", "score_a": 1, "score_b": 9},
        pairs=Refused("score_a"),
        prompts=either(ASKED, Refused()),
    ),
    layout(
        "an instruction beside a question",
        "two columns that are both asked",
        {"instruction": "Answer in one word.", "question": QUESTION, "chosen": GOOD, "rejected": BAD},
        pairs=Refused(),
        prompts=Refused(),
    ),
    layout(
        "columns are given, conversations",
        "data.columns for whole conversations: prompts are what is in front of the last answer",
        {"good": [system(), *LATER, assistant(GOOD_NEXT)], "bad": [system(), *LATER, assistant(BAD_NEXT)]},
        pairs=[TOLD_TWO],
        columns={"chosen": "good", "rejected": "bad"},
    ),
    layout(
        "columns are given, a context",
        "data.columns says that a context goes on behind the question",
        {"context": ASIDE, "question": QUESTION, "chosen": GOOD, "rejected": BAD},
        pairs=[([user(f"{QUESTION}\n{ASIDE}")], GOOD, BAD)],
        columns={"input": "context"},
    ),
    layout(
        "columns are given, one is ignored",
        "data.columns says that a column does not matter",
        {"prompt": QUESTION, "question": NEXT, "chosen": GOOD, "rejected": BAD},
        pairs=[ONE],
        columns={"ignore": ["question"]},
    ),
    layout(
        "columns are given, a system within template arguments",
        "data.columns says where the system prompt is",
        pair(chat_template_kwargs={"custom_instructions": SYSTEM}),
        pairs=[TOLD],
        columns={"system": "chat_template_kwargs.custom_instructions"},
    ),
)
