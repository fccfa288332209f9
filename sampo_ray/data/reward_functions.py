"""Reward functions: how one is found, what it is called with, and how it is tried before a run starts.

A function is called with keywords only. It gets what it names as parameters, all of it if it takes `**kwargs`:

* `prompts`: lists of messages; `completions`: texts; `completion_ids`: lists of token ids;
* any other column of the prompt file by its name, as a list with None where a row lacks it;
* what the recipe gives in `reward.arguments`, as it is there, instead of columns of that name.

Each list has one entry a completion, and so has what the function returns: finite numbers, higher is better, or None
where it has no score. It may be a coroutine function, and may be called from several threads at once.
"""

import asyncio
import importlib
import inspect
import sys
import threading
import traceback
import types
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from sampo_ray.data.rewards import Rewards, Samples, as_rewards
from sampo_ray.errors import ConfigError, RewardError, suggestion

RewardFunction = Callable[..., object]
Arguments = Mapping[str, object]
OURS = {"prompts", "completions", "completion_ids"}
NONE: Arguments = types.MappingProxyType({})


def function_source(spec: str) -> str | None:
    """The source text of the file in `path/file.py:function`, to be sent to other nodes; None for a module."""
    place, _ = _parse_spec(spec)
    try:
        return Path(place).read_text() if place.endswith(".py") else None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"reward.function={spec!r}: cannot be read ({error}); name an existing file") from None


def load_function(spec: str, source: str | None = None) -> RewardFunction:
    """The function that `spec` names: `package.module:function` or `path/file.py:function`. Raises ConfigError.

    A module must be importable where this is called. A file need not exist there if its text is given as `source`; it
    is executed by itself, so the modules that it imports must be installed.
    """
    place, name = _parse_spec(spec)
    text = function_source(spec) if source is None else source
    try:
        module = importlib.import_module(place) if text is None else _execute_file(place, text)
    except Exception as error:  # a user's module may raise anything while it is imported
        raise ConfigError(
            f"reward.function={spec!r}: importing {place} failed with {type(error).__name__}: {error}; correct it, or "
            f"name another package.module:function or file.py:function"
        ) from error
    function: RewardFunction | None = getattr(module, name, None)
    if not callable(function):
        known = [key for key, value in vars(module).items() if inspect.isfunction(value) and not key.startswith("_")]
        has = ", ".join(known) or "none"
        raise ConfigError(f"reward.function={spec!r}: {place} has no function {name!r}; it has {has}")
    if inspect.isclass(function):
        raise ConfigError(f"reward.function={spec!r}: is a class; name a function, or an object that can be called")
    return function


def call_function(function: RewardFunction, samples: Samples, arguments: Arguments = NONE) -> Rewards:
    """The function's rewards for the samples.

    A column that it needs and none of the samples has is None for all. RewardError if it returns anything but a finite
    number or None for each. What the function raises is passed on.
    """
    given, parameters = _given(samples), _Parameters.of(function)
    nothing: list[object] = [None] * len(samples.prompts)
    named = {name: given.get(name, nothing) for name in parameters.needed}
    named |= {name: value for name, value in given.items() if parameters.takes_all or name in parameters.optional}
    returned = function(**{**named, **arguments})
    if inspect.isawaitable(returned):
        returned = asyncio.run(_awaited(returned))
    return as_rewards(returned, samples)


def check_function(spec: str, samples: Samples, timeout_s: float, arguments: Arguments = NONE) -> Rewards:
    """Loads a function, tries it on `samples`, and returns their rewards. ConfigError if it cannot be called or does
    not score them in time."""
    function = load_function(spec)
    _check_parameters(spec, function, samples, arguments)
    errors: list[BaseException] = []
    rewards: Rewards = []

    def work() -> None:
        try:
            rewards.extend(call_function(function, samples, arguments))
        except BaseException as error:  # also SystemExit, which a thread would swallow
            errors.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(timeout_s)
    if thread.is_alive():
        raise ConfigError(
            f"reward.function={spec!r}: did not return within reward.timeout_s={timeout_s:g} for two made-up "
            "completions of the first prompt; give it time limits of its own, or raise reward.timeout_s"
        )
    for error in errors:
        if isinstance(error, RewardError):
            raise ConfigError(f"reward.function={spec!r}: {error}") from None
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise ConfigError(
            f"reward.function={spec!r}: raised {type(error).__name__}: {error} ({place.filename}:{place.lineno}) for "
            "made-up completions of the first prompt; prompts are lists of messages, completions are texts (one of "
            "the two is empty)"
        ) from error
    return rewards


def _given(samples: Samples) -> dict[str, list[object]]:
    """All that a function may ask for, by name."""
    return {
        **samples.columns,
        "prompts": list(samples.prompts),
        "completions": list(samples.completions),
        "completion_ids": list(samples.completion_ids),
    }


@dataclass(frozen=True)
class _Parameters:
    """A function's parameters: with and without a default, those that can only be given by place."""

    needed: list[str]
    optional: list[str]
    by_place: list[str]
    takes_all: bool

    @classmethod
    def of(cls, function: RewardFunction) -> "_Parameters":
        every = list(inspect.signature(function).parameters.values())
        named = [each for each in every if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)]
        return cls(
            [each.name for each in named if each.default is each.empty],
            [each.name for each in named if each.default is not each.empty],
            [each.name for each in every if each.kind is each.POSITIONAL_ONLY and each.default is each.empty],
            any(each.kind is each.VAR_KEYWORD for each in every),
        )


def _check_parameters(spec: str, function: RewardFunction, samples: Samples, arguments: Arguments) -> None:
    """ConfigError unless all that the function needs is there, and the completions are among it."""
    try:
        parameters = _Parameters.of(function)
    except ValueError:  # some functions that are written in C
        raise ConfigError(f"reward.function={spec!r}: has no signature; name a Python function") from None
    if by_place := ", ".join(parameters.by_place):
        raise ConfigError(f"reward.function={spec!r}: takes {by_place} by place only; drop the `/` from its parameters")
    named = [*parameters.needed, *parameters.optional]
    for name in arguments:
        if name in OURS:
            raise ConfigError(f"reward.arguments has {name!r}, which is given to every reward function; drop it")
        if name not in named and not parameters.takes_all:
            meant = suggestion(name, [each for each in named if each not in OURS]) if {*named} - OURS else "drop it"
            raise ConfigError(f"reward.arguments has {name!r}, which {spec!r} does not take; {meant}")
    known = {**_given(samples), **arguments}
    if unknown := ", ".join(name for name in parameters.needed if name not in known):
        raise ConfigError(
            f"reward.function={spec!r}: nothing is given for its parameter {unknown}; arguments go by name, so rename "
            f"it to one of {', '.join(known)}, give it a default or a value in reward.arguments, or add the column to "
            "data.prompts"
        )
    if not parameters.takes_all and not {"completions", "completion_ids"} & {*named}:
        raise ConfigError(f"reward.function={spec!r}: does not look at completions; give it a parameter `completions`")


async def _awaited(returned: Awaitable[object]) -> object:
    return await returned


def _parse_spec(spec: str) -> tuple[str, str]:
    place, colon, name = spec.rpartition(":")
    if not colon or not place or not name.isidentifier():
        raise ConfigError(f"reward.function={spec!r}: write it as package.module:function or path/file.py:function")
    return place, name


def _execute_file(path: str, text: str) -> types.ModuleType:
    name = f"sampo_reward_{Path(path).stem}"
    sys.modules[name] = module = types.ModuleType(name)  # dataclasses and pickle look up a class's module
    module.__file__ = path
    exec(compile(text, path, "exec"), module.__dict__)
    return module
