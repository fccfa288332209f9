"""Nothing is lost: constant load through swaps, promotion, rollback, autoscaling and an engine that is killed."""

import json
import logging
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import ray
import torch
from ray import serve
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTNeoXConfig

from sampo_ray.config.sections import GeneratorsConfig
from sampo_ray.config.serving import ServeConfig
from sampo_ray.internals.transformers import saved_tensors
from tests.waiting import scaled, wait_until

logger = logging.getLogger(__name__)
pytestmark = pytest.mark.slow
SWAPS = int(os.environ.get("SAMPO_TEST_SWAPS", "8"))
HI = [{"role": "user", "content": "hello"}]


@dataclass
class Live:
    """A live policy of one to two replicas, and the store that it follows."""

    url: str
    store: Any
    versions: str
    model: Path
    newest: int = 0

    def publish(self, always: int | None = None) -> int:
        """A version near the model or, if that is given, one that `always` says this token."""
        from sampo_ray.actors.weights.publish import NewVersion, publish_version
        from sampo_ray.run.storage import Place
        from sampo_ray.run.versions import VersionInfo

        self.newest += 1
        model = AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.bfloat16)
        noise = {name: tensor + torch.randn_like(tensor) * 0.02 for name, tensor in saved_tensors(model)}
        if always is not None:
            for name, value in (("gpt_neox.final_layer_norm.weight", 0.0), ("gpt_neox.final_layer_norm.bias", 1.0)):
                noise[name] = torch.full_like(noise[name], value)
            noise["embed_out.weight"] = torch.full_like(noise["embed_out.weight"], -1.0)
            noise["embed_out.weight"][always] = 1.0
        info = VersionInfo(version=self.newest, round=0, step=self.newest)
        base = f"{self.versions}/000000"
        publish_version(self.store, NewVersion("run-a", Place(self.versions), info), noise.items(), base)
        return self.newest

    def admin(self, verb: str, **body: Any) -> dict[str, Any]:
        answer = httpx.post(f"{self.url}/admin/{verb}", json=body, timeout=scaled(60))
        assert answer.status_code == 200, answer.text
        return answer.json()

    def replicas(self) -> int:
        return serve.status().applications["lossless-policy"].deployments["policy"].replica_states.get("RUNNING", 0)

    def wait_for(self, replicas: int, seconds: float) -> None:
        wait_until(lambda: self.replicas() == replicas, f"number of replicas that is {replicas}", seconds, every=0.2)


@dataclass
class Client(threading.Thread):
    """Asks again and again until stopped, and keeps what came of each request."""

    url: str
    stream: bool
    stopped: threading.Event
    versions: list[tuple[float, int]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    broken_streams: int = 0

    def __post_init__(self) -> None:
        super().__init__(daemon=True)

    __hash__ = threading.Thread.__hash__

    def run(self) -> None:
        while not self.stopped.is_set():
            try:
                self._ask()
            except httpx.HTTPError as error:
                self.failures.append(repr(error))

    def _ask(self) -> None:
        body = {"messages": HI, "max_tokens": 48, "stream": self.stream}
        url = f"{self.url}/v1/chat/completions"
        with httpx.stream("POST", url, json=body, timeout=scaled(180)) as answer:
            lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
        if answer.status_code != 200:
            self.failures.append(f"{answer.status_code} {''.join(lines)[:200]}")
            return
        first = int(answer.headers["x-policy-version"])
        items = [json.loads(line) for line in lines if line != "[DONE]"]
        if any("error" in item for item in items):
            self.broken_streams += 1
            return
        spans = [item["policy_versions"] for item in items if "policy_versions" in item]
        seen = [span["version"] for span in spans[-1]] if spans else [first]
        assert seen[0] == first
        self.versions += [(time.monotonic(), version) for version in seen]


@pytest.fixture(scope="module")
def pythia(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random model whose weights have other names in its checkpoint than in memory."""
    folder, tokenizer = tmp_path_factory.mktemp("pythia"), AutoTokenizer.from_pretrained(tiny_model)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = GPTNeoXConfig(vocab_size=len(tokenizer), max_position_embeddings=1024, **sizes)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def live(own_serve: None, pythia: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    from sampo_ray.actors.policy.deployment import policy_deployment
    from sampo_ray.actors.policy.replica_weights import WeightsSource
    from sampo_ray.actors.weights.store import start_weight_store
    from sampo_ray.data.chat import ChatFormat
    from sampo_ray.run.version_files import write_version
    from sampo_ray.run.versions import VersionInfo
    from sampo_ray.serve.endpoint import await_endpoint, deploy_endpoint, free_port, start_serve, stop_endpoint

    run = tmp_path_factory.mktemp("lossless")
    ChatFormat.load(pythia, "llama3-sampo").save(run / "tokenizer")
    base = saved_tensors(AutoModelForCausalLM.from_pretrained(pythia, dtype=torch.bfloat16))
    write_version(f"{run}/versions/000000", base, str(pythia), VersionInfo(version=0, round=0, step=0))
    config = ServeConfig(port=free_port("127.0.0.1"), api_keys=())
    start_serve(config)
    store = start_weight_store("lossless", f"{run}/store.json")
    ray.get(store.attach.remote("run-a", f"{run}/versions"), timeout=scaled(60))
    generators = GeneratorsConfig(
        num_cpus=0.5,
        min_replicas=1,
        max_replicas=2,
        target_ongoing_requests=1.5,
        upscale_delay_s=1,
        downscale_delay_s=2,
        max_ongoing_requests=16,
    )
    policy = policy_deployment(
        "policy", f"{run}/versions/000000", str(run / "tokenizer"), WeightsSource("lossless"), generators, 512
    )
    serve.run(policy, name="lossless-policy", route_prefix=None)
    deploy_endpoint("lossless-endpoint", "lossless-policy", "lossless", config)
    url = await_endpoint("lossless-endpoint")
    yield Live(url, store, f"{run}/versions", pythia)
    stop_endpoint("lossless-endpoint")
    serve.delete("lossless-policy")
    ray.kill(store)


def test_answers_are_those_of_the_weights_that_were_swapped_in(live: Live) -> None:
    tokenizer, body = AutoTokenizer.from_pretrained(live.model), {"messages": HI, "max_tokens": 3, "temperature": 0}

    def answer() -> httpx.Response:
        return httpx.post(f"{live.url}/v1/chat/completions", json=body, timeout=scaled(180))

    for word in ("two", "three"):
        token = tokenizer.encode(word, add_special_tokens=False)[0]
        given, version = tokenizer.decode([token] * 3), str(live.publish(always=token))
        wait_until(lambda version=version: answer().headers["x-policy-version"] == version, "answer of that version")
        assert answer().json()["choices"][0]["message"]["content"] == given


def test_no_request_is_lost_and_versions_never_go_backwards_but_by_a_rollback(live: Live) -> None:
    stopped, light = threading.Event(), threading.Event()
    clients = [Client(live.url, stream, light) for stream in (True, False, True)]
    clients += [Client(live.url, False, stopped)]
    for client in clients:
        client.start()
    try:
        before, rolled_back = exercise(live, clients, stopped, light)
    finally:  # or they would go on, and starve all tests after this one
        stopped.set()
        light.set()
    assert [failure for client in clients for failure in client.failures] == []
    assert sum(client.broken_streams for client in clients) <= 2, "only streams that the killed engine had begun"
    for client in clients:
        assert len(client.versions) > SWAPS
        falls = [(at, a, b) for (_, a), (at, b) in zip(client.versions, client.versions[1:], strict=False) if b < a]
        assert all(b == before and at > rolled_back for at, _, b in falls) and len(falls) <= 1
    assert clients[-1].versions[-1][1] == live.newest
    answers = sum(len(client.versions) for client in clients)
    logger.info("%d answers of %d clients through %d swaps, none lost", answers, len(clients), SWAPS + 1)


def exercise(live: Live, clients: list[Client], stopped: threading.Event, light: threading.Event) -> tuple[int, float]:
    """All that may happen, while the clients ask; returns the version that was rolled back to, and when."""
    live.wait_for(2, 240)  # four at a time is more than one replica is to have
    for swap in range(SWAPS):
        live.publish()
        answered = [len(client.versions) for client in clients]
        for client, before in zip(clients, answered, strict=True):
            wait_until(lambda client=client, before=before: len(client.versions) > before, "answer", 180)
        if swap == SWAPS // 2:
            kill_one_engine()
    before = live.admin("promote", version="latest")["previous"]
    rolled_back = time.monotonic()
    assert live.admin("rollback")["live"] == before
    time.sleep(2)
    assert live.admin("promote", version="latest")["live"] == live.newest
    time.sleep(1)
    light.set()
    for client in clients[:-1]:
        client.join(scaled(180))
    live.wait_for(1, 240)  # what is left is little enough for one again
    newest = live.publish()
    wait_until(lambda: clients[-1].versions[-1][1] == newest, f"answer of version {newest}")
    stopped.set()
    clients[-1].join(scaled(180))
    return before, rolled_back


def kill_one_engine() -> None:
    processes = psutil.Process().children(recursive=True)
    engines = [process for process in processes if process.name() == "VLLM::EngineCore"]
    assert len(engines) == 2
    engines[0].kill()
