"""A penalty for completions that are longer than they should be."""

from collections.abc import Sequence

from sampo_ray.errors import RewardError


def reward(completion_ids: Sequence[Sequence[int]], target: int, limit: int | None = None) -> list[float]:
    """0 up to `target` tokens, then falling in a straight line to -1 at `limit` tokens (default: twice `target`), and
    -1 beyond. The token that ends a turn counts.

    Made for sums (`reward.sum`): alone it prefers the empty answer as much as any short one. The form is DAPO's soft
    overlong punishment (Yu et al. 2025, arXiv:2503.14476, eq. 13).
    """
    end = 2 * target if limit is None and isinstance(target, int) else limit
    if not isinstance(target, int) or target < 1:
        raise RewardError(f"target={target!r} is no number of tokens; use 1 or more")
    if not isinstance(end, int) or end <= target:
        raise RewardError(f"limit={limit!r} is not above target={target}; make it larger, or leave it out")
    return [-min(1.0, max(0, len(ids) - target) / (end - target)) for ids in completion_ids]
