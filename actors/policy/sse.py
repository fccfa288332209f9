"""Server-sent events as OpenAI's streams use them: each is one line `data: ` with JSON, and an empty line."""

import json
from collections.abc import Callable, Iterator, Mapping

PREFIX, END = "data: ", "\n\n"
END_BYTES = END.encode()  # JSON text never holds it: a line break in a string is written \n
DONE_DATA = "[DONE]"
DONE = f"{PREFIX}{DONE_DATA}{END}"  # the last event of a stream
ERROR = f'{PREFIX}{{"error"'  # how vLLM's events that report an error begin


def event(body: Mapping[str, object]) -> str:
    return f"{PREFIX}{json.dumps(body)}{END}"


def data_of(events: str) -> Iterator[str]:
    """The data of each of some whole events."""
    return (data for each in events.split(END) if (data := each.removeprefix(PREFIX)))


def without(raw: bytes, drop: Callable[[bytes], object]) -> bytes:
    """Whole events less those that are to be dropped."""
    return b"".join(each + END_BYTES for each in raw.split(END_BYTES) if each and not drop(each))
