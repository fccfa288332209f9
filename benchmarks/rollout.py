"""Rollouts through the fleet's handle path against bare vLLM: same prompts, sampling parameters and concurrency.

The fleet is asked as in a round (`sampo_ray/loop/stages.py`): items of a few prompts through Serve to a policy replica,
and blocks written to the run directory. The bare side is `vllm.LLM.generate` with the same engine settings.
"""

import os
import time
from typing import Any

import _measure
import _rig
from _measure import Target

TOKENS = 16
SAMPLES = 4
CONCURRENCY = 64
TARGETS = {"rollout_vs_bare_vllm": Target(at_least=0.95)}


def main() -> None:
    parser = _measure.options(__doc__.splitlines()[0], requests=2048, repeats=4)
    args = parser.parse_args()
    _rig.quiet()
    with _rig.scratch() as folder, _rig.policy_rig(folder, args.model, CONCURRENCY, max_num_seqs=CONCURRENCY) as rig:
        bare = Bare(rig)
        share = max(1, args.requests // args.repeats // SAMPLES)
        sides = {"fleet": lambda turn: fleet(rig, turn, share), "bare": lambda turn: bare.run(rig, turn, share)}
        fleet(rig, 99, CONCURRENCY // SAMPLES)  # warm
        bare.run(rig, 99, CONCURRENCY // SAMPLES)
        results = _measure.take_turns(sides, args.repeats)
        rows = [("model", rig.label, "")]
        for name, found in results.items():
            rate = [tokens / seconds for tokens, seconds in found]
            rows.append((f"{name}: tokens/s", _measure.spread(rate), f"{args.repeats} x {share * SAMPLES} completions"))
        pairs = list(zip(results["fleet"], results["bare"], strict=True))
        rows.append(("tokens of both", f"{sum(a[0] for a, _ in pairs)} and {sum(b[0] for _, b in pairs)}", ""))
        _measure.show("rollout", ("what", "value", "count"), rows)
        ratios = [(a[0] / a[1]) / (b[0] / b[1]) for a, b in pairs]
        _measure.report("rollout", {"rollout_vs_bare_vllm": ratios}, TARGETS)


def fleet(rig: _rig.Rig, turn: int, prompts: int) -> tuple[int, float]:
    """Tokens and seconds of a round's rollouts."""
    import pyarrow.compute as pc

    from sampo_ray.config.sections import RolloutConfig
    from sampo_ray.loop import stages
    from sampo_ray.loop.blocks import StageOutput
    from sampo_ray.run.parts import Part, part_place
    from sampo_ray.run.storage import Place

    stage = Place(str(rig.folder / "rollouts" / str(turn)))
    parts = []
    for number, first in enumerate(range(0, prompts, stages.PART_PROMPTS)):
        block = rig.prompts(turn * 4000 + first, min(stages.PART_PROMPTS, prompts - first))
        place = part_place(stage.at("prompts"), number)
        place.write_table(block)
        parts.append(Part(place, len(block)))
    rollout = RolloutConfig(samples=SAMPLES, temperature=1.0, top_p=1.0, max_tokens=TOKENS)
    begin = time.perf_counter()
    made = stages.sample(
        lambda version: rig.policy, parts, StageOutput(stage.at("out")), rollout, 0, (_rig.RUN, 0), CONCURRENCY
    )
    seconds = time.perf_counter() - begin
    tables = [part.table() for part in made]
    return sum(pc.sum(pc.list_value_length(table["completion"])).as_py() for table in tables), seconds


class Bare:
    """vLLM by itself, in this process, with the policy replica's engine settings and parameters."""

    def __init__(self, rig: _rig.Rig) -> None:
        from vllm import LLM

        from sampo_ray.actors.policy.deployment import cpu_engine, cpu_environment

        os.environ.update(cpu_environment())
        self._llm = LLM(
            model=rig.model,
            tokenizer=str(rig.folder / "tokenizer"),
            max_model_len=_rig.CONTEXT,
            generation_config="vllm",
            max_num_seqs=CONCURRENCY,
            # As the replica's (internals/serve_llm.py); the name "uni" alone is not taken on CPUs.
            distributed_executor_backend="vllm.v1.executor.uniproc_executor.UniProcExecutor",
            **cpu_engine(_rig.CONTEXT),
        )

    def run(self, rig: _rig.Rig, turn: int, prompts: int) -> tuple[int, float]:
        from sampo_ray.actors.policy.answers import sampling_params
        from sampo_ray.actors.policy.messages import RolloutRequest

        block = rig.prompts(turn * 4000, prompts)
        asked: list[Any] = []
        request = RolloutRequest(SAMPLES, 1.0, 1.0, TOKENS, seed=0)
        for key, ids in zip(block["id"].to_pylist(), block["prompt"].to_pylist(), strict=True):
            for sample in range(SAMPLES):
                params = sampling_params(request, key, sample, rig.chat.end_of_turn_id)
                asked.append(({"prompt_token_ids": ids}, params))
        begin = time.perf_counter()
        outputs = self._llm.generate([a for a, _ in asked], [b for _, b in asked], use_tqdm=False)
        seconds = time.perf_counter() - begin
        return sum(len(output.outputs[0].token_ids) for output in outputs), seconds


if __name__ == "__main__":
    main()
