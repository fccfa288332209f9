"""Runs as jobs on an existing cluster."""

import io
import signal
import socket
from pathlib import Path

import pytest
from rich.console import Console

from sampo_ray.cluster import submit as job
from sampo_ray.config.run import load_config
from sampo_ray.errors import ConfigError
from tests.waiting import scaled, wait_until

from .conftest import Cluster

RECIPE = {"model": {"path": "hub/model"}, "data": {"train": "hub/pairs"}, "run": {"dir": "s3://bucket/run"}}


def config(*overrides: str):
    return load_config(RECIPE, list(overrides))


def test_the_entrypoint_survives_the_shell():
    command = job.entrypoint(Path("some/where/my recipe.yaml"), ["data.train=s3://b/a b.jsonl", "run.seed=3"])
    assert command == "python -m sampo_ray train 'my recipe.yaml' 'data.train=s3://b/a b.jsonl' run.seed=3"


def test_a_run_directory_that_ends_with_the_job_is_refused():
    with pytest.raises(ConfigError, match="run.dir='runs/x' is relative"):
        job.check_reachable(config("run.dir=runs/x"), [])


def test_files_that_only_this_machine_sees_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("pairs.jsonl").touch()
    with pytest.raises(ConfigError, match="data.train='pairs.jsonl' is a relative path on this machine"):
        job.check_reachable(config("data.train=pairs.jsonl"), [])
    job.check_reachable(config("data.train=hub/pairs"), [])
    Path("keys.yaml").touch()
    with pytest.raises(ConfigError, match="serve.keys_file='keys.yaml' is a relative path on this machine"):
        job.check_reachable(config("serve.keys_file=keys.yaml"), [])


def test_keys_never_go_on_the_command_line():
    overrides = ["serve.api_keys=[secret]"]
    with pytest.raises(ConfigError, match=r"serve\.api_keys") as refused:
        job.check_reachable(config(*overrides), overrides)
    assert "secret]" not in str(refused.value)


def test_a_reward_file_travels_with_the_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine").mkdir()
    Path("mine/reward.py").write_text("def score(prompts, completions): ...")
    Path("recipe.yaml").write_text("{}")
    folder = tmp_path / "staged"
    folder.mkdir()
    job.stage_files(Path("recipe.yaml"), config("reward.function=mine/reward.py:score"), folder)
    assert (folder / "recipe.yaml").exists() and (folder / "mine/reward.py").exists()


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1:8265", "give the URL of the cluster's dashboard"),
        ("http://127.0.0.1:9", "no Ray job server answers there"),
    ],
)
def test_an_address_where_no_cluster_is_gives_one_clear_message(address, message, tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(job.SubmitError, match=message):
        job.submit_entrypoint("true", tmp_path, address, Console(file=io.StringIO()))


def test_a_server_that_never_answers_does_not_hold_us_up(tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(job, "REQUEST_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(job.SubmitError, match="no Ray job server"):
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        job.submit_entrypoint("true", tmp_path, address, Console(file=io.StringIO()))


def test_an_environment_that_would_overrule_the_address_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "http://elsewhere:8265")
    with pytest.raises(job.SubmitError, match="RAY_ADDRESS is set"):
        job.submit_entrypoint("true", tmp_path, "http://127.0.0.1:8265", Console(file=io.StringIO()))


@pytest.mark.slow
def test_a_job_runs_over_both_nodes_with_the_package_that_travels_with_it(cluster, tmp_path):
    (tmp_path / "probe.py").write_text(
        "import ray, sampo_ray.actors\n"
        "ray.init(log_to_driver=False)\n"
        "print(len(ray.nodes()), 'nodes', sampo_ray.__file__, sampo_ray.actors.__file__)\n"
    )
    status, output = cluster.run("python probe.py", tmp_path)
    assert status == 0, output
    assert "2 nodes" in output and "succeeded" in output
    assert output.count("runtime_resources/py_modules_files") == 2


@pytest.mark.slow
def test_a_job_that_fails_gives_its_status_and_its_last_words(cluster, tmp_path):
    status, output = cluster.run("echo out of luck; exit 3", tmp_path)
    assert status == 3, output
    assert "out of luck" in output and "failed" in output


@pytest.mark.slow
def test_a_cluster_that_asks_for_a_token_says_so(cluster, tmp_path):
    stranger = Cluster(cluster.address, {k: v for k, v in cluster.env.items() if not k.startswith("RAY_AUTH")})
    status, output = stranger.run("true", tmp_path)
    assert status == 1
    assert "SubmitError" in output and "RAY_AUTH_TOKEN" in output


@pytest.mark.slow
def test_ctrl_c_leaves_the_job_running_and_says_how_to_go_on(cluster, tmp_path):
    log, empty = tmp_path / "out.log", tmp_path / "empty"
    empty.mkdir()
    follower = cluster.follower("echo working; sleep 600", empty, log)
    wait_until(lambda: "\nworking" in log.read_text(), "output of the job", 120)
    follower.send_signal(signal.SIGINT)
    assert follower.wait(timeout=scaled(60)) == 130
    job_id = log.read_text().split("job ", 1)[1].split()[0]
    assert f"ray job stop --address {cluster.address} {job_id}" in log.read_text()

    def status() -> str:
        return cluster.request("GET", f"/api/jobs/{job_id}").json()["status"]

    assert status() == "RUNNING"
    cluster.request("POST", f"/api/jobs/{job_id}/stop")
    wait_until(lambda: status() == "STOPPED", "end of the job", 60)


@pytest.mark.slow
def test_a_recipe_trains_as_a_job_on_the_cluster(submitted):
    run, said = submitted
    assert "round 2/2" in said and "succeeded" in said
    assert (run / "exports" / "round-2" / "version.json").exists()
