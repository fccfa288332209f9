"""Policy replicas on a real vLLM engine: generation on token ids, and weights that change under way."""

import asyncio
import dataclasses
import inspect
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
import ray
import torch
from ray import serve
from ray.serve.llm.openai_api_models import ChatCompletionRequest, CompletionRequest
from transformers import AutoTokenizer

from sampo_ray.actors.policy import replica_weights
from sampo_ray.actors.policy.deployment import policy_deployment
from sampo_ray.actors.policy.lifecycle import AnswersInFlight, ReplicaState, RequestGate
from sampo_ray.actors.policy.messages import (
    AnsweredBy,
    Chunks,
    Failure,
    Progress,
    RolloutRequest,
    WeightsChanged,
    Whole,
)
from sampo_ray.actors.policy.replica_weights import LoadedWeights, ReplicaWeights, WeightsSource, merging
from sampo_ray.actors.transfer import transport
from sampo_ray.actors.transfer.coordinator import ReceivingReplica
from sampo_ray.actors.transfer.sending import Sender, StoreTransfers
from sampo_ray.actors.transfer.transport import BroadcastSender, digest
from sampo_ray.actors.weights.client import Weights
from sampo_ray.actors.weights.publish import NewVersion, publish_adapters, publish_version
from sampo_ray.actors.weights.store import start_weight_store
from sampo_ray.config.sections import GeneratorsConfig, LoraConfig
from sampo_ray.console.demo_task import tiny_llama
from sampo_ray.data.chat import ChatFormat
from sampo_ray.errors import PausedError, WeightsError
from sampo_ray.run.buckets import joined, unpack
from sampo_ray.run.storage import Place
from sampo_ray.run.version_files import adapters_info, read_version, write_version
from sampo_ray.run.versions import AdaptersInfo, VersionInfo, WeightsId, version_folder
from sampo_ray.training.lora import file_name
from tests.conftest import assert_greedy, assert_own_logprobs
from tests.waiting import scaled, wait_until

LONG = "What is two plus three? The answer is five. " * 14  # more than one block of the prefix cache (128 tokens)


def test_vllm_has_the_engine_calls_that_a_swap_is_made_of() -> None:
    from vllm.v1.engine.async_llm import AsyncLLM

    assert {"mode", "clear_cache"} <= inspect.signature(AsyncLLM.pause_generation).parameters.keys()
    assert {"prompt", "sampling_params", "request_id"} <= inspect.signature(AsyncLLM.generate).parameters.keys()
    for name in ("start_weight_update", "update_weights", "finish_weight_update", "resume_generation"):
        assert inspect.iscoroutinefunction(getattr(AsyncLLM, name))


def test_an_update_that_fails_half_way_ends_the_replica_and_never_resumes(monkeypatch: pytest.MonkeyPatch) -> None:
    class Ended(BaseException):
        pass

    def end(reason: str) -> None:
        raise Ended(reason)

    calls: list[str] = []

    class FailingEngine:
        """An engine without requests whose update fails."""

        output_processor = SimpleNamespace(request_states={})

        async def collective_rpc(self, method: str, args: tuple[object, ...] = ()) -> list[bool]:
            calls.append(method)
            return [True]

        async def pause_generation(self, mode: str, clear_cache: bool) -> None:
            calls.append(f"pause {mode}")

        async def start_weight_update(self) -> None:
            calls.append("start")

        async def update_weights(self, request: object) -> None:
            calls.append("update")
            raise RuntimeError("out of memory")

    monkeypatch.setattr(replica_weights, "end_process", end)
    held = ReplicaWeights(FailingEngine(), WeightsSource("store"), RequestGate(), AnswersInFlight())
    held.loaded, held.state = LoadedWeights(WeightsId("run", 0)), ReplicaState.READY
    with pytest.raises(Ended, match=r"run@10 failed half-way.*out of memory"):
        asyncio.run(held.adopt(Weights(WeightsId("run", 10), VersionInfo(version=10, round=0, step=10), ())))
    assert calls == ["prepare_weights", "pause keep", "start", "update"]
    assert held.loaded.id.version == 0
    assert held.state == ReplicaState.DEAD


class Policy:
    """A running deployment of policy replicas on a tiny model, and a run that publishes to it."""

    def __init__(self, folder: Path, tiny_model: Path) -> None:
        self.format = ChatFormat.load(tiny_model, "llama3-sampo")
        self.chat_folder, self.versions, self.shell = (
            str(folder / "tokenizer"),
            str(folder / "versions"),
            str(tiny_model),
        )
        self.format.save(self.chat_folder)
        self.version = 0
        base = VersionInfo(version=0, round=0, step=0)
        write_version(version_folder(self.versions, 0), weights(self.shell, 0), self.shell, base)
        self.store = start_weight_store("policy-test", str(folder / "store.json"))
        ray.get(self.store.attach.remote("run", self.versions), timeout=scaled(60))
        config = GeneratorsConfig(num_cpus=0.5, max_ongoing_requests=32)
        # What nobody sends by a transport comes by the host path, which is how most tests here publish.
        source = WeightsSource("policy-test", transport="broadcast", takes_turns=True)
        base = version_folder(self.versions, 0)
        app = policy_deployment("policy", base, self.chat_folder, source, config, 640)
        self.handle = serve.run(app, name="policy-test", route_prefix=None)

    def publish(self, seed: int | None, awaited: bool = True) -> int:
        """Publishes weights of that seed (None: weights that end every turn at once); returns when they are live."""
        self.version += 10
        tensors = weights(self.shell, seed, self.format.end_of_turn_id)
        publish_version(self.store, self.new(), tensors, self.shell, timeout_s=scaled(60))
        if awaited:
            self.await_version()
        return self.version

    @contextmanager
    def asleep(self) -> Iterator[None]:
        """The ranks have the GPUs within it, and the engine has them again behind it, whatever happened."""
        try:
            assert self._give_gpus("ranks")
            yield
        finally:
            assert self._give_gpus("engines")

    def _give_gpus(self, turn: str) -> bool:
        return ray.get(self.store.give_gpus.remote(turn, scaled(60)), timeout=scaled(90))

    def new(self, adapters: AdaptersInfo | None = None) -> NewVersion:
        info = VersionInfo(version=self.version, round=0, step=self.version, adapters=adapters)
        return NewVersion("run", Place(self.versions), info)

    def send(self, sender: Sender, seed: int) -> int:
        """Publishes weights of that seed, a bucket a tensor, by a transport too; returns when they are live."""
        self.version += 10
        folder, tensors = version_folder(self.versions, self.version), weights(self.shell, seed)
        ray.get(self.store.offer_transfer.remote(WeightsId("run", self.version)), timeout=scaled(60))
        write_version(folder, tensors, self.shell, self.new().info, 1)
        ray.get(self.store.publish.remote("run", self.version), timeout=scaled(60))
        sender.send(WeightsId("run", self.version), self.newest().buckets)
        self.await_version()
        sender.wait()
        return self.version

    def newest(self) -> Weights:
        return ray.get(self.store.wait.remote(None, 0.0, "training"), timeout=scaled(60))

    def adapt(self, seed: int) -> str:
        """Publishes adapters on the version that is live; returns a folder of the model that has them merged in."""
        base, self.version = self.version, self.version + 10
        lora, draws = LoraConfig(rank=2), torch.Generator().manual_seed(seed)
        info = adapters_info(lora, base)
        adapted = [
            (file_name(name, side), 0.2 * torch.randn(shape, generator=draws))
            for name, w in weights(self.shell, 0)
            if "_proj" in name
            for side, shape in (("A", (2, w.shape[1])), ("B", (w.shape[0], 2)))
        ]
        publish_adapters(self.store, self.new(info), adapted, lora, timeout_s=scaled(60))
        self.await_version()
        (adapters,) = read_version(version_folder(self.versions, self.version))
        merge = merging(adapters, info.scaling)
        merged = [
            pair for bucket in read_version(version_folder(self.versions, base)) for pair in unpack(merge(bucket))
        ]
        folder = version_folder(f"{self.versions}-merged", self.version)
        write_version(folder, merged, self.shell, self.new().info)
        return folder

    def await_version(self) -> None:
        wait_until(lambda: self.held()["version"] == self.version, f"version {self.version}", every=0.01)

    def held(self) -> dict[str, Any]:
        return self.handle.weights.remote().result(timeout_s=scaled(60))

    def prompts(self) -> pa.Table:
        texts = ["What is two plus three?", LONG, "hello world", ""]
        messages = [[{"role": "user", "content": text}] for text in texts]
        return pa.table(
            {
                "id": [f"prompt-{i}" for i in range(len(texts))],
                "messages": [json.dumps(each) for each in messages],
                "columns": ["{}"] * len(texts),
                "prompt": pa.array([self.format.prompt_ids(each) for each in messages], pa.list_(pa.int32())),
            }
        )

    def generate(
        self,
        temperature: float = 0.0,
        samples: int = 1,
        rows: tuple[int, ...] = (0, 1, 2, 3),
        weights: WeightsId | None = None,
    ) -> pa.Table:
        request = RolloutRequest(samples, temperature, top_p=0.95, max_tokens=24, seed=1, weights=weights)
        call = self.handle.generate.remote(ray.put(self.prompts()), list(rows), request)
        return call.result(timeout_s=scaled(120))

    def chat(self, **options: Any) -> list[Any]:
        return list(self.stream(**options))

    def stream(self, **options: Any) -> Iterator[Any]:
        request = ChatCompletionRequest(
            model="policy", messages=[{"role": "user", "content": LONG}], temperature=0, **options
        )
        items = self.handle.options(stream=True).chat.remote(request)
        yield from (item for item in items if not isinstance(item, Progress))

    def cached_tokens(self) -> int:
        return self.chat(max_tokens=2)[-1].response.usage.prompt_tokens_details.cached_tokens


def weights(shell: str, seed: int | None, end_of_turn_id: int = 0) -> Iterator[tuple[str, torch.Tensor]]:
    model = tiny_llama(AutoTokenizer.from_pretrained(shell), seed=seed or 0)
    with torch.no_grad():
        model.lm_head.weight.mul_(5)  # spread the logits, so that weights can be told apart by their log-probs
        if seed is None:
            for name, parameter in model.named_parameters():
                parameter.fill_(0.0 if "_proj" in name else 1.0)
            model.lm_head.weight.fill_(-1.0)
            model.lm_head.weight[end_of_turn_id] = 1.0
    yield from model.state_dict().items()


@pytest.fixture(scope="module")
def policy(own_serve: None, tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Policy]:
    policy = Policy(tmp_path_factory.mktemp("policy"), tiny_model)
    yield policy
    serve.delete("policy-test")
    ray.kill(policy.store)


@pytest.mark.slow
def test_completions_are_the_models_own_tokens_with_their_log_probs(policy: Policy) -> None:
    policy.publish(seed=0)
    completions = policy.generate()
    assert_greedy(completions, version_folder(policy.versions, policy.version))
    ended = [ids[-1] == policy.format.end_of_turn_id for ids in completions["completion"].to_pylist()]
    assert completions["finish_reason"].to_pylist() == ["stop" if end else "length" for end in ended]
    assert completions["first_version"].to_pylist() == completions["last_version"].to_pylist() == [policy.version] * 4
    assert completions["text"].to_pylist() == [policy.format.text(ids) for ids in completions["completion"].to_pylist()]


@pytest.mark.slow
def test_log_probs_are_the_models_whatever_temperature_and_top_p_they_are_sampled_with(policy: Policy) -> None:
    for temperature in (0.3, 2.0):
        completions = policy.generate(temperature, samples=2)
        assert_own_logprobs(completions, version_folder(policy.versions, policy.version))


@pytest.mark.slow
def test_sampling_again_with_the_same_seed_draws_the_same(policy: Policy) -> None:
    first, again = policy.generate(0.9, samples=3), policy.generate(0.9, samples=3)
    assert first["completion"].to_pylist() == again["completion"].to_pylist()
    assert first["id"].to_pylist()[:4] == ["prompt-0"] * 3 + ["prompt-1"]
    assert first["sample"].to_pylist() == [0, 1, 2] * 4
    assert len({tuple(ids) for ids in first["completion"].to_pylist()}) == 12
    assert policy.generate(0.9, samples=1, rows=(2,))["id"].to_pylist() == ["prompt-2"]


@pytest.mark.slow
def test_generation_stops_on_the_end_of_turn_even_when_nothing_was_said(policy: Policy) -> None:
    policy.publish(seed=None)
    completions = policy.generate()
    assert completions["completion"].to_pylist() == [[policy.format.end_of_turn_id]] * 4
    assert completions["finish_reason"].to_pylist() == ["stop"] * 4
    assert completions["text"].to_pylist() == [""] * 4
    assert policy.chat(max_tokens=20)[-1].response.choices[0].finish_reason == "stop"


@pytest.mark.slow
def test_new_weights_answer_and_going_back_gives_the_first_answers_again(policy: Policy) -> None:
    policy.publish(seed=1)
    first = policy.generate()
    policy.publish(seed=2)
    second = policy.generate()
    assert_greedy(second, version_folder(policy.versions, policy.version))
    policy.publish(seed=1)
    assert policy.generate()["completion"].to_pylist() == first["completion"].to_pylist()
    assert first["completion"].to_pylist() != second["completion"].to_pylist()


@pytest.mark.slow
def test_adapters_answer_merged_into_the_weights_that_they_belong_to(policy: Policy) -> None:
    policy.publish(seed=1)
    before = policy.generate()
    folder = policy.adapt(seed=4)
    adapted = policy.generate()
    assert_greedy(adapted, folder)
    assert adapted["completion"].to_pylist() != before["completion"].to_pylist()
    policy.publish(seed=1)
    assert policy.generate()["completion"].to_pylist() == before["completion"].to_pylist()


@pytest.mark.slow
def test_weights_come_by_broadcast_while_answers_are_given(policy: Policy, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "sampo_ray.actors.transfer.sending")
    sender = broadcaster(policy)
    policy.publish(seed=1)
    first = policy.generate()
    for seed in (2, 1):
        asking = threading.Thread(target=policy.chat, kwargs={"max_tokens": 320, "ignore_eos": True})
        asking.start()
        policy.send(sender, seed)
        asking.join(scaled(60))
    assert sendings(caplog) == [f"sent run@{version}" for version in (policy.version - 10, policy.version)]
    assert policy.generate()["completion"].to_pylist() == first["completion"].to_pylist()
    policy.send(sender, 2)
    second = policy.generate()
    assert_greedy(second, version_folder(policy.versions, policy.version))
    assert second["completion"].to_pylist() != first["completion"].to_pylist()


def broadcaster(policy: Policy) -> Sender:
    """A sender whose limits are this machine's."""
    side, transfers = BroadcastSender(torch.device("cpu")), StoreTransfers(policy.store)
    return Sender(side, transfers, gather_s=scaled(10), send_s=scaled(20))


def sendings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the sender said of each version."""
    said = [record.getMessage() for record in caplog.records if record.name == "sampo_ray.actors.transfer.sending"]
    return [message.split(": ")[0].split(" to ")[0] for message in said]


RECEIVES = """
import json, sys, time, torch
from sampo_ray.actors.transfer.transport import BroadcastReceiver
from sampo_ray.actors.transfer.coordinator import TransferPlan
side = BroadcastReceiver(torch.device("cpu"))
print("ready", flush=True)
plan, places = json.loads(sys.stdin.readline())
buffers = [torch.empty(size, dtype=torch.uint8) for _, size in places]
side.receive(TransferPlan(**plan), plan["rank"], buffers, time.monotonic() + 20)
"""


@pytest.mark.slow
def test_a_member_killed_in_mid_broadcast_leaves_the_replica_to_the_host_path(
    policy: Policy, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO", "sampo_ray.actors.transfer.sending")
    sender = broadcaster(policy)
    doomed, coming = ReceivingReplica("doomed", 1, "training"), WeightsId("run", policy.version + 10)
    ray.get(policy.store.join_transfer.remote(doomed, coming, 0), timeout=scaled(60))
    command = [sys.executable, "-c", RECEIVES]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        sent: list[int] = []

        def killing(data: torch.Tensor) -> int:
            sent.append(len(data))
            if len(sent) == 5:
                process.kill()
                process.wait()
            return digest(data)

        def joins() -> None:
            plan = None
            while plan is None:
                plan = ray.get(policy.store.join_transfer.remote(doomed, coming, 10), timeout=scaled(60))
            places, _ = joined(policy.newest().buckets)
            process.stdin.write(json.dumps([dataclasses.asdict(plan), places]) + "\n")
            process.stdin.flush()

        monkeypatch.setattr(transport, "digest", killing)
        joining = threading.Thread(target=joins)
        joining.start()
        begun = time.monotonic()
        try:
            policy.send(sender, seed=3)
            assert time.monotonic() - begun < scaled(20), "it waited for the member that is gone"
            joining.join(scaled(30))
        finally:
            process.kill()
    assert 5 <= len(sent) < 21
    assert sendings(caplog) == [f"could not send {coming}, replicas fetch it themselves"]
    assert_greedy(policy.generate(), version_folder(policy.versions, policy.version))
    policy.send(sender, seed=1)
    policy.send(sender, seed=2)
    assert sendings(caplog)[-1] == f"sent run@{policy.version}"


@pytest.mark.slow
def test_an_engine_leaves_its_gpus_to_the_ranks_and_comes_back_on_the_newest_weights(policy: Policy) -> None:
    policy.publish(seed=1)
    first, items = policy.generate(), list[Any]()
    options = {"max_tokens": 64, "stream": True, "ignore_eos": True}
    asking = threading.Thread(target=lambda: items.extend(policy.stream(**options)))
    asking.start()
    wait_until(lambda: items, "beginning of the answer", every=0.01)
    with policy.asleep():
        assert policy.held()["state"] == "asleep"
        asking.join(scaled(60))
        *_, last, done = [chunk for item in items if isinstance(item, Chunks) for chunk in item.events]
        assert done == "data: [DONE]\n\n", "an answer in flight ends first"
        assert json.loads(last.removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        with pytest.raises(PausedError):
            policy.chat(max_tokens=2)
        before, version = policy.held()["version"], policy.publish(seed=2, awaited=False)
        request = RolloutRequest(1, 0.0, top_p=0.95, max_tokens=24, seed=1)
        rollouts = policy.handle.generate.remote(ray.put(policy.prompts()), [0, 1, 2, 3], request)
        time.sleep(1.0)
        assert policy.held() == {**policy.held(), "state": "asleep", "version": before}
    completions = rollouts.result(timeout_s=scaled(120))
    assert completions["first_version"].to_pylist() == [version] * 4
    assert_greedy(completions, version_folder(policy.versions, version))
    assert policy.chat(max_tokens=2)[0].weights.version == version
    policy.publish(seed=1)
    assert policy.generate()["completion"].to_pylist() == first["completion"].to_pylist()


@pytest.mark.slow
def test_rollouts_can_ask_for_the_weights_they_are_drawn_from(policy: Policy) -> None:
    passed = policy.version
    current = policy.publish(seed=1)
    policy.handle.hold.remote(WeightsId("run", current)).result(timeout_s=scaled(60))
    assert set(policy.generate(weights=WeightsId("run", current))["first_version"].to_pylist()) == {current}
    with pytest.raises(WeightsError, match=f"asked for from run@{passed}, but this replica holds run@{current}"):
        policy.generate(weights=WeightsId("run", passed))


@pytest.mark.slow
def test_no_new_request_reuses_prefix_blocks_of_old_weights(policy: Policy) -> None:
    policy.publish(seed=1)
    assert [policy.cached_tokens(), policy.cached_tokens()] == [0, 128]
    policy.publish(seed=2)
    assert [policy.cached_tokens(), policy.cached_tokens()] == [0, 128]


@pytest.mark.slow
def test_a_request_in_flight_survives_a_swap_and_names_both_versions(policy: Policy) -> None:
    before = policy.publish(seed=1)
    items: list[Any] = []
    options = {"max_tokens": 320, "stream": True, "ignore_eos": True}
    asking = threading.Thread(target=lambda: items.extend(policy.stream(**options)))
    asking.start()
    wait_until(lambda: items, "beginning of the answer", every=0.01)
    after = policy.publish(seed=2)
    assert asking.is_alive()
    asking.join(scaled(60))
    origins = [item for item in items if isinstance(item, AnsweredBy | WeightsChanged)]
    assert [origin.weights for origin in origins] == [WeightsId("run", before), WeightsId("run", after)]
    assert origins[0].sequence < origins[1].sequence
    *answer, last, done = [chunk for item in items if isinstance(item, Chunks) for chunk in item.events]
    assert done == "data: [DONE]\n\n"
    ended = json.loads(last.removeprefix("data: "))
    first, second = ended["policy_versions"]
    assert first == {"version": before} and second["version"] == after
    assert 0 < second["from_tokens"][0] < 320
    assert ended["choices"][0]["finish_reason"] == "length"
    assert not any("policy_versions" in chunk for chunk in answer)


@pytest.mark.slow
def test_an_answer_whole_or_refused_says_which_weights_gave_it(policy: Policy) -> None:
    first, answer = policy.chat(max_tokens=4)
    assert first.weights == WeightsId("run", policy.version)
    assert isinstance(answer, Whole) and not hasattr(answer.response, "policy_versions")
    first, refusal = policy.chat(max_tokens=100_000)
    assert first.weights == WeightsId("run", policy.version)
    assert isinstance(refusal, Failure) and refusal.status == 400
    request = CompletionRequest(model="policy", prompt="hello", max_tokens=4, ignore_eos=True)
    first, *progress, answer = policy.handle.options(stream=True).completions.remote(request)
    assert all(isinstance(item, Progress) for item in progress)
    assert first.weights == WeightsId("run", policy.version)
    assert answer.response.usage.completion_tokens == 4


@pytest.mark.slow
def test_an_answer_that_takes_long_tells_how_many_tokens_it_has(policy: Policy) -> None:
    ask = ChatCompletionRequest(
        model="policy", messages=[{"role": "user", "content": LONG}], n=8, max_tokens=320, ignore_eos=True
    )
    _, *progress, answer = policy.handle.options(stream=True).chat.remote(ask)
    tokens = [each.tokens for each in progress]
    assert tokens == sorted(tokens) and tokens[-1] > 8
    assert tokens[-1] <= answer.response.usage.completion_tokens == 8 * 320
