"""Records that become other records: trees, exports of tools, one answer a row.

A form turns the records of a file into records that are then read like any others, one after the other, with no more
than one tree or one prompt's answers in memory. Positions stay unique: the second record of `train.jsonl:17` is
`train.jsonl:17.2`. What has no pair stays a record: it is counted, and can be a prompt.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from sampo_ray.config.columns import Columns
from sampo_ray.sources import exports, neighbours, trees
from sampo_ray.sources.answers import NEIGHBOURS
from sampo_ray.sources.records import Record

Values = Mapping[str, object]
Unfold = Callable[[Iterable[Record], Columns], Iterator[Record]]


@dataclass(frozen=True)
class Form:
    """`columns` gives what is known of the columns of rows that have this form; None for rows that have not."""

    columns: Callable[[Sequence[Values]], Columns | None]
    unfold: Unfold


def form_of(records: Sequence[Record]) -> Columns | None:
    """The form of a source, found by some of its records, with what is known of its columns once it is unfolded.

    None for records that are read as they are. Where the form does not say which column is the prompt, as in exports
    of tools with columns of the user's own, it is to be found in the unfolded records.
    """
    rows = [record.values for record in records]
    return next((columns for form in FORMS.values() if (columns := form.columns(rows))), None)


def unfolded(records: Iterable[Record], columns: Columns) -> Iterator[Record]:
    """The records that `records` become by `columns.form`; the same where there is no form."""
    if columns.form is None:
        yield from records
        return
    seen, again = "", 0
    for record in FORMS[columns.form].unfold(records, columns):
        again = again + 1 if record.position == seen else 1
        seen = record.position
        yield record if again == 1 else replace(record, position=f"{seen}.{again}")


def _each(unfold: Callable[[Values], Iterable[dict[str, object]]]) -> Unfold:
    """Unfolds each record for itself."""
    return lambda records, _: (replace(r, values=values) for r in records for values in unfold(r.values))


def _argilla(records: Iterable[Record], columns: Columns) -> Iterator[Record]:
    return (replace(r, values=values) for r in records for values in exports.of_argilla(r.values, columns))


def _tree_columns(form: str, holds: Callable[[Sequence[Values]], bool]) -> Callable[[Sequence[Values]], Columns | None]:
    columns = exports.every_column(form=form, prompt="prompt", answers="answers", rank="rank")
    return lambda rows: columns if holds(rows) else None


FORMS: dict[str, Form] = {
    "trees": Form(_tree_columns("trees", trees.holds_trees), _each(trees.of_tree)),
    "messages_of_trees": Form(_tree_columns("messages_of_trees", trees.holds_messages), trees.of_messages),
    "label_studio": Form(exports.label_studio_columns, _each(exports.of_label_studio)),
    "open_webui": Form(exports.open_webui_columns, _each(exports.of_open_webui)),
    "vertex": Form(exports.vertex_columns, _each(exports.of_vertex)),
    "nova": Form(exports.nova_columns, _each(exports.of_nova)),
    "argilla": Form(exports.argilla_columns, _argilla),
    "prodigy": Form(exports.prodigy_columns, _each(exports.of_prodigy)),
    "battles": Form(exports.battles_columns, _each(exports.of_battle)),
    "summaries": Form(exports.summaries_columns, _each(exports.of_summaries)),
    NEIGHBOURS: Form(neighbours.columns_of, neighbours.joined),
}
"""The forms under the names that `data.columns` has for them."""
