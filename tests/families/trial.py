"""A family's trial: whether the product trains, exports and adapts its tiny model exactly, or refuses it."""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import tempfile
import traceback
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from sampo_ray.config.rows import RowBudget
from sampo_ray.config.run import RunConfig
from sampo_ray.config.sections import LoraConfig
from sampo_ray.console.demo_task import tiny_tokenizer
from sampo_ray.errors import ConfigError
from sampo_ray.loop.validate import check
from sampo_ray.run.version_files import write_version
from sampo_ray.run.versions import VersionInfo
from sampo_ray.training.attention import NAME
from sampo_ray.training.batching import Pair, assemble
from sampo_ray.training.loading import load_model
from sampo_ray.training.lora import add_adapters, named_weights
from sampo_ray.training.policy import Policy, every_token, load_policy, pair_logprobs, score_pairs
from sampo_ray.training.saving import Cast, SavedModel
from tests.families.models import (
    LENGTHS,
    Truth,
    answer_logprobs,
    is_causal,
    largest_difference,
    largest_gradient_error,
    mean_difference,
    pairs,
    sequences,
    truth_of,
    weights_like,
    write_model,
)
from tests.families.specs import Spec

EXACT = 1e-4
"""Nats of log-probs, and relative error of gradients."""
MAX_LENGTH = max(prompt + max(answers) for prompt, *answers in LENGTHS)
BUDGET = RowBudget(batch_size=3, tokens_per_row=200)


@dataclasses.dataclass
class Result:
    """What came of a family's trial. Errors are nan where nothing was measured."""

    spec: Spec
    architecture: str = ""
    way: str = ""
    logprobs: float = math.nan
    gradients: float = math.nan
    export: str = ""
    lora: str = ""
    refusal: str = ""
    faults: list[str] = dataclasses.field(default_factory=list)

    @property
    def verdict(self) -> str:
        """exact, refused or wrong."""
        return "wrong" if self.faults else "refused" if self.refusal else "exact"

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """What is raised within is a fault."""
        try:
            yield
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            text = " ".join(str(error).split())[:300]
            self.faults.append(f"{name}: {type(error).__name__}: {text} ({Path(where.filename).name}:{where.lineno})")

    def limit(self, name: str, error: float) -> None:
        """An error above EXACT is a fault."""
        if not error <= EXACT:
            self.faults.append(f"{name}: {error:.1e}")


def try_family(spec: Spec) -> Result:
    """Its trial, in a folder that is gone afterwards. Raises only where the specification itself is wrong."""
    result = Result(spec)
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = Path(name) / "model"
        write_model(spec, folder)
        tiny_tokenizer(["one two three"], 270).save_pretrained(folder)
        model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        missing = info["missing_keys"]
        result.architecture = type(model).__name__
        with result.step("validation"):
            result.refusal = refusal_of(folder, lora=False)
        if not result.refusal and not result.faults:
            if missing:
                result.faults.append(f"accepted, though transformers invents {len(missing)} tensors, as {min(missing)}")
            elif not is_causal(model):
                result.faults.append("accepted, though its tokens see those after them")
            else:
                try_model(result, model, folder)
        del model
    gc.collect()
    return result


def loaded(folder: Path) -> PreTrainedModel:
    """Plain transformers' model of a folder, fp32."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model


def try_model(result: Result, model: PreTrainedModel, folder: Path) -> None:
    """The trial of an accepted model."""
    data = pairs()
    truth = truth_of(model, data)
    with result.step("training"):
        try_training(result, folder, data, truth)
    with result.step("export"):
        try_export(result, model, folder)
    with result.step("LoRA"):
        result.lora = refusal_of(folder, lora=True)
        if not result.lora:
            try_adapters(result, model, folder, data)
    with result.step("bf16"):
        try_bf16(result, folder, data, truth)


def run_config(folder: Path, lora: LoraConfig | None = None) -> RunConfig:
    """A run's configuration that starts from the model in `folder`."""
    data = folder.parent / "pairs.jsonl"
    data.write_text(json.dumps({"prompt": "one", "chosen": "two", "rejected": "three"}))
    tree = {
        "model": {"path": str(folder), "lora": lora and lora.model_dump()},
        "data": {"train": str(data), "max_length": MAX_LENGTH},
        "run": {"dir": str(folder.parent / "run")},
    }
    return RunConfig.model_validate(tree)


def refusal_of(folder: Path, *, lora: bool) -> str:
    """The message with which validation refuses the model; empty if it does not."""
    try:
        check(run_config(folder, LoraConfig(rank=4) if lora else None))
    except ConfigError as error:
        return str(error).replace(str(folder), "...")
    return ""


def policy_of(folder: Path) -> Policy:
    """The product's policy, fp32, with gradient checkpointing."""
    model = load_model(folder, NAME, dtype=torch.float32)
    if model.supports_gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return Policy(model)


def answers_of(policy: Policy, data: Sequence[Pair]) -> list[Tensor]:
    """Log-probs of each answer's tokens: all pairs in one row."""
    chosen, rejected = pair_logprobs(policy, assemble(data), every_token(data))
    return [values for pair in zip(chosen, rejected, strict=True) for values in pair]


def weighted_sum(values: Iterable[Tensor]) -> Tensor:
    """The sum whose gradients are compared."""
    return torch.stack([(each * weights_like(each)).sum() for each in values]).sum()


def try_training(result: Result, folder: Path, data: list[Pair], truth: Truth) -> None:
    """Log-probs of rows of several pairs and of one, and gradients, against the truth."""
    policy, result.way = policy_of(folder), "segments"
    policy.eval()
    scored = score_pairs(policy, data, BUDGET)
    in_rows = [torch.from_numpy(each) for pair in scored for each in (pair.chosen_ref, pair.rejected_ref)]
    policy.train()
    values = answers_of(policy, data)
    weighted_sum(values).backward()
    result.logprobs = max(largest_difference(each, truth.logprobs) for each in (in_rows, values))
    gradients = {name: each.grad for name, each in policy.model.named_parameters()}
    result.gradients, worst = largest_gradient_error(gradients, truth.gradients)
    result.limit("log-probs", result.logprobs)
    result.limit(f"gradient of {worst}", result.gradients)


def try_bf16(result: Result, folder: Path, data: list[Pair], truth: Truth) -> None:
    """As a run loads it: no further from the fp32 truth than transformers' bf16 is."""
    policy = load_policy(folder, gradient_checkpointing=True)
    policy.train()
    values = answers_of(policy, data)
    weighted_sum(values).backward()
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        theirs = [answer_logprobs(plain, *each) for each in sequences(data)]
    ours, allowed = (mean_difference(each, truth.logprobs) for each in (values, theirs))
    if not ours <= 1.5 * allowed + 0.02:
        result.faults.append(f"bf16: log-probs are {ours:.2f} from those in fp32, transformers' {allowed:.2f}")


def weights_of(policy: Policy) -> Iterator[tuple[str, Tensor]]:
    """What the learner exports, fp32."""
    saved = SavedModel(policy.model)
    yield from saved.converted(saved.tensors(Cast(torch.float32)))


def export(policy: Policy, shell: Path) -> Path:
    """The folder that the product writes of the policy's weights."""
    folder = shell.parent / f"export-{len(list(shell.parent.iterdir()))}"
    write_version(str(folder), weights_of(policy), str(shell), VersionInfo(version=0, round=0, step=0))
    return folder


def tensors_in(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's safetensors."""
    return {name: each for file in sorted(folder.glob("*.safetensors")) for name, each in load_file(file).items()}


def try_export(result: Result, model: PreTrainedModel, folder: Path) -> None:
    """The export against `save_pretrained`'s files, and loaded again against the model."""
    saved = folder.parent / "saved"
    model.save_pretrained(saved)
    written = export(policy_of(folder), folder)
    if difference := different(tensors_in(written), tensors_in(saved)):
        result.faults.append(f"export: {difference}")
        return
    (prompt, answer), *_ = sequences(pairs())
    with torch.no_grad():
        again, plain = (answer_logprobs(each.eval(), prompt, answer) for each in (loaded(written), model))
    if not torch.equal(again, plain):
        result.faults.append(f"export: loaded again it differs by {float((again - plain).abs().max()):.1e}")
        return
    result.export = "same"


def different(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> str:
    """How two sets of tensors differ first; empty if they do not."""
    if missing := sorted(theirs.keys() - ours.keys()):
        return f"{len(missing)} tensors are missing, as {missing[0]}"
    if more := sorted(ours.keys() - theirs.keys()):
        return f"{len(more)} tensors are too many, as {more[0]}"
    for name, tensor in theirs.items():
        if tensor.shape != ours[name].shape or tensor.dtype != ours[name].dtype:
            return f"{name} is {ours[name].dtype} {tuple(ours[name].shape)}, not {tensor.dtype} {tuple(tensor.shape)}"
        if not torch.equal(tensor, ours[name]):
            return f"{name} has other values"
    return ""


def try_adapters(result: Result, model: PreTrainedModel, folder: Path, data: list[Pair]) -> None:
    """All-linear adapters: each has a gradient, and the model that they are merged into is the adapted one."""
    policy = policy_of(folder)
    add_adapters(policy.model, LoraConfig(rank=4), seed=1)
    policy.train()
    adapters = {name: each for name, each in policy.named_parameters() if ".lora_" in name}
    with torch.no_grad():
        for name, each in adapters.items():
            if "lora_B" in name:
                each.normal_(0.0, 0.02)
    values = answers_of(policy, data)
    weighted_sum(values).backward()
    if idle := [name for name, each in adapters.items() if each.grad is None or not each.grad.any()]:
        result.faults.append(f"LoRA: {len(idle)} adapters get no gradient, as {idle[0]}")
    merged = loaded(export(policy, folder)).eval()
    with torch.no_grad():
        plain = [answer_logprobs(merged, *each) for each in sequences(data)]
    error = largest_difference([each.detach() for each in values], plain)
    result.limit("LoRA: merged log-probs", error)
    adapted = (name.removesuffix(".weight") for name, weight in named_weights(policy.model) if weight.adapter)
    kinds = sorted({name.rpartition(".")[2] for name in adapted})
    result.lora = f"{', '.join(kinds)} ({error:.0e})"
