"""How a model makes logits of its decoder's output: read from it, and held against its own `forward`."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from sampo_ray.errors import ConfigError, first_line
from sampo_ray.training.logprobs import Distributions, LogitShape, token_comparisons, token_logprobs

if TYPE_CHECKING:
    from jaxtyping import Float, Int64

SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier", "logits_mup_width_multiplier")
"""Fields of configurations with a factor of the logits (Cohere's `logit_scale`) or a divisor (Granite's
`logits_scaling`, which HyperCLOVA X multiplies by); MPT has a `logit_scale` that nothing reads."""

CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""Fields with a bound of the logits: those of Gemma, RecurrentGemma and xLSTM."""

VOCABULARY = "unpadded_vocab_size"
"""The field with how many rows of the head are words, where it has more of them (Inkling)."""

TOKENS, ROWS, WORDS = 32, 24, 20
"""Of the logits that are compared: tokens, rows of the head and, where these are padded, words."""

TYPICAL = 100.0
"""Standard deviation of the products compared: above common caps, and with some values far below them."""

TOLERANCE = 1e-6
"""Of the compared logits, in parts of the largest: some families return them in fp32."""


@dataclass(frozen=True)
class HeadSpec:
    """What is between a decoder's output and the logits.

    `before` are the names of the modules that the hidden states go through, in order: none where the head takes the
    decoder's output. The last of them may hold the head. `words` is how many rows of the head count, None for all.
    """

    before: tuple[str, ...]
    shape: LogitShape
    words: int | None


class TiledHead(nn.Module):
    """Replaces a model's output embedding. It is a module, so that ZeRO-3 gathers its weight around the call."""

    def __init__(self, model: PreTrainedModel) -> None:
        """ConfigError, naming `model.path`, for a head that `head_of` refuses."""
        super().__init__()
        self.spec = head_of(model)
        self.weight, self.bias = matrix_of(model)
        self._before = tuple(model.get_submodule(name) for name in self.spec.before)  # in a tuple, theirs stay theirs

    def forward(
        self,
        hidden: Float[Tensor, "tokens dim"],
        targets: Int64[Tensor, " tokens"] | None = None,
        reference: Distributions | None = None,
    ) -> Tensor:
        """The targets' log-probs or, with a reference, comparisons with it; see `logprobs`.

        Without targets the hidden states themselves: so a module around the head gives what it would hand to it.
        """
        if targets is None:
            return hidden
        if reference is None:
            return token_logprobs(self.distributions(hidden), targets)
        return token_comparisons(self.distributions(hidden), reference, targets)

    def inputs(self, hidden: Float[Tensor, "tokens width"]) -> Float[Tensor, "tokens dim"]:
        """What the head is given, of the decoder's output."""
        for module in self._before:
            hidden = module(hidden)
        return hidden

    def distributions(self, hidden: Float[Tensor, "tokens dim"]) -> Distributions:
        """The distributions over the next token at these inputs."""
        words = self.spec.words
        if words is None:
            return Distributions(hidden, self.weight, self.bias, self.spec.shape)
        bias = None if self.bias is None else self.bias[:words]
        return Distributions(hidden, self.weight[:words], bias, self.spec.shape)


def matrix_of(model: PreTrainedModel) -> tuple[nn.Parameter, nn.Parameter | None]:
    """The weight [vocabulary, dim] of a model's head, and its bias if it has one. ConfigError if it is no matrix."""
    name, head = type(model).__name__, model.get_output_embeddings()
    if head is None:
        raise ConfigError(f"model.path: {name} has no language-model head")
    weight, bias = getattr(head, "weight", None), getattr(head, "bias", None)
    if not isinstance(weight, nn.Parameter) or weight.ndim != 2:
        raise ConfigError(f"model.path: {name} has a head that is not one matrix, which is not supported")
    return weight, bias


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """The part of a model from token ids to last hidden states.

    transformers looks for it by name, and finds the head where that is called `decoder` (ModernBERT's), or nothing but
    the model where its base has another name than it says (Llama-4's).
    """
    decoder: nn.Module = model.get_decoder()
    if decoder is model.get_output_embeddings():
        decoder = model.base_model
    return decoder if decoder is not model else model.model


def head_of(model: PreTrainedModel) -> HeadSpec:
    """Reads how a model makes its logits, and proves it: the model's own `forward`, with random hidden states in place
    of its decoder's output and a random head of few rows, gives the same logits.

    The model is not changed, and may be on the meta device. ConfigError, naming `model.path`, where no reading of its
    configuration gives its logits.
    """
    name, (weight, _), config = type(model).__name__, matrix_of(model), model.config.get_text_config()
    try:
        probe = _Probe(model)
        theirs = probe.logits()
        before = probe.before()
        products = probe.products(before)
    except Exception as error:  # whatever a forward raises that expects more than token ids
        raise ConfigError(f"model.path: {name} has logits that cannot be computed: {first_line(error)}") from error
    words = getattr(config, VOCABULARY, None)
    words = words if words is not None and words < len(weight) else None
    products = products if words is None else products[:, :WORDS]
    if products.shape != theirs.shape:
        difference = f"of shape {list(theirs.shape)} where the head's products are {list(products.shape)}"
        raise ConfigError(f"model.path: {name} has logits that are not supported: {difference}")
    found = {shape: _difference(shape, products, theirs) for shape in _readings(config)}
    nearest = min(found, key=lambda shape: found[shape])
    if found[nearest] <= TOLERANCE:
        return HeadSpec(before, nearest, words)
    fields = "".join(f", {field}={value}" for field, value in _numbers(config, SCALES + CAPS))
    raise ConfigError(
        f"model.path: {name} has logits that are not supported: they differ from those of its head{fields} by "
        f"{found[nearest]:.0e} of the largest"
    )


def _readings(config: PretrainedConfig) -> Iterator[LogitShape]:
    """What a configuration may say of the logits: families differ in whether they multiply, divide or do nothing."""
    factors = [(value, 1 / value, 1.0) for _, value in _numbers(config, SCALES)]
    caps = [value for _, value in _numbers(config, CAPS)]
    for scales, cap in itertools.product(itertools.product(*factors), (*caps, None)):
        yield LogitShape(math.prod(scales, start=1.0), cap)


def _numbers(config: PretrainedConfig, fields: tuple[str, ...]) -> list[tuple[str, float]]:
    found = [(field, getattr(config, field, None)) for field in fields]
    return [(field, float(value)) for field, value in found if isinstance(value, int | float) and value]


def _difference(shape: LogitShape, products: Tensor, logits: Tensor) -> float:
    """The largest, in parts of the largest logit."""
    return float((shape.logits_of(products.clone()) - logits).abs().max() / logits.abs().max())


class _Probe:
    """A copy of a model without its decoder, whose few weights are random, fp64."""

    def __init__(self, model: PreTrainedModel) -> None:
        decoder, (weight, bias) = decoder_of(model), matrix_of(model)
        base = model.base_model if model.base_model is not model else decoder
        self.random = torch.Generator().manual_seed(0)
        self.hidden = self._normal(1, TOKENS, weight.shape[1])
        stub = _Decoder(base, decoder, self.hidden)
        inside = {id(each) for each in base.parameters()}
        shapes = {id(each): each.shape for each in model.parameters() if id(each) not in inside}
        shapes |= {id(each): torch.Size([ROWS, *each.shape[1:]]) for each in (weight, bias) if each is not None}
        copies: dict[int, object] = {id(base): stub}
        for key, shape in shapes.items():
            copies[key] = nn.Parameter(self._normal(*shape).div_(shape[-1] ** 0.5))
        self.model = copy.deepcopy(model, copies).eval()
        self.weight, self.bias = matrix_of(self.model)
        self.weight.data.mul_(TYPICAL)
        config = self.model.config.get_text_config()
        if getattr(config, VOCABULARY, None) is not None:
            setattr(config, VOCABULARY, WORDS if getattr(config, VOCABULARY) < len(weight) else ROWS)
        self.called: list[str] = []
        for name, module in self.model.named_modules():
            if module not in (self.model, stub):
                module.register_forward_pre_hook(partial(self._record, name))

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.random, dtype=torch.float64)

    def _record(self, name: str, *_: object) -> None:
        if not any(name.startswith(f"{outer}.") for outer in self.called):
            self.called.append(name)

    @torch.no_grad()
    def logits(self) -> Float[Tensor, "tokens rows"]:
        """Those of the model's own forward."""
        logits: Tensor = self.model(input_ids=torch.zeros(1, TOKENS, dtype=torch.int64)).logits
        return logits[0].double()

    def before(self) -> tuple[str, ...]:
        """See `HeadSpec`; after `logits`."""
        head = self.model.get_output_embeddings()
        [name] = [name for name, module in self.model.named_modules() if module is head]
        return tuple(each for each in self.called if each != name)

    @torch.no_grad()
    def products(self, before: tuple[str, ...]) -> Float[Tensor, "tokens rows"]:
        """Those of the head with what the modules before it give."""
        self.model.get_output_embeddings().forward = lambda hidden: hidden
        inputs = self.hidden[0]
        for name in before:
            inputs = self.model.get_submodule(name)(inputs)
        return nn.functional.linear(inputs, self.weight, self.bias)


class _Decoder(nn.Module):
    """Stands for a model's decoder, or for what holds it: has its attributes, and returns given hidden states."""

    def __init__(self, base: nn.Module, decoder: nn.Module, hidden: Tensor) -> None:
        super().__init__()
        self.stands_for, self.hidden = (base, decoder), hidden

    def __getattr__(self, name: str) -> Tensor | nn.Module:
        base, decoder = self.stands_for
        value: Tensor | nn.Module = getattr(base if hasattr(base, name) else decoder, name)
        return self if value is decoder else value

    def forward(self, *_: object, **__: object) -> _Output:
        return _Output((self.hidden,))


class _Output(tuple[Tensor, ...]):
    """A decoder's output with nothing but the last hidden states."""

    def __getattr__(self, name: str) -> Tensor | None:
        return self[0] if name == "last_hidden_state" else None
