"""The model card of a run's exported model: what the run's files say, and nothing else."""

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from statistics import fmean

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, StrictUndefined

from sampo_ray.config.run import RunConfig, load_config
from sampo_ray.errors import EvaluationError
from sampo_ray.evaluation.comparison import Comparison, Row, compare, is_trial
from sampo_ray.evaluation.licences import README, Licence, licence_of, write_licence
from sampo_ray.evaluation.shown import bracketed, change, conditions, value
from sampo_ray.evaluation.subjects import BASE, method_name, results_at
from sampo_ray.evaluation.tasks import TASKS, Column
from sampo_ray.run import lines
from sampo_ray.run.directory import find_run, read_settings
from sampo_ray.run.manifest import Manifest, parse_metrics, read_manifest
from sampo_ray.run.storage import Place
from sampo_ray.run.versions import export_folder, is_complete, read_info

PAPER = "arxiv:2406.10957"
DATASETS = {"alpaca_eval": "tatsu-lab/alpaca_eval", "ifbench": "allenai/IFBench_test"}
"""Of tasks that lm-eval does not load."""
HUB_ID = r"[\w.-]+/[\w.-]+"
MARK = "<!-- sampo card "
EXAMPLE = ({"role": "user", "content": "Name three rivers of Europe."},)


@dataclass(frozen=True)
class Round:
    """What a round trained on."""

    number: int
    pairs: int | None
    steps: int
    chosen: float | None
    rejected: float | None
    """Mean tokens of the pairs' responses."""
    accuracy: float | None
    """Share of pairs whose chosen response has the higher implicit reward, over the last tenth of the steps."""


@dataclass(frozen=True)
class Prompt:
    """The prompt format by an example."""

    text: str
    tokens: int
    bos: int
    end: str


def newest_export(run: Place) -> Place:
    """The exported model of the run's last committed round. EvaluationError where there is none."""
    manifest = read_manifest(run)
    for record in reversed(manifest.rounds):
        if record.committed and not record.fell_back and is_complete((folder := export_folder(run, record.index)).url):
            return folder
    raise EvaluationError(f"{run.url!r} has no exported model yet; a run exports one at the end of each round")


def write_card(url: str, name: str | None = None) -> Place:
    """Writes README.md, and licence files, beside the newest exported weights of a run; returns the README.
    EvaluationError where that would replace a README that people have changed."""
    run = find_run(url)
    folder = newest_export(run)
    config = load_config(read_settings(run))
    licence = licence_of(config.model.path)
    target = folder.at(README)
    if target.exists() and not _ours(target.read().decode(errors="replace")):
        raise EvaluationError(f"{target.url} was changed by hand; move it away, and write the card again")
    with folder.draft() as scratch:
        files = write_licence(licence, _made(scratch / "licence"))
        text = card(run, folder, config, licence, name or model_name(config, licence), files)
        folder.take(scratch / "licence")
    target.write(_marked(text).encode())
    return target


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def model_name(config: RunConfig, licence: Licence) -> str:
    """The base model's name and the method, as in Llama-3-8B-Instruct-Iterative-SamPO."""
    base = public_name(config.model.path).rpartition("/")[2].removeprefix("Meta-")
    name = f"{base}-{method_name(config)}".replace(", ", "-")
    name = re.sub(r"[^\w.-]+", "-", name)
    prefix = licence.llama.prefix if licence.llama else ""
    return name if name.lower().startswith(prefix.lower()) else f"{prefix}-{name}"


def card(run: Place, folder: Place, config: RunConfig, licence: Licence, name: str, files: Sequence[str]) -> str:
    """The card's text, with its metadata as huggingface_hub writes and reads it. EvaluationError for a name that the
    base model's licence does not allow."""
    if licence.llama and not name.lower().startswith(licence.llama.prefix.lower()):
        raise EvaluationError(
            f"name={name!r}: the {licence.llama.licence} asks for a name that begins with {licence.llama.prefix}"
        )
    results = results_at(run, version := read_info(folder.url).version)
    found = compare([results]) if results else None
    ours = found.rows[-1] if found else None
    about = {"name": name, "licence": licence, "licence_files": files, "version": version}
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["md"] = markdown
    source = resources.files("sampo_ray.evaluation").joinpath("card.md.jinja").read_text(encoding="utf-8")
    body = environment.from_string(source).render(
        **about, **_of_run(run, config), **_of_results(found, ours), prompt=prompt(folder), dtype=dtype(folder)
    )
    text = f"---\n{metadata(config, licence, name, found, ours).to_yaml()}\n---\n\n{body}"
    ModelCard(text)  # reads its own metadata back, and refuses what it cannot
    return text


def _of_run(run: Place, config: RunConfig) -> dict[str, object]:
    manifest = read_manifest(run)
    return {
        "config": config,
        "manifest": manifest,
        "base": public_name(config.model.path),
        "method": method_name(config),
        "rewards": list(rewards(config)),
        "sources": [public_name(each) for each in config.data.names(config.online)],
        "rounds": list(rounds(run, manifest)),
    }


def _of_results(found: Comparison | None, ours: Row | None) -> dict[str, object]:
    return {
        "found": found,
        "ours": ours,
        "before": _base(found),
        "conditions": conditions(found) if found else [],
        "columns": [each for each in found.columns if each.title in ours.cells] if found and ours else [],
        "shown": {"value": value, "bracketed": bracketed, "change": change, "figure": figure},
    }


def _base(found: Comparison | None) -> Row | None:
    return found.rows[0] if found and found.rows[0].name == BASE else None


def metadata(
    config: RunConfig, licence: Licence, name: str, found: Comparison | None, ours: Row | None
) -> ModelCardData:
    """The YAML block. Fields that are not known are left out."""
    base = public_name(config.model.path)
    hub = [each for each in map(_dataset, config.data.names(config.online)) if each]
    tags = ["preference-optimization", *_methods(config), "sampo-ray", PAPER]
    if licence.id == "llama3":
        tags.append("llama-3")
    scored = list(eval_results(found.columns, ours)) if found and ours else []
    return ModelCardData(
        license=licence.id,
        license_name=licence.name,
        license_link=licence.link,
        base_model=base if re.fullmatch(HUB_ID, base) else None,
        datasets=hub or None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=tags,
        model_name=name,
        eval_results=scored or None,
    )


def _methods(config: RunConfig) -> list[str]:
    of = {"sample": ["sampo"], "sum": ["dpo"] if config.method.loss == "sigmoid" else []}
    return of.get(config.method.reduction, [])


def eval_results(columns: Sequence[Column], ours: Row) -> Iterator[EvalResult]:
    """Of `model-index`: scores of public benchmarks. A number of fewer samples says so in both of its names."""
    for column in columns:
        cell = ours.cells.get(column.title)
        task = TASKS[cell.result.task] if cell else None
        dataset = (task.dataset or DATASETS.get(task.name)) if task else None
        if cell is None or task is None or dataset is None:
            continue
        about = cell.result.conditions
        part = "" if not is_trial(about) else f" (trial: {about.limit} of {about.total} samples)"
        arguments: dict[str, object] = {"num_few_shot": about.shots}
        if is_trial(about):
            arguments["limit"] = about.limit
        if about.judge is not None:
            arguments["judge"] = about.judge.name
        share = cell.score.unit == "share"
        yield EvalResult(
            task_type="text-generation",
            task_name="Text Generation",
            dataset_type=dataset,
            dataset_name=task.name + part,
            dataset_args=arguments,
            metric_type=cell.score.name.partition(",")[0],
            metric_name=f"{column.title}{' (%)' if share else ''}: {cell.score.name}{part}",
            metric_value=round(cell.score.value * (100 if share else 1), 2),
        )


def rounds(run: Place, manifest: Manifest) -> Iterator[Round]:
    steps = parse_metrics(lines.read(run.at("metrics.jsonl")))
    for record in manifest.rounds:
        of = [each.numbers for each in steps if each.round == record.index]
        if record.committed and of:
            pairs = record.stages["pairs"].rows if "pairs" in record.stages else []
            yield Round(
                record.index + 1,
                sum(pairs) or None,
                len(of),
                _mean(of, "chosen_tokens"),
                _mean(of, "rejected_tokens"),
                _mean(of[-max(1, len(of) // 10) :], "accuracy"),
            )


def _mean(steps: Sequence[Mapping[str, float]], name: str) -> float | None:
    values = [step[name] for step in steps if name in step]
    return fmean(values) if values else None


def rewards(config: RunConfig) -> Iterator[str]:
    """The reward sources of an online run; none of an offline one."""
    for part in config.reward.parts if config.online else ():
        weight = "" if part.weight == 1 else f"{part.weight:g} times "
        if part.function:
            file, colon, function = part.function.rpartition(":")
            yield f"{weight}the function {public_name(file)}{colon}{function}"
        elif part.model:
            yield f"{weight}the reward model {public_name(part.model)}"
        elif part.judge:
            yield f"{weight}the judge {part.judge.model} ({part.judge.preset}, {part.judge.mode})"


def public_name(named: str) -> str:
    """A hub name as it is; of a path or URL the last part: a card tells nothing of the machine it was made on."""
    if re.fullmatch(rf"{HUB_ID}(:[\w.-]+)*", named):
        return named
    return named.rstrip("/").rpartition("/")[2]


def _dataset(named: str) -> str | None:
    found = re.fullmatch(rf"({HUB_ID})(:[\w.-]+)*", named)
    return found[1] if found else None


def prompt(folder: Path | Place) -> Prompt:
    """The example as the exported tokenizer renders it."""
    from sampo_ray.data.chat import ChatFormat

    place = folder if isinstance(folder, Place) else Place(str(folder))
    names = [name for name in place.names() if not name.endswith((".safetensors", ".md"))]
    with place.on_disk(None if place.local else names) as files:
        chat = ChatFormat.load(files, "tokenizer")
    text, ids = chat.render(list(EXAMPLE)), chat.prompt_ids(list(EXAMPLE))
    bos = chat.tokenizer.bos_token_id
    return Prompt(text, len(ids), 0 if bos is None else list(ids).count(bos), chat.turn.end)


def dtype(folder: Place) -> str:
    """The data type of the exported weights."""
    found = re.search(r'"dtype":\s*"(\w+)"', folder.at("config.json").read().decode())
    return found[1] if found else "unknown"


def markdown(text: object) -> str:
    """Text within a line or a cell of a table, without a meaning of its own."""
    return re.sub(r"([\\`*_{}\[\]<>|])", r"\\\1", " ".join(str(text).split()))


def figure(value: float | None, places: int) -> str:
    return "unknown" if value is None else f"{value:.{places}f}"


def _marked(text: str) -> str:
    return f"{text}\n{MARK}{_digest(text)} -->\n"


def _ours(text: str) -> bool:
    body, mark, rest = text.rpartition(f"\n{MARK}")
    return bool(mark) and rest == f"{_digest(body)} -->\n"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
