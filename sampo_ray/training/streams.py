"""The random streams of a run: what each one draws, and which numbers it is seeded with.

Every draw is a pure function of `run.seed` and a few numbers, so a restarted run repeats it. These seeds are part of
the format of run directories: another one changes what a resumed run draws.
"""

from __future__ import annotations

import hashlib
from enum import Enum

import numpy as np


class Stream(Enum):
    """A stream of random numbers. Its value lists what seeds it, in order: names of numbers, and constants.

    `seed` is `run.seed`; `round` and `epoch` count from 0; `pair` is `pair_number`. numpy takes the missing end of a
    short list for zeros. So SPLIT is PAIR_ORDER of round 0, and the later epochs of rounds 0, 1 and 2 have the orders
    that PROMPT_ORDER, PAIR_ORDER and FEEDBACK_ORDER make of as many items.
    """

    PROMPT_ORDER = ("seed", 0, "cycle")
    """Order of the prompts of online rounds; `cycle` counts how often all prompts were used before."""
    PAIR_ORDER = ("seed", 1, "round")
    """Training order of a round's pairs, where each round has all of them (or those of its own rollouts)."""
    SPLIT = ("seed", 1)
    """Order in which the pairs of an offline run are divided among its rounds (`rounds.data=split`)."""
    FEEDBACK_ORDER = ("seed", 2, "round")
    """Training order of a round's pairs together with those from feedback."""
    EPOCH_ORDER = ("seed", "round", "epoch")
    """Order of the pairs in the second and later epochs of a round; the first takes them as they are stored."""
    POLICY_MASK = ("seed", "round", "epoch", 0, "pair")
    """The tokens of a pair that the policy's log-ratios are summed over, and its reference's where masks are shared."""
    REFERENCE_MASK = ("seed", "round", "epoch", 1, "pair")
    """The tokens of a pair that its reference is summed over, where masks are independent (`method.mask`)."""

    MIX = ("seed", 2**32 - 1, "source", "start")
    """The rows of a source that are used where it is one of several (`data.mix`); `source` counts from 0, `start` is
    the first row's number. The constant is no round's number."""

    PROBE = ("seed", 2**32 - 2)
    """The prompts that are held out of an online run's own, for the evaluation of its versions."""

    def generator(self, **numbers: int) -> np.random.Generator:
        """A new generator at the beginning of the stream for these numbers; KeyError if one is missing."""
        return np.random.default_rng([numbers[part] if isinstance(part, str) else part for part in self.value])


def pair_number(pair_id: str) -> int:
    """A pair's id as a number of 128 bits, for streams that are seeded with it."""
    return int.from_bytes(hashlib.blake2b(pair_id.encode(), digest_size=16).digest(), "little")


def rollout_seed(seed: int, round: int) -> int:
    """The seed of a round's rollouts, of which each completion gets one of its own (`completion_seed`)."""
    return seed * 1_000_003 + round


def completion_seed(seed: int, prompt_id: str, sample: int) -> int:
    """vLLM's seed for the `sample`-th completion of a prompt, 63 bits; `seed` is that of the rollouts."""
    import xxhash  # the training core runs without it

    return xxhash.xxh3_64_intdigest(f"{seed}/{sample}/{prompt_id}".encode()) >> 1


def adapter_seed(seed: int, round: int) -> int:
    """torch's seed for the initial A matrices of a round's LoRA adapters."""
    return seed + round
