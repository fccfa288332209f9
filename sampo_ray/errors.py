"""Errors that a user sees as one message. Imports no library."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake that a user can fix; the message names what is wrong and what to do."""


class ConfigError(UserError, ValueError):
    """A configuration that cannot run; the message names field, value and fix."""


class DataError(UserError, ValueError):
    """Data that cannot be used; the message names the source, the line where it can, and the fix."""


class KeysError(UserError, ValueError):
    """A keys file that cannot be used, or a change to it that cannot be made; the message holds none of its content."""


class RunLostError(UserError, RuntimeError):
    """A run directory that another process has taken over; this one must not write to it any more."""


class VersionError(UserError, ValueError):
    """A request about versions that cannot be met; the message names the version and which versions exist."""


class FeedbackError(UserError, ValueError):
    """A judgement that makes no sense; the message names the field."""


class RewardError(UserError, RuntimeError):
    """A reward source that answers, but not with one finite number for each completion. Not retried."""


class JudgeError(RewardError):
    """A judge that cannot be used: it does not answer, rejects its calls, or lacks what is needed of it."""


class WeightsError(UserError, RuntimeError):
    """Weights that are incomplete, damaged, or not what was asked for."""


class OverflowingWeightsError(WeightsError):
    """Weights that do not fit into the data type of exports."""


class WeightsNotLoadedError(WeightsError):
    """A replica holds other weights than those a call asks for, and will not hold them soon; another one may."""


class PausedError(UserError, RuntimeError):
    """A policy replica that answers nothing for some time, since the ranks that train it use its GPUs."""


class PublishError(UserError, RuntimeError):
    """A version that is durable, but that the weight store did not take; the message says why. Training can go on."""


class TrainingError(UserError, RuntimeError):
    """Training that cannot go on, and would fail again in the same way if it were tried again."""


class StageError(UserError, RuntimeError):
    """A stage of a round that cannot be completed; the message says why."""


class FleetError(UserError, RuntimeError):
    """An engine or worker that does not start; the message has the last error that it reported."""


class EndpointError(UserError, RuntimeError):
    """An endpoint that could not be started; the message says why."""


class EvaluationError(UserError, RuntimeError):
    """Something could not be evaluated, compared or described; the message says what is missing."""


class SubmitError(UserError, RuntimeError):
    """A cluster that cannot be reached or refuses a job; the message says which and what to do."""


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its class if it has none."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def described(error: BaseException) -> str:
    """An error's class and the first line of its text."""
    return f"{type(error).__name__}: {first_line(error)}"


def suggestion(name: str, known: Iterable[str]) -> str:
    """Suggests the closest known name, or lists all if none is close."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known are {', '.join(sorted(known))}"
