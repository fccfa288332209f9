"""What is compared and described: the evaluated versions of a run, or an exported folder with results."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from sampo_ray.config.run import RunConfig, load_config
from sampo_ray.errors import EvaluationError
from sampo_ray.evaluation.records import TaskResult, results_in
from sampo_ray.run.directory import read_settings
from sampo_ray.run.manifest import read_manifest
from sampo_ray.run.storage import Place, absolute

BASE = "base"


@dataclass(frozen=True)
class Evaluated:
    """A version, or the model of a folder, with its results by task."""

    version: int | None
    label: str
    results: Mapping[str, TaskResult]


@dataclass(frozen=True)
class Results:
    """A run, or a folder, with the results of its versions, in order; `shown` is the one that stands for it."""

    name: str
    place: Place
    model: str
    method: str | None
    """The row of the published table that its settings are those of."""
    base: Evaluated | None
    versions: tuple[Evaluated, ...]
    shown: Evaluated | None
    """None: only the base was evaluated."""


def read_results(named: str) -> Results:
    """Of `RUN`, `RUN@VERSION` (a number or a label) or an exported folder. EvaluationError where it has no results."""
    url, version = _split(named)
    place = Place(absolute(url))
    found = list(results_in(place))
    if not found:
        known = "no results of evaluations" if place.exists() else "not there"
        raise EvaluationError(f"{url!r}: {known}; name a run or an exported folder that `sampo evaluate` has evaluated")
    versions = _versions(found)
    labels = [each.label for each in versions if each.version is None]
    if version is None and len(labels) > 1:
        raise EvaluationError(f"{url!r} has results of {', '.join(labels)}; name one, as in {url}@{labels[0]}")
    return _results(place, found, versions, _chosen(url, version, versions) if version else None)


def results_at(run: Place, version: int) -> Results | None:
    """Of one version of a run, and of its base; None where that version has none."""
    versions = _versions(found := list(results_in(run)))
    shown = next((each for each in versions if each.version == version), None)
    return None if shown is None else _results(run, found, versions, shown)


def _results(
    place: Place, found: Sequence[TaskResult], versions: Sequence[Evaluated], chosen: Evaluated | None
) -> Results:
    base = next((each for each in versions if each.version == 0), None)
    later = tuple(each for each in versions if each.version != 0)
    is_run = place.at("manifest.json").exists()
    given_up = read_manifest(place).given_up if is_run else None
    shown = chosen or next((each for each in reversed(later) if each.version != given_up or each.version is None), None)
    config = load_config(read_settings(place)) if is_run else None
    name, method = (method_name(config), published_method(config)) if config else (place.name, None)
    if base is not None and shown is base:
        name, method = BASE, BASE
    elif chosen:
        name = f"{name}, {chosen.label}" if config else chosen.label
    return Results(name, place, found[0].model, method, base, later, shown)


def with_names(read: Sequence[Results], names: Sequence[str]) -> list[Results]:
    """The results under these names, or under their own with the run directory's where two would be called the same."""
    if names and len(names) != len(read):
        raise EvaluationError(f"names: {len(names)} names for {len(read)} runs; give each run one")
    named = [replace(each, name=name) for each, name in zip(read, names, strict=True)] if names else list(read)
    of_one_name = {each.name for each in named if [other.name for other in named].count(each.name) > 1}
    if names and of_one_name:
        raise EvaluationError(f"names: {sorted(of_one_name)[0]!r} is there twice; give each run its own")
    if not names:
        named = [replace(e, name=f"{e.name} ({e.place.name})") if e.name in of_one_name else e for e in named]
    seen = set[tuple[str, str | None]]()
    for each in named:
        key = (each.place.url, each.shown.label if each.shown else None)
        if key in seen:
            raise EvaluationError(f"{each.place.url!r} is named twice; name each run, or RUN@VERSION, once")
        seen.add(key)
    return named


def method_name(config: RunConfig) -> str:
    """What a run is called in tables: `DPO`, `Iterative SamPO`, `Iterative SamPO, online`."""
    method, several = config.method, config.rounds.count > 1
    known = {("sigmoid", "sum"): "DPO", ("sigmoid", "sample"): "SamPO"}
    name = known.get((method.loss, method.reduction), f"{method.loss}/{method.reduction}")
    return f"{'Iterative ' if several else ''}{name}{', online' if config.online else ''}"


def published_method(config: RunConfig) -> str | None:
    """Online runs have no published row."""
    return None if config.online else method_name(config)


def _split(named: str) -> tuple[str, str | None]:
    if Place(absolute(named)).exists():
        return named, None
    url, at, version = named.rpartition("@")
    return (url, version) if at and "/" not in version else (named, None)


def _versions(found: Sequence[TaskResult]) -> list[Evaluated]:
    by: dict[tuple[int, str], list[TaskResult]] = {}
    for each in found:
        by.setdefault((-1 if each.version is None else each.version, each.subject), []).append(each)
    return [Evaluated(of[0].version, of[0].label, {each.task: each for each in of}) for _, of in sorted(by.items())]


def _chosen(url: str, version: str, versions: Sequence[Evaluated]) -> Evaluated:
    wanted = [each for each in versions if version in (str(each.version), each.label)]
    if not wanted:
        known = ", ".join(each.label if each.version is None else f"{each.version} ({each.label})" for each in versions)
        raise EvaluationError(f"{url!r}: version {version!r} was not evaluated; there are results of {known}")
    return wanted[-1]
