"""How a model's attention is computed in training: in rows of pairs where that is exact, else as transformers does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from sampo_ray.config.rows import Attention
from sampo_ray.errors import ConfigError, described
from sampo_ray.internals.torch import made_up_values
from sampo_ray.training.architecture import inexact, longrope_boundary, not_exact, on_meta
from sampo_ray.training.batching import Pair, assemble
from sampo_ray.training.lora import notes_on
from sampo_ray.training.noise import noise_in
from sampo_ray.training.policy import Policy, every_token, pair_logprobs

if TYPE_CHECKING:
    from sampo_ray.config.sections import ModelConfig


def choose_attention(config: PretrainedConfig, model: ModelConfig, max_length: int) -> tuple[Attention, list[str]]:
    """How attention is computed for sequences of up to `max_length` tokens, and what the user is told of that and of
    what else in training is not as the model's configuration has it. One forward pass on the meta device proves it.

    ConfigError, naming the field, where it cannot be trained, or not with the `model.attention` that is asked for.
    """
    plain = on_meta(config, model.lora)
    name, notes = type(plain).__name__, list[str]()
    if model.lora is not None:
        notes += notes_on(plain, model.lora)
    if noise := noise_in(config):
        values = ", ".join(f"{field}={value:g}" for field, value in noise.items())
        notes.append(f"model.path: {name} is trained without the noise of its config.json ({values})")
    if not plain.supports_gradient_checkpointing:
        notes.append(f"trainer.gradient_checkpointing: {name} has none, so what its layers compute is kept")
    reason = _why_not_rows(plain, max_length)
    if model.attention not in (None, "own") and reason:
        raise inexact(plain, model.attention, reason)
    kind: Attention = model.attention or ("own" if reason else "segments")
    if kind != "own":
        # FlexAttention has no meta device; the rows that it takes are those of segments.
        trouble = trouble_of(on_meta(config, model.lora, "segments"), "segments")
        if trouble is None:
            return kind, notes
        if model.attention is not None:
            asked = f"model.attention={model.attention!r}"
            raise ConfigError(f"{asked} does not work for {name}: {trouble}; use model.attention=own")
        kind, reason = "own", trouble
    if trouble := trouble_of(plain, "own"):
        raise ConfigError(f"model.path: {name} cannot be trained: {trouble}; choose another model")
    if model.attention is None:
        notes.append(
            f"model.attention=own, since {name} is not computed in rows of pairs ({reason}): each answer is behind a "
            "prompt of its own, so prompts are computed twice"
        )
    return kind, notes


def _why_not_rows(model: PreTrainedModel, max_length: int) -> str | None:
    """Why segments would not be exact for a model, as far as its type and configuration say."""
    if reason := not_exact(model):
        return reason
    boundary = longrope_boundary(model.config.get_text_config())
    if boundary is not None and max_length > boundary:
        return f"beyond {boundary} tokens longrope goes by a row's largest position"
    return None


def trouble_of(model: PreTrainedModel, kind: Attention) -> str | None:
    """What a forward pass of the training path raises for a model on the meta device, or None.

    ConfigError if its head or its attention is refused.
    """
    lengths = ((3, 2, 90), (3, 5, 2))  # some models compute more than a chunk of tokens by other code
    pairs = [Pair("", *(np.zeros(tokens, np.int32) for tokens in each)) for each in lengths]
    policy, row = Policy(model, kind).train(), assemble(pairs).to("meta")

    def trouble() -> str | None:
        try:
            with made_up_values():
                pair_logprobs(policy, row, every_token(pairs))
        except NotImplementedError:  # an operation that the meta device lacks
            return None
        except Exception as error:  # of a model's code, which may be any
            return described(error)
        return None

    with first_layers(model):
        if trouble() is None:
            return None
    return trouble()  # some models count on having all


@contextmanager
def first_layers(model: PreTrainedModel) -> Iterator[None]:
    """Within, a deep model has only its first layers, among them one of each kind. Its passes take seconds else."""
    config = model.config.get_text_config()
    count, kinds = config.num_hidden_layers, getattr(config, "layer_types", None)
    stacks = [
        (module, name, layers)
        for module in model.modules()
        for name, layers in module.named_children()
        if isinstance(layers, nn.ModuleList) and len(layers) == count
    ]
    firsts = dict[object, int]()
    for _, _, layers in stacks:
        for index, layer in enumerate(layers):
            parts = tuple((name, type(part)) for name, part in layer.named_modules())
            firsts.setdefault((parts, kinds and kinds[index]), index)
    kept = max([1, *firsts.values()]) + 1
    try:
        for module, name, layers in stacks:
            setattr(module, name, nn.ModuleList(list(layers)[:kept]))
        config.num_hidden_layers = min(kept, count)
        yield
    finally:
        config.num_hidden_layers = count
        for module, name, layers in stacks:
            setattr(module, name, layers)
