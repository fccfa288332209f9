"""A family's trial: whether the product trains, exports and adapts its tiny model exactly, or refuses it."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import math
import tempfile
import traceback
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sampo_ray.config.rows import Attention
from sampo_ray.config.run import RunConfig
from sampo_ray.config.sections import LoraConfig
from sampo_ray.console.demo_task import tiny_tokenizer
from sampo_ray.errors import ConfigError
from sampo_ray.loop.validate import check
from sampo_ray.run.version_files import write_version
from sampo_ray.run.versions import VersionInfo
from sampo_ray.training.architecture import IMPLEMENTATIONS
from sampo_ray.training.batching import assemble
from sampo_ray.training.loading import in_training_dtype, load_model
from sampo_ray.training.noise import without_noise
from sampo_ray.training.policy import Policy, every_token, pair_logprobs, policy_on, score_pairs
from sampo_ray.training.saving import Cast, SavedModel
from tests.families.models import (
    LENGTHS,
    answer_logprobs,
    invented,
    is_causal,
    largest_difference,
    largest_gradient_error,
    mean_difference,
    pairs,
    plain_model,
    sequences,
    tensors_in,
    truth_of,
    weights_like,
    write_model,
)
from tests.families.specs import Spec

EXACT = 1e-4
"""Nats of log-probs, and relative error of gradients."""
MERGED = 1e-3
"""Nats of log-probs, of the model that adapters are merged into: its weights are rounded once more."""
MAX_LENGTH = max(prompt + max(answers) for prompt, *answers in LENGTHS)
LORA = LoraConfig(rank=4)


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

    @contextlib.contextmanager
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
        model, missing = plain_model(folder), invented(folder)
        result.architecture = type(model).__name__
        with result.step("validation"):
            config = validated(result, folder)
            if config and missing:
                result.faults.append(f"accepted, though transformers invents {len(missing)} tensors, as {min(missing)}")
            elif config and not is_causal(model):
                result.faults.append("accepted, though its tokens see those after them")
            elif config:
                Trial(result, model, folder, config.model.computed).run()
        del model
    gc.collect()
    return result


def run_config(folder: Path, way: Attention | None = None, lora: LoraConfig | None = None) -> RunConfig:
    """A run's configuration that starts from the model in `folder`."""
    data = folder.parent / "pairs.jsonl"
    data.write_text(json.dumps({"prompt": "one", "chosen": "two", "rejected": "three"}))
    tree = {
        "model": {"path": str(folder), "attention": way, "lora": lora and lora.model_dump()},
        "data": {"train": str(data), "max_length": MAX_LENGTH},
        "optim": {"batch_size": 3},
        "trainer": {"tokens_per_row": 2 * MAX_LENGTH},
        "run": {"dir": str(folder.parent / "run")},
    }
    return RunConfig.model_validate(tree)


def validated(result: Result, folder: Path) -> RunConfig | None:
    """What validation makes of a run's configuration; None, and the message in the result, if it refuses the model."""
    try:
        return check(run_config(folder)).config
    except ConfigError as error:
        result.refusal = str(error).replace(str(folder), "...")
        return None


def is_refused(config: RunConfig) -> bool:
    """Whether validation refuses it."""
    try:
        check(config)
    except ConfigError:
        return True
    return False


class Trial:
    """The trial of an accepted model: what plain transformers computes with it, and what the product does."""

    def __init__(self, result: Result, model: PreTrainedModel, folder: Path, way: Attention) -> None:
        self.result, self.model, self.folder, self.way = result, model, folder, way
        self.pairs, self.answers = pairs(), sequences(pairs())
        self.truth = truth_of(model, self.pairs)

    def run(self) -> None:
        """All of it; what is raised in one part leaves the others."""
        self.result.way = self.way
        for name, part in (
            ("training", self.training),
            ("the other attention", self.other_way),
            ("bf16", self.bf16),
            ("export", self.export),
            ("LoRA", self.adapters),
        ):
            with self.result.step(name):
                part()

    def policy(self, dtype: torch.dtype = torch.float32, lora: LoraConfig | None = None) -> Policy:
        """The product's policy, with gradient checkpointing."""
        model = load_model(self.folder, IMPLEMENTATIONS[self.way], dtype=dtype, change=without_noise)
        in_training_dtype(model, dtype)
        return policy_on(model, True, lora, seed=1, attention=self.way)

    def trained(self, policy: Policy) -> list[Tensor]:
        """Log-probs of each answer's tokens, all pairs in one row; their gradients are in the policy afterwards."""
        policy.train()
        row = pair_logprobs(policy, assemble(self.pairs), every_token(self.pairs))
        values = [each for pair in zip(*row, strict=True) for each in pair]
        torch.stack([(each * weights_like(each)).sum() for each in values]).sum().backward()
        return [each.detach() for each in values]

    def training(self) -> None:
        """Training as the product chooses by itself."""
        self.result.logprobs, self.result.gradients = self.errors()

    def other_way(self) -> None:
        """Training with the attention that it does not choose, if it is accepted when asked for by name."""
        chosen, self.way = self.way, "segments" if self.way == "own" else "own"
        if not is_refused(run_config(self.folder, self.way)):
            self.errors()
        self.way = chosen

    def errors(self) -> tuple[float, float]:
        """Of log-probs and gradients: planned rows without gradients, and one row of all pairs, against the truth."""
        policy, budget = self.policy(), run_config(self.folder, self.way).row_budget
        scored = score_pairs(policy.eval(), self.pairs, budget)
        planned = [torch.from_numpy(each) for pair in scored for each in (pair.chosen_ref, pair.rejected_ref)]
        values = self.trained(policy)
        logprobs = max(largest_difference(each, self.truth.logprobs) for each in (planned, values))
        gradients = {name: each.grad for name, each in policy.model.named_parameters()}
        error, worst = largest_gradient_error(gradients, self.truth.gradients)
        self.result.limit(f"{self.way}: log-probs", logprobs)
        self.result.limit(f"{self.way}: gradient of {worst}", error)
        return logprobs, error

    def bf16(self) -> None:
        """As a run loads it: no further from the fp32 truth than transformers' bf16 is, if that works."""
        ours = mean_difference(self.trained(self.policy(torch.bfloat16)), self.truth.logprobs)
        theirs = math.inf
        with contextlib.suppress(RuntimeError):  # DeepSeek V4: its norms stay in fp32, layers after them do not
            plain = plain_model(self.folder, torch.bfloat16)
            theirs = mean_difference(self.computed(plain), self.truth.logprobs)
        if not ours <= 1.5 * theirs + 0.02:
            self.result.faults.append(f"bf16: log-probs are {ours:.2f} from those in fp32, transformers' {theirs:.2f}")

    @torch.no_grad()
    def computed(self, model: PreTrainedModel) -> list[Tensor]:
        """Log-probs of each answer by plain transformers."""
        return [answer_logprobs(model.eval(), *each) for each in self.answers]

    def written(self, policy: Policy) -> Path:
        """The folder that the product writes of the policy's weights."""
        folder = self.folder.parent / f"export-{len(list(self.folder.parent.iterdir()))}"
        write_version(str(folder), weights_of(policy), str(self.folder), VersionInfo(version=0, round=0, step=0))
        return folder

    def export(self) -> None:
        """The export against `save_pretrained`'s files, and loaded again against the model."""
        saved, written = self.folder.parent / "saved", self.written(self.policy())
        self.model.save_pretrained(saved)
        if difference := different(tensors_in(written), tensors_in(saved)):
            self.result.faults.append(f"export: {difference}")
            return
        again = self.computed(plain_model(written))
        if any(not torch.equal(*each) for each in zip(again, self.computed(self.model), strict=True)):
            error = largest_difference(again, self.truth.logprobs)
            self.result.faults.append(f"export: loaded again its log-probs differ by {error:.1e}")
            return
        self.result.export = "same"

    def adapters(self) -> None:
        """All-linear adapters: each has a gradient, and the model that they are merged into is the adapted one."""
        result = self.result
        if is_refused(run_config(self.folder, lora=LORA)):
            result.lora = "refused"
            return
        policy = self.policy(lora=LORA)
        adapters = {name: each for name, each in policy.named_parameters() if each.requires_grad}
        with torch.no_grad():
            for name, each in adapters.items():
                if "lora_B" in name:
                    each.normal_(0.0, 0.02)
        values = self.trained(policy)
        if idle := [name for name, each in adapters.items() if self.trains(name) and not moved(each)]:
            result.faults.append(f"LoRA: {len(idle)} adapters get no gradient, as {idle[0]}")
        merged = plain_model(self.written(policy))
        error = largest_difference(values, self.computed(merged))
        if not error <= MERGED:
            result.faults.append(f"LoRA: merged log-probs: {error:.1e}")
        result.lora = f"{', '.join(sorted({last_name(adapted(name)) for name in adapters}))} ({error:.0e})"

    def trains(self, adapter: str) -> bool:
        """Whether the weight that an adapter is for has a gradient: a router's choice and an unused part have none."""
        gradient = self.truth.gradients.get(adapted(adapter))
        return gradient is not None and bool(gradient.any())


def moved(parameter: torch.nn.Parameter) -> bool:
    """Whether it has a gradient."""
    return parameter.grad is not None and bool(parameter.grad.any())


def adapted(adapter: str) -> str:
    """The parameter that an adapter is for, by its name in the model without adapters."""
    name = adapter.removeprefix("model.").partition(".lora_")[0]
    outer, kept, last = name.rpartition(".parametrizations.")
    return f"{outer}.{last.removesuffix('.0')}".lstrip(".") if kept else f"{name}.weight"


def last_name(parameter: str) -> str:
    """What a layer, or a parameter that is none's weight, is called."""
    return next(part for part in reversed(parameter.removesuffix(".weight").split(".")) if not part.isdecimal())


def weights_of(policy: Policy) -> Iterator[tuple[str, Tensor]]:
    """What the learner exports, fp32."""
    saved = SavedModel(policy.model)
    yield from saved.converted(saved.tensors(Cast(torch.float32)))


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
