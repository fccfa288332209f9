"""What judging took, and how it went."""

from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    import pyarrow as pa

_METADATA = b"judge"


class Tally(BaseModel):
    """Counts that add up over calls, processes and rounds."""

    model_config = ConfigDict(frozen=True)

    calls: int = 0
    """That the endpoint answered; those that were cached are not among them."""
    cached: int = 0
    refused: int = 0
    nonsense: int = 0
    """Answers that are no verdict."""
    failed: int = 0
    """Calls without an answer after all tries, or that the endpoint rejects."""
    first_wins: float = 0.0
    """Verdicts for the answer that was shown first; a tie is half of one."""
    compared: int = 0
    """Verdicts on pairs."""
    flipped: int = 0
    """Pairs whose winner is another in the other order."""
    both_orders: int = 0
    """Pairs with verdicts in both orders."""
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(**{name: getattr(self, name) + getattr(other, name) for name in type(self).model_fields})

    @property
    def asked(self) -> int:
        return self.calls + self.cached + self.failed

    @property
    def lost(self) -> int:
        """Judgements without a verdict."""
        return self.refused + self.nonsense + self.failed

    @property
    def first_share(self) -> float | None:
        """Share of wins of the answer that is shown first: 0.5 without position bias. None without comparisons."""
        return self.first_wins / self.compared if self.compared else None

    @property
    def flip_share(self) -> float | None:
        return self.flipped / self.both_orders if self.both_orders else None

    @property
    def figures(self) -> dict[str, float]:
        """By the names of metrics."""
        counts = {
            "judge_calls": self.calls,
            "judge_cached": self.cached,
            "judge_refused": self.refused,
            "judge_nonsense": self.nonsense,
            "judge_failed": self.failed,
            "judge_tokens": self.prompt_tokens + self.completion_tokens,
        }
        bias = {} if self.first_share is None else {"judge_first_share": self.first_share}
        return {**{name: float(count) for name, count in counts.items()}, **bias}

    def text(self) -> str:
        """For people, in one line."""
        parts = [
            f"{self.calls} calls",
            f"{self.cached} cached",
            f"{self.prompt_tokens + self.completion_tokens} tokens",
        ]
        lost = {"refused": self.refused, "nonsense": self.nonsense, "failed": self.failed}
        parts += [f"{count} {name}" for name, count in lost.items() if count]
        if self.first_share is not None:
            parts.append(f"the first answer wins {self.first_share:.0%}")
        if self.flip_share is not None:
            parts.append(f"{self.flip_share:.0%} change with the order")
        return ", ".join(parts)


def with_tally(scores: "pa.Table", tally: Tally) -> "pa.Table":
    """The table with what its rewards took, in its metadata."""
    metadata = {**(scores.schema.metadata or {}), _METADATA: tally.model_dump_json()}
    return scores.replace_schema_metadata(metadata)


def tally_of(scores: "pa.Table") -> Tally:
    """What the rewards of a table took; nothing where no judge gave them."""
    found = (scores.schema.metadata or {}).get(_METADATA)
    return Tally.model_validate_json(found) if found else Tally()
