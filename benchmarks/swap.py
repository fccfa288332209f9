"""What a change of weights costs those who are being answered: the longest gap of a stream, and throughput.

The limit of a gap is one decode step + 25 ms + 3 copies of the weights in memory, all measured in the same run. It also
checks what it measures: after the swaps, log-probs are those of the version's files in an independent forward, and a
version that comes back gives its first answers again.
"""

import itertools
import json
import os
import shutil
import statistics
import threading
import time
from pathlib import Path
from typing import Any

import _measure
import _rig
import numpy as np
from _measure import Target

STREAMS = 4
IN_FLIGHT = 8
PROMPTS_A_CALL = 8
TOKENS = 16
SWAP_EVERY_S = 10.0
TARGETS = {
    "swap_pause_vs_limit": Target(at_most=1.0),
    "throughput_with_swaps_vs_without": Target(at_least=0.95),
}


def main() -> None:
    parser = _measure.options(__doc__.splitlines()[0], requests=2049, repeats=3)
    parser.add_argument("--swaps", type=int, default=10, help="swaps with streams in flight")
    parser.add_argument("--only", choices=("gaps", "throughput"), help="one of the two parts")
    args = parser.parse_args()
    _rig.quiet()
    with _rig.scratch() as folder, _rig.policy_rig(folder, args.model, 64) as rig:
        versions = Versions(rig)
        ratios: dict[str, list[float]] = {}
        rows = [("model", rig.label, "")]
        check(rig, versions, rows)
        if args.only != "throughput":
            gaps(rig, versions, args.swaps, rows, ratios)
        if args.only != "gaps":
            throughput(rig, versions, args.requests, args.repeats, rows, ratios)
        _measure.show("swap", ("what", "value", "count"), rows)
        _measure.report("swap", ratios, {name: TARGETS[name] for name in ratios})


class Versions:
    """Versions 1, 2, 3 ... with the weights of two models in turn (odd: disturbed, even: the base), to publish."""

    def __init__(self, rig: _rig.Rig) -> None:
        import ray
        import torch

        from sampo_ray.run.buckets import unpack
        from sampo_ray.run.version_files import read_version, write_version
        from sampo_ray.run.versions import VersionInfo, version_folder

        self.rig, self._numbers = rig, itertools.count(1)
        base = version_folder(rig.versions, 0)
        torch.manual_seed(0)

        def noisy() -> Any:
            for bucket in read_version(base):
                for name, tensor in unpack(bucket):
                    yield name, tensor + 0.1 * tensor.float().std().to(tensor.dtype) * torch.randn_like(tensor)

        aside = f"{rig.versions}-disturbed"
        write_version(aside, noisy(), base, VersionInfo(version=1, round=0, step=1))
        self._sources, self._ray = (Path(base), Path(aside)), ray
        self.nbytes = sum(spec.nbytes for bucket in read_version(base) for spec in bucket.specs)

    def publish(self) -> int:
        """Makes the next version live; returns its number at once, while replicas still load it."""
        number = next(self._numbers)
        link(self._sources[number % 2], Path(f"{self.rig.versions}/{number:06d}"), number)
        self._ray.get(self.rig.store.publish.remote(_rig.RUN, number), timeout=120)
        return number

    def await_held(self, number: int, every_s: float = 0.05) -> None:
        while self.rig.policy.weights.remote().result(timeout_s=120)["version"] != number:
            time.sleep(every_s)


def link(source: Path, target: Path, number: int) -> None:
    shutil.copytree(source, target, copy_function=os.link)
    about = json.loads((target / "version.json").read_text())
    (target / "version.json").unlink()
    (target / "version.json").write_text(json.dumps({**about, "version": number, "step": number}))


def check(rig: _rig.Rig, versions: Versions, rows: list[Any]) -> None:
    """Log-probs of the swapped-in weights against an independent forward over the version's files."""
    from sampo_ray.actors.policy.deployment import cpu_engine

    first, errors = greedy(rig), []
    for _ in range(2):
        number = versions.publish()
        versions.await_held(number)
        answers = greedy(rig)
        own, other = (distance(rig, answers, source) for source in (number, number + 1))
        errors.append(own)
        count = f"{8 * TOKENS} tokens"
        rows.append((f"version {number}: |log-prob - Hugging Face's|, mean", f"{own:.4f} nats", count))
        rows.append(("  against the other weights'", f"{other:.4f} nats", count))
    before, after = (table["completion"].to_pylist() for table in (first, answers))
    same = sum(a == b for a, b in zip(before, after, strict=True))
    rows.append(("greedy answers the same after swapping away and back", f"{same} of 8", ""))
    if max(errors) > (0.05 if cpu_engine(_rig.CONTEXT)["dtype"] == "float32" else 0.1):  # bf16 itself makes up to 0.05
        raise SystemExit(f"the engine does not compute with the weights it was given: {errors}")


def greedy(rig: _rig.Rig) -> Any:
    import ray

    from sampo_ray.actors.policy.messages import RolloutRequest

    call = rig.policy.generate.remote(
        ray.put(rig.prompts(0, 8)), list(range(8)), RolloutRequest(1, 0.0, 1.0, TOKENS, seed=0)
    )
    return call.result(timeout_s=300)


def distance(rig: _rig.Rig, answers: Any, version: int) -> float:
    import torch
    from transformers import AutoModelForCausalLM

    from sampo_ray.actors.policy.deployment import cpu_engine
    from sampo_ray.run.versions import version_folder

    dtype = getattr(torch, cpu_engine(_rig.CONTEXT)["dtype"])
    model = AutoModelForCausalLM.from_pretrained(version_folder(rig.versions, version), dtype=dtype)
    differences = []
    for row in answers.to_pylist():
        with torch.no_grad():
            logits = model(torch.tensor([row["prompt"] + row["completion"]])).logits[0, len(row["prompt"]) - 1 : -1]
        theirs = logits.float().log_softmax(-1).gather(1, torch.tensor(row["completion"])[:, None])[:, 0]
        differences += (torch.tensor(row["logprobs"]) - theirs).abs().tolist()
    return statistics.mean(differences)


def gaps(rig: _rig.Rig, versions: Versions, swaps: int, rows: list[Any], ratios: dict[str, list[float]]) -> None:
    """Publishes while streams are in flight, one version after the other, and looks at when their chunks come."""
    copy_s = seconds_of_a_copy(versions.nbytes)
    streams = [Stream(rig, index) for index in range(STREAMS)]
    for stream in streams:
        stream.start()
    while not all(len(stream.times) > 20 for stream in streams):
        time.sleep(0.1)
    windows, live = [], []
    time.sleep(3)
    for _ in range(swaps):
        begin = time.perf_counter()
        versions.await_held(versions.publish())
        held = time.perf_counter()
        live.append(held - begin)
        time.sleep(1)
        windows.append((begin, held + 0.5))
        time.sleep(1.5)
    for stream in streams:
        stream.stop()
    step_s = statistics.median(itertools.chain(*(stream.gaps_outside(windows) for stream in streams)))
    longest = [max(stream.longest_gap(*window) for stream in streams) for window in windows]
    limit = step_s + 0.025 + 3 * copy_s
    between = [(end, begin) for (_, end), (begin, _) in itertools.pairwise(windows)]
    calm = [max(stream.longest_gap(*window) for stream in streams) for window in between]
    ratios["swap_pause_vs_limit"] = [gap / limit for gap in longest]
    chunks = sum(len(stream.times) for stream in streams)
    rows += [
        ("decode step", f"{1000 * step_s:.1f} ms", f"{chunks} chunks of {STREAMS} streams"),
        ("one copy of the weights in memory", f"{1000 * copy_s:.1f} ms", f"{versions.nbytes / 1e6:.0f} MB"),
        ("limit: step + 25 ms + 3 copies", f"{1000 * limit:.1f} ms", ""),
        ("longest gap of any stream at a swap", in_ms(longest), f"{swaps} swaps"),
        ("longest gap between swaps", in_ms(calm), f"{len(calm)} stretches"),
        ("publish to held by the replica", in_ms(live), f"{swaps} swaps"),
    ]


class Stream(threading.Thread):
    """Streamed answers one after the other; `times` has when each chunk came."""

    def __init__(self, rig: _rig.Rig, index: int) -> None:
        super().__init__(daemon=True)
        self._rig, self._index, self._ended = rig, index, threading.Event()
        self.times: list[float] = []
        self.breaks: list[float] = []

    def run(self) -> None:
        from ray.serve.llm.openai_api_models import ChatCompletionRequest

        chat = self._rig.policy.options(stream=True).chat
        while not self._ended.is_set():
            how = {"model": "policy", "stream": True, "max_tokens": 400, "ignore_eos": True, "temperature": 0.0}
            items = chat.remote(ChatCompletionRequest(messages=_rig.messages(self._index), **how))
            self.breaks.append(time.perf_counter())  # prefill is no gap of a stream
            for item in items:
                if isinstance(item, list):
                    self.times.append(time.perf_counter())
                if self._ended.is_set():
                    items.cancel()
                    break

    def stop(self) -> None:
        self._ended.set()
        self.join(60)

    def pairs(self) -> list[tuple[float, float]]:
        starts = np.array(self.breaks)
        return [(a, b) for a, b in itertools.pairwise(self.times) if not np.any((starts > a) & (starts < b))]

    def longest_gap(self, begin: float, end: float) -> float:
        return max((b - a for a, b in self.pairs() if b > begin and a < end), default=0.0)

    def gaps_outside(self, windows: list[tuple[float, float]]) -> list[float]:
        return [b - a for a, b in self.pairs() if not any(b > begin and a < end for begin, end in windows)]


def seconds_of_a_copy(nbytes: int) -> float:
    source, target = (np.ones(nbytes, np.uint8) for _ in range(2))
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        np.copyto(target, source)
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def throughput(
    rig: _rig.Rig, versions: Versions, requests: int, repeats: int, rows: list[Any], ratios: dict[str, list[float]]
) -> None:
    """The same load with a version published every 10 s, and with none."""
    share, swapped = requests // repeats, []

    def with_swaps(turn: int) -> float:
        done = threading.Event()

        def keep_publishing() -> None:
            while not done.wait(SWAP_EVERY_S if swapped else SWAP_EVERY_S / 2):
                number = versions.publish()
                versions.await_held(number, every_s=1.0)  # seldom enough to be no load
                swapped.append(number)

        publisher = threading.Thread(target=keep_publishing)
        publisher.start()
        try:
            return load(rig, turn, share)
        finally:
            done.set()
            publisher.join()

    load(rig, 99, IN_FLIGHT * PROMPTS_A_CALL)  # warm
    sides = {"none": lambda turn: load(rig, turn, share), "a swap every 10 s": with_swaps}
    results = _measure.take_turns(sides, repeats)
    none, some = results["none"], results["a swap every 10 s"]
    ratios["throughput_with_swaps_vs_without"] = [b / a for a, b in zip(none, some, strict=True)]
    count = f"{share * repeats} requests"
    rows += [
        ("tokens/s without swaps", _measure.spread(none), count),
        ("tokens/s with a swap every 10 s", _measure.spread(some), f"{count}, {len(swapped)} swaps"),
    ]


def load(rig: _rig.Rig, turn: int, requests: int) -> float:
    """Completions of TOKENS tokens, IN_FLIGHT calls of PROMPTS_A_CALL at a time; returns tokens/s."""
    import ray

    from sampo_ray.actors.policy.messages import RolloutRequest
    from sampo_ray.loop.stages import as_ref

    block, calls = ray.put(rig.prompts(turn * 4000, requests)), range(0, requests, PROMPTS_A_CALL)
    waiting, tokens, begin = list(calls), 0, time.perf_counter()
    request = RolloutRequest(1, 1.0, 1.0, TOKENS, seed=0)
    flying: list[Any] = []
    while waiting or flying:
        while waiting and len(flying) < IN_FLIGHT:
            first = waiting.pop(0)
            some = list(range(first, min(first + PROMPTS_A_CALL, requests)))
            flying.append(as_ref(rig.policy.generate.remote(block, some, request)))
        ready, flying = ray.wait(flying, timeout=300)
        tokens += sum(len(ids) for table in ray.get(ready, timeout=60) for ids in table["completion"].to_pylist())
    return tokens / (time.perf_counter() - begin)


def in_ms(seconds: list[float]) -> str:
    return f"{_measure.spread([1000 * each for each in seconds])} ms"


if __name__ == "__main__":
    main()
