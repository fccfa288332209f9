"""Sources with one answer a row, where rows of the same prompt follow each other."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from sampo_ray.config.columns import Columns
from sampo_ray.sources.answers import NEIGHBOURS, paths_of
from sampo_ray.sources.paths import at
from sampo_ray.sources.records import Record
from sampo_ray.sources.spelled import spelled
from sampo_ray.sources.verdicts import key_of, number_of

MOST = 1000
"""Answers to one prompt that are in memory at a time; more of them are taken for those of another prompt."""

_PROMPTS = ("prompt", "question", "instruction", "query", "context", "input")
_ANSWERS = ("response", "completion", "answer", "output", "messages", "conversations", "conversation")
_CONVERSATIONS = ("messages", "conversations", "conversation")
_SCORES = ("helpfulness", "overall_score", "score", "rating", "reward", "quality", "label", "kto_tag", "is_safe")
_BESIDE = {"system", "system_prompt", "input", "context", "history", "tools", "images", "image"}
"""What makes two questions different, besides the prompt."""


def columns_of(rows: Sequence[Mapping[str, object]]) -> Columns | None:
    """The columns of rows that have one answer and a score; None if they have not."""
    names = {key_of(name): name for row in rows for name in row}
    answer = next((names[name] for name in _ANSWERS if name in names), None)
    if answer is None or {"chosen", "rejected"} & names.keys():
        return None
    is_whole = key_of(answer) in _CONVERSATIONS
    prompt = None if is_whole else next((names[name] for name in _PROMPTS if name in names), None)
    score = next((names[name] for name in _SCORES if name in names and _is_score(rows, names[name])), None)
    if score is None or (prompt is None and not is_whole):
        return None
    return Columns(prompt=prompt, answers=answer, score=score, form=NEIGHBOURS)


def joined(records: Iterable[Record], columns: Columns) -> Iterator[Record]:
    """Neighbours with the same prompt as one row: lists of their answers and scores, and what they have in common."""
    answer = paths_of(columns.answers)[0]
    scores = paths_of(columns.score or columns.rank)

    def answer_of(record: Record) -> object:
        value = at(record.values, answer)
        return value if columns.prompt is not None else spelled(value)  # a conversation

    def prompt_of(record: Record) -> object:
        before = [columns.prompt, columns.input, columns.system, columns.history, columns.tools]
        found = [at(record.values, path) for path in before if path is not None]
        found += [value for name, value in record.values.items() if key_of(name) in _BESIDE and value]
        whole = answer_of(record)
        return found if columns.prompt is not None or not isinstance(whole, list) else [*found, whole[:-1]]

    for _, group in itertools.groupby(records, key=prompt_of):
        while several := list(itertools.islice(group, MOST)):
            first = several[0]
            common = {
                name: value
                for name, value in first.values.items()
                if all(name in other.values and other.values[name] == value for other in several[1:])
            }
            lists = {path: [at(record.values, path) for record in several] for path in scores}
            lists[answer] = [answer_of(record) for record in several]
            yield replace(first, values=common | lists)


def _is_score(rows: Sequence[Mapping[str, object]], name: str) -> bool:
    values = [row[name] for row in rows if row.get(name) is not None]
    return bool(values) and sum(number_of(value) is not None for value in values) * 2 > len(values)
