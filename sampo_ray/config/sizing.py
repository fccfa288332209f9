"""The sizes of a run that its configuration leaves open, filled in, and the actors that a run with all sizes has.

What was given and what was chosen count alike: `groups_of` reads both from the same fields.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias, TypeVar

from sampo_ray.config.packing import Group
from sampo_ray.config.run import RunConfig
from sampo_ray.config.section import Section
from sampo_ray.config.sections import FleetConfig, FleetsConfig

F = TypeVar("F", bound=FleetConfig)
Profile: TypeAlias = Literal["laptop", "cluster"]
Placed: TypeAlias = Literal["shared", "split"]
GIB = 1 << 30
SMALL_CPUS, TASK_CPUS = 0.1, 0.5
"""Logical CPUs of weight store, exchange and endpoint each, and of the largest task."""
PYTHON_BYTES = 1 * GIB
"""Of a process that has imported torch or vLLM, with what it works on."""


@dataclass(frozen=True)
class RankMemory:
    """Bytes that one rank takes of its GPU and of its node."""

    gpu: int
    host: int


@dataclass(frozen=True)
class ModelMemory:
    """What is known of a model's memory: bytes of a version (16 bits a parameter), of a token in vLLM's cache, and of
    a rank of a run whose sizes are filled in."""

    weights: int
    kv_per_token: int
    rank: Callable[[RunConfig], RankMemory]


@dataclass(frozen=True)
class Layout:
    """How a run is laid out: on `gpus` devices, each an actor's own (`whole`) or divided, or on CPUs where there are
    none; `limit` is the most ranks or replicas of a kind where sizes are cut to the machine."""

    profile: Profile
    placement: Placed
    gpus: int
    cpus_each: float = 1.0
    limit: int | None = None

    @property
    def whole(self) -> bool:
        return self.profile == "cluster" and self.placement == "split"


@dataclass(frozen=True)
class Shares:
    """The part of a GPU that Ray counts for one rank, one engine's worker, and one reference or reward worker."""

    rank: float
    engine: float
    scorer: float


FLEETS = ("generators", "references", "rewards")
UTILIZATION = "fleet.generators.engine.gpu_memory_utilization"
SIZES = (
    *("profile", "fleet.placement", "trainer.workers", "trainer.min_workers", "trainer.num_gpus", "trainer.num_cpus"),
    *(f"fleet.{fleet}.{end}_replicas" for fleet in FLEETS for end in ("min", "max")),
    *(f"fleet.{fleet}.num_{kind}" for fleet in FLEETS for kind in ("gpus", "cpus")),
    UTILIZATION,
)
"""What a plan fills in."""

TIME_SHARED = Shares(0.51, 0.3, 0.1)
"""Beside a rank there is room for one engine, so that no device gets two and another none; a rank is never beside
another, since NCCL has one rank a device."""


def shares(config: RunConfig, layout: Layout, ranks: int) -> Shares:
    """GPUs of one of each, where they are not given."""
    if not layout.gpus:
        return Shares(0.0, 0.0, 0.0)
    if layout.whole:  # a reward model shares the GPU of reference workers, if there are any
        both = config.reference_workers and config.reward.has_model
        return Shares(1.0, 1.0, 0.5 if both else 1.0)
    if layout.placement == "shared":
        return TIME_SHARED
    if engine_workers(config.fleet.generators.engine) > 1:  # which are on different devices, as ranks are
        return TIME_SHARED
    # Room for two engines: the live policy, and one that starts for gates, a rollback or a pinned version.
    both = config.reference_workers and config.reward.has_model
    return Shares(0.5 if ranks == 1 else 0.51, 0.2, 0.04 if both else 0.09)


def engine_workers(engine: Mapping[str, object]) -> int:
    """Processes of a vLLM engine, which have a GPU each: tensor times pipeline parallelism."""
    sizes = [engine.get(f"{kind}_parallel_size") for kind in ("tensor", "pipeline")]
    workers = 1
    for size in sizes:
        workers *= size if isinstance(size, int) and size > 0 else 1
    return workers


def filled(config: RunConfig, layout: Layout, ranks: int, generators: int) -> RunConfig:
    """The configuration with every open size: `ranks` and `generators` replicas where it does not say how many."""
    config = _decided(config, layout)
    trainer, fleets = config.trainer, config.fleet
    workers = layout_size(layout, trainer.workers, ranks)
    share = shares(config, layout, workers)
    small = layout.profile == "laptop"

    def gpus(asked: float | None, chosen: float) -> float:
        return (chosen if asked is None else asked) if layout.gpus else 0.0

    def fleet(asked: F, most: int, cpus: float, chosen: float) -> F:
        least = 1 if asked.min_replicas is None else asked.min_replicas
        most = max(layout_size(layout, asked.max_replicas, max(most, least)), 1)
        update = {
            "min_replicas": min(least, most),
            "max_replicas": most,
            "num_gpus": gpus(asked.num_gpus, chosen),
            "num_cpus": cpus if asked.num_cpus is None else asked.num_cpus,
        }
        return asked.model_copy(update=update)

    each = 0.5 if small else layout.cpus_each
    update: dict[str, object] = {
        "workers": workers,
        "min_workers": None if trainer.min_workers is None else min(trainer.min_workers, workers),
        "num_gpus": gpus(trainer.num_gpus, share.rank),
        "num_cpus": each if trainer.num_cpus is None else trainer.num_cpus,
    }
    sized = FleetsConfig(
        placement=layout.placement,
        start_timeout_s=fleets.start_timeout_s,
        generators=fleet(fleets.generators, generators, each, share.engine),
        references=fleet(fleets.references, 1, each, share.scorer),
        rewards=fleet(fleets.rewards, 1, min(each, 0.1), share.scorer if config.reward.has_model else 0.0),
    )
    return config.model_copy(update={"trainer": trainer.model_copy(update=update), "fleet": sized})


def changed(config: RunConfig, name: str, value: object) -> RunConfig:
    """The configuration with another value of the field `name`, such as `trainer.workers`, unvalidated."""

    def within(section: object, path: list[str]) -> object:
        if not path:
            return value
        if isinstance(section, Mapping):  # engine arguments, which are not there where they are not given
            rest = {key: each for key, each in section.items() if key != path[0]}
            return rest if value is None else {**rest, path[0]: value}
        assert isinstance(section, Section)
        return section.model_copy(update={path[0]: within(getattr(section, path[0]), path[1:])})

    new = within(config, name.split("."))
    assert isinstance(new, RunConfig)
    return new


def value_of(config: RunConfig, name: str) -> object:
    """The value of the field `name`, such as `trainer.workers`; None for an engine argument that is not given."""
    found: object = config
    for part in name.split("."):
        found = found.get(part) if isinstance(found, Mapping) else getattr(found, part)
    return found


def reopened(config: RunConfig) -> RunConfig:
    """The configuration without the sizes that an earlier plan chose, but for those that were changed since."""
    for name, value in config.chosen.items():
        if value_of(config, name) == value:
            config = changed(config, name, "auto" if name in ("profile", "fleet.placement") else None)
    return config.model_copy(update={"chosen": {}})


def with_chosen(config: RunConfig, asked: RunConfig) -> RunConfig:
    """`config` with a record of the sizes that are not those that were `asked` for."""
    now = {name: value_of(config, name) for name in SIZES}
    chosen = {name: value for name, value in now.items() if value is not None and value != value_of(asked, name)}
    return config.model_copy(update={"chosen": chosen})


def layout_size(layout: Layout, asked: int | None, chosen: int) -> int:
    """A number of ranks or replicas: as asked, unless it is cut to the machine."""
    size = chosen if asked is None else asked
    return min(size, layout.limit) if layout.limit else size


def _decided(config: RunConfig, layout: Layout) -> RunConfig:
    """The configuration with the profile, and with who computes the log-probs of the reference: where ranks have GPUs
    they do, all of them, while one worker would keep them waiting; sizes of workers are taken as a wish for workers."""
    where = config.reference.where
    if where == "auto" and config.method.needs_reference:
        where = "trainer" if layout.gpus and not sizes_workers(config) else "workers"
    reference = config.reference.model_copy(update={"where": where})
    return config.model_copy(update={"profile": layout.profile, "reference": reference})


def sizes_workers(config: RunConfig) -> bool:
    """Whether sizes of reference workers are given."""
    asked = config.fleet.references
    return any(size is not None for size in (asked.min_replicas, asked.max_replicas, asked.num_gpus))


def not_by_turns(config: RunConfig) -> str | None:
    """The setting with which engines and ranks cannot take turns on the same devices, if there is one.

    A device then has one engine, which sleeps while ranks train, and is told which version to wake up with.
    """
    where = config.reference.where
    workers = config.method.needs_reference and (where == "workers" or (where == "auto" and sizes_workers(config)))
    asks = config.online or config.evaluates
    against = {
        "probing serve.gates": config.serve.gates.probing or (asks and config.serve.gates.any),
        f"serve.follow={config.serve.follow}": asks and config.serve.follow != "latest",
        f"rollout.ahead={config.rollout.ahead}": config.online and config.rollout.ahead > 0,
        "reference.where=workers": workers,
        f"trainer.lifetime={config.trainer.lifetime}": config.trainer.lifetime == "round",
        f"publish.transport={config.publish.transport}": config.publish.transport != "host",
    }
    return next((setting for setting, holds in against.items() if holds), None)


def groups_of(config: RunConfig, memory: ModelMemory | None = None) -> list[Group]:
    """The actors of a run whose sizes are filled in, but those that need no room kept (pinned versions)."""
    trainer = config.trainer
    takes = memory.rank(config) if memory else RankMemory(0, 0)
    ranks = Group(
        "ranks",
        trainer.min_workers or trainer.workers or 1,
        trainer.workers or 1,
        trainer.num_gpus or 0.0,
        cpus=trainer.num_cpus or 0.0,
        memory=takes.host,
        gpu_memory=takes.gpu if trainer.num_gpus else 0,
    )
    return [ranks, *_engines(config), *_scorers(config), *_services(config, memory)]


def engine(config: RunConfig, role: Literal["policy", "generators", "pinned"], least: int, most: int) -> Group:
    """A group of vLLM replicas."""
    settings = config.fleet.generators
    workers = engine_workers(settings.engine)
    return Group(role, least, most, settings.num_gpus or 0.0, workers, settings.num_cpus or 0.0)


def _engines(config: RunConfig) -> list[Group]:
    """The live policy's replicas, and those for rollouts and for the probes of gates."""
    least, most = (int(config.fleet.generators.autoscaling[f"{end}_replicas"]) for end in ("min", "max"))
    groups = []
    if config.serve.enabled:
        counts = (least, most) if config.shared_replicas or not config.online else (1, 1)
        groups.append(engine(config, "policy", *counts))
    if config.online and not config.shared_replicas:
        groups.append(engine(config, "generators", least, most))
    elif config.probes and not (config.fleet.placement == "shared" and config.serve.enabled):
        groups.append(replace(engine(config, "generators", 0, most), note="for probes"))
    elif config.online and config.fleet.placement == "split":
        spare = engine(config, "generators", 0, most)
        groups.append(replace(spare, spare=not spare.gpus, note="after a rollback"))
    return groups


def _scorers(config: RunConfig) -> list[Group]:
    """Reference and reward workers."""
    groups: list[Group] = []
    wanted: list[tuple[Literal["references", "rewards"], FleetConfig, bool]] = [
        ("references", config.fleet.references, config.reference_workers),
        ("rewards", config.fleet.rewards, config.scores),
    ]
    for role, fleet, used in wanted:
        least, most = (int(fleet.autoscaling[f"{end}_replicas"]) for end in ("min", "max"))
        if used:
            groups.append(Group(role, least, most, fleet.num_gpus or 0.0, cpus=fleet.num_cpus or 0.0))
    return groups


def _services(config: RunConfig, memory: ModelMemory | None) -> list[Group]:
    """What every run has besides: none of it needs a GPU, and what is heavy stays off the head node."""
    weights = memory.weights if memory else 0
    copy = f"{2 * weights / GIB:.1f} GiB of objects" if weights else ""
    groups = [
        Group("store", 1, 1, cpus=SMALL_CPUS, memory=PYTHON_BYTES, avoids_head=True, note=copy),
        Group("exchange", 1, 1, cpus=SMALL_CPUS),
        Group("base publish", 1, 1, cpus=TASK_CPUS, memory=PYTHON_BYTES + 2 * weights, avoids_head=True),
    ]
    tokenizing = Group("tokenizing", 0, 1, cpus=SMALL_CPUS, memory=PYTHON_BYTES, avoids_head=True, spare=True)
    endpoint = [Group("endpoint", 1, 1, cpus=SMALL_CPUS)] if config.serve.enabled else []
    return [*groups, tokenizing, *endpoint]
