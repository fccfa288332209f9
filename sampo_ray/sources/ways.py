"""The ways in which a source's rows may have their answers, by the names of columns and what is in them."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from sampo_ray.config.columns import Columns
from sampo_ray.sources import layouts
from sampo_ray.sources.answers import answers_of, paths_of, pick
from sampo_ray.sources.conversations import filled
from sampo_ray.sources.meaning import Unclear, means_of
from sampo_ray.sources.spelled import spelled
from sampo_ray.sources.table import Table, is_message, text_of, turns_or_none
from sampo_ray.sources.unusable import Unusable
from sampo_ray.sources.verdicts import key_of, marks_of, number_of

Way = dict[str, Any]
"""Fields of Columns: those that say where the answers are, and which one is better."""

Pairs = dict[int, tuple[str, str, set[str]]]
"""Chosen, rejected and all answers, as texts, by the row's number."""

FIELDS = ("chosen", "rejected", "answers", "text", "verdict", "means", "score", "rank")
COMPARED = 200
"""Rows in which two ways are compared."""
FEW = 50
"""One row in so many may be judged otherwise: best scores that are equal, slips of judges."""


class Undecided(Exception):
    """Answers without anything that says which one is better; `answers` are their columns."""

    def __init__(self, answers: str | tuple[str, ...], said: str = "") -> None:
        super().__init__(said)
        self.answers = answers


def ways_of(table: Table, given: Columns) -> tuple[list[Way], list[Undecided]]:
    """The ways that `table` and what is `given` allow, the usual ones first; and the answers that lack a verdict."""
    fixed = {name: getattr(given, name) for name in FIELDS if name in given.model_fields_set}
    ways: list[Way] = []
    undecided: list[Undecided] = []
    if fixed.get("answers") is None:
        ways += [way for way in _pairs(table, fixed) if _agrees(way, fixed)]
    if fixed.get("chosen") is None and fixed.get("rejected") is None:
        found_answers: list[str | tuple[str, ...]] = [*_columns_of_answers(table), *_lists(table)]
        for answers in [fixed["answers"]] if fixed.get("answers") else found_answers:
            found = list(_decided(table, answers, fixed, undecided))
            ways += [way for way in found if _agrees(way, fixed)]
    return ways, undecided


def pairs_in(way: Way, rows: Sequence[Mapping[str, object]], prompt: str | None) -> Pairs:
    """What a way reads in rows."""
    columns, found = Columns(**way, prompt=prompt), {}
    for number, row in enumerate(rows[:COMPARED]):
        try:
            chosen, rejected = pick(row, columns)
        except Unusable:
            continue
        if not filled(chosen) or not filled(rejected):
            continue
        every = answers_of(row, columns)[1] if columns.answers else [chosen, rejected]
        found[number] = (text_of(chosen), text_of(rejected), {text_of(each) for each in every if each is not None})
    return found


def differ(some: Pairs, others: Pairs) -> bool:
    """Whether two ways read different pairs, in more than a few rows: other answers, or the same the other way round.
    That one of them takes another of several worse answers is no contradiction."""
    both, different = some.keys() & others.keys(), 0
    for number in both:
        (better, worse, all_of_some), (best, worst, all_of_others) = some[number], others[number]
        different += better != best or (worse != worst and worse not in all_of_others and worst not in all_of_some)
    return different * FEW > len(both)


def named(way: Way) -> str:
    """A way by the names of its columns."""
    paths = [path for field in FIELDS if field != "means" for path in paths_of(way.get(field))]
    return " and ".join(dict.fromkeys(paths))


def _agrees(way: Way, fixed: Way) -> bool:
    return all(value is None or way.get(name) == value for name, value in fixed.items()) and all(
        fixed.get(name, way[name]) == way[name] for name in way
    )


def _pairs(table: Table, fixed: Way) -> Iterator[Way]:
    names = [
        (part.format(better), part.format(worse))
        for better, worse in layouts.BETTER_AND_WORSE
        for part in layouts.PARTS_OF_PAIRS
        if len(part.format(better)) > 1
    ]
    better, worse = fixed.get("chosen"), fixed.get("rejected")
    if better and worse:
        yield {"chosen": better, "rejected": worse}
        return
    seen = set()
    for first, second in [*names, *layouts.PAIRS]:
        chosen, rejected = better or next(table.find([first]), None), worse or next(table.find([second]), None)
        if better and key_of(better.removeprefix(table.under)) != first and worse is None:
            continue
        if worse and key_of(worse.removeprefix(table.under)) != second and better is None:
            continue
        if chosen and rejected and (chosen, rejected) not in seen and not _are_marks(table, chosen):
            seen.add((chosen, rejected))
            sides = table.text_path(chosen), table.text_path(rejected)
            if sides[0] and sides[1]:
                yield {"chosen": sides[0], "rejected": sides[1]}


def _are_marks(table: Table, path: str) -> bool:
    """Whether a column named `chosen` and the like names another column instead of holding an answer."""
    texts = {key_of(value) if isinstance(value, str) else "" for value in table.values(path)}
    marks = {mark for marks in layouts.MARKS for mark in marks}
    return texts <= (table.names.keys() | marks) and "" not in texts


def _columns_of_answers(table: Table) -> Iterator[tuple[str, ...]]:
    for part in layouts.PARTS_OF_ANSWERS:
        for marks in layouts.MARKS:
            found: list[str] = []
            for mark in marks:
                if (path := next(table.find([part.format(mark)]), None)) is None:
                    break
                found.append(path)
            paths = tuple(text for path in found if (text := table.text_path(path)))
            if len(paths) > 1 and len(paths) == len(found):
                yield paths


def _lists(table: Table) -> Iterator[str]:
    """Columns that hold lists of answers; a conversation is none."""
    for path in table.find(layouts.LISTS):
        elements = [each for value in map(spelled, table.values(path)) if isinstance(value, list) for each in value]
        objects = [each for each in elements if isinstance(each, Mapping)]
        if elements and not (objects and all(map(is_message, objects)) and turns_or_none(elements)):
            yield path


def _decided(table: Table, answers: str | tuple[str, ...], fixed: Way, undecided: list[Undecided]) -> Iterator[Way]:
    """The ways to know which of some answers is better."""
    way: Way = {"answers": answers}
    several = isinstance(answers, tuple) and len(answers) > 1
    inner = None if several else _elements(table, paths_of(answers)[0])
    if inner is not None and inner.names:
        text = fixed.get("text") or inner.first([key for key in layouts.TEXTS if any(inner.find([key]))])
        if text is None:
            return
        way["text"] = text
    found = False
    for more in [*_verdicts(table, way, fixed, undecided), *_scores(table, way, inner, fixed)]:
        found = True
        yield way | more
    path = paths_of(answers)[0]
    if not found and not several and key_of(path) == "output" and _all_are_two_texts(table.values(path)):
        yield {"chosen": f"{path}.0", "rejected": f"{path}.1"}  # LLaMA-Factory's first form: the better one first
    elif not found:
        undecided.append(Undecided(answers))


def _elements(table: Table, path: str) -> Table | None:
    """The objects in a column's lists; None if they are no objects."""
    found = [each for value in map(spelled, table.values(path)) if isinstance(value, list) for each in value]
    objects = [each for each in found if isinstance(each, Mapping)]
    return Table(objects) if objects else None


def _all_are_two_texts(values: Iterable[object]) -> bool:
    return all(isinstance(v, list) and len(v) == 2 and all(isinstance(each, str) for each in v) for v in values)


def _verdicts(table: Table, way: Way, fixed: Way, undecided: list[Undecided]) -> Iterator[Way]:
    if "verdict" in fixed:
        names = [fixed["verdict"]] if fixed["verdict"] else []
    else:
        flags = list(_flags(table, way["answers"]))
        names = [*flags, *(path for path in table.find(layouts.VERDICTS) if _is_verdict(table.values(path)))]
    for name in names:
        if isinstance(name, tuple) and len(name) > 1:
            yield {"verdict": name}
            continue
        try:
            means = fixed.get("means") or means_of(table.rows, Columns(**way, verdict=name))
        except Unclear as unclear:
            undecided.append(Undecided(way["answers"], str(unclear)))
            continue
        yield {"verdict": name, "means": means}


def _is_verdict(values: Sequence[object]) -> bool:
    """Whether values are texts or numbers, each one or, of several people, a list; some of them short."""
    said = [each for value in values for each in (value if isinstance(value, list) else [value])]
    return all(isinstance(value, str | int | float | bool) for value in said) and any(
        not isinstance(value, str) or len(value) < 200 for value in said
    )


def _flags(table: Table, answers: str | tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    marks = marks_of(paths_of(answers)) if isinstance(answers, tuple) else []
    for part in layouts.FLAGS:
        paths = [next(table.find([part.format(mark)]), None) for mark in marks]
        whole = tuple(path for path in paths if path is not None)
        if whole and len(whole) == len(paths):
            yield (*whole, *list(table.find(layouts.TIES))[:1])


def _scores(table: Table, way: Way, inner: Table | None, fixed: Way) -> Iterator[Way]:
    answers = way["answers"]
    for field, of_columns, of_elements, of_lists in (
        ("score", layouts.SCORES, layouts.ELEMENT_SCORES, layouts.LIST_SCORES),
        ("rank", layouts.RANKS, layouts.ELEMENT_RANKS, layouts.LIST_RANKS),
    ):
        if field in fixed:
            if fixed[field]:
                yield {field: fixed[field]}
        elif isinstance(answers, tuple) and len(answers) > 1:
            yield from ({field: paths} for paths in _columns_of_numbers(table, answers, of_columns))
            yield from ({field: path} for path in table.find(of_lists) if _are_lists_of_numbers(table.values(path)))
        elif inner is not None:
            paths = (path for name in of_elements for path in ([name] if "*" in name else inner.find([name])))
            if found := next((path for path in paths if _has_numbers(inner, path)), None):
                yield {field: found}
            elif path := next((p for p in table.find(of_lists) if _are_lists_of_numbers(table.values(p))), None):
                yield {field: path}
        else:
            yield from ({field: path} for path in table.find(of_lists) if _are_lists_of_numbers(table.values(path)))


def _has_numbers(inner: Table, path: str) -> bool:
    return any(number_of(value) is not None or isinstance(value, list) for value in inner.values(path))


def _are_lists_of_numbers(values: Sequence[object]) -> bool:
    lists = [value for value in map(spelled, values) if isinstance(value, list)]
    return len(lists) == len(values) and all(
        each is None or isinstance(each, float) or number_of(each) is not None for value in lists for each in value
    )


def _columns_of_numbers(table: Table, answers: tuple[str, ...], names: Sequence[str]) -> Iterator[tuple[str, ...]]:
    keys, marks = [key_of(path.removeprefix(table.under)) for path in answers], marks_of(answers)
    for name in names:
        for written in ("{key}_{name}", "{name}_{key}", "{name}_{mark}", "{mark}_{name}", "model_{mark}_{name}"):
            wanted = [written.format(key=k, name=name, mark=m) for k, m in zip(keys, marks, strict=True)]
            paths = tuple(path for key in wanted for path in list(table.find([key]))[:1])
            if len(paths) == len(answers) and any(number_of(v) is not None for v in table.values(paths[0])):
                yield paths
