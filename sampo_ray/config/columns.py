"""Which columns of a source hold what: given by users, found by probing, stored with the run."""

from typing import Annotated, Literal, TypeAlias

from pydantic import Discriminator, SerializerFunctionWrapHandler, Tag, model_serializer, model_validator

from sampo_ray.config.section import Section

Path: TypeAlias = str
"""A column, or a path into one with dots: `info.post`, `answers.0.text`. A column whose own name has dots wins."""

Paths: TypeAlias = Path | tuple[Path, ...]

Means: TypeAlias = Literal["index", "number", "sign", "first", "name"]


class Columns(Section):
    """What the columns of a source's rows are. A field that is not given is found by probing the rows; one that is
    given as null is not used."""

    prompt: Path | None = None
    """The user's question as text, or the conversation up to the answer (or with it, where it goes on)."""
    input: Path | None = None
    """Text that goes on behind the prompt, after a newline."""
    system: Path | None = None
    """The text of a system turn, in front of everything."""
    history: Path | None = None
    """Turns between the system turn and the prompt: messages, or [question, answer] pairs."""
    tools: Path | None = None
    """JSON schemas of the functions that answers may call."""
    chosen: Path | None = None
    """The better answer: text, one message, or a conversation that ends with it."""
    rejected: Path | None = None
    """The worse answer."""
    answers: Paths | None = None
    """The columns of two or more answers of which `verdict`, `score` or `rank` says which is better; or one column
    with a list of them."""
    text: Path | None = None
    """Where an element of that list has its answer."""
    verdict: Paths | None = None
    """What says which answer is better. Several columns: one for each answer, true for the better one."""
    means: Means | None = None
    """How a verdict says it: `index` counts from 0, `number` from 1, `sign` is below 0 for the first answer, `first` is
    true for the first, `name` is its column, letter or text."""
    score: Paths | None = None
    """Of each answer, higher is better: a list, columns in the order of `answers`, or a path inside its elements."""
    rank: Paths | None = None
    """Of each answer, lower is better; as `score`."""
    beginning: Literal["prompt", "shared"] | None = None
    """How answers in text begin: with the prompt's text, which is cut (`prompt`), or alike (`shared`), which is read as
    the prompt."""
    ignore: tuple[Path, ...] | None = None
    """Columns that are not read, though their names say that they change what a prompt or an answer means."""
    form: str | None = None
    """How a row of the file becomes rows of this program, where they are not the same; found by probing."""

    @model_serializer(mode="wrap")
    def _given(self, whole: SerializerFunctionWrapHandler) -> dict[str, object]:
        """Only what is given: a null that is written down says that the field is not used."""
        return {name: value for name, value in whole(self).items() if name in self.model_fields_set}

    @model_validator(mode="after")
    def _answers_are_different_columns(self) -> "Columns":
        seen: dict[str, str] = {}
        for field in ("prompt", "input", "system", "history", "tools", "chosen", "rejected", "answers"):
            value = getattr(self, field)
            for path in [value] if isinstance(value, str) else value or ():
                if not path:
                    raise ValueError(f"{field} names no column; write null if none is to be used")
                if field in ("rejected", "answers") and path in seen:
                    raise ValueError(f"{seen[path]} and {field} are both {path!r}; name two columns")
                seen[path] = field
        return self

    @property
    def complete(self) -> bool:
        """Whether nothing is left to be found."""
        return self.model_fields_set >= set(type(self).model_fields)


def _one_or_several(value: object) -> str:
    return "several" if isinstance(value, list | tuple) else "one"


ColumnsOfSources: TypeAlias = Annotated[
    Annotated[Columns, Tag("one")] | Annotated[tuple[Columns, ...], Tag("several")], Discriminator(_one_or_several)
]
"""The columns of the only source, or of each of several in their order."""
