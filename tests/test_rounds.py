"""Online rounds on one real fleet: on-policy rollouts, an endpoint that is live meanwhile, and a killed engine."""

import dataclasses
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import openai
import psutil
import pyarrow as pa
import pytest

from sampo_ray.actors.policy.messages import RolloutRequest
from sampo_ray.config.profiles import resolve
from sampo_ray.config.run import load_config
from sampo_ray.run.directory import Run, create_run
from sampo_ray.run.manifest import Age
from sampo_ray.run.storage import Place
from sampo_ray.run.versions import WeightsId
from tests.conftest import assert_greedy
from tests.judge_server import JudgeServer, by_length, serving
from tests.notes import Notes
from tests.waiting import scaled, wait_until

logger = logging.getLogger(__name__)
pytestmark = pytest.mark.slow
EDITS = 6
REWARD = '''
def reward(prompts, completions):
    """Differs by text, so that there are few ties; it means nothing."""
    return [sum(map(ord, text)) % 97 / 97 for text in completions]
'''


def stop_at(done: Callable[[], object]) -> Callable[[], None]:
    """A check before the run directory is written to that ends the run once something is there."""

    def check() -> None:
        if done():
            raise KeyboardInterrupt

    return check


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
        "serve": {"port": 0, "feedback": {"keep_hours": 1}},
        "run": {"dir": str(folder / "run")},
    }
    return create_run(resolve(load_config(tree, overrides), {}, cores=2)[0])


@pytest.fixture(scope="module")
def judge() -> Iterator[JudgeServer]:
    """Prefers longer answers."""
    with serving(by_length) as server:
        yield server


def judged(folder: Path, judge: JudgeServer) -> list[str]:
    """Overrides by which a judge's rewards are added to the function's, and both are corrected for length."""
    settings = f"{{url: '{judge.url}', model: judge, weighted: false}}"
    parts = f"[{{function: '{folder}/reward.py:reward'}}, {{judge: {settings}, weight: 0.1}}]"
    return ["reward.function=null", f"reward.sum={parts}", "reward.length_controlled=true"]


@pytest.fixture(scope="module")
def fleet(own_serve, tiny_model, judge, tmp_path_factory):
    from sampo_ray.actors.policy import replica_weights
    from sampo_ray.loop.fleet import open_fleet

    source = replica_weights.WeightsSource

    def takes_turns(*arguments, **more):
        """A fleet that takes turns with the ranks if a test wants it to: else the store never has it sleep."""
        return source(*arguments, **{**more, "takes_turns": True})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replica_weights, "WeightsSource", takes_turns)
        folder = tmp_path_factory.mktemp("fleet")
        with open_fleet(new_run(folder, tiny_model, *judged(folder, judge))) as fleet:
            yield fleet


class Client(threading.Thread):
    """Asks the live policy until it is stopped; keeps status and version of every answer. Edits a few of them once
    `begun` exists.
    """

    def __init__(self, url: str, begun: Place) -> None:
        super().__init__(daemon=True)
        self.url, self.begun, self.answers, self.edits, self.stopped = url, begun, [], [], threading.Event()

    def run(self) -> None:
        body = {"model": "policy", "messages": [{"role": "user", "content": "Say 3"}], "max_tokens": 8}
        while not self.stopped.is_set():
            reply = httpx.post(f"{self.url}/v1/chat/completions", json=body, timeout=scaled(120))
            self.answers.append(
                (reply.status_code, reply.headers.get("x-policy-version"), reply.headers.get("x-policy-run"))
            )
            if len(self.edits) < EDITS and self.begun.exists():
                self.edits.append(f"{len(self.edits)}, three.")
                vote = {"response": reply.json()["id"], "edited": self.edits[-1]}
                assert httpx.post(f"{self.url}/feedback", json=vote, timeout=scaled(120)).status_code == 200


@pytest.fixture(scope="module")
def finished(fleet, tiny_model, judge, tmp_path_factory) -> tuple[Run, Client]:
    """An online run of two rounds, and a client that asked the endpoint while it trained."""
    from sampo_ray.iterate import iterate

    folder = tmp_path_factory.mktemp("online")
    run = new_run(folder, tiny_model, *judged(folder, judge))
    client = Client(fleet.endpoint, begun=run.place.at("rounds", "0", "prompts"))
    fleet.attach(run)
    client.start()
    iterate(run, fleet, Notes())
    last = run.manifest.rounds[-1]
    final = str(last.start_version + last.steps)

    def answered() -> bool:
        assert client.is_alive(), "a request failed"
        return client.answers[-1][1] == final

    wait_until(answered, f"answer of version {final}")
    client.stopped.set()
    client.join(scaled(120))
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
        assert (pair["id"], tuple(pair["rejected"])) in by_ids
        assert chosen["finish_reason"] == "stop" and pair["chosen_reward"] > pair["rejected_reward"]
        assert len(pair["chosen_ref"]) == len(pair["chosen"])


def test_rewards_have_what_the_judge_took_and_what_length_explained_of_them(finished, judge):
    run, _ = finished
    for record in run.manifest.rounds:
        scores, candidates = stage(run, record.index, "scores"), stage(run, record.index, "candidates")
        tally, fit = record.stages["scores"].judge, record.stages["candidates"].length_fit
        assert tally.calls + tally.cached > 32 and tally.lost == 0 and tally.first_share is not None
        rewards = {}
        for row in scores.to_pylist():
            rewards.setdefault(row["id"], {})[tuple(row["completion"])] = row["reward"]
        for pair in candidates.to_pylist():
            chosen, rejected = tuple(pair["chosen"]), tuple(pair["rejected"])
            raw = rewards[pair["id"]][chosen] - rewards[pair["id"]][rejected]
            corrected = pair["chosen_reward"] - pair["rejected_reward"]
            assert corrected == pytest.approx(raw - fit.slope * (len(chosen) - len(rejected)), abs=1e-6)
    assert judge.bodies and run.place.at("verdicts").names() == []  # they are in the run that the fleet began with
    lines = [json.loads(line) for line in run.place.at("metrics.jsonl").read().splitlines()]
    assert {line["judge_calls"] for line in lines} and all("length_slope" in line for line in lines)


def test_feedback_on_answers_is_trained_on_in_the_next_round_and_only_there(finished, tmp_path):
    from sampo_ray.data.chat import ChatFormat
    from sampo_ray.loop import stages

    run, client = finished
    first, second = (run.manifest.rounds[index].stages["feedback"] for index in range(2))
    assert first.rows == [] and first.votes == 0
    assert 0 < second.votes == sum(second.rows) <= len(client.edits)
    chat = ChatFormat.load(run.place.at("tokenizer").path, "tokenizer")
    trained = [pair for pair in stage(run, 1, "reference").to_pylist() if pair["id"].startswith("feedback/")]
    assert len(trained) == second.votes and {chat.text(pair["chosen"]) for pair in trained} <= set(client.edits)
    assert all(len(pair["chosen_ref"]) == len(pair["chosen"]) for pair in trained)

    where = run.place, [], run.place.at("tokenizer"), run.config.data
    place = run.place.at("rounds", "1", "feedback")
    again = stages.feedback(place, *where)
    assert again.votes == second.votes, "a stage that was cut off has its votes already"
    later = stages.feedback(run.place.at("later"), run.place, [place], *where[2:])
    assert second.votes + later.votes + sum(later.left.values()) == len(client.edits)


def test_the_second_round_begins_at_delta_zero_on_new_weights(finished):
    run, _ = finished
    assert [step.values["margin"] for step in run.metrics() if step.step == 1] == [0.0, 0.0]
    assert run.manifest.rounds[1].start_version == run.manifest.rounds[0].steps > 0


def test_the_endpoint_always_answers_and_follows_the_run(finished):
    run, client = finished
    assert {status for status, _, _ in client.answers} == {200}
    versions = [int(version) for _, version, name in client.answers if name == run.id]
    assert versions == sorted(versions), "versions never go backwards"
    last = run.manifest.rounds[-1]
    assert versions[-1] == last.start_version + last.steps
    assert len(set(versions)) > 1


def test_a_killed_engine_costs_only_what_was_not_stored(fleet, tiny_model, tmp_path):
    """Its replica ends at once, and another takes its place, on current weights."""
    from sampo_ray.iterate import iterate

    run = new_run(
        tmp_path, tiny_model, "rounds.count=1", "rollout.prompts=64", "fleet.generators.max_ongoing_requests=16"
    )
    completions = run.place.at("rounds", "0", "completions")
    killed: list[float] = []
    ended: list[psutil.Process] = []

    def kill() -> None:
        wait_until(completions.names, "completion", 200, every=0.01)
        processes = psutil.Process().children(recursive=True)
        (engine,) = [process for process in processes if process.name() == "VLLM::EngineCore"]
        replica = psutil.Process(engine.ppid())
        engine.kill()
        killed.append(time.time())
        ended.extend(psutil.wait_procs([replica], timeout=scaled(30))[0])

    killer = threading.Thread(target=kill)
    killer.start()
    iterate(run, fleet, Notes())
    killer.join(scaled(10))
    assert killed and ended and run.manifest.finished
    last = run.manifest.rounds[0].start_version + run.manifest.rounds[0].steps
    fleet.shared_policy.hold.remote(WeightsId(run.id, last)).result(timeout_s=scaled(60))
    held = fleet.shared_policy.weights.remote().result(timeout_s=scaled(60))
    assert (held["run"], held["version"], held["state"]) == (run.id, last, "ready")
    greedy = RolloutRequest(1, 0.0, top_p=1.0, max_tokens=24, seed=0, weights=WeightsId(run.id, last))
    answers = fleet.shared_policy.generate.remote(stage(run, 0, "prompts"), [0, 1, 2], greedy).result(
        timeout_s=scaled(60)
    )
    assert_greedy(answers, run.versions.at(f"{last:06}").path)
    first = min(Path(completions.at(name).path).stat().st_mtime for name in completions.names())
    assert first < killed[0] + 1, "what was stored before was not made again"
    assert stage(run, 0, "completions").num_rows == 64 * 4


def test_completions_sampled_ahead_are_at_most_one_round_old_and_their_age_is_recorded(fleet, tiny_model, tmp_path):
    from sampo_ray.iterate import iterate

    # Sixteen epochs: some steps of this model are over before the first completion has begun.
    overrides = ["rollout.ahead=1", "rounds.count=3", "rollout.prompts=20", "rounds.epochs=16"]
    run = new_run(tmp_path, tiny_model, *overrides)
    iterate(run, fleet, Notes())
    for record, before in zip(run.manifest.rounds[1:], run.manifest.rounds, strict=False):
        sampled = stage(run, record.index, "completions")
        ages = [record.start_version - first for first in sampled["first_version"].to_pylist()]
        assert sampled.num_rows == 20 * 4 and 0 <= min(ages) <= max(ages) <= before.steps
        assert record.stages["completions"].age == Age(mean=sum(ages) / len(ages), most=max(ages))
        assert max(ages) > 0, "some were sampled while the round before was training"
    assert set(stage(run, 0, "completions")["first_version"].to_pylist()) == {0}
    assert len({row["id"] for index in range(3) for row in stage(run, index, "prompts").to_pylist()}) == 60


def test_versions_are_evaluated_at_the_end_of_rounds_once_and_a_collapse_ends_the_run_with_the_one_before(
    fleet, tiny_model, tmp_path, monkeypatch
):
    from sampo_ray.evaluation import probe
    from sampo_ray.evaluation.records import results_in
    from sampo_ray.iterate import iterate
    from sampo_ray.run.directory import open_run
    from sampo_ray.run.serving import read_serving

    asked = ["evaluate.every=round", "evaluate.count=8", "rollout.prompts=16"]
    run = new_run(tmp_path, tiny_model, *asked, "evaluate.on_collapse=fall back")
    stopped = open_run(run.place.url)
    stopped.check = stop_at(lambda: len(run.place.at("evaluations").names()) > 1)
    with pytest.raises(KeyboardInterrupt):
        iterate(stopped, fleet, Notes())  # between a probe and what is decided of it
    answers = run.place.at("rounds", "0", "answers").at("part-00000.parquet")
    before = answers.read()
    monkeypatch.setattr(probe, "collapse", lambda limits, result, previous: f"it is not {previous.label}")
    run, notes = open_run(run.place.url), Notes()
    export = iterate(run, fleet, notes)
    assert answers.read() == before and "answers" not in [stage.name for stage in notes.stages]
    first = run.manifest.rounds[0].steps
    base, ended = sorted(results_in(run.place), key=lambda result: result.version)
    assert (base.version, ended.version, ended.conditions.route) == (0, first, "fleet")
    assert ended.score("win_rate_base").count == 8 and base.score("win_rate_base") is None
    assert ended.score("win_rate_base").value == ended.score("win_rate_previous").value
    held = {row["id"] for row in run.place.at("held-out", "prompts").at("part-00000.parquet").read_table().to_pylist()}
    assert len(held) == 8 and not held & {row["id"] for row in stage(run, 0, "prompts").to_pylist()}

    assert run.manifest.finished and len(run.manifest.rounds) == 1 and run.manifest.rounds[0].fell_back
    assert export.url == run.versions.at("000000").url
    wait_until(lambda: ask(fleet.endpoint, "policy").headers["x-policy-version"] == "0", "the base is live again")
    state = read_serving(run.place)
    assert state.labels["final"] == 0 and state.refused[first] == "round 1 fell back: it is not base"
    iterate(run, fleet, again := Notes())
    assert not again.stages and not again.steps


def ask(url: str, model: str) -> httpx.Response:
    body = {"model": model, "messages": [{"role": "user", "content": "Say 3"}], "max_tokens": 8, "temperature": 0}
    return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=scaled(300))


def admin(url: str, verb: str, **body: object) -> dict:
    answer = httpx.post(f"{url}/admin/{verb}", json=body, timeout=scaled(60))
    assert answer.status_code == 200, answer.text
    return answer.json()


def models(url: str) -> list[str]:
    return [card["id"] for card in httpx.get(f"{url}/v1/models", timeout=scaled(60)).json()["data"]]


def sampo(*arguments: object) -> str:
    """The first line that a command prints, without "for it" at its end."""
    from typer.testing import CliRunner

    from sampo_ray.console.main import app

    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output.splitlines()[0].removesuffix(" for it")


def save_adapter(run: Run, folder: Path) -> Path:
    """A LoRA adapter, made with peft, that changes the base model's answers."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(run.versions.at("000000").path, dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(r=8, target_modules=["q_proj", "v_proj", "down_proj"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(0))
    model.save_pretrained(folder)
    return folder


def test_versions_are_listed_pinned_promoted_and_rolled_back_while_they_are_served(finished, fleet, tmp_path):
    run, _ = finished
    fleet.attach(run)
    first, last = run.manifest.rounds[0].steps, run.manifest.rounds[1].start_version + run.manifest.rounds[1].steps
    live, *cards = httpx.get(f"{fleet.endpoint}/v1/models", timeout=scaled(60)).json()["data"]
    assert (live["id"], live["metadata"]["version"]) == ("policy", last)
    by_version = {card["metadata"]["version"]: card["metadata"] for card in cards}
    assert by_version[last]["labels"][-2:] == ["round-2", "final"]
    assert by_version[last]["parent"] == first and by_version[last]["method"] == "sigmoid/sample, beta 0.1"
    assert by_version[last]["metrics"]["loss"] > 0 and by_version[last]["data"] == run.manifest.data.fingerprint
    unknown = ask(fleet.endpoint, "policy@nope")
    assert unknown.status_code == 404 and f"policy@{last}, policy@round-2/step" in unknown.json()["error"]["message"]
    assert "not pinned" in ask(fleet.endpoint, "policy@round-1").json()["error"]["message"]

    adapter = save_adapter(run, tmp_path / "adapter")
    assert (
        sampo("adapter", "add", run.place.url, adapter, "tune") == "policy@tune: served on version 0, which is pinned"
    )
    wait_until(lambda: "policy@tune" in models(fleet.endpoint), "adapter")  # the file is looked at once a second
    started = time.monotonic()
    tuned = ask(fleet.endpoint, "policy@tune")  # a replica starts on account of this request
    assert (tuned.status_code, tuned.headers["x-policy-version"]) == (200, "0"), tuned.text
    logger.info("a pinned version answered from zero in %.0f s", time.monotonic() - started)
    base = ask(fleet.endpoint, "policy@base")
    assert (base.json()["model"], base.headers["x-policy-version"]) == ("policy@base", "0")
    assert tuned.json()["choices"] != base.json()["choices"] and tuned.json()["model"] == "policy@tune"
    client = openai.OpenAI(base_url=f"{fleet.endpoint}/v1", api_key="none", max_retries=0, timeout=scaled(120))
    listed = [model.id for model in client.models.list()]
    assert listed == ["policy", f"policy@{last}", "policy@0", "policy@tune"], "no version that is merely kept"
    for model in listed:
        chat = client.chat.completions.create(model=model, messages=[{"role": "user", "content": "hi"}], max_tokens=2)
        assert chat.model == model and client.models.retrieve(model).id == model
    pins = admin(fleet.endpoint, "pin", version="round-1")
    assert pins["pinned"] == [0, first] and pins["pins"]["0"]["state"] == "pinned"
    assert pins["pins"][str(first)]["state"] in ("starting", "pinned") and not pins["troubles"]

    assert admin(fleet.endpoint, "promote", version="base")["held"]
    held = ask(fleet.endpoint, "policy")
    assert held.headers["x-policy-version"] == "0"
    assert not fleet_shares(fleet, 0), "rollouts no longer come from the live policy's replicas"
    assert admin(fleet.endpoint, "rollback")["live"] == last
    assert ask(fleet.endpoint, "policy").headers["x-policy-version"] == str(last)
    assert ask(fleet.endpoint, f"policy@{last}").status_code == 200
    assert not admin(fleet.endpoint, "promote", version="latest")["held"]
    assert admin(fleet.endpoint, "unpin", version="round-1")["pinned"] == [0]
    assert "no longer served" in sampo("adapter", "remove", run.place.url, "tune")
    wait_until(lambda: "policy@tune" not in models(fleet.endpoint), "end of the adapter")
    assert ask(fleet.endpoint, "policy@base").status_code == 404, "it was pinned for the adapter alone"
    assert ask(fleet.endpoint, "policy@round-1").status_code == 404
    refused = httpx.post(f"{fleet.endpoint}/admin/rollback", json={"version": 10**13}, timeout=scaled(60))
    assert refused.status_code == 400


def test_a_version_is_pinned_as_long_as_it_is_evaluated(finished, fleet, tmp_path):
    from sampo_ray.evaluation.asking import Question, Scoring, answers_to, scores_of
    from sampo_ray.evaluation.subject import Subject
    from sampo_ray.evaluation.targets import open_target
    from sampo_ray.loop.evaluated import find_live
    from sampo_ray.run.serving import read_serving

    run, _ = finished
    fleet.attach(run)
    with open_target(run.place.url, ["round-1"], str(tmp_path)) as target:
        live, chosen = find_live(target, f"{fleet.endpoint}/v1"), target.versions[0]
        assert live is not None and (chosen.label, target.served_context) == ("round-1", 256)
        at = {"url": live.url, "model": f"policy@{chosen.version}", "tokenizer": str(target.tokenizer), "context": 256}
        subject = Subject(**at, label="round-1", name="tiny", run=run.id, version=chosen.version)
        chat, messages = subject.chat(), [{"role": "user", "content": "Say 3"}]
        ids = chat.prompt_ids(messages)
        with live.serving(chosen):
            assert read_serving(run.place).pinned == [chosen.version]
            question = Question(messages, ids, 8)
            first, again = answers_to(subject, [question, question], chat)
            said = chat.response_ids(first.raw)
            scored, greedy, *one = scores_of(subject, [Scoring(ids, 5), Scoring([*ids, *said], 2), Scoring(ids, 1)])
            together = scores_of(subject, [Scoring(ids, 1), Scoring([*ids[:-1], said[0]], 1)])
    assert read_serving(run.place).pinned == []
    assert first == again and first.error is None and 0 < first.tokens <= 8
    assert together[0].logprob == pytest.approx(one[0].logprob, abs=0.05)
    assert scored.logprob < 0 and (greedy.greedy or first.finish == "length")


def fleet_shares(fleet, version: int) -> bool:
    return fleet.generators(version) is fleet.shared_policy


def asked_while(work: Callable[[], object], endpoint: str) -> list[httpx.Response]:
    """What the endpoint answers while `work` is done."""
    answers, working = list[httpx.Response](), threading.Event()

    def keep_asking() -> None:
        while not working.wait(0.2):
            answers.append(ask(endpoint, "policy"))

    asking = threading.Thread(target=keep_asking, daemon=True)
    asking.start()
    try:
        work()
    finally:
        working.set()
        asking.join(scaled(60))
    return answers


def test_within_its_rounds_a_run_with_adapters_publishes_these_alone_and_engines_sleep_while_it_trains(
    fleet, tiny_model, tmp_path
):
    from sampo_ray.iterate import iterate
    from sampo_ray.run.versions import complete_versions, read_info, version_folder

    overrides = "model.lora.rank=4", "rounds.count=1", "optim.batch_size=2", "rollout.prompts=16"
    run = new_run(tmp_path, tiny_model, *overrides, "fleet.placement=shared")
    taking_turns = dataclasses.replace(fleet, shares_gpus=True)
    answers = asked_while(lambda: iterate(run, taking_turns, Notes()), fleet.endpoint)
    assert 503 in [answer.status_code for answer in answers], "the policy pauses while ranks train"
    for answer in answers:
        if answer.status_code == 503:
            assert answer.json()["error"]["code"] == "policy_paused" and int(answer.headers["retry-after"]) >= 10
        else:
            assert answer.status_code == 200, answer.text
    wait_until(lambda: ask(fleet.endpoint, "policy").status_code == 200, "an engine that is awake")
    versions = {v: read_info(version_folder(run.versions.url, v)) for v in complete_versions(run.versions.url)}
    last, adapters = run.manifest.rounds[0].steps, [v for v, info in versions.items() if info.adapters]
    assert versions.keys() - set(adapters) == {0, last} and 0 < adapters[-1] < last
    newest = adapters[-1]
    assert versions[newest].adapters.base == 0
    assert set(versions[newest].files) == {"adapter_model.safetensors", "adapter_config.json"}

    admin(fleet.endpoint, "promote", version=str(newest))
    live = ask(fleet.endpoint, "policy")
    assert admin(fleet.endpoint, "pin", version=f"round-1/step-{newest}")["pinned"] == [0, newest]
    pinned = ask(fleet.endpoint, f"policy@{newest}")  # the adapters on a replica of their base
    for answer in (live, pinned):
        assert (answer.status_code, answer.headers["x-policy-version"]) == (200, str(newest)), answer.text
    base, final = ask(fleet.endpoint, "policy@base"), ask(fleet.endpoint, "policy@final")
    assert (base.headers["x-policy-version"], final.status_code) == ("0", 404)
    assert {"policy@0", f"policy@{newest}"} <= set(models(fleet.endpoint))


def test_a_version_that_fails_its_checks_is_listed_and_never_goes_live(fleet, tiny_model, tmp_path):
    from sampo_ray.iterate import iterate
    from sampo_ray.run.serving import read_serving

    overrides = "rounds.count=1", "rollout.prompts=16", "publish.every_steps=50"
    run = new_run(tmp_path, tiny_model, *overrides, "serve.gates.finite=true", "serve.gates.max_mean_tokens=1.5")
    iterate(run, fleet, Notes())  # which waits for the checks: what makes them may end then
    state = read_serving(run.place)
    last = run.manifest.rounds[0].steps
    assert state.live == 0 and "above max_mean_tokens=1.5" in state.refused[last]
    assert ask(fleet.endpoint, "policy").headers["x-policy-version"] == "0"
    assert httpx.get(f"{fleet.endpoint}/v1/models/policy@final", timeout=scaled(60)).status_code == 404
    listed = httpx.get(f"{fleet.endpoint}/admin/versions", timeout=scaled(60)).json()["versions"]
    (entry,) = (each for each in listed if each["version"] == last)
    assert entry["state"] == "refused" and entry["reason"] == state.refused[last]
    again = httpx.post(f"{fleet.endpoint}/admin/promote", json={"version": last}, timeout=scaled(60))
    assert again.status_code == 409 and "was refused" in again.json()["error"]["message"]
