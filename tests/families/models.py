"""The tiny random model of a specification, and what plain transformers computes with it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as IMAGES

from sampo_ray.training.batching import Pair
from tests.families.specs import Spec

MAX_PARAMETERS = 2_000_000
LENGTHS = ((37, 30, 9), (37, 12, 41), (5, 1, 23), (1, 60, 2), (5, 17, 17))
"""Tokens of prompt, chosen and rejected: twice the same prompt, one token, windows of 16 left behind."""


def write_model(spec: Spec, folder: Path) -> None:
    """Writes the family's model with random weights, fp32; of one that also sees, the whole."""
    torch.manual_seed(0)
    whole = AutoModelForImageTextToText if spec.model_type in IMAGES else AutoModelForCausalLM
    model = whole.from_config(spec.config(), dtype=torch.float32)
    assert sum(each.numel() for each in model.parameters()) < MAX_PARAMETERS, f"{spec.family} is not tiny"
    randomise(model)
    model.save_pretrained(folder)


@torch.no_grad()
def randomise(model: PreTrainedModel) -> None:
    """Weights with enough spread that log-probs differ; buffers that are saved get noise, so that a lost one shows."""
    embeddings = {id(each.weight) for each in model.modules() if isinstance(each, torch.nn.Embedding)}
    for parameter in model.parameters():
        if id(parameter) in embeddings:
            parameter.normal_()
        elif parameter.dim() > 1:
            parameter.normal_(
                0.0, 1.3 / math.sqrt(parameter[0].numel() if parameter.dim() == 2 else parameter.shape[-1])
            )
        else:
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    saved = model.state_dict().keys()
    for name, buffer in model.named_buffers():
        if name in saved and buffer.is_floating_point():
            noise = torch.randn_like(buffer)
            buffer.add_(noise * buffer if buffer.any() else noise, alpha=0.2)  # zeros may stand for what is not seen


@torch.no_grad()
def plain_model(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Plain transformers' model of a folder, with the weights that are there: it sets some to others as it loads them
    (Youtu's embedding of the padding token, a bias of Zaya's router). Scores are capped, which its default leaves out.
    """
    text = AutoConfig.from_pretrained(folder).get_text_config()
    settings = {"attn_implementation": "eager"} if getattr(text, "attn_logit_softcapping", None) else {}
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **settings)
    if hasattr(model.config, "rescale_every"):  # when RWKV is evaluated it halves its weights, in place
        model.config.rescale_every = 0
    files = tensors_in(folder)
    for name, each in model.state_dict().items():
        if name in files and files[name].shape == each.shape:
            each.copy_(files[name])
    return model


def invented(folder: Path) -> set[str]:
    """Weights that the model has and its files have not."""
    _, found = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    return set(found["missing_keys"])


def tensors_in(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's safetensors."""
    return {name: each for file in sorted(folder.glob("*.safetensors")) for name, each in load_file(file).items()}


def pairs() -> list[Pair]:
    """Pairs of random tokens, of LENGTHS; prompts of the same length are the same."""
    random = np.random.default_rng(7)
    prompts = {length: random.integers(0, 330, length, dtype=np.int32) for length in {each[0] for each in LENGTHS}}
    answers = [[random.integers(0, 330, length, dtype=np.int32) for length in each[1:]] for each in LENGTHS]
    return [Pair(str(i), prompts[each[0]], *answers[i]) for i, each in enumerate(LENGTHS)]


def sequences(pairs: Sequence[Pair]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Prompt and answer of each answer: chosen and rejected of the first pair, then of the next."""
    return [(pair.prompt, answer) for pair in pairs for answer in (pair.chosen, pair.rejected)]


@dataclasses.dataclass(frozen=True)
class Truth:
    """Log-probs of each answer's tokens, fp32 nats, and gradients of their weighted sum by parameter."""

    logprobs: list[Tensor]
    gradients: dict[str, Tensor | None]


def truth_of(model: PreTrainedModel, pairs: Sequence[Pair]) -> Truth:
    """What transformers computes with each sequence alone, through the whole model."""
    model.eval().zero_grad()
    logprobs = []
    for prompt, answer in sequences(pairs):
        values = answer_logprobs(model, prompt, answer)
        (values * weights_like(values)).sum().backward()
        logprobs.append(values.detach())
    return Truth(logprobs, {name: each.grad for name, each in model.named_parameters()})


def answer_logprobs(model: PreTrainedModel, prompt: np.ndarray, answer: np.ndarray) -> Tensor:
    """[answer] log-probs."""
    tokens = torch.from_numpy(np.concatenate([prompt, answer]).astype(np.int64))
    logits = model(input_ids=tokens[None], use_cache=False).logits[0, len(prompt) - 1 : -1]
    return logits.float().log_softmax(-1).gather(-1, tokens[len(prompt) :, None])[:, 0]


def weights_like(values: Tensor) -> Tensor:
    """The weights of an answer's tokens in the sum whose gradient is compared: both signs, as in a loss of pairs."""
    return torch.cos(torch.arange(len(values), dtype=torch.float32) + len(values))


def largest_difference(ours: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """Over all tokens; inf where one is not finite."""
    difference = (torch.cat(list(ours)).float() - torch.cat(list(truth)).float()).abs().max()
    return float(difference) if difference.isfinite() else math.inf


def mean_difference(ours: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """Over all tokens, of the absolute difference."""
    return float((torch.cat(list(ours)).float() - torch.cat(list(truth)).float()).abs().mean())


def largest_gradient_error(ours: dict[str, Tensor | None], truth: dict[str, Tensor | None]) -> tuple[float, str]:
    """Of |ours - truth| / |truth|, and its parameter; inf where one side has a gradient and the other has none.

    Gradients that are small beside the largest one are compared with a thousandth of that: some are zero but for
    rounding, as those of key biases.
    """
    if ours.keys() != truth.keys():
        return math.inf, f"parameters {sorted(ours.keys() ^ truth.keys())[:3]}"
    floor = 1e-3 * max(float(each.norm()) for each in truth.values() if each is not None)
    errors = {name: _relative(ours[name], truth[name], floor) for name in truth}
    worst = max(errors, key=lambda name: errors[name])
    return errors[worst], worst


def _relative(ours: Tensor | None, truth: Tensor | None, floor: float) -> float:
    if ours is None or truth is None:
        present = ours if truth is None else truth
        return 0.0 if present is None or not present.any() else math.inf
    error = float((ours.float() - truth.float()).norm() / max(float(truth.norm()), floor))
    return error if math.isfinite(error) else math.inf


@torch.no_grad()
def is_causal(model: PreTrainedModel) -> bool:
    """Whether the logits of tokens stay what they are when those after them are others."""
    tokens = torch.arange(3, 63)[None]
    other = torch.cat([tokens[:, :30], tokens[:, 30:] + 200], dim=1)
    before, after = (model.eval()(input_ids=each, use_cache=False).logits[0, :30] for each in (tokens, other))
    return largest_difference([before], [after]) < 1e-3  # mixtures of experts round differently
