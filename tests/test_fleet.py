"""What a fleet consists of, and the reason that is given when it does not start."""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sampo_ray.actors.weights.pinned import last_error
from sampo_ray.config.machines import Cluster
from sampo_ray.config.run import load_config
from sampo_ray.config.serving import ServeConfig
from sampo_ray.console import session
from sampo_ray.errors import EndpointError
from sampo_ray.loop.fleet import applications, routes_of
from sampo_ray.loop.rounds import Round
from sampo_ray.loop.starting import Places
from sampo_ray.loop.validate import Checked
from sampo_ray.run.directory import create_run
from sampo_ray.run.parts import Part
from tests.notes import Notes

REPORT = """Deploying application r1-policy failed: Failed to update the deployments ['policy'].
The deployment failed to start 3 times in a row due to an internal error. Error:
ray::ServeReplica:r1-policy:policy.initialize_and_get_metadata() (pid=7)
  File "engine.py", line 222, in start
    raise RuntimeError(f"Failed to create the config: {e}") from None
RuntimeError: Failed to create the config: 1 validation error for ModelConfig
  Value error, Unknown quantization method: nonsense. [type=value_error]
    For further information visit https://errors.example
"""


@pytest.mark.parametrize(
    ("report", "words"),
    [
        (
            REPORT,
            "RuntimeError: Failed to create the config: 1 validation error for ModelConfig Value error, "
            "Unknown quantization method: nonsense. [type=value_error]",
        ),
        ("torch.OutOfMemoryError: no room", "torch.OutOfMemoryError: no room"),
        ("Deploying failed", "Deploying failed"),
        ("", "an application could not be started"),
    ],
)
def test_the_reason_of_a_failed_start_is_the_last_error_in_the_report(report: str, words: str) -> None:
    assert last_error(report) == words


def test_the_reason_of_a_failed_start_is_cut_to_500_characters() -> None:
    assert len(last_error(f"ValueError: {'too much ' * 1000}")) <= 500


@pytest.mark.parametrize(("loss", "referenced"), [("sigmoid", True), ("mix", True), ("orpo", False), ("simpo", False)])
def test_losses_without_a_reference_have_no_reference_workers_and_no_such_stage(
    tmp_path: Path, loss: str, referenced: bool
) -> None:
    tree = {"model": {"path": "m"}, "data": {"train": "d"}, "run": {"dir": str(tmp_path)}, "serve": {"enabled": False}}
    run = create_run(load_config(tree, [f"method.loss={loss}"]))
    serving: Any = SimpleNamespace(store_name="store")
    places = Places(run.config, Cluster.of({}, 1))
    assert list(applications(run, serving, places)) == ([f"{run.id}-references"] if referenced else [])
    if not referenced:
        pairs = [Part(run.place.at("pairs"), 3)]
        round = Round(run, 0, Notes())
        assert round.reference(pairs, None) == pairs and "reference" not in run.round(0).stages


def test_endpoints_of_one_cluster_have_routes_of_their_own() -> None:
    trained, served, other = (routes_of(name, "cluster") for name in ("r1", "serve-r1", "serve-r2"))
    assert (trained, served, other) == (["/r1"], ["/serve-r1"], ["/serve-r2"])
    assert routes_of("serve-r1", "laptop") == ["/", "/serve-r1"]


def test_a_run_that_serve_refuses_leaves_no_run_directory(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(config: ServeConfig) -> list[str]:
        raise EndpointError("others reach it")

    monkeypatch.setattr("sampo_ray.serve.endpoint.start_serve", refuse)
    monkeypatch.setattr(session, "ray_cluster", lambda note: nullcontext(Cluster.of({"CPU": 8.0}, 2)))
    tree = {"model": {"path": str(tiny_model)}, "data": {"train": "d", "max_length": 64}, "serve": {"port": 0}}
    config = load_config(tree, [f"run.dir={tmp_path}"])
    with pytest.raises(EndpointError, match="others reach it"):
        session._run(Checked(config, [], [], []), None, keep_serving=False, check=lambda: None)
    assert create_run(config).id
