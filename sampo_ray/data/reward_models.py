"""Reward models: Hugging Face sequence classifiers with one label."""

import functools
import logging
import math
import threading
from collections.abc import Mapping, Sequence
from typing import Any, cast

import jinja2
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedConfig

from sampo_ray.data.calls import Tools, as_requested, with_calls
from sampo_ray.data.cutting import shortened
from sampo_ray.data.rewards import Rewards, Samples
from sampo_ray.data.tokenizer import exact_tokenizer, token_starts
from sampo_ray.data.tools import tools_left_out
from sampo_ray.errors import ConfigError, RewardError, first_line
from sampo_ray.sources.messages import Message
from sampo_ray.training.pretrained import open_model

logger = logging.getLogger(__name__)

Encoded = Mapping[str, list[int]]
"""A model's inputs by name, each with one entry a token."""


class Encoder:
    """How a reward model reads a conversation: its tokenizer, chat template and context. Raises ConfigError.

    Without a chat template, prompt and answer are a text pair, for which the tokenizer must have a separator.
    """

    def __init__(self, path: str, config: PreTrainedConfig) -> None:
        try:
            self.tokenizer = exact_tokenizer(path, truncation_side="left")
        except (OSError, ValueError, KeyError) as error:
            reason = first_line(error)
            raise ConfigError(f"reward.model={path!r}: no tokenizer can be loaded ({reason}); save it there") from None
        if not self.tokenizer.chat_template and self.tokenizer.sep_token_id is None:
            raise ConfigError(
                f"reward.model={path!r}: its tokenizer has no chat template, and no separator for a text pair; save "
                "the template that it was trained with into its folder (chat_template.jinja)"
            )
        positions = getattr(config.get_text_config(), "max_position_embeddings", None) or -1  # -1: XLNet's for no limit
        self.max_length: int = min(positions if positions > 0 else 1 << 20, self.tokenizer.model_max_length)
        self.cut = 0
        """How many conversations were too long so far."""

    def __call__(self, prompt: list[Message], text: str, tools: Tools | None = None) -> Encoded:
        """The inputs, of at most `max_length` tokens. TemplateError if the template refuses the messages.

        A prompt is cut as the policy's are; where the answer leaves it no room, the conversation is, on the left.
        """
        if (tools or any(map(with_calls, prompt))) and self._tools_left_out:
            raise jinja2.TemplateError("it leaves out tools, or calls of them")
        given = as_requested(tools) if tools else None
        whole = self._inputs(prompt, text, given)
        if len(whole["input_ids"]) <= self.max_length:
            return whole
        self.cut += 1

        def length(messages: list[Message]) -> int | None:
            try:
                return len(self._inputs(messages, text, given)["input_ids"])
            except jinja2.TemplateError:
                return None

        cut = shortened(prompt, self.max_length, length, lambda question: token_starts(self.tokenizer, question))
        if cut is not None:
            return self._inputs(cut.messages, text, given)
        if not self.tokenizer.chat_template:
            short = {"truncation": "longest_first", "max_length": self.max_length}
            return dict(self.tokenizer(_question(prompt), text, **short))
        bos = int(whole["input_ids"][0] == self.tokenizer.bos_token_id)
        return {name: values[:bos] + values[len(values) - self.max_length + bos :] for name, values in whole.items()}

    @functools.cached_property
    def _tools_left_out(self) -> bool:
        try:
            return not self.tokenizer.chat_template or bool(tools_left_out(self.tokenizer)[1])
        except ValueError:
            return True

    def _inputs(self, prompt: list[Message], text: str, tools: list[Any] | None) -> Encoded:
        if not self.tokenizer.chat_template:
            return dict(self.tokenizer(_question(prompt), text))
        messages = [*prompt, {"role": "assistant", "content": text}]
        conversation = self.tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
        ids = self.tokenizer(conversation, add_special_tokens=False)["input_ids"]
        return {"input_ids": ids, "attention_mask": [1] * len(ids)}


def _question(prompt: list[Message]) -> str:
    return "\n\n".join(message["content"] for message in prompt)


class RewardModel:
    """A Scorer that is a sequence classifier with one label.

    A reward is the logit that transformers computes for the conversation by itself, whatever else is scored with it; a
    decoder is read at the last token that is not the padding token of its config. A conversation that the chat template
    refuses has no reward. float32 on CPU, the checkpoint's type on a GPU.
    """

    def __init__(self, path: str, device: str, batch_tokens: int = 16384) -> None:
        config = _one_label(path, AutoConfig.from_pretrained(path))
        self.encode, self.device, self.batch_tokens = Encoder(path, config), device, batch_tokens
        dtype = torch.float32 if device == "cpu" else "auto"
        self.model, loaded = AutoModelForSequenceClassification.from_pretrained(
            path, config=config, use_safetensors=True, dtype=dtype, output_loading_info=True
        )
        if missing := ", ".join(sorted(loaded["missing_keys"])[:3]):
            raise ConfigError(
                f"reward.model={path!r}: has no weights for {missing}; use a model that was saved as "
                f"{type(self.model).__name__}"
            )
        self.model.to(device).eval()
        self._lock = threading.Lock()  # one call at a time: batches of several would add up in memory
        text = self.model.config.get_text_config()
        self._padding = text.pad_token_id
        if self._padding is None:
            text.pad_token_id = -1  # no token is padding; transformers takes None for "no batches"
        if self._padding not in range(self.model.get_input_embeddings().num_embeddings) or not self._ignores_padding():
            self._padding = None  # only rows of one length share a batch

    def __call__(self, samples: Samples) -> Rewards:
        with self._lock:
            return self._score(samples)

    def _score(self, samples: Samples) -> Rewards:
        encoded: dict[int, Encoded] = {}
        rewards: Rewards = [None] * len(samples.completions)
        before = self.encode.cut
        tools = cast(list[Tools | None], samples.columns.get("tools") or [None] * len(rewards))
        for i, (prompt, text) in enumerate(zip(samples.prompts, samples.completions, strict=True)):
            try:
                encoded[i] = self.encode(prompt, text, tools[i])
            except jinja2.TemplateError:
                logger.warning("a conversation without a reward: the chat template of the reward model refuses it")
        if cut := self.encode.cut - before:
            limit = self.encode.max_length
            logger.warning("%d of %d conversations were cut to %d tokens", cut, len(rewards), limit)
        for batch in self._batches({i: len(row["input_ids"]) for i, row in encoded.items()}):
            for i, reward in zip(batch, self._logits([encoded[i] for i in batch]), strict=True):
                if not math.isfinite(reward):
                    raise RewardError(f"the reward model returned {reward}; its weights or its numbers' type are unfit")
                rewards[i] = reward
        return rewards

    def _logits(self, rows: Sequence[Encoded]) -> list[float]:
        longest = max(len(row["input_ids"]) for row in rows)
        fill = {"input_ids": self._padding}
        batch = {
            name: torch.tensor([row[name] + [fill.get(name, 0)] * (longest - len(row[name])) for row in rows])
            for name in rows[0]
        }
        with torch.inference_mode():
            logits = self.model(**{name: ids.to(self.device) for name, ids in batch.items()}).logits  # [batch, 1]
        values: list[float] = logits[:, 0].float().tolist()
        return values

    def _ignores_padding(self) -> bool:
        """Whether a short text has the same score beside a long one as alone: not so for every architecture."""
        question = [{"role": "user", "content": "Is it?"}]
        rows = [self.encode(question, text) for text in ("Yes.", "No, it is not. " * 8)]
        (short,), (long,), (beside, _) = self._logits(rows[:1]), self._logits(rows[1:]), self._logits(rows)
        return abs(beside - short) <= 0.1 * abs(long - short)  # a reduced precision makes less of a difference

    def _batches(self, lengths: Mapping[int, int]) -> list[list[int]]:
        """Indices in batches, longest first; a padded batch of several rows has at most `batch_tokens` tokens."""
        batches: list[list[int]] = []
        for i in sorted(lengths, key=lambda i: -lengths[i]):
            longest = lengths[batches[-1][0]] if batches else 0
            fits = batches and (len(batches[-1]) + 1) * longest <= self.batch_tokens
            if fits and (self._padding is not None or lengths[i] == longest):
                batches[-1].append(i)
            else:
                batches.append([i])
        return batches


def check_model(path: str, samples: Samples, max_length: int) -> None:
    """ConfigError if the model at `path` is no reward model, or cannot read the first of the samples. Loads no weights.

    Warns if it cannot read conversations of `max_length` tokens.
    """
    try:
        encode = Encoder(path, _one_label(path, open_model("reward.model", path).config))
        [tools, *_] = cast(list[Tools | None], samples.columns.get("tools") or [None])
        encode(samples.prompts[0], samples.completions[0], tools)
    except jinja2.TemplateError as error:
        raise ConfigError(
            f"reward.model={path!r}: its chat template refuses the first prompt ({error}); use prompts that it takes, "
            "without a system message for example, or another model"
        ) from None
    if max_length > encode.max_length:
        logger.warning(
            "reward.model=%r: reads %d tokens; longer conversations (data.max_length=%d) are cut",
            *(path, encode.max_length, max_length),
        )


def _one_label(path: str, config: PreTrainedConfig) -> PreTrainedConfig:
    if config.num_labels != 1:
        raise ConfigError(
            f"reward.model={path!r}: has {config.num_labels} labels (num_labels); a reward model has one, so use a "
            f"sequence-classification model that was saved with num_labels=1"
        )
    return config
