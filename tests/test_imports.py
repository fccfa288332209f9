"""What commands import: a command that does not train answers at once."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.waiting import scaled

HEAVY = ("torch", "transformers", "ray", "vllm", "deepspeed", "datasets", "pyarrow", "numpy")
COMMAND = "from sampo_ray.console.main import app; app({arguments!r}, standalone_mode=False)"


def imported_by(code: str) -> set[str]:
    """The top-level packages that a new Python process has imported once it has run `code`."""
    listing = "import sys; print('\\n' + ' '.join({name.partition('.')[0] for name in sys.modules}))"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{listing}"], capture_output=True, text=True, timeout=scaled(60)
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())


@pytest.fixture
def run_directory(tmp_path: Path) -> Path:
    from sampo_ray.config.run import load_config
    from sampo_ray.run.directory import create_run

    tree = {"model": {"path": "m"}, "data": {"train": "d"}, "run": {"dir": str(tmp_path / "run")}}
    return Path(create_run(load_config(tree)).place.path)


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["keys", "list", "KEYS"], ["versions", "RUN"]])
def test_a_command_imports_no_heavy_library(arguments: list[str], run_directory: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys.yaml"
    keys.write_text("[]")
    places = {"KEYS": str(keys), "RUN": str(run_directory)}
    code = COMMAND.format(arguments=[places.get(word, word) for word in arguments])
    assert imported_by(code).isdisjoint(HEAVY)


@pytest.mark.parametrize("module", ["sampo_ray.config.run", "sampo_ray.config.profiles", "sampo_ray.run.versions"])
def test_a_module_imports_no_heavy_library(module: str) -> None:
    assert imported_by(f"import {module}").isdisjoint(HEAVY)
