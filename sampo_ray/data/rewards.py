"""Reward sources: a Python function, or a Hugging Face sequence-classification model.

A reward function is called as `function(prompts, completions, **columns)`: `prompts` are message lists, `completions`
are texts, one of each per sample, and every other column of the data set that the function names as a parameter (all of
them, if it takes `**kwargs`) comes as a list of the same length. It returns one finite number per completion, higher is
better. It may be called from several threads at once.
"""

import importlib
import importlib.util
import inspect
import json
import math
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from sampo_ray.config.rollout import RewardConfig
from sampo_ray.data.chat import Message
from sampo_ray.data.preferences import cut_prompt
from sampo_ray.errors import ConfigError, RewardError

RewardFunction = Callable[..., Sequence[float]]

_SHOWN = 200  # characters of a prompt in an error message


class Scorer(Protocol):
    """A loaded reward source."""

    def __call__(
        self, prompts: list[list[Message]], completions: list[str], columns: dict[str, list[Any]]
    ) -> list[float]: ...


def check_reward(reward: RewardConfig) -> None:
    """Opens the configured reward source, before anything starts. Raises ConfigError."""
    if reward.function is not None:
        load_function(reward.function)
    if reward.model is not None:
        _model_config(reward.model)


def function_source(spec: str) -> str | None:
    """The source text behind `path/file.py:function`, so that it can travel to other nodes; None for a module."""
    place, _ = _split(spec)
    if not place.endswith(".py"):
        return None
    try:
        return Path(place).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"reward.function={spec!r}: cannot be read ({error}); name an existing file") from None


def load_function(spec: str, source: str | None = None) -> RewardFunction:
    """Imports `package.module:function`, or runs `path/file.py:function` (its text: `source`, if given).

    A module must be importable where this is called. A file is run on its own: what it imports must be installed.
    Raises ConfigError.
    """
    place, name = _split(spec)
    text = function_source(spec) if source is None else source
    try:
        module = importlib.import_module(place) if text is None else _run_file(place, text)
    except Exception as error:  # a user's module may raise anything while it is imported
        raise ConfigError(
            f"reward.function={spec!r}: importing {place} failed with {type(error).__name__}: {error}; mend it, or "
            f"name another package.module:function or file.py:function"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        known = [key for key, value in vars(module).items() if inspect.isfunction(value) and not key.startswith("_")]
        raise ConfigError(
            f"reward.function={spec!r}: {place} has no function {name!r}; it has {', '.join(known) or 'none'}"
        )
    if inspect.iscoroutinefunction(function):
        raise ConfigError(f"reward.function={spec!r}: is a coroutine; write it as a plain `def`")
    return function


def score(
    function: RewardFunction, prompts: list[list[Message]], completions: list[str], columns: dict[str, list[Any]]
) -> list[float]:
    """One finite reward per completion.

    Raises RewardError if the function returns anything else or needs a column that the data lacks, and what it raises.
    """
    signature = inspect.signature(function)
    parameters = signature.parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    own = list(parameters)[:2]
    wanted = {name: list_ for name, list_ in columns.items() if name not in own and (takes_any or name in parameters)}
    try:
        signature.bind(prompts, completions, **wanted)
    except TypeError as error:
        have = ", ".join(columns) or "none"
        raise RewardError(
            f"the reward function cannot be called: {error}; the data's other columns are {have}"
        ) from None
    return checked(function(prompts, completions, **wanted), prompts)


def checked(rewards: Any, prompts: list[list[Message]]) -> list[float]:
    """`rewards` as floats. Raises RewardError, showing a prompt, unless there is one finite number per prompt."""
    try:
        values = list(rewards)
    except TypeError:
        raise RewardError(
            f"the reward source returned {type(rewards).__name__} instead of a list of numbers for {_shown(prompts[0])}"
        ) from None
    if len(values) != len(prompts):
        raise RewardError(
            f"the reward source returned {len(values)} scores for {len(prompts)} completions; return one score each. "
            f"The first completion answers {_shown(prompts[0])}"
        )
    return [_finite(value, prompt) for value, prompt in zip(values, prompts, strict=True)]


def columns_of(completions: pa.Table) -> dict[str, list[Any]]:
    """The data set's other columns, from the JSON objects of a COMPLETIONS block; None where a row lacks one."""
    rows = [json.loads(text) for text in completions["columns"].to_pylist()]
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


class RewardModel:
    """A sequence classifier with one label, as a `Scorer`.

    It reads the conversation in its tokenizer's chat template, or, where there is none, the prompt and the answer as a
    text pair. Longer than its context: cut on the left. float32 on CPU, the checkpoint's type on a GPU.
    """

    def __init__(self, path: str, device: str, batch_tokens: int = 16384) -> None:
        config = _model_config(path)
        self.tokenizer = AutoTokenizer.from_pretrained(path, truncation_side="left", padding_side="right")
        self.device, self.batch_tokens = device, batch_tokens
        self.max_length = min(getattr(config, "max_position_embeddings", 1 << 20), self.tokenizer.model_max_length)
        if config.pad_token_id is None:
            config.pad_token_id = self.tokenizer.pad_token_id
        elif self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token_id = config.pad_token_id
        self.model = AutoModelForSequenceClassification.from_pretrained(
            path, config=config, use_safetensors=True, dtype=torch.float32 if device == "cpu" else "auto"
        )
        self.model.to(device).eval()

    def __call__(
        self, prompts: list[list[Message]], completions: list[str], columns: dict[str, list[Any]]
    ) -> list[float]:
        encoded = [self._encode(prompt, text) for prompt, text in zip(prompts, completions, strict=True)]
        rewards = [math.nan] * len(encoded)
        for batch in self._batches([len(row["input_ids"]) for row in encoded]):
            rows = [encoded[i] for i in batch]
            padded = self.tokenizer.pad(rows, padding=len(rows) > 1, return_tensors="pt").to(self.device)
            with torch.inference_mode():
                logits = self.model(**padded).logits  # [batch, 1]
            for i, reward in zip(batch, logits[:, 0].float().tolist(), strict=True):
                rewards[i] = reward
        return checked(rewards, prompts)

    def _encode(self, prompt: list[Message], text: str) -> dict[str, list[int]]:
        if self.tokenizer.chat_template:
            messages = [*prompt, {"role": "assistant", "content": text}]
            conversation = self.tokenizer.apply_chat_template(messages, tokenize=False)
            ids = self.tokenizer(conversation, add_special_tokens=False)["input_ids"]
            return {"input_ids": cut_prompt(ids, self.max_length, self.tokenizer.bos_token_id)}
        question = "\n\n".join(message["content"] for message in prompt)
        return dict(self.tokenizer(question, text, truncation="longest_first", max_length=self.max_length))

    def _batches(self, lengths: list[int]) -> list[list[int]]:
        """Indices, longest first, so many at a time that the padded batch holds at most `batch_tokens`."""
        batches: list[list[int]] = []
        # Without a padding token the classifier cannot tell where a shorter one ends.
        alone = self.model.config.pad_token_id is None
        for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            if batches and not alone and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= self.batch_tokens:
                batches[-1].append(i)
            else:
                batches.append([i])
        return batches


def _model_config(path: str) -> Any:
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        reason = str(error).split("\n", 1)[0]
        raise ConfigError(
            f"reward.model={path!r}: cannot be opened ({reason}); name a Hugging Face folder or hub name"
        ) from None
    if config.num_labels != 1:
        raise ConfigError(
            f"reward.model={path!r}: has {config.num_labels} labels (num_labels); a reward model has one, so use a "
            f"sequence-classification model that was saved with num_labels=1"
        )
    return config


def _split(spec: str) -> tuple[str, str]:
    place, colon, name = spec.rpartition(":")
    if not colon or not place or not name.isidentifier():
        raise ConfigError(f"reward.function={spec!r}: write it as package.module:function or path/file.py:function")
    return place, name


def _run_file(path: str, text: str) -> types.ModuleType:
    name = f"sampo_reward_{Path(path).stem}"
    module = types.ModuleType(name)
    module.__file__ = path
    sys.modules[name] = module  # dataclasses and pickle look a class's module up
    exec(compile(text, path, "exec"), module.__dict__)
    return module


def _finite(value: Any, prompt: list[Message]) -> float:
    try:
        reward = float(value)
    except (TypeError, ValueError):
        reward = math.nan
    if not math.isfinite(reward):
        raise RewardError(f"the reward source returned {value!r} for a completion of {_shown(prompt)}; return a number")
    return reward


def _shown(prompt: list[Message]) -> str:
    text = " ".join(prompt[-1]["content"].split())
    return f"the prompt {text if len(text) <= _SHOWN else text[:_SHOWN] + '...'!r}"
