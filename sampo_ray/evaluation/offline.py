"""What the harnesses need besides the model: packages, data on this machine, and no network."""

import contextlib
import importlib.util
import os
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path

from sampo_ray.errors import EvaluationError
from sampo_ray.evaluation.tasks import Task

OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
"""The environment of a process that evaluates. Set before the libraries are imported, which read it once."""
PUNKT = "tokenizers/punkt_tab"


def environment(data: Path | None) -> dict[str, str]:
    """`OFFLINE`, and where NLTK finds its data: `nltk_data` in the data folder or beside it, or as NLTK_DATA says."""
    folders = [] if data is None else [data / "nltk_data", data.parent / "nltk_data"]
    found = [str(each) for each in folders if each.is_dir()]
    given = os.environ.get("NLTK_DATA")
    return {**OFFLINE, **({"NLTK_DATA": os.pathsep.join([*([given] if given else []), *found])} if found else {})}


def check_packages(tasks: Iterable[Task]) -> None:
    """EvaluationError that names all that is missing."""
    missing = {name for task in tasks for name in task.packages if importlib.util.find_spec(name) is None}
    if missing:
        extra = sorted(missing - {"ifbench"})
        how = [f"pip install 'sampo-ray[eval]' ({', '.join(extra)})"] if extra else []
        how += ["pip install ifbench"] if "ifbench" in missing else []
        named = ", ".join(task.name for task in tasks if missing & set(task.packages))
        raise EvaluationError(
            f"tasks: {named} cannot be run without packages that are not installed; {' and '.join(how)}"
        )


def check_data(tasks: Iterable[Task], data: Path | None) -> None:
    """EvaluationError for a data folder that lacks what tasks read, or for a machine without NLTK's sentence model."""
    if data is not None and not data.is_dir():
        raise EvaluationError(f"data: {str(data)!r} is no folder; name the one that holds openai/gsm8k and the others")
    for task in tasks:
        if task.dataset and data is not None and not (data / task.dataset).is_dir():
            raise EvaluationError(
                f"data: task {task.name} reads {task.dataset}, which {str(data)!r} does not hold (nothing is "
                f"downloaded); put the data set's files into {data / task.dataset}"
            )
        if "nltk" in task.packages:
            check_punkt(data)


def check_punkt(data: Path | None) -> None:
    import nltk

    paths = [*environment(data).get("NLTK_DATA", "").split(os.pathsep), *nltk.data.path]
    if not any((Path(path) / PUNKT).is_dir() for path in paths if path):
        raise EvaluationError(
            f"data: NLTK has no {PUNKT} on this machine, which counts sentences (nothing is downloaded); put it into "
            "nltk_data of the data folder, or name its folder in NLTK_DATA"
        )


@contextlib.contextmanager
def at_data(data: Path | None) -> Iterator[None]:
    """The data folder as working directory: where the harness's names of data sets are paths."""
    if data is None:
        yield
        return
    with contextlib.chdir(data):
        yield


def versions_of(packages: Iterable[str]) -> dict[str, str]:
    """Installed versions, of packages that are installed."""
    found = {}
    for name in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found
