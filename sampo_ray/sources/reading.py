"""How a source's rows are read: chosen once from probed rows, completed by what users give, and said."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

from sampo_ray.config.columns import Columns
from sampo_ray.errors import DataError, suggestion
from sampo_ray.sources import layouts
from sampo_ray.sources.answers import NEIGHBOURS, paths_of, pick
from sampo_ray.sources.conversations import filled
from sampo_ray.sources.paths import at, has
from sampo_ray.sources.records import Record
from sampo_ray.sources.table import Table, is_conversation, is_list_of_messages, turns_or_none
from sampo_ray.sources.unfolding import form_of, unfolded
from sampo_ray.sources.unusable import Unusable
from sampo_ray.sources.verdicts import key_of
from sampo_ray.sources.ways import FIELDS, Undecided, Way, differ, named, pairs_in, ways_of

Kind = Literal["pairs", "prompts"]
Fields = dict[str, Any]

ASKED = ("system", "history", "prompt", "input", "tools")

WORDS = 3
"""Words that a text has at least if answers that begin with it repeat the prompt."""


class NotFound(DataError):
    """Rows of which it is not known how to read them. `missing`: the fields of data.columns that were not found."""

    def __init__(self, message: str, *missing: str) -> None:
        super().__init__(message)
        self.missing = missing


class Ambiguous(DataError):
    """Rows that can be read in two ways, which give different pairs."""


def choose(records: Sequence[Record], kind: Kind, given: Columns) -> Columns:
    """How records like these are read; all fields of the result are set. What is `given` wins, the rest is found.

    Raises NotFound where the answers, the prompt or a path that is given are not found, and Ambiguous where two ways to
    read them differ.
    """
    if given.complete:
        return given
    formed = _formed(records, kind, given)
    rows = [record.values for record in (unfolded(records, formed) if formed.form else records)]
    _check_paths(rows, given)
    if formed.complete:
        return formed
    found = _found(rows, kind, formed)
    known = {name: getattr(formed, name) for name in formed.model_fields_set}
    return Columns(**(dict.fromkeys(Columns.model_fields) | found | known | {"ignore": _ignored(rows, formed)}))


def said(columns: Columns) -> str:
    """What a user is told of how the rows are read."""
    parts = []
    for field in (*ASKED, *FIELDS):
        value = getattr(columns, field)
        if value is not None and field != "means":
            how = f" ({columns.means})" if field == "verdict" and columns.means else ""
            named = f"{', '.join(paths_of(value))} -> {field}"
            parts.append(field if field in ("chosen", "rejected") and value == field else f"{named}{how}")
    if columns.form:
        parts.append(f"form {columns.form}")
    if columns.beginning == "prompt":
        parts.append("answers without the prompt that they repeat")
    if columns.beginning == "shared":
        parts.append("what chosen and rejected begin with -> prompt")
    if columns.ignore:
        parts.append(f"without {', '.join(columns.ignore)}")
    return f"read as: {', '.join(parts)}"


def _formed(records: Sequence[Record], kind: Kind, given: Columns) -> Columns:
    """What is given, with the form of the records, where they have one and cannot be read as they are."""
    if "form" in given.model_fields_set:
        return given
    rows = [record.values for record in records]
    form = form_of(records)
    alone = form is not None and form.form == NEIGHBOURS
    if form is None or (alone and (_direct(rows, kind, given) or _labelled(rows, kind, form))):
        return given
    known = {name: getattr(form, name) for name in form.model_fields_set}
    return Columns(**(known | {name: getattr(given, name) for name in given.model_fields_set}))


def _labelled(rows: Sequence[Any], kind: Kind, form: Columns) -> bool:
    """Whether prompts are asked for and each row's answer is only said to be good or bad: such rows stand alone."""
    scores = [at(row, form.score) for row in rows] if isinstance(form.score, str) else []
    return kind == "prompts" and any(isinstance(score, bool) for score in scores)


def _direct(rows: Sequence[Any], kind: Kind, given: Columns) -> bool:
    return kind == "pairs" and bool(_ways(Table(rows), given))


def _ways(table: Table, given: Columns) -> list[Way]:
    return ways_of(table, given)[0]


def _found(rows: Sequence[Any], kind: Kind, given: Columns) -> Fields:
    """The fields that the rows show, beside those that are given: of the rows' own columns, else of an object's."""
    whole = Table(rows)
    tables = [whole, *(Table(rows, path) for path in whole.objects())]
    find = _found_pairs if kind == "pairs" else _found_prompts
    return find(tables, given)


def _found_pairs(tables: Sequence[Table], given: Columns) -> Fields:
    whole = tables[0]
    for table in tables:
        ways, undecided = ways_of(table, given)
        if ways:
            return _asked(table, whole, "pairs", given, _only(ways, whole.rows, given))
        if undecided:
            raise _undecided(next((each for each in undecided if str(each)), undecided[-1]))
    if {"chosen", "rejected"} <= whole.names.keys():  # empty in all of these rows
        return _asked(whole, whole, "pairs", given, {"chosen": "chosen", "rejected": "rejected"})
    raise NotFound("no columns are known to hold answers; name them in data.columns", "chosen", "rejected")


def _found_prompts(tables: Sequence[Table], given: Columns) -> Fields:
    for table in tables:
        ways, undecided = ways_of(table, given)
        way = ways[0] if ways else {"answers": undecided[0].answers} if undecided else {}
        found = _asked(table, tables[0], "prompts", given, way)
        if given.prompt or found.get("prompt"):
            return found
    raise NotFound("no column is known to hold prompts; name it in data.columns", "prompt")


def _undecided(undecided: Undecided) -> NotFound:
    answers = ", ".join(paths_of(undecided.answers))
    unsaid = (
        f"the rows have the answers {answers}, and nothing known that says which is better; "
        "name it in data.columns, as verdict, score or rank"
    )
    return NotFound(str(undecided) or unsaid, "verdict")


def _only(ways: list[Way], rows: Sequence[Any], given: Columns) -> Way:
    """The way that reads most rows. Ambiguous if another one reads them otherwise."""
    prompt = given.prompt or next(Table(rows).find(layouts.PROMPTS), None)
    read = [pairs_in(way, rows, prompt) for way in ways]
    best = max(range(len(ways)), key=lambda n: (len(read[n]), -n)) if not read[0] else 0
    for number, other in enumerate(ways):
        if number != best and differ(read[best], read[number]):
            first, second = named(ways[best]), named(other)
            raise Ambiguous(
                f"the answers are in {first}, and others in {second}; say which ones are meant, as in "
                f"{_as_columns(ways[best])} or {_as_columns(other)}"
            )
    return ways[best]


def _as_columns(way: Way) -> str:
    shown = ", ".join(
        f"{name}: {value if isinstance(value, str) else '[' + ', '.join(value) + ']'}" for name, value in way.items()
    )
    return f"'data.columns={{{shown}}}'"


def _asked(table: Table, whole: Table, kind: Kind, given: Columns, way: Way) -> Fields:
    """The fields that say what is asked, with those of the answers in `way`."""
    used = [path for field in FIELDS for path in paths_of(way.get(field))]
    fixed = {name: getattr(given, name) for name in given.model_fields_set}
    talk = bool(way) and _are_conversations(way, table)
    found: Fields = dict(way) if kind == "pairs" else {}
    there = (table, whole) if table is not whole else (whole,)
    if "prompt" not in fixed:
        found["prompt"] = _prompt(there, used, talk)
    prompt = fixed.get("prompt", found.get("prompt"))
    whole_talk = talk or (prompt is None and _are_unreadable(way, table))
    if prompt is None and kind == "prompts" and whole_talk:
        found["prompt"] = prompt = _first_answer(way)
    elif kind == "prompts" and talk:
        found["chosen"] = _first_answer(way)
    near = _near(prompt, used, there)
    for field, names in (("system", layouts.SYSTEMS), ("tools", layouts.TOOLS)):
        found[field] = next((path for each in near if (path := each.first(names, [*used, prompt]))), None)
    found["history"], found["input"] = _around(near, prompt, used)
    if kind == "pairs":
        found["beginning"] = _beginning(table, Columns(**(found | fixed)))
        if prompt is None and not whole_talk and found["beginning"] is None:
            raise NotFound("no column is known to hold prompts; name it in data.columns", "prompt")
    return found


def _first_answer(way: Way) -> str:
    return str(way.get("chosen") or paths_of(way["answers"])[0])


def _near(prompt: str | None, used: Sequence[str], there: Sequence[Table]) -> list[Table]:
    """The columns beside the prompt and the answers: those of the row, and of an object that one of them is in."""
    objects = {path.rpartition(".")[0] for path in (prompt, *used) if path and "." in path}
    outer = there[-1]
    inside = [Table(outer.rows, path) for path in outer.objects() if path in objects]
    return [*inside, *there]


def _are_conversations(way: Way, table: Table) -> bool:
    """Whether most answers hold what was asked, too."""
    seen = table.values(_first_answer(way))[:100]
    return sum(map(is_conversation, seen)) * 2 > len(seen)


def _are_unreadable(way: Way, table: Table) -> bool:
    """Whether answers are messages that cannot be read. Their rows are dropped for what is in them."""
    seen = table.values(_first_answer(way))[:100] if way else []
    return bool(seen) and all(is_list_of_messages(value) and not turns_or_none(value) for value in seen)


def _prompt(there: Sequence[Table], used: Sequence[str], talk: bool) -> str | None:
    """The first known column with prompts that at least half as many rows have as any other."""
    names = [*layouts.PROMPTS] if talk else [*layouts.PROMPTS, *layouts.CONVERSATIONS, *layouts.HISTORIES]
    for table in there:
        taken = set(used) | {path.split(".")[0] for path in used if not table.under}
        paths = [path for path in table.find(names) if path not in taken]
        full = {path: len(table.values(path)) for path in paths}
        often = [path for path in paths if full[path] * 2 >= max(full.values())]
        for path in often:
            first = layouts.CONVERSATIONS if path.rpartition(".")[2] in ("input", "inputs") else ()
            if found := table.text_path(path, first):
                return found
    return there[-1].first(["prompt"], used)


def _around(near: Sequence[Table], prompt: str | None, used: Sequence[str]) -> tuple[str | None, str | None]:
    """Columns with earlier turns, and with text that the prompt goes on with."""
    history = extra = None
    goes_on = prompt is not None and prompt.rpartition(".")[2].lower() in layouts.INSTRUCTIONS_WITH_INPUT
    for table in near:
        turns = (each for each in table.find(layouts.HISTORIES) if each not in (prompt, *used))
        history = history or next((each for each in turns if _are_turns(table.values(each))), None)
        if history is None:
            empty = table.first([n for n in layouts.HISTORIES if n != "context"], [prompt, *used])
            history = empty if empty and not table.values(empty) else None
        if goes_on and extra is None:
            path = table.first(["input", "context"], [prompt, history, *used])
            objects = path is not None and any(isinstance(value, list | dict) for value in table.values(path))
            extra = path if path is not None and (key_of(path) == "input" or not objects) else None
    return history, extra


def _are_turns(values: Sequence[object]) -> bool:
    """Whether values are turns, and not just texts or objects."""
    return any(is_list_of_messages([value]) or is_list_of_messages(value) for value in values) or all(
        len({turn["role"] for turn in turns_or_none(value, "user")} - {"system"}) > 1 for value in values[:20]
    )


def _beginning(table: Table, columns: Columns) -> Literal["prompt", "shared"] | None:
    """How the answers of all (nearly all) probed rows begin."""
    counts, starts = Counter[str](), set()
    for row in table.rows:
        try:
            chosen, rejected = pick(row, columns)
        except Unusable:
            continue
        if not isinstance(chosen, str) or not isinstance(rejected, str) or is_conversation(chosen):
            continue
        counts["texts"] += 1
        if columns.prompt is None:
            start = shared_beginning(chosen, rejected)
            counts["shared"] += bool(start)
            starts.add(start)
        elif isinstance(prompt := at(row, columns.prompt), str) and filled(prompt):
            counts["prompt"] += begins(chosen, prompt) and begins(rejected, prompt)
            counts["long"] += several_words(prompt)
    if columns.prompt is not None:
        return "prompt" if counts["long"] and counts["prompt"] == counts["texts"] else None
    alike = counts["texts"] and counts["shared"] >= 0.95 * counts["texts"] and len(starts) * 2 > counts["texts"]
    return "shared" if alike else None


def begins(answer: str, prompt: str) -> bool:
    """Whether an answer begins with the prompt's text."""
    return answer.lstrip().startswith(prompt.strip())


def several_words(text: str) -> bool:
    return len(text.split()) >= WORDS or len(text.strip()) >= 6 * WORDS


def shared_beginning(some: str, other: str) -> str:
    """The words that two texts begin with, without the space behind them; "" if these are not several."""
    if some.lstrip()[:1] in ("{", "["):  # JSON of something else
        return ""
    end = next((n for n, (a, b) in enumerate(zip(some, other, strict=False)) if a != b), min(len(some), len(other)))
    while end and not some[end - 1].isspace():
        end -= 1
    start = some[:end].rstrip()
    return start if len(start.split()) >= WORDS else ""


def _ignored(rows: Sequence[Any], given: Columns) -> tuple[str, ...] | None:
    """The columns that are not to be read: those that are given, and those of a field that is given as null."""
    nulls = {name for name in given.model_fields_set if getattr(given, name) is None}
    table = Table(rows)
    names = {"system": layouts.SYSTEMS, "tools": layouts.TOOLS, "history": layouts.HISTORIES, "input": layouts.CONTEXTS}
    found = [path for field in names if field in nulls for path in table.find(names[field])]
    return tuple(dict.fromkeys([*(given.ignore or ()), *found])) or None


def _check_paths(rows: Sequence[Any], given: Columns) -> None:
    """NotFound for a path that no row has."""
    known = list(dict.fromkeys(str(name) for row in rows for name in row))
    for field in (*ASKED, "chosen", "rejected", "answers", "verdict", "ignore"):
        for path in paths_of(getattr(given, field)):
            if rows and not any(has(row, path) for row in rows):
                raise NotFound(f"data.columns.{field}={path!r}: no row has it; {suggestion(path, known)}")
