"""Online rounds on one real fleet: on-policy rollouts, a live endpoint meanwhile, and an engine that is killed."""

import json
import threading
import time
from pathlib import Path

import httpx
import psutil
import pyarrow as pa
import pytest

from sampo_ray.config import load_config
from sampo_ray.profiles import resolve
from sampo_ray.runs import Run, create_run

pytestmark = pytest.mark.slow
REWARD = '''
def reward(prompts, completions):
    """Distinct by text, so that there are few ties; a run of it is no use to anybody."""
    return [sum(map(ord, text)) % 97 / 97 for text in completions]
'''


class QuietDisplay:
    """Takes what a display takes; the tests look at the run directory instead."""

    def __getattr__(self, name):
        return lambda *args, **kwargs: None

    def stage(self, *args):
        import contextlib

        return contextlib.nullcontext(type("Stage", (), {"advance": staticmethod(lambda n=1: None)}))


def new_run(folder: Path, tiny_model: Path, *overrides: str) -> Run:
    (folder / "reward.py").write_text(REWARD)
    rows = [{"prompt": f"Say {i} and then {i + 1}"} for i in range(64)]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tree = {
        "model": {"path": str(tiny_model)},
        "data": {"prompts": str(folder / "prompts.jsonl"), "max_length": 256},
        "rounds": {"count": 2, "mode": "online"},
        "rollout": {"prompts": 32, "samples": 4, "max_tokens": 48},
        "reward": {"function": f"{folder}/reward.py:reward"},
        "optim": {"batch_size": 8, "learning_rate": 1e-3},
        "publish": {"every_steps": 1},
        "serve": {"port": 0},
        "run": {"dir": str(folder / "run")},
    }
    return create_run(resolve(load_config(tree, overrides), {}, cores=2)[0])


@pytest.fixture(scope="module")
def fleet(own_serve, tiny_model, tmp_path_factory):
    from sampo_ray.actors.fleet import open_fleet

    with open_fleet(new_run(tmp_path_factory.mktemp("fleet"), tiny_model)) as fleet:
        yield fleet


class Client(threading.Thread):
    """Asks the live policy again and again until it is stopped; keeps status and version of every answer."""

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self.url, self.answers, self.stopped = url, [], threading.Event()

    def run(self) -> None:
        body = {"model": "policy", "messages": [{"role": "user", "content": "Say 3"}], "max_tokens": 8}
        while not self.stopped.is_set():
            reply = httpx.post(f"{self.url}/v1/chat/completions", json=body, timeout=120)
            self.answers.append(
                (reply.status_code, reply.headers.get("x-policy-version"), reply.headers.get("x-policy-run"))
            )


@pytest.fixture(scope="module")
def finished(fleet, tiny_model, tmp_path_factory) -> tuple[Run, Client]:
    """An online run of two rounds, and a client that asked the endpoint while it trained."""
    from sampo_ray.iterate import iterate

    run = new_run(tmp_path_factory.mktemp("online"), tiny_model)
    client = Client(fleet.endpoint)
    fleet.attach(run)
    client.start()
    iterate(run, fleet, QuietDisplay())
    last = run.manifest.rounds[-1]
    final, deadline = str(last.start_version + last.steps), time.monotonic() + 60
    while client.answers[-1][1] != final and time.monotonic() < deadline:
        time.sleep(0.1)
    client.stopped.set()
    client.join(120)
    return run, client


def stage(run: Run, round: int, name: str) -> pa.Table:
    folder = run.place.at("rounds", str(round), name)
    return pa.concat_tables([folder.at(part).read_table() for part in folder.names()])


def test_rollouts_are_on_policy_and_kept_with_their_versions(finished):
    run, _ = finished
    for record in run.manifest.rounds:
        completions = stage(run, record.index, "completions")
        assert completions.num_rows == 32 * 4
        assert set(completions["first_version"].to_pylist()) == {record.start_version}
        assert set(completions["last_version"].to_pylist()) == {record.start_version}


def test_pairs_hold_the_sampled_ids_and_never_choose_an_unfinished_completion(finished):
    run, _ = finished
    rows = stage(run, 0, "scores").to_pylist()
    by_ids = {(row["id"], tuple(row["completion"])): row for row in rows}
    for pair in stage(run, 0, "reference").to_pylist():
        chosen = by_ids[pair["id"], tuple(pair["chosen"])]
        rejected = by_ids[pair["id"], tuple(pair["rejected"])]
        assert chosen["finish_reason"] == "stop" and chosen["reward"] == pair["chosen_reward"] > rejected["reward"]
        assert len(pair["chosen_ref"]) == len(pair["chosen"])


def test_the_second_round_begins_at_delta_zero_on_new_weights(finished):
    run, _ = finished
    first = [line for line in run.metrics() if line["step"] == 1]
    assert [line["margin"] for line in first] == [0.0, 0.0]
    assert run.manifest.rounds[1].start_version == run.manifest.rounds[0].steps > 0


def test_the_endpoint_always_answers_and_follows_the_run(finished):
    run, client = finished
    assert {status for status, _, _ in client.answers} == {200}
    mine = [int(version) for _, version, name in client.answers if name == run.id]
    assert mine == sorted(mine), "versions never go backwards"
    last = run.manifest.rounds[-1]
    assert mine[-1] == last.start_version + last.steps
    assert len(set(mine)) > 1


def test_a_killed_engine_costs_only_what_was_not_stored(fleet, tiny_model, tmp_path):
    from sampo_ray.iterate import iterate

    run = new_run(
        tmp_path, tiny_model, "rounds.count=1", "rollout.prompts=64", "fleet.generators.max_ongoing_requests=16"
    )
    completions = run.place.at("rounds", "0", "completions")
    killed: list[float] = []

    def kill() -> None:
        deadline = time.monotonic() + 200
        while not completions.names() and time.monotonic() < deadline:
            time.sleep(0.01)
        engines = [p for p in psutil.Process().children(recursive=True) if "EngineCore" in " ".join(p.cmdline())]
        assert engines
        engines[0].kill()
        killed.append(time.time())

    killer = threading.Thread(target=kill)
    killer.start()
    iterate(run, fleet, QuietDisplay())
    killer.join(10)
    assert killed and run.manifest.finished
    first = min(Path(completions.at(name).path).stat().st_mtime for name in completions.names())
    assert first < killed[0] + 1, "what was stored before was not made again"
    assert stage(run, 0, "completions").num_rows == 64 * 4
