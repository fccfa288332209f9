"""What `sampo evaluate` is given: a run with versions of it, or an exported folder."""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sampo_ray.errors import EvaluationError, VersionError, suggestion
from sampo_ray.run.directory import Run, open_run
from sampo_ray.run.scratch import scratch_folder
from sampo_ray.run.serving import all_labels, read_serving
from sampo_ray.run.storage import Place, absolute
from sampo_ray.run.versions import VersionInfo, complete_versions, find, is_version_number, read_info, version_folder

DEFAULT_VERSIONS = ("base", "final")


@dataclass(frozen=True)
class Chosen:
    """A version of a run by its number, or (None) an exported folder; `label`: what it is called in tables."""

    version: int | None
    label: str


@dataclass(frozen=True)
class Target:
    """What is evaluated. `root`: where results go; `tokenizer`: a local folder; `context`: the model's positions;
    `dtype`: of its weights; `infos`: the run's versions on disk."""

    root: Place
    versions: tuple[Chosen, ...]
    tokenizer: Path
    name: str
    context: int
    dtype: str | None
    run: Run | None = None
    folder: Path | None = None
    infos: Mapping[int, VersionInfo] | None = None

    @property
    def run_id(self) -> str | None:
        return self.run.id if self.run else None

    @property
    def served_context(self) -> int:
        """Tokens that an endpoint of the run takes, which has the context of its training."""
        return min(self.run.config.data.max_length, self.context) if self.run else self.context


@contextlib.contextmanager
def open_target(where: str, wanted: Sequence[str], out: str | None) -> Iterator[Target]:
    """The run or folder at `where` with the `wanted` versions (none: base and final). EvaluationError for what is
    neither, VersionError for a version that is not there."""
    place = check_place(where)
    if place.at("manifest.json").exists():
        with _open_run_target(place, wanted, out) as target:
            yield target
    else:
        if wanted:
            raise EvaluationError(
                f"versions={','.join(wanted)}: {where!r} is a model folder and has none; leave it out"
            )
        with scratch_folder() as tokenizer:
            yield _folder_target(Path(place.path), tokenizer, out)


def check_place(where: str) -> Place:
    """The place of a run or of a model's folder. EvaluationError for what is neither."""
    place = Place(absolute(where))
    if place.at("manifest.json").exists() or (place.local and place.at("config.json").exists()):
        return place
    raise EvaluationError(
        f"{where!r} is neither a run directory (no manifest.json) nor a local folder of a model (no config.json)"
    )


@contextlib.contextmanager
def _open_run_target(place: Place, wanted: Sequence[str], out: str | None) -> Iterator[Target]:
    run = open_run(place.url)
    infos = {each: read_info(version_folder(run.versions.url, each)) for each in complete_versions(run.versions.url)}
    labels = all_labels(read_serving(place, run.config.serve.follow), infos)
    if not infos:
        raise EvaluationError(f"{place.url} has no version yet; wait until the run has published one")
    chosen = _chosen(wanted, labels)
    numbers = [each.version for each in chosen if each.version is not None]
    settings = [json.loads(run.versions.at(f"{_whole(n, infos):06d}", "config.json").read()) for n in numbers]
    dtypes = {each.get("dtype") or each.get("torch_dtype") for each in settings}
    path = Path(run.config.model.path)
    name = infos[min(infos)].base or (path.name if path.is_absolute() else str(path))
    with run.place.at("tokenizer").on_disk() as tokenizer:
        yield Target(
            root=Place(absolute(out)) if out else run.place,
            versions=chosen,
            tokenizer=tokenizer,
            name=name,
            context=positions(settings[0], run.config.data.max_length),
            dtype=str(dtypes.pop()) if len(dtypes) == 1 else None,
            run=run,
            infos=infos,
        )


def _whole(version: int, infos: Mapping[int, VersionInfo]) -> int:
    """The version whose folder has a whole model: of one of adapters alone, its base."""
    adapters = infos[version].adapters
    return adapters.base if adapters else version


def _chosen(wanted: Sequence[str], labels: Mapping[int, Sequence[str]]) -> tuple[Chosen, ...]:
    """The versions by number or label, in the order asked for, each once."""
    known = {name for names in labels.values() for name in names}
    names = list(wanted)
    if not names:
        names = [name for name in DEFAULT_VERSIONS if name in known]
        if "final" not in names:
            names.append(str(max(labels)))
    chosen: dict[int, Chosen] = {}
    for name in names:
        try:
            version = find(name, labels)
        except VersionError as error:
            near = "" if is_version_number(name) else f"; {suggestion(name, known)}"
            raise VersionError(f"versions: {error}{near}") from None
        short = min(labels[version], key=len, default=str(version))
        chosen.setdefault(version, Chosen(version, short if is_version_number(name) else name))
    return tuple(chosen.values())


def _folder_target(folder: Path, tokenizer: Path, out: str | None) -> Target:
    from sampo_ray.data.chat import ChatFormat  # torch, for which a mistake in the command line need not wait

    ChatFormat.load(folder, "tokenizer").save(tokenizer)
    settings = json.loads((folder / "config.json").read_text())
    return Target(
        root=Place(absolute(out)) if out else Place(str(folder)),
        versions=(Chosen(None, folder.name),),
        tokenizer=tokenizer,
        name=folder.name,
        context=positions(settings, 2048),
        dtype="bfloat16",  # as it is served, whatever its files are in
        folder=folder,
    )


def positions(settings: Mapping[str, object], otherwise: int) -> int:
    """The positions that a model's config.json names."""
    text = settings.get("text_config")
    for tree in (text if isinstance(text, Mapping) else {}, settings):
        for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
            if isinstance(found := tree.get(name), int):
                return found
    return otherwise
