"""The model of trainer and reference worker: from a row of pairs to log-probabilities of selected tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy
from transformers import PreTrainedModel

from sampo_ray.config.rows import Attention, RowBudget
from sampo_ray.internals.torch import checkpoint_contexts, limit_recompilations
from sampo_ray.training import cpu
from sampo_ray.training.architecture import (
    IMPLEMENTATIONS,
    check_architecture,
    inexact,
    keys_picked,
    longrope_boundary,
    not_exact,
)
from sampo_ray.training.attention import over_row
from sampo_ray.training.batching import Pair, Row, Segments, assemble, lengths_of, plan_rows, predecessors
from sampo_ray.training.head import TiledHead, decoder_of
from sampo_ray.training.loading import Weights, in_training_dtype, without_weights
from sampo_ray.training.logprobs import Distributions
from sampo_ray.training.lora import add_adapters
from sampo_ray.training.noise import silence, without_noise
from sampo_ray.training.reduction import Positions
from sampo_ray.training.sequences import Sequences

if TYPE_CHECKING:
    from jaxtyping import Float, Int64

    from sampo_ray.config.sections import LoraConfig


Reference: TypeAlias = "Callable[[Row, Tensor], Distributions]"
"""A reference in the policy's process: from (row, [selected] positions of tokens) to its distributions over them."""

PairValues: TypeAlias = "tuple[list[Float[Tensor, ' kept_w']], list[Float[Tensor, ' kept_l']]]"
"""Values at the selected tokens of each pair of a row, chosen and rejected, fp32."""

SelectPositions = Callable[[Sequence[Pair]], list[Positions]]
"""Selects the response tokens of each pair whose log-probs are computed."""

Scores = dict[int, tuple[np.ndarray, np.ndarray]]
"""By a pair's index: log-probs of its response tokens, chosen and rejected, fp32 nats; NaN where not selected."""


ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
}
"""The kernels that SDPA may call."""

PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default}
"""The operations of a linear layer, without and with a bias; its weight is the last operand."""


class Policy(nn.Module):
    """A causal language model over rows of pairs, whose head is computed at selected positions only."""

    def __init__(self, model: PreTrainedModel, kind: Attention = "segments") -> None:
        super().__init__()
        check_architecture(model, kind)
        cpu.use_fp32_kernels(model)
        model.set_output_embeddings(TiledHead(model))
        self.model, self.attention = model, kind
        self._batched = False
        self._boundary, self._picked = longrope_boundary(model.config.get_text_config()), keys_picked(model.config)
        soft_capped = getattr(model.config.get_text_config(), "attn_logit_softcapping", None)
        how = IMPLEMENTATIONS[kind] or ("eager" if soft_capped else None)  # transformers' SDPA leaves soft-capping out
        if how is not None:
            model.set_attn_implementation(how)

    def in_batches(self, batched: bool) -> Policy:
        """Has the model's own attention take the answers of a row in two padded batches, or each alone."""
        self._batched = batched
        return self

    def train(self, mode: bool = True) -> Policy:
        """Only what is computed again in the backward pass is told that it is trained: all else that models do in
        training alone is noise, as dropout, or a loss of their own.
        """
        super().train(mode)
        for module in self.model.modules():
            module.training = mode and bool(getattr(module, "gradient_checkpointing", False))
        return self

    @property
    def head(self) -> TiledHead:
        head: TiledHead = self.model.get_output_embeddings()
        return head

    def forward(
        self,
        tokens: Int64[Tensor, " tokens"],
        positions: Int64[Tensor, " tokens"],
        segments: tuple[Segments, ...],
        predicted: Int64[Tensor, " selected"],
        reference: Distributions | None = None,
    ) -> Float[Tensor, " selected"] | Float[Tensor, "3 selected"]:
        """Log-probabilities, fp32 nats, of the tokens at row positions `predicted`; with the distributions of a
        `reference` over them, its log-probabilities come second, and KL(reference || policy) third.
        """
        hidden = self.hidden(tokens, positions, segments, predicted)
        logprobs: Tensor = self.head(hidden, tokens[predicted], reference)
        return logprobs

    def hidden(
        self,
        tokens: Int64[Tensor, " tokens"],
        positions: Int64[Tensor, " tokens"],
        segments: tuple[Segments, ...],
        predicted: Int64[Tensor, " selected"],
    ) -> Float[Tensor, "selected dim"]:
        """What the head predicts the tokens at row positions `predicted` from: the last hidden states of the tokens
        before them, for most models.
        """
        if self.attention == "own":
            return self._hidden_of_sequences(tokens, segments, predicted)
        decoder = decoder_of(self.model)
        with over_row(segments, tokens.device):
            output = decoder(
                input_ids=tokens[None],
                # Without a mask transformers takes the row's positions for those of sequences of their own.
                attention_mask=torch.ones_like(tokens[None]),
                position_ids=positions[None],
                use_cache=False,
            )
        hidden: Tensor = output.last_hidden_state[0]
        before = predecessors(segments, len(tokens)).to(tokens.device)
        return self.head.inputs(hidden[before[predicted]])

    def _hidden_of_sequences(self, tokens: Tensor, segments: tuple[Segments, ...], predicted: Tensor) -> Tensor:
        """`hidden`, computed by the model's own attention. It needs no mask: a causal model does not see the padding
        on the right.
        """
        picked = self._picked if self._batched else 0
        sequences = Sequences.of(segments, len(tokens), self._boundary, picked).to(tokens.device)
        decoder = decoder_of(self.model)
        outputs = [decoder(input_ids=tokens[batch], use_cache=False) for batch in sequences.batches]
        hidden = torch.cat([output.last_hidden_state.flatten(0, 1) for output in outputs])
        return self.head.inputs(hidden[sequences.before[predicted]])

    @torch.no_grad()
    def distributions(self, row: Row, predicted: Int64[Tensor, " selected"]) -> Distributions:
        """This policy's distributions over the tokens at positions `predicted` of a row (a `Reference`)."""
        return self.head.distributions(self.hidden(row.tokens, row.positions, row.segments, predicted))


def load_policy(
    path: str | Path,
    gradient_checkpointing: bool | Literal["selective"] = False,
    device: str | torch.device = "cpu",
    lora: LoraConfig | None = None,
    seed: int = 0,
    attention: Attention = "segments",
    tensors: Mapping[str, Tensor] | None = None,
) -> Policy:
    """Loads a Hugging Face folder or hub name in bf16, safetensors only. `gradient_checkpointing`: see TrainerConfig.

    With `lora` the model is frozen and gets new adapters, random by `seed`; `attention`: see ModelConfig. `tensors`, by
    a checkpoint's names, take the place of those in its files, and are shared. ConfigError, naming `model.path`, when
    it cannot be opened or its head is not a plain matrix; naming `model.attention` if that is not exact for its type.
    """
    model, weights = without_weights(path, IMPLEMENTATIONS[attention], tensors, change=without_noise)
    policy = _policy_without_weights(model, gradient_checkpointing, lora, seed, attention)
    weights.fill(policy.model, device)
    return policy.to(device)


def policy_without_weights(
    path: str | Path,
    gradient_checkpointing: bool | Literal["selective"] = False,
    lora: LoraConfig | None = None,
    seed: int = 0,
    attention: Attention = "segments",
) -> tuple[Policy, Weights]:
    """`load_policy` before any weight but those of the adapters is in memory, and what reads them."""
    model, weights = without_weights(path, IMPLEMENTATIONS[attention], change=without_noise)
    return _policy_without_weights(model, gradient_checkpointing, lora, seed, attention), weights


def _policy_without_weights(
    model: PreTrainedModel,
    gradient_checkpointing: bool | Literal["selective"],
    lora: LoraConfig | None,
    seed: int,
    attention: Attention,
) -> Policy:
    if attention != "own" and (reason := not_exact(model)):
        raise inexact(model, attention, reason)
    in_training_dtype(model)
    return policy_on(model, gradient_checkpointing, lora, seed, attention)


def policy_on(
    model: PreTrainedModel,
    gradient_checkpointing: bool | Literal["selective"] = False,
    lora: LoraConfig | None = None,
    seed: int = 0,
    attention: Attention = "segments",
) -> Policy:
    """`load_policy` of a model that is loaded already, without noise and for this attention."""
    if attention == "flex":  # for rows, scoring and adapters; without a compiled kernel it makes matrices of all scores
        limit_recompilations(32)
    if gradient_checkpointing and model.supports_gradient_checkpointing:
        settings: dict[str, object] = {"use_reentrant": False, "preserve_rng_state": False}
        if gradient_checkpointing == "selective":
            width = model.config.get_text_config().hidden_size
            kept = partial(_checkpoint_policy, width)
            settings["context_fn"] = partial(checkpoint_contexts, kept, ATTENTION | PRODUCTS)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
        model.disable_input_require_grads()  # not needed so, and some models add to their embeddings in place
    if lora is not None:
        add_adapters(model, lora, seed)
    silence(model)
    return Policy(model, attention)


def _checkpoint_policy(width: int, _: object, op: object, *operands: Tensor, **__: object) -> CheckpointPolicy:
    """Selective checkpointing: keeps attention and the products that make a layer's states wider."""
    wider = op in PRODUCTS and width <= operands[-1].shape[0] < operands[-1].shape[1]
    return CheckpointPolicy.MUST_SAVE if wider or op in ATTENTION else CheckpointPolicy.PREFER_RECOMPUTE


def pair_logprobs(policy: nn.Module, row: Row, positions: list[Positions]) -> PairValues:
    """Log-probabilities of the selected tokens of each pair of a row, nats."""
    return _by_pair(*_selected_logprobs(policy, row, positions))


def _selected_logprobs(
    policy: nn.Module, row: Row, positions: list[Positions]
) -> tuple[Float[Tensor, " selected"], list[int]]:
    predicted, counts = _predicted(row, positions)
    return policy(row.tokens, row.positions, row.segments, predicted), counts


def pair_divergences(
    policy: nn.Module, reference: Reference, row: Row, positions: list[Positions]
) -> tuple[PairValues, PairValues, PairValues]:
    """Log-probabilities under the policy and under the reference, and KL(reference || policy); see `pair_logprobs`."""
    predicted, counts = _predicted(row, positions)
    compared = policy(row.tokens, row.positions, row.segments, predicted, reference(row, predicted))
    logprobs, reference_logprobs, divergences = (_by_pair(values, counts) for values in compared)
    return logprobs, reference_logprobs, divergences


def _predicted(row: Row, positions: list[Positions]) -> tuple[Int64[Tensor, " selected"], list[int]]:
    """Row positions of the selected tokens, and how many each response has."""
    tokens, counts = [], []
    for pair, selected in zip(row.segments, positions, strict=True):
        tokens += [pair.chosen_start + selected.chosen, pair.rejected_start + selected.rejected]
        counts += [len(selected.chosen), len(selected.rejected)]
    return torch.from_numpy(np.concatenate(tokens)).to(row.tokens.device), counts


def _by_pair(values: Tensor, counts: list[int]) -> PairValues:
    parts = torch.split(values, counts)
    return list(parts[0::2]), list(parts[1::2])


def every_token(pairs: Sequence[Pair]) -> list[Positions]:
    """Selects all response tokens (a `SelectPositions`)."""
    return [Positions(np.arange(len(pair.chosen)), np.arange(len(pair.rejected))) for pair in pairs]


def score_pairs(
    policy: Policy, pairs: Sequence[Pair], budget: RowBudget, select: SelectPositions = every_token
) -> list[Pair]:
    """The pairs with this policy's log-probs as those of their reference.

    They are in training order and begin with a whole global batch. So the rows are those that the trainer will plan for
    its first epoch, and on every device policy and reference run through the same shapes.
    """
    scores: Scores = {}
    for indices in (row for rows in batch_rows(pairs, budget) for row in rows if len(row)):
        scores |= row_logprobs(policy, pairs, indices, select)
    return with_logprobs(pairs, scores)


def batch_rows(pairs: Sequence[Pair], budget: RowBudget) -> Iterator[list[np.ndarray]]:
    """The rows of each global batch in the first epoch; see `plan_rows`."""
    lengths = lengths_of(pairs)
    for start in range(0, len(pairs), budget.batch_size):
        yield plan_rows(np.arange(start, min(start + budget.batch_size, len(pairs))), lengths, budget)


@torch.no_grad()
def row_logprobs(policy: nn.Module, pairs: Sequence[Pair], indices: np.ndarray, select: SelectPositions) -> Scores:
    """Log-probs of the pairs that make up a row."""
    row_pairs = [pairs[index] for index in indices]
    row, positions = assemble(row_pairs).to(next(policy.parameters()).device), select(row_pairs)
    logprobs, counts = _selected_logprobs(policy, row, positions)
    chosen, rejected = _by_pair(logprobs.cpu(), counts)  # in one copy
    scores = {}
    for index, pair, at, w, r in zip(indices, row.segments, positions, chosen, rejected, strict=True):
        scores[int(index)] = _scatter(w, at.chosen, pair.chosen), _scatter(r, at.rejected, pair.rejected)
    return scores


def _scatter(logprobs: Tensor, positions: np.ndarray, length: int) -> np.ndarray:
    """[length] log-probs: those given at `positions`, NaN elsewhere."""
    values = np.full(length, np.nan, np.float32)
    values[positions] = logprobs.numpy()
    return values


def with_logprobs(pairs: Sequence[Pair], scores: Scores) -> list[Pair]:
    """The pairs with a reference's log-probs."""
    return [replace(pair, chosen_ref=scores[i][0], rejected_ref=scores[i][1]) for i, pair in enumerate(pairs)]
