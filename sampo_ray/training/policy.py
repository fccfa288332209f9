"""The model as trainer and reference worker see it: a row of pairs in, log-probabilities of chosen tokens out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from sampo_ray.config.rows import RowBudget
from sampo_ray.errors import ConfigError
from sampo_ray.training import attention, cpu
from sampo_ray.training.batching import Pair, Row, Segments, assemble, lengths_of, plan_rows
from sampo_ray.training.logprobs import TiledHead, token_comparisons
from sampo_ray.training.lora import add_adapters
from sampo_ray.training.reduction import Positions

if TYPE_CHECKING:
    from jaxtyping import Float, Int64

    from sampo_ray.config.model import LoraConfig


Distributions: TypeAlias = "tuple[Float[Tensor, 'asked dim'], Float[Tensor, 'vocabulary dim']]"
"""Distributions over the next token: softmax(hidden states @ a head's weight^T)."""

Reference: TypeAlias = "Callable[[Row, Tensor], Distributions]"
"""A reference that is resident where the policy is: (row, [asked] positions of states) to what it says comes next."""


ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
}
"""What SDPA may turn out to be."""

PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default}
"""What a linear layer is, without and with a bias; its weight is the last operand."""

OTHER_HEADS = ("classifier_", "summary_")
"""How names of settings begin that are not of the language model."""


class Policy(nn.Module):
    """A causal language model whose head is computed only where asked, over rows of segments."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        check_architecture(model)
        cpu.use_fp32_kernels(model)
        model.set_output_embeddings(TiledHead(model.get_output_embeddings().weight))
        self.model = model

    def forward(
        self,
        tokens: Int64[Tensor, " tokens"],
        positions: Int64[Tensor, " tokens"],
        segments: tuple[Segments, ...],
        states: Int64[Tensor, " asked"],
        targets: Int64[Tensor, " asked"],
        reference: Distributions | None = None,
    ) -> Float[Tensor, " asked"] | Float[Tensor, "3 asked"]:
        """Log-probabilities, fp32 nats, of `targets` given the hidden states at row positions `states`.

        With `reference`, the distributions of another policy there, its log-probabilities come second, and
        KL(reference || policy) third.
        """
        head = self.model.get_output_embeddings()
        hidden = self.hidden(tokens, positions, segments, states)
        if reference is None:
            return head(hidden, targets)
        return token_comparisons(hidden, head.weight, *reference, targets)

    def hidden(
        self,
        tokens: Int64[Tensor, " tokens"],
        positions: Int64[Tensor, " tokens"],
        segments: tuple[Segments, ...],
        states: Int64[Tensor, " asked"],
    ) -> Float[Tensor, "asked dim"]:
        """The last hidden states at row positions `states`."""
        decoder = self.model.get_decoder()
        if self.model.config._attn_implementation == attention.FLEX:
            sight = {"attention_mask": attention.block_mask(segments, len(tokens), tokens.device)}
        else:
            sight = attention.sight(segments, tokens.device)
        everything = decoder(input_ids=tokens[None], position_ids=positions[None], use_cache=False, **sight)
        return everything.last_hidden_state[0][states]

    @torch.no_grad()
    def distributions(self, row: Row, states: Int64[Tensor, " asked"]) -> Distributions:
        """What this policy says comes next at positions `states` of a row."""
        hidden = self.hidden(row.tokens, row.positions, row.segments, states)
        return hidden, self.model.get_output_embeddings().weight.detach()


def check_architecture(model: PreTrainedModel) -> None:
    """Raises ConfigError for a model whose head or attention would be computed wrongly (it may be without weights)."""
    name, config = type(model).__name__, model.config.get_text_config()
    head = model.get_output_embeddings()
    if head is None:
        raise ConfigError(f"model.path: {name} has no language-model head")
    if getattr(head, "bias", None) is not None:
        raise ConfigError(f"model.path: {name} has a head with a bias, which is not supported")
    for field in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(config, field, None) not in (None, 1.0):
            raise ConfigError(f"model.path: {name} changes its logits ({field}), which is not supported")
    window = getattr(config, "sliding_window", None)
    layers = getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"]
    kinds = set(layers) - {"full_attention"}
    if not model.is_backend_compatible() or kinds or getattr(config, "attn_logit_softcapping", None):
        how = " and ".join(sorted(kinds)) or "an attention of its own"
        raise ConfigError(f"model.path: {name} has {how}; only full attention over rows of pairs is supported")
    for field, value in config.to_dict().items():
        noise = any(each in field for each in ("drop", "jitter")) and not field.startswith(OTHER_HEADS)
        if noise and isinstance(value, float) and value > 0:
            raise ConfigError(f"model.path: {field}={value} in its config.json is not supported; set it to 0")


def on_meta(config: PretrainedConfig, lora: LoraConfig | None = None) -> PreTrainedModel:
    """The model of a configuration, with adapters if asked for, without its weights.

    ConfigError, naming `model.path`, if it is no causal one, or `model.lora.targets` if these match nothing.
    """
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, attn_implementation=attention.NAME)
    except ValueError as error:
        raise ConfigError(f"model.path: not a causal language model: {str(error).splitlines()[0]}") from None
    except KeyError:  # it looks in a table of its own
        raise ConfigError(f"model.path: {config.model_type} models have an attention of their own") from None
    if lora is not None:
        add_adapters(model, lora, seed=0)
    return model


def load_policy(
    path: str | Path,
    gradient_checkpointing: bool | Literal["selective"] = False,
    device: str = "cpu",
    lora: LoraConfig | None = None,
    seed: int = 0,
    flex: bool = False,
) -> Policy:
    """Loads a Hugging Face folder or hub name in bf16, safetensors only, for rows of segments; `flex`: whose attention
    is FlexAttention. `gradient_checkpointing`: see TrainerConfig.

    With `lora` all of it is frozen but new adapters (sampo_ray/training/lora.py), random by `seed`.
    Raises ConfigError naming `model.path` when it cannot be opened or its head is not a plain matrix.
    """
    try:
        model = AutoModelForCausalLM.from_pretrained(
            str(path),
            dtype=torch.bfloat16,
            attn_implementation=attention.FLEX if flex else attention.NAME,
            use_safetensors=True,
        )
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.path={str(path)!r} cannot be loaded: {str(error).splitlines()[0]}") from error
    if flex:
        attention.allow_flex_shapes()
    if gradient_checkpointing:
        how: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
        if gradient_checkpointing == "selective":
            width = model.config.get_text_config().hidden_size
            how["context_fn"] = partial(create_selective_checkpoint_contexts, partial(_kept, width))
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
    if lora is not None:
        add_adapters(model, lora, seed)
    return Policy(model).to(device)


def _kept(width: int, _: object, op: object, *operands: Any, **__: object) -> CheckpointPolicy:
    """What selective checkpointing does not compute again: attention, and what makes a layer's states wider."""
    wider = op in PRODUCTS and width <= operands[-1].shape[0] < operands[-1].shape[1]
    return CheckpointPolicy.MUST_SAVE if wider or op in ATTENTION else CheckpointPolicy.PREFER_RECOMPUTE


Sides: TypeAlias = "tuple[list[Float[Tensor, ' kept_w']], list[Float[Tensor, ' kept_l']]]"
"""Numbers of the asked token positions of each pair of a row, chosen and rejected, fp32."""


def pair_logprobs(policy: nn.Module, row: Row, positions: list[Positions]) -> Sides:
    """Log-probabilities of the asked token positions of each pair of a row, nats."""
    return _sides(*_answers(policy, row, positions))


def _answers(policy: nn.Module, row: Row, positions: list[Positions]) -> tuple[Float[Tensor, " asked"], list[int]]:
    """Log-probabilities of the asked tokens, and how many there are of each side."""
    states, targets, counts = _asked(row, positions)
    return policy(row.tokens, row.positions, row.segments, states, targets), counts


def pair_divergences(
    policy: nn.Module, reference: Reference, row: Row, positions: list[Positions]
) -> tuple[Sides, Sides, Sides]:
    """Log-probabilities under the policy, under the reference, and KL(reference || policy), as `pair_logprobs`."""
    states, targets, counts = _asked(row, positions)
    compared = policy(row.tokens, row.positions, row.segments, states, targets, reference(row, states))
    ours, theirs, divergences = (_sides(each, counts) for each in compared)
    return ours, theirs, divergences


def _asked(row: Row, positions: list[Positions]) -> tuple[Tensor, Tensor, list[int]]:
    """Row positions of the states that the asked tokens follow, those tokens, and how many there are of each side."""
    states, tokens, counts = [], [], []
    for pair, asked in zip(row.segments, positions, strict=True):
        states += [pair.chosen_states(asked.chosen), pair.rejected_states(asked.rejected)]
        tokens += [pair.chosen_start + asked.chosen, pair.rejected_start + asked.rejected]
        counts += [len(asked.chosen), len(asked.rejected)]
    where, what = (torch.from_numpy(np.concatenate(x)).to(row.tokens.device) for x in (states, tokens))
    return where, row.tokens[what], counts


def _sides(values: Tensor, counts: list[int]) -> Sides:
    parts = values.split(counts)
    return list(parts[0::2]), list(parts[1::2])


Ask = Callable[[Sequence[Pair]], list[Positions]]
"""Of which response tokens of each pair log-probs are wanted."""

Scores = dict[int, tuple[np.ndarray, np.ndarray]]
"""By a pair's place: log-probs of its response tokens, chosen and rejected, fp32 nats; NaN where not asked for."""


def every_token(pairs: Sequence[Pair]) -> list[Positions]:
    return [Positions(np.arange(len(pair.chosen)), np.arange(len(pair.rejected))) for pair in pairs]


def score_pairs(policy: Policy, pairs: Sequence[Pair], budget: RowBudget, ask: Ask = every_token) -> list[Pair]:
    """The pairs with a policy's log-probs as those of their reference.

    They are in training order and begin with a whole global batch, so the rows are those that the trainer will plan for
    its first epoch, and on every device policy and reference run through the same shapes.
    """
    scores: Scores = {}
    for rows in batch_rows(pairs, budget):
        for indices in rows:
            if len(indices):
                scores |= row_logprobs(policy, pairs, indices, ask)
    return with_logprobs(pairs, scores)


def batch_rows(pairs: Sequence[Pair], budget: RowBudget) -> Iterator[list[np.ndarray]]:
    """The rows of each global batch, as the first epoch has them; see `plan_rows`."""
    lengths = lengths_of(pairs)
    for start in range(0, len(pairs), budget.batch_size):
        yield plan_rows(np.arange(start, min(start + budget.batch_size, len(pairs))), lengths, budget)


@torch.no_grad()
def row_logprobs(policy: nn.Module, pairs: Sequence[Pair], indices: np.ndarray, ask: Ask) -> Scores:
    """Log-probs of the pairs that make up a row."""
    mine = [pairs[index] for index in indices]
    row, asked = assemble(mine).to(next(policy.parameters()).device), ask(mine)
    logprobs, counts = _answers(policy, row, asked)
    chosen, rejected = _sides(logprobs.cpu(), counts)  # in one copy
    scores = {}
    for index, pair, at, w, r in zip(indices, row.segments, asked, chosen, rejected, strict=True):
        scores[int(index)] = _spread(w, at.chosen, pair.chosen), _spread(r, at.rejected, pair.rejected)
    return scores


def _spread(logprobs: Tensor, positions: np.ndarray, length: int) -> np.ndarray:
    every = np.full(length, np.nan, np.float32)
    every[positions] = logprobs.numpy()
    return every


def with_logprobs(pairs: Sequence[Pair], scores: Scores) -> list[Pair]:
    """The pairs with what a reference says of them."""
    sides = (scores[index] for index in range(len(pairs)))
    return [
        replace(pair, chosen_ref=chosen, rejected_ref=rejected)
        for pair, (chosen, rejected) in zip(pairs, sides, strict=True)
    ]
