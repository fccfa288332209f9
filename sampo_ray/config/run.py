"""The configuration of a run: one pydantic tree, and how it is read from a YAML recipe and dotted overrides.

It refuses every mistake that can be found before an engine starts, with one message that names field, value and fix.
The profile (`sampo_ray.config.profiles`) fills fields that are `None`.
"""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, TypeAlias, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from sampo_ray.config import evaluation, sections, serving
from sampo_ray.config.rows import RowBudget, default_row
from sampo_ray.config.section import Section
from sampo_ray.errors import ConfigError, suggestion

Tree: TypeAlias = dict[str, object]

SECRET = "serve.api_keys"
"""The field whose value no message quotes."""


class RunConfig(Section):
    """A whole run. `profile: auto` chooses between `laptop` and `cluster` by the GPUs that Ray has."""

    profile: Literal["auto", "laptop", "cluster"] = "auto"
    model: sections.ModelConfig
    data: sections.DataConfig = sections.DataConfig()
    rounds: sections.RoundsConfig = sections.RoundsConfig()
    method: sections.MethodConfig = sections.MethodConfig()
    optim: sections.OptimConfig = sections.OptimConfig()
    rollout: sections.RolloutConfig = sections.RolloutConfig()
    reward: sections.RewardConfig = sections.RewardConfig()
    reference: sections.ReferenceConfig = sections.ReferenceConfig()
    trainer: sections.TrainerConfig = sections.TrainerConfig()
    fleet: sections.FleetsConfig = sections.FleetsConfig()
    publish: serving.PublishConfig = serving.PublishConfig()
    serve: serving.ServeConfig = Field(default_factory=serving.ServeConfig)
    evaluate: evaluation.EvaluateConfig = evaluation.EvaluateConfig()
    run: sections.OutputConfig
    chosen: dict[str, str | int | float] = Field(default_factory=dict)
    """Written by the program: sizes that were left open, which are chosen anew where the run goes on elsewhere. One
    that was changed since counts as given."""

    @property
    def row_budget(self) -> RowBudget:
        tokens = self.trainer.tokens_per_row or default_row(self.data.max_length)
        shared = self.model.computed != "own"
        return RowBudget(self.optim.batch_size, tokens, self.trainer.workers or 1, shared)

    @property
    def batches_answers(self) -> bool:
        """Whether a model's own attention takes answers in padded batches: on GPUs, where they are faster, and under
        ZeRO-3, where ranks make the same number of passes."""
        return bool(self.trainer.num_gpus) or self.trainer.zero_stage == 3

    @property
    def reference_workers(self) -> bool:
        """Whether workers of their own compute the reference's log-probs."""
        return self.method.needs_reference and self.reference.where != "trainer"

    @property
    def shares_gpus(self) -> bool:
        """Whether engines and ranks take turns on the same GPUs (or, without any, cores)."""
        return self.fleet.placement == "shared"

    @property
    def shared_replicas(self) -> bool:
        """Whether rollouts may use the live policy's replicas: where they share devices, as long as it serves the
        newest version."""
        steady = self.serve.follow == "latest" and not self.serve.gates.any
        together = self.profile != "cluster" or self.shares_gpus
        return self.serve.enabled and steady and together

    @property
    def limits(self) -> sections.DataConfig:
        """`data` with the lengths that a run cuts to: online, a completion of `max_tokens` fits behind any prompt."""
        if not self.online:
            return self.data
        limit = min(self.data.prompt_limit, self.data.max_length - self.rollout.max_tokens)
        return self.data.model_copy(update={"max_prompt_length": limit})

    @property
    def evaluates(self) -> bool:
        """Whether versions answer probe prompts at the end of rounds."""
        return self.evaluate.every == "round"

    @property
    def probes(self) -> bool:
        """Whether versions are asked outside of rollouts."""
        return self.evaluates or self.serve.gates.probing

    @property
    def scores(self) -> bool:
        """Whether answers are scored by the reward source."""
        return self.online or (self.evaluates and bool(self.reward.parts))

    @property
    def probe_tokens(self) -> int:
        """Tokens of an answer to a probe prompt, at most."""
        room = self.data.max_length if self.online else self.data.max_length // 4
        return self.evaluate.max_tokens or min(self.rollout.max_tokens, room)

    @property
    def online(self) -> bool:
        return self.rounds.mode == "online"

    @model_validator(mode="after")
    def _has_pairs(self) -> "RunConfig":
        if not self.online and not self.data.train:
            raise ValueError("data.train is missing; rounds.mode=offline trains on preference pairs, so name a file")
        if self.online and not self.data.prompts:
            raise ValueError("data.prompts is missing; rounds.mode=online samples for prompts, so name a file")
        if self.online and not self.reward.parts:
            raise ValueError(
                "reward.function, reward.model or reward.judge is missing; rounds.mode=online needs a reward source"
            )
        if self.online and self.rounds.data == "split":
            raise ValueError("rounds.data=split is for offline rounds; online ones take rollout.prompts each")
        if self.serve.gates.min_win_rate is not None and not self.online:
            raise ValueError("serve.gates.min_win_rate needs a reward source: use rounds.mode=online, or drop it")
        if self.serve.gates.min_win_rate is not None and self.reward.compares:
            raise ValueError(
                "serve.gates.min_win_rate compares rewards of different calls, and reward.judge.mode=pairwise gives "
                "rewards within a call only; use reward.judge.mode=pointwise, or drop the gate"
            )
        if self.reward.length_controlled and not self.online:
            raise ValueError(
                "reward.length_controlled corrects the rewards of sampled completions; use rounds.mode=online, or drop "
                "it"
            )
        if self.online and self.rollout.samples < 2:
            raise ValueError(
                f"rollout.samples={self.rollout.samples} gives no pairs; rounds.mode=online needs 2 or more"
            )
        if self.online and self.rollout.max_tokens >= self.data.max_length:
            raise ValueError(
                f"rollout.max_tokens={self.rollout.max_tokens} leaves no room for a prompt within "
                f"data.max_length={self.data.max_length}; make it smaller"
            )
        return self

    @model_validator(mode="after")
    def _has_what_gates_need(self) -> "RunConfig":
        gates = self.serve.gates
        if gates.verifiers is not None and not (self.online or self.evaluates):
            raise ValueError(
                "serve.gates.verifiers needs prompts with instructions: use rounds.mode=online, or "
                "evaluate.every=round with evaluate.prompts"
            )
        if gates.probe and not self.evaluates:
            raise ValueError("serve.gates.probe needs the evaluation at the end of rounds: use evaluate.every=round")
        if gates.probe and self.serve.follow != "round":
            raise ValueError(
                f"serve.gates.probe needs serve.follow=round, not {self.serve.follow}: versions within a round are not "
                "evaluated"
            )
        return self

    @model_validator(mode="after")
    def _can_evaluate(self) -> "RunConfig":
        named, tokens = self.evaluate.prompts, self.probe_tokens
        if named and not self.evaluates:
            raise ValueError(
                f"evaluate.prompts={named!r} is not used with evaluate.every=never; use evaluate.every=round"
            )
        if not self.evaluates:
            return self
        if not self.online and not named:
            raise ValueError(
                "evaluate.prompts is missing; rounds.mode=offline has no prompts to hold out, so name a file of some "
                "that are not trained on"
            )
        if named in self.data.names(self.online):
            field = "data.prompts" if self.online else "data.train"
            raise ValueError(f"evaluate.prompts={named!r} is {field}, too; name prompts of their own")
        if tokens >= self.data.max_length:
            raise ValueError(
                f"evaluate.max_tokens={tokens} leaves no room for a prompt within "
                f"data.max_length={self.data.max_length}; make it smaller"
            )
        if not named and tokens > self.rollout.max_tokens:
            raise ValueError(
                f"evaluate.max_tokens={tokens} is more than rollout.max_tokens={self.rollout.max_tokens}, which the "
                "prompts of data.prompts leave room for; make it smaller, or name evaluate.prompts"
            )
        return self

    @model_validator(mode="after")
    def _has_a_share_of_each_source(self) -> "RunConfig":
        field = "data.prompts" if self.online else "data.train"
        names = self.data.names(self.online)
        if twice := next((name for at, name in enumerate(names) if name in names[:at]), None):
            raise ValueError(f"{field} names {twice!r} twice; name each source once")
        if "" in names:
            raise ValueError(f"{field}={list(names)} has an empty name; drop it")
        if self.data.mix is not None and len(self.data.mix) != len(names):
            raise ValueError(
                f"data.mix={list(self.data.mix)} is not one share for each source of {field}, which has {len(names)}; "
                f"write data.mix={[1.0] * len(names)} with your shares"
            )
        if isinstance(self.data.columns, tuple) and len(self.data.columns) != len(names):
            raise ValueError(
                f"data.columns has {len(self.data.columns)} entries and {field} {len(names)} names; give each source "
                "its own, or one for all without a list"
            )
        return self

    @model_validator(mode="after")
    def _can_use_tools(self) -> "RunConfig":
        if self.serve.tools is not None and self.model.template != "tokenizer":
            raise ValueError(
                f"serve.tools={self.serve.tools!r} needs model.template=tokenizer; "
                f"{self.model.template} writes no tools into a prompt"
            )
        return self

    @model_validator(mode="after")
    def _can_train(self) -> "RunConfig":
        if self.reference.positions == "sampled" and (self.method.reduction, self.method.mask) != ("sample", "shared"):
            raise ValueError(
                "reference.positions=sampled needs method.reduction=sample and method.mask=shared, not "
                f"{self.method.reduction} and {self.method.mask}; use reference.positions=all"
            )
        if self.method.needs_distributions and self.trainer.zero_stage == 3:
            raise ValueError(
                f"method.loss={self.method.loss!r} keeps its reference whole on each rank, and trainer.zero_stage=3 "
                "shards the policy because that is too much; use trainer.zero_stage=2"
            )
        if self.method.needs_distributions and self.reference != sections.ReferenceConfig():
            raise ValueError(
                f"method.loss={self.method.loss!r} has its reference beside the policy; drop reference.where and "
                "reference.positions, which are for stored log-probs"
            )
        if self.model.attention == "flex" and self.trainer.gradient_checkpointing == "selective":
            raise ValueError(
                "trainer.gradient_checkpointing=selective does not go with model.attention=flex; use true or false"
            )
        if self.trainer.tokens_per_row is not None and self.trainer.tokens_per_row < 2 * self.data.max_length:
            raise ValueError(
                f"trainer.tokens_per_row={self.trainer.tokens_per_row} does not hold the longest pair, two answers of "
                f"up to data.max_length={self.data.max_length}; use {2 * self.data.max_length} or more"
            )
        return self


def load_config(recipe: str | Path | Mapping[str, object], overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a YAML recipe (or takes a mapping), applies `a.b.c=value` overrides (values are YAML), validates.

    Raises ConfigError with one line per mistake.
    """
    tree = dict(recipe) if isinstance(recipe, Mapping) else _read_yaml(Path(recipe))
    for override in overrides:
        tree = _set(tree, override)
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(error.errors()))) from None


def _read_yaml(path: Path) -> Tree:
    try:
        tree = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"recipe {path}: cannot be read ({error.strerror}); name an existing YAML file") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"recipe {path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"recipe {path}: holds {type(tree).__name__}, not sections such as `model:` and `data:`")
    return tree


def _set(tree: Tree, override: str) -> Tree:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r}: write it as section.field=value")
    try:
        leaf = yaml.safe_load(value)
    except yaml.YAMLError:
        raise ConfigError(f"override {override!r}: the value is not valid YAML; quote it") from None
    inner = tree = copy.deepcopy(tree)
    *outer, name = key.split(".")
    for section in outer:
        below = inner.setdefault(section, {})
        if not isinstance(below, dict):
            raise ConfigError(f"override {override!r}: {section} is a value ({below!r}), not a section")
        inner = below
    inner[name] = leaf
    return tree


def _explain(errors: Sequence[ErrorDetails]) -> list[str]:
    """One line a mistake. What the branches of a union say of one value is one mistake."""
    lines: dict[str, str] = {}
    expected: dict[str, list[str]] = {}
    for error in errors:
        field, inside = _split(error["loc"])
        if inside and isinstance(inside[0], str) and (len(inside) > 1 or error["type"] != "extra_forbidden"):
            if len(inside) == 1 and error["type"] != "value_error":
                expected.setdefault(field, []).append(_expected(field, error))
                lines[field] = f"{field}: input should be {' or '.join(expected[field])} (got {error['input']!r})"
            else:  # of the kind that the value is
                lines[field] = _line({**error, "loc": (*field.split("."), *inside[1:])})
        else:
            lines[f"{error['loc']}"] = _line(error)
    return list(lines.values())


def _line(error: ErrorDetails) -> str:
    path = [str(part) for part in error["loc"]]
    where = ".".join(path)
    value = "..." if where.startswith(SECRET) else error.get("input")
    if error["type"] == "extra_forbidden":
        return f"{where}: unknown key; {suggestion(path[-1], _fields_at(path[:-1]))}"
    if error["type"] == "missing" and isinstance(error["loc"][-1], int):
        return f"{'.'.join(path[:-1])}: more values are needed (got {value!r})"
    if error["type"] == "missing":
        return f"{where}: missing; set it in the recipe or as {where}=..."
    if error["type"] == "model_type":
        return f"{where}: is a section (got {value!r}); set its fields, as in {where}.{_fields_at(path)[0]}=..."
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return f"{where}.{message}" if where else message
    if error["type"] in ("tuple_type", "list_type"):
        message = f"Input should be {_expected(where, error)}"
    return f"{where}: {message[0].lower()}{message[1:]} (got {value!r})"


def _expected(field: str, error: ErrorDetails) -> str:
    """What a value should be, without "input should be"."""
    if error["type"] in ("tuple_type", "list_type"):
        quoted = isinstance(error["input"], str | float) and field != SECRET
        return f"a list, as in {field}=[{error['input'] if quoted else '...'}]"
    return error["msg"].removeprefix("Input should be ").partition(", unable")[0]


def _split(loc: tuple[int | str, ...]) -> tuple[str, tuple[int | str, ...]]:
    """The field that an error's location is in, and where in its value: positions, and branches of a union."""
    section: type[BaseModel] | None = RunConfig
    length = 0
    while section is not None and length < len(loc) and loc[length] in section.model_fields:
        section = _section_at(section, str(loc[length]))
        length += 1
    return ".".join(map(str, loc[:length])), loc[length:]


def _section_at(section: type[BaseModel], name: str) -> type[BaseModel] | None:
    """The section that a field holds, which may be optional; None for a value."""
    found = [section.model_fields[name].annotation] if name in section.model_fields else []
    for kind in found:  # grows by what unions and annotations hold
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
        found += get_args(kind)
    return None


def _fields_at(path: list[str]) -> list[str]:
    """The fields of the section at `path`."""
    section: type[BaseModel] = RunConfig
    for name in path:
        section = _section_at(section, name) or section
    return list(section.model_fields)
