"""Reward sources: a Python function, or a Hugging Face sequence-classification model.

A reward function is called as `function(prompts, completions, **columns)`. `prompts` are message lists and
`completions` are texts, one of each per sample. The data set's other columns come as lists of the same length: those
that the function names as parameters, or all of them if it takes `**kwargs`. It returns one finite number per
completion; higher is better. It may be called from several threads at once.
"""

import importlib
import inspect
import json
import math
import sys
import threading
import types
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import SupportsFloat

import pyarrow as pa
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedConfig

from sampo_ray.config.sections import RewardConfig
from sampo_ray.data.preferences import cut_prompt
from sampo_ray.data.sources import Message
from sampo_ray.errors import ConfigError, RewardError

RewardFunction = Callable[..., Iterable[SupportsFloat]]
Prompts = list[list[Message]]
Columns = dict[str, list[object]]
Scorer = Callable[[Prompts, list[str], Columns], list[float]]
"""A loaded reward source: prompts, completions, other columns -> one finite reward per completion, or RewardError."""


def check_reward(reward: RewardConfig) -> None:
    """Opens the configured reward source. Raises ConfigError if it cannot be used."""
    if reward.function is not None:
        load_function(reward.function)
    if reward.model is not None:
        _model_config(reward.model)


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
    if inspect.iscoroutinefunction(function):
        raise ConfigError(f"reward.function={spec!r}: is a coroutine; write it as a plain `def` function")
    return function


def call_function(function: RewardFunction, prompts: Prompts, completions: list[str], columns: Columns) -> list[float]:
    """Calls a reward function with the columns that it takes; returns one finite reward per completion.

    Raises RewardError if the function needs a column that the data lacks or returns anything but finite numbers. What
    the function raises is passed on.
    """
    parameters = (signature := inspect.signature(function)).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    names = {name for name in columns if takes_all or name in parameters} - {*list(parameters)[:2]}
    taken = {name: column for name, column in columns.items() if name in names}
    try:
        signature.bind(prompts, completions, **taken)
    except TypeError as error:
        message = f"{error}; the data's other columns are {', '.join(columns) or 'none'}"
        raise RewardError(f"the reward function cannot be called: {message}") from None
    return _finite_rewards(function(prompts, completions, **taken), prompts)


def _finite_rewards(rewards: Iterable[SupportsFloat], prompts: Prompts) -> list[float]:
    """`rewards` as floats. Raises RewardError, quoting a prompt, unless there is one finite number per prompt."""
    try:
        values = list(rewards)
    except TypeError:
        kind, prompt = type(rewards).__name__, _quoted(prompts[0])
        raise RewardError(f"the reward source returned {kind} instead of a list of numbers for {prompt}") from None
    if len(values) != len(prompts):
        counts = f"{len(values)} scores for {len(prompts)} completions; return one score each."
        raise RewardError(f"the reward source returned {counts} The first completion answers {_quoted(prompts[0])}")
    return [_finite(value, prompt) for value, prompt in zip(values, prompts, strict=True)]


def columns_of(completions: pa.Table) -> Columns:
    """The data set's other columns, from the JSON objects of a COMPLETIONS block; None where a row lacks one."""
    rows: list[dict[str, object]] = [json.loads(text) for text in completions["columns"].to_pylist()]
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


class RewardModel:
    """A Scorer that is a sequence classifier with one label.

    Its input is the conversation in its tokenizer's chat template or, without a template, prompt and answer as a text
    pair. Input beyond its context is cut on the left. float32 on CPU, the checkpoint's type on a GPU.
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
        self._lock = threading.Lock()  # one call at a time: batches of several would add up in memory

    def __call__(self, prompts: Prompts, completions: list[str], columns: Columns) -> list[float]:
        with self._lock:
            return _finite_rewards(self._score(prompts, completions), prompts)

    def _score(self, prompts: Prompts, completions: list[str]) -> list[float]:
        encoded = [self._encode(prompt, text) for prompt, text in zip(prompts, completions, strict=True)]
        rewards = [math.nan] * len(encoded)
        for batch in self._batches([len(row["input_ids"]) for row in encoded]):
            rows = [encoded[i] for i in batch]
            padded = self.tokenizer.pad(rows, padding=len(rows) > 1, return_tensors="pt").to(self.device)
            with torch.inference_mode():
                logits = self.model(**padded).logits  # [batch, 1]
            for i, reward in zip(batch, logits[:, 0].float().tolist(), strict=True):
                rewards[i] = reward
        return rewards

    def _encode(self, prompt: list[Message], text: str) -> dict[str, list[int]]:
        if self.tokenizer.chat_template:
            messages = [*prompt, {"role": "assistant", "content": text}]
            conversation = self.tokenizer.apply_chat_template(messages, tokenize=False)
            ids = self.tokenizer(conversation, add_special_tokens=False)["input_ids"]
            return {"input_ids": cut_prompt(ids, self.max_length, self.tokenizer.bos_token_id)}
        question = "\n\n".join(message["content"] for message in prompt)
        return dict(self.tokenizer(question, text, truncation="longest_first", max_length=self.max_length))

    def _batches(self, lengths: list[int]) -> list[list[int]]:
        """Indices in batches, longest first; a padded batch of several rows has at most `batch_tokens` tokens."""
        batches: list[list[int]] = []
        # Without a padding token the classifier cannot tell where a shorter row ends.
        one_by_one = self.model.config.pad_token_id is None
        for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            if batches and not one_by_one and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= self.batch_tokens:
                batches[-1].append(i)
            else:
                batches.append([i])
        return batches


def _model_config(path: str) -> PreTrainedConfig:
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        reason, advice = str(error).split("\n", 1)[0], "name a Hugging Face folder or hub name"
        raise ConfigError(f"reward.model={path!r}: cannot be opened ({reason}); {advice}") from None
    if config.num_labels != 1:
        raise ConfigError(
            f"reward.model={path!r}: has {config.num_labels} labels (num_labels); a reward model has one, so use a "
            f"sequence-classification model that was saved with num_labels=1"
        )
    return config


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


def _finite(value: SupportsFloat, prompt: list[Message]) -> float:
    try:
        reward = float(value)
    except (TypeError, ValueError):
        reward = math.nan
    if math.isfinite(reward):
        return reward
    prompt_text = _quoted(prompt)
    raise RewardError(f"the reward source returned {value!r} for a completion of {prompt_text}; return a finite number")


def _quoted(prompt: list[Message]) -> str:
    text = " ".join(prompt[-1]["content"].split())
    return f"the prompt {text if len(text) <= 200 else text[:200] + '...'!r}"
