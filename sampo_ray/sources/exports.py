"""Rows as tools and services write them, as rows with a prompt and answers that can be compared.

Label Studio's tasks, Open WebUI's feedback, Argilla's records, preference data of Vertex AI and of Amazon Nova,
Prodigy's choices, battles of Chatbot Arena with one list of texts a side, and OpenAI's comparisons of summaries.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sampo_ray.config.columns import Columns
from sampo_ray.sources.spelled import spelled
from sampo_ray.sources.verdicts import key_of, marks_of

Values = Mapping[str, Any]


def _first(rows: Sequence[Values], name: str, kind: type) -> Any:
    """The first value of a column that is of a type and not empty."""
    return next((row[name] for row in rows if isinstance(row.get(name), kind) and row[name]), None)


def _dict(value: object) -> dict[str, Any]:
    value = spelled(value)
    return value if isinstance(value, dict) else {}


def _dicts(value: object) -> list[dict[str, Any]]:
    value = spelled(value)
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []


# Label Studio: a task with `data` that annotators saw, and what each of them said of it.


def label_studio_columns(rows: Sequence[Values]) -> Columns | None:
    if not any(_dict(row.get("data")) and isinstance(spelled(row.get("annotations")), list) for row in rows):
        return None
    if any("selected" in each for row in rows for each in of_label_studio(row)):
        return Columns(form="label_studio", answers="compared", verdict="selected", means="name")
    return Columns(form="label_studio")


def of_label_studio(values: Values) -> Iterator[dict[str, object]]:
    """The data of a task with what was selected: left or right in a pairwise control, the choices in others."""
    data = _dict(values.get("data"))
    said: dict[str, list[object]] = {}
    names: list[str] = []
    for annotation in _dicts(values.get("annotations")):
        for result in _dicts(annotation.get("result")) if not annotation.get("was_cancelled") else ():
            value = _dict(result.get("value"))
            if result.get("type") == "pairwise":
                names = [name.strip() for name in str(result.get("to_name")).split(",")]
                said.setdefault("selected", []).append(value.get("selected"))
            elif isinstance(value.get("choices"), list):
                said.setdefault(str(result.get("from_name")), []).extend(value["choices"])
    compared = {"compared": _compared(data, names)} if names else {}
    yield {"id": values.get("id"), **data, **said, **compared}


def _compared(data: Values, names: list[str]) -> list[object]:
    """The texts of the controls that were compared: columns of their name, or that end as they do (text1, answer1)."""
    if all(name in data for name in names):
        return [data[name] for name in names]
    marks = marks_of(names)
    ends = [[column for column in data if key_of(column).rpartition("_")[2] == mark] for mark in marks]
    return [data[found[0]] for found in ends] if all(len(found) == 1 for found in ends) else []


# Open WebUI: a rating of one message, and the chat as a tree.

_BLOCKS = {"reasoning": "reasoning_content", "tool_calls": "tool_calls"}
_BLOCK = re.compile(r'<details type="(\w+)"')


def open_webui_columns(rows: Sequence[Values]) -> Columns | None:
    if any(_chat_of(row) for row in rows):
        return every_column(form="open_webui", prompt="prompt", answers="answers", score="score")
    return None


def of_open_webui(values: Values) -> Iterator[dict[str, object]]:
    """The turns before the rated message, with it and its siblings; an answer without a rating counts as 0."""
    chat = _chat_of(values) or {}
    messages = _dict(_dict(chat.get("history")).get("messages"))
    rating = _dict(values.get("data")).get("rating")
    rated = _dict(messages.get(str(_dict(values.get("meta")).get("message_id"))))
    path: list[dict[str, Any]] = []
    seen: set[int] = set()
    above = _dict(messages.get(str(rated.get("parentId"))))
    while above and id(above) not in seen:
        seen.add(id(above))
        path.insert(0, above)
        above = _dict(messages.get(str(above.get("parentId"))))
    names = path[-1].get("childrenIds") if path else None
    siblings = [_dict(messages.get(str(name))) for name in names] if isinstance(names, list) else []
    others = [each for each in siblings if each is not rated and each.get("role") == "assistant"]
    system = _dict(chat.get("params")).get("system") or chat.get("system")
    prompt = [{"role": "system", "content": system}] * bool(system) + [_message(each) for each in path]
    scores = [rating, *(_dict(each.get("annotation")).get("rating") or 0 for each in others)]
    kept = {name: values.get(name) for name in ("id", "user_id")}
    yield kept | {"prompt": prompt, "answers": [_message(each) for each in (rated, *others)], "score": scores}


def _chat_of(values: Values) -> dict[str, Any] | None:
    found: object = values.get("snapshot")
    for name in ("chat", "chat"):
        found = found.get(name) if isinstance(found, dict) else None
    return found if isinstance(found, dict) and isinstance(found.get("history"), dict) else None


def _message(node: Values) -> dict[str, object]:
    """A message of a chat; blocks of reasoning and tool calls in its text are said in fields of their own, too."""
    message = {name: node[name] for name in ("role", "content", "files") if node.get(name) is not None}
    blocks = _BLOCK.findall(str(node.get("content")))
    return message | {_BLOCKS[kind]: kind for kind in blocks if kind in _BLOCKS}


# Vertex AI and Amazon Nova: conversations whose turns are lists of parts.


def vertex_columns(rows: Sequence[Values]) -> Columns | None:
    completions = _dicts(_first(rows, "completions", list))
    if _first(rows, "contents", list) is None or not any("completion" in each for each in completions):
        return None
    return every_column(form="vertex", system="system", prompt="prompt", answers="answers", score="score")


def _conversations(form: str) -> Columns:
    return every_column(form=form, system="system", prompt="prompt", answers="answers", score="score")


def of_vertex(values: Values) -> Iterator[dict[str, object]]:
    """Preference data for Gemini: `contents` of parts, two `completions` with a score."""
    others = {n: v for n, v in values.items() if key_of(n) not in ("system_instruction", "contents", "completions")}
    system = next((v for n, v in values.items() if key_of(n) == "system_instruction" and v), None)
    completions = _dicts(values.get("completions"))
    yield _with_tools(others) | {
        "system": _parts(system.get("parts")) if isinstance(system, dict) else system,
        "prompt": [_turn(each, "parts") for each in _dicts(values.get("contents"))],
        "answers": [_turn(each.get("completion"), "parts") for each in completions],
        "score": [each.get("score") for each in completions],
    }


def nova_columns(rows: Sequence[Values]) -> Columns | None:
    if any("candidates" in turns[-1] for row in rows if (turns := _dicts(row.get("messages")))):
        return every_column(form="nova", system="system", prompt="prompt", answers="answers", score="score")
    return None


def of_nova(values: Values) -> Iterator[dict[str, object]]:
    """Preference data for Amazon Nova: the last message has two candidates with a label."""
    turns = _dicts(values.get("messages"))
    candidates = _dicts(turns[-1].get("candidates")) if turns else []
    system = values.get("system")
    yield _with_tools({name: value for name, value in values.items() if name != "messages"}) | {
        "system": _parts(system) if isinstance(system, list) else system,
        "prompt": [_turn(each, "content") for each in turns[:-1]],
        "answers": [_turn({"role": "assistant", **each}, "content") for each in candidates],
        "score": [{"preferred": 1, "non-preferred": 0}.get(str(each.get("preferenceLabel"))) for each in candidates],
    }


def _with_tools(others: Values) -> dict[str, object]:
    """Columns with those that declare tools under the name that is looked for: they are not read, and not lost."""
    return {"tools" if key_of(name) in ("tools", "tool_config") else name: value for name, value in others.items()}


def _turn(message: Any, parts: str) -> object:
    """A message of parts as one of text parts; a role of its own for the model is the assistant's."""
    if not isinstance(message, dict):
        return message
    role = "assistant" if message.get("role") == "model" else message.get("role")
    return {"role": role, "content": _parts(message.get(parts))}


def _kind(part: Values) -> str:
    return "text" if part.keys() == {"text"} else next((name for name in part if name != "text"), "empty")


def _parts(parts: object) -> object:
    """The one text of parts; parts with their kinds where some are no text."""
    kinds = [(_kind(part), part) for part in _dicts(parts)]
    if not isinstance(parts, list) or len(kinds) != len(parts):
        return parts
    if all(kind == "text" for kind, _ in kinds):
        return "".join(part["text"] for _, part in kinds) if all(isinstance(p["text"], str) for _, p in kinds) else None
    return [{"type": kind, **part} for kind, part in kinds]


# Argilla: fields, and for each question what its annotators answered.


def argilla_columns(rows: Sequence[Values]) -> Columns | None:
    for question in _questions_of(rows):
        said = [value for row in rows for value in _submitted(row, question)]
        named = (_alike(rows, value) for value in dict.fromkeys(each for each in said if isinstance(each, str)))
        compared = next((tuple(found) for found in named if found), ())
        if len(compared) > 1:
            return Columns(form="argilla", answers=compared, verdict=question, means="name")
        ranked = tuple(sorted({name for value in said for name, _ in _ranks(value)}))
        if len(ranked) > 1:
            return Columns(form="argilla", answers=ranked, rank=tuple(f"{question}.{name}" for name in ranked))
    return None


def of_argilla(values: Values, columns: Columns) -> Iterator[dict[str, object]]:
    """A record with what was submitted under the name of its question, or ranks under that and the answers' names."""
    if isinstance(columns.verdict, str):
        yield {**values, columns.verdict: _submitted(values, columns.verdict)}
        return
    ranks: dict[str, object] = {}
    for path in columns.rank or ():
        question, _, answer = path.rpartition(".")
        ranks[path] = [rank for said in _submitted(values, question) for name, rank in _ranks(said) if name == answer]
    yield {**values, **ranks}


def _questions_of(rows: Sequence[Values]) -> list[str]:
    names = dict.fromkeys(name for row in rows for name in row)
    found = [name.removesuffix(".responses") for name in names if f"{name}.status" in names or f"{name}.users" in names]
    return found + [name for name in names if any("status" in each for row in rows for each in _dicts(row.get(name)))]


def _submitted(values: Values, question: str) -> list[object]:
    """What annotators answered and submitted."""
    said = spelled(values.get(f"{question}.responses"))
    if said is None:  # of version 1
        return [each.get("value") for each in _dicts(values.get(question)) if each.get("status") == "submitted"]
    states = spelled(values.get(f"{question}.responses.status"))
    if not isinstance(said, list) or not isinstance(states, list | None):
        return []
    states = states or ["submitted"] * len(said)
    return [value for value, state in zip(said, states, strict=False) if state == "submitted"]


def _ranks(said: object) -> list[tuple[str, object]]:
    """The answers of one ranking with their ranks, whether it is a list of both or two lists."""
    if isinstance(said, dict) and all(isinstance(said.get(name), list) for name in ("value", "rank")):
        return [(str(name), rank) for name, rank in zip(said["value"], said["rank"], strict=False)]
    return [(str(each.get("value")), each.get("rank")) for each in _dicts(said)]


def _alike(rows: Sequence[Values], name: str) -> list[str]:
    """The columns whose names differ from one in their last word alone: response-1 and response-2."""
    names = dict.fromkeys(column for row in rows for column in row)
    stem, _, _ = key_of(name).rpartition("_")
    return [each for each in names if stem and key_of(each).rpartition("_")[0] == stem] if name in names else []


# Prodigy: options of a choice, and those that were accepted.


def prodigy_columns(rows: Sequence[Values]) -> Columns | None:
    if not any(_dicts(row.get("options")) and isinstance(spelled(row.get("accept")), list) for row in rows):
        return None
    return Columns(form="prodigy", prompt="text", answers="options", text="text", verdict="accept", means="name")


def of_prodigy(values: Values) -> Iterator[dict[str, object]]:
    """A task; one that was rejected or ignored has nothing accepted."""
    yield dict(values) if values.get("answer", "accept") == "accept" else {**values, "accept": []}


# Chatbot Arena's battles with the users' turns in one list, and the answers of each side in another.


def battles_columns(rows: Sequence[Values]) -> Columns | None:
    names = ("prompt", "response_a", "response_b")
    if any(all(_texts(row.get(name)) for name in names) for row in rows):
        return Columns(form="battles", prompt="prompt", chosen=None, rejected=None, answers=names[1:])
    return None


def of_battle(values: Values) -> Iterator[dict[str, object]]:
    """A battle with its first question, and each side's conversation after it."""
    asked = _texts(values.get("prompt"))
    sides = {name: _texts(values.get(name)) for name in ("response_a", "response_b")}
    if any(len(said) != len(asked) for said in sides.values()):
        yield dict(values)
        return
    turns = {}
    for name, said in sides.items():
        both = zip(asked, said, strict=True)
        whole = [
            {"role": role, "content": text}
            for pair in both
            for role, text in zip(("user", "assistant"), pair, strict=True)
        ]
        turns[name] = whole[1:]
    yield {**values, "prompt": asked[:1] and [{"role": "user", "content": asked[0]}], **turns}


def _texts(value: object) -> list[Any]:
    """A list of texts; [] for anything else."""
    value = spelled(value)
    return value if isinstance(value, list) and all(isinstance(each, str | None) for each in value) else []


# OpenAI's comparisons of summaries: a post in several columns, and two summaries.


def summaries_columns(rows: Sequence[Values]) -> Columns | None:
    if not any(_dict(row.get("info")).keys() >= {"post", "title"} for row in rows):
        return None
    if not any(_dicts(row.get("summaries")) and "choice" in row for row in rows):
        return Columns(form="summaries", prompt="prompt")
    known = {"prompt": "prompt", "answers": "summaries", "text": "text", "verdict": "choice", "means": "index"}
    return every_column(form="summaries", **known)


def of_summaries(values: Values) -> Iterator[dict[str, object]]:
    """A row whose prompt is the post, or the article, as models were asked to summarize it."""
    info = _dict(values.get("info"))
    subreddit = f"r/{info['subreddit']}" if info.get("subreddit") else None
    parts = {
        "SUBREDDIT": subreddit,
        "TITLE": info.get("title"),
        "POST": info.get("post"),
        "ARTICLE": info.get("article"),
    }
    text = "".join(f"{name}: {part}\n\n" for name, part in parts.items() if part)
    yield {**values, "prompt": f"{text}TL;DR:" if info.get("post") or info.get("article") else None}


def every_column(**known: Any) -> Columns:
    """Columns of which nothing is left to be found."""
    return Columns(**(dict.fromkeys(Columns.model_fields) | known))
