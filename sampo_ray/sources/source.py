"""What one entry of `data.train` or `data.prompts` is to a run: a name, how its columns are read, how much is used."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from sampo_ray.config.columns import Columns
from sampo_ray.config.sections import DataConfig
from sampo_ray.training.streams import Stream


@dataclass(frozen=True, slots=True)
class Source:
    """One source of rows.

    `mark` goes in front of its rows' positions, so that rows of several sources have ids of their own: "" where there
    is one source, else `1/`, `2/`, ..., which are the same on every machine. `share` is that of its rows that is used,
    in (0, 1].
    """

    name: str
    columns: Columns
    mark: str = ""
    share: float = 1.0


def sources_of(data: DataConfig, kind: Literal["pairs", "prompts"]) -> list[Source]:
    """The sources of a run on pairs (`data.train`) or on prompts (`data.prompts`), in the order they are named."""
    names = data.names(online=kind == "prompts")
    shares = data.mix or (1.0,) * len(names)
    marks = [f"{at}/" for at in range(1, len(names) + 1)] if len(names) > 1 else [""]
    given = data.columns if isinstance(data.columns, tuple) else (data.columns or Columns(),) * len(names)
    return [Source(*each) for each in zip(names, given, marks, shares, strict=True)]


def drawn(share: float, seed: int, source: int, start: int, rows: int) -> np.ndarray:
    """Which of `rows` consecutive rows of a source are used, the first of which is its `start`-th: [rows], bool.

    Of a source cut into such chunks in any one way `share` is used, up to one row. Which ones is drawn anew for each
    chunk, from the numbers given here alone.
    """
    used = int((start + rows) * share + 1e-9) - int(start * share + 1e-9)
    mask = np.zeros(rows, dtype=bool)
    order = Stream.MIX.generator(seed=seed, source=source, start=start).permutation(rows)
    mask[order[:used]] = True
    return mask
