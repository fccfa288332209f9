"""What travels between a policy replica and its callers. Importing this costs neither vLLM nor Serve.

`PolicyServer.chat` and `.completions` stream `AnswerItem`s: first one AnsweredBy, then Chunks (a streamed answer), one
Whole (any other), or a Failure, and Progress among them. WeightsChanged comes before each item that names the weights
swapped in meanwhile: the Whole, or the Chunks with which a choice ends.
"""

from dataclasses import dataclass
from typing import NamedTuple, NotRequired, TypeAlias, TypedDict

from pydantic import BaseModel

from sampo_ray.run.versions import WeightsId


@dataclass(frozen=True)
class RolloutRequest:
    """How to draw rollouts: `samples` completions a prompt, each of at most `max_tokens` tokens."""

    samples: int
    temperature: float  # 0 is greedy
    top_p: float
    max_tokens: int
    seed: int  # each draw is seeded by it, the prompt's id and the sample alone
    weights: WeightsId | None = None  # those to draw from; None: those that the replica holds


class ReplicaStatus(TypedDict):
    run: str
    version: int
    round: int | None
    step: int | None
    state: str  # a ReplicaState


class LivePosition(NamedTuple):
    """A place in the order in which weights of a run went live. It grows with a rollback, too."""

    run: str = ""
    sequence: int = 0


@dataclass(frozen=True)
class AnsweredBy:
    weights: WeightsId  # those held when the request came; comes before an error, too
    sequence: int


@dataclass(frozen=True)
class WeightsChanged:
    weights: WeightsId  # the last of those that were swapped in during the answer
    sequence: int


@dataclass(frozen=True)
class Chunks:
    events: list[str]  # of a streamed answer: server-sent events, as text


@dataclass(frozen=True)
class Whole:
    response: BaseModel  # OpenAI's, not streamed


@dataclass(frozen=True)
class Failure:
    status: int  # HTTP's, for an error of the engine
    message: str
    param: str | None = None  # the field of the request that it is about


@dataclass(frozen=True)
class Progress:
    tokens: int  # that an answer has so far, over all its choices


AnswerItem: TypeAlias = AnsweredBy | WeightsChanged | Progress | Chunks | Whole | Failure


class VersionSpan(TypedDict):
    """An entry of an answer's `policy_versions`."""

    version: int
    from_tokens: NotRequired[list[int | None]]  # where it began, by choice; null: had ended. Not in the first entry
