"""Runs as jobs on an existing cluster."""

import asyncio
import io
import os
import signal
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import requests
import yaml
from ray.job_submission import JobStatus
from rich.console import Console

from sampo_ray.cluster import submit as job
from sampo_ray.config.run import load_config
from sampo_ray.errors import ConfigError
from sampo_ray.internals.ray import LimitedJobClient
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
        job.check_reachable(config("run.dir=runs/x"))


def test_files_that_only_this_machine_sees_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("pairs.jsonl").touch()
    with pytest.raises(ConfigError, match="data.train='pairs.jsonl' is a relative path on this machine"):
        job.check_reachable(config("data.train=pairs.jsonl"))
    with pytest.raises(ConfigError, match="data.train='pairs.jsonl' is a relative path on this machine"):
        job.check_reachable(config("data.train=[hub/pairs,pairs.jsonl]"))
    job.check_reachable(config("data.train=hub/pairs"))
    Path("keys.yaml").touch()
    with pytest.raises(ConfigError, match="serve.keys_file='keys.yaml' is a relative path on this machine"):
        job.check_reachable(config("serve.keys_file=keys.yaml"))


@pytest.mark.parametrize("override", ["serve.api_keys=[secret]", "serve={api_keys: [secret]}"])
def test_keys_never_travel_with_a_job(override):
    with pytest.raises(ConfigError, match=r"serve\.api_keys.*serve\.keys_file.*SAMPO_API_KEYS") as refused:
        job.check_reachable(config(override))
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("keys", ["", "some-key"])
def test_a_job_for_an_open_address_needs_keys_and_those_of_this_machine_stay_here(keys, tmp_path, monkeypatch):
    monkeypatch.setenv("SAMPO_API_KEYS", keys)
    monkeypatch.setattr(job, "submit_entrypoint", lambda *_: 0)
    recipe, console = tmp_path / "recipe.yaml", Console(file=io.StringIO())
    recipe.write_text(yaml.safe_dump(RECIPE))
    if keys:
        assert job.submit(recipe, ["serve.host=0.0.0.0"], "http://127.0.0.1:9", console) == 0
        assert "SAMPO_API_KEYS of this machine stays here" in console.file.getvalue()
        assert keys not in console.file.getvalue()
    else:
        with pytest.raises(ConfigError, match=r"serve\.host='0\.0\.0\.0'.*no API keys"):
            job.submit(recipe, ["serve.host=0.0.0.0"], "http://127.0.0.1:9", console)


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


class Server:
    """Answers the requests of Ray's job client as its server does: packages are not there yet and are taken, and jobs
    get the `answers` in turn (an exception is raised), the last one again and again.
    """

    def __init__(self, monkeypatch: Any, *answers: tuple[int, str] | Exception, upload: int = 200) -> None:
        self.answers, self.upload, self.asked = list(answers), upload, []
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        monkeypatch.setattr("requests.request", self.answer)
        monkeypatch.setattr(job, "RETRY_SECONDS", 0.0)

    def answer(self, method: str, url: str, json: Any = None, **_: Any) -> requests.Response:
        self.asked.append((method, url, json))
        if url.endswith("/api/version"):
            return response(200, '{"ray_version": "2.60.0"}')
        if "/api/packages/" in url:
            return response(404 if method == "GET" else self.upload, "")
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return response(answer[0], answer[1].replace("ID", (json or {}).get("submission_id", "")))

    def submit(self, folder: Path) -> str:
        client = job._connect("http://127.0.0.1:8265")
        return job._submitted(client, "true", {"working_dir": str(folder)}, "http://127.0.0.1:8265")


def response(status: int, text: str) -> requests.Response:
    made = requests.Response()
    made.status_code, made._content = status, text.encode()
    return made


def test_files_that_are_too_much_for_the_job_server_are_refused_before_they_are_sent(tmp_path, monkeypatch):
    (tmp_path / "reward.py").write_bytes(os.urandom(3 << 20))  # it does not get smaller
    server = Server(monkeypatch, (200, '{"job_id": "ID", "submission_id": "ID"}'))
    monkeypatch.setattr(LimitedJobClient, "UPLOAD_BYTES", 4 << 20)
    assert server.submit(tmp_path).startswith("sampo_")
    monkeypatch.setattr(LimitedJobClient, "UPLOAD_BYTES", 2 << 20)
    server.asked.clear()
    with pytest.raises(job.SubmitError, match=r"travel with the job are 3\.0 MiB zipped, and .* at most 2 MiB"):
        server.submit(tmp_path)
    assert not [method for method, *_ in server.asked if method == "PUT"]


def test_an_upload_that_a_proxy_refuses_is_one_message(tmp_path, monkeypatch):
    with pytest.raises(job.SubmitError, match=r"zipped, and http.* takes less \(status 413\); keep what is"):
        Server(monkeypatch, (200, ""), upload=413).submit(tmp_path)


TAKEN = "Traceback (most recent call last):\n  ...\nValueError: Job with submission_id ID already exists. Please ...\n"


def test_a_job_whose_taking_was_not_heard_of_is_not_started_a_second_time(tmp_path, monkeypatch):
    server = Server(monkeypatch, requests.ReadTimeout(), (500, "No available agent to submit job"), (500, TAKEN))
    found = server.submit(tmp_path)
    ids = [body["submission_id"] for method, url, body in server.asked if url.endswith("/api/jobs/")]
    assert ids == [found] * 3


def test_a_refusal_is_told_without_the_server_s_stack(tmp_path, monkeypatch):
    refusal = "Traceback (most recent call last):\n  File ...\nValueError: no such field.\n"
    with pytest.raises(job.SubmitError, match=r"the job was not taken: ValueError: no such field"):
        Server(monkeypatch, (400, refusal)).submit(tmp_path)


def test_a_server_that_stays_silent_is_one_message(tmp_path, monkeypatch):
    monkeypatch.setattr(job, "SETTLE_SECONDS", 0.0)
    with pytest.raises(job.SubmitError, match="the job was not taken: ReadTimeout"):
        Server(monkeypatch, requests.ReadTimeout()).submit(tmp_path)


@pytest.mark.parametrize(
    ("mode", "status", "message"),
    [(None, 401, "sends only if RAY_AUTH_MODE=token is set"), ("token", 403, "prints on its head")],
)
def test_a_cluster_that_asks_for_a_token_says_what_to_set(mode, status, message, tmp_path, monkeypatch):
    server = Server(monkeypatch, (200, ""))
    monkeypatch.setattr("requests.request", lambda *_, **__: response(status, "Unauthorized"))
    monkeypatch.setenv("RAY_AUTH_MODE", mode) if mode else monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    with pytest.raises(job.SubmitError, match=message):
        server.submit(tmp_path)


class Followed:
    """A job that is seen in these states in turn, the last one again and again; its log ends or is lost at once."""

    def __init__(self, *states: str | Exception, log: Exception | None = None) -> None:
        self.states, self.log = list(states), log

    def get_job_info(self, job_id: str) -> Any:
        state = self.states.pop(0) if len(self.states) > 1 else self.states[0]
        if isinstance(state, Exception):
            raise state
        return SimpleNamespace(status=JobStatus(state), message="Job has not started yet.")

    async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        yield "working\n"
        if self.log:
            raise self.log

    def follow(self, monkeypatch: pytest.MonkeyPatch) -> tuple[str, list[str]]:
        """What is shown of its log, and what is said beside it."""
        monkeypatch.setattr(job, "REQUEST_SECONDS", 0.0)
        monkeypatch.setattr(job, "SETTLE_SECONDS", 0.0)
        shown, said = io.StringIO(), []
        asyncio.run(job._follow(self, "j", Console(file=shown), said.append))
        job._ended(self, "j", said.append)
        return shown.getvalue(), said


def test_a_job_that_stays_pending_is_waited_for_and_says_so_once(monkeypatch):
    shown, said = Followed("PENDING", "PENDING", "PENDING", "RUNNING", "SUCCEEDED").follow(monkeypatch)
    assert shown == "working\n"
    assert len(said) == 1 and "job j is pending: Job has not started yet. Ray cannot stop it before" in said[0]


def test_a_job_whose_log_cannot_be_read_is_followed_to_its_end(monkeypatch):
    running = ["RUNNING"] * 4
    shown, said = Followed(*running, "SUCCEEDED", log=RuntimeError("closed unexpectedly")).follow(monkeypatch)
    assert shown == "working\n", "what was shown is not shown again"
    assert [line.partition(": ")[2] for line in said] == [
        "its log is lost since 0 s: closed unexpectedly",
        "there is no more of its log, and it still is RUNNING; waiting for its end",
    ]


def test_a_job_that_went_with_the_head_says_how_the_run_goes_on(monkeypatch):
    forgotten = RuntimeError("Request failed with status code 404: Job j does not exist.")
    with pytest.raises(job.SubmitError, match="its head was restarted and the job ended; continue the run"):
        Followed("RUNNING", forgotten).follow(monkeypatch)


def test_a_head_that_fails_at_the_end_is_one_message(monkeypatch):
    broken = RuntimeError("Request failed with status code 500: Traceback:\n ...\nKeyError: 'head'\n.")
    with pytest.raises(job.SubmitError, match="job j: how it ended is not known: KeyError: 'head'"):
        Followed("RUNNING", broken).follow(monkeypatch)


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
    none = {k: v for k, v in cluster.env.items() if not k.startswith("RAY_AUTH")}
    wrong = {**cluster.env, "RAY_AUTH_TOKEN": "0" * 64}
    for env, message in ((none, "RAY_AUTH_MODE=token is set"), (wrong, "the cluster has another token")):
        status, output = Cluster(cluster.address, env).run("true", tmp_path)
        assert status == 1
        assert "SubmitError" in output and message in output


@pytest.mark.slow
def test_the_job_server_takes_no_more_than_we_send_it(cluster):
    package, much = "/api/packages/gcs/_ray_pkg_0123456789abcdef.zip", bytes(LimitedJobClient.UPLOAD_BYTES + 1)
    assert cluster.request("PUT", package, data=much).status_code == 413


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
