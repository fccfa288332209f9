"""Judges as reward sources: what workers make of them, what a dry run says, what is refused."""

import asyncio
import json
from pathlib import Path

import pyarrow as pa
import pytest
import yaml

from sampo_ray.actors.scoring.workers import RewardWorker
from sampo_ray.config.run import RunConfig, load_config
from sampo_ray.config.sections import RewardConfig
from sampo_ray.data.preferences import best_against_worst
from sampo_ray.errors import ConfigError, JudgeError
from sampo_ray.judging.tally import Tally, tally_of
from sampo_ray.run.storage import Place
from tests.judge_server import Answer, Body, JudgeServer, by_length, completion, problem, serving
from tests.test_length_control import block
from tests.test_validate import dry_run, recipe


def completions(texts: list[list[str]]) -> pa.Table:
    """COMPLETIONS, a prompt for each list."""
    import numpy as np

    shape = np.ones((len(texts), len(texts[0])))
    table = block(shape, shape).drop(["reward"])
    names = [json.dumps([{"role": "user", "content": f"question {n}"}]) for n in range(len(texts)) for _ in texts[0]]
    answers = [text for each in texts for text in each]
    for name, values in (("messages", names), ("text", answers)):
        table = table.set_column(table.schema.get_field_index(name), table.schema.field(name), pa.array(values))
    return table


def judge(server: JudgeServer, **changes: object) -> dict[str, object]:
    return {"url": server.url, "model": "judge", "weighted": False, "retries": 0, **changes}


def score(reward: dict[str, object], table: pa.Table, verdicts: Place | None = None) -> pa.Table:
    config = RewardConfig.model_validate(reward)
    worker = RewardWorker(config, [None] * len(config.parts), verdicts, hung_limit=1)
    try:
        return asyncio.run(worker.score(table))
    finally:
        for each in worker.judges.values():
            each.close()


TEXTS = [["aaa", "a", "aa", "aaaa"], ["b", "bb", "b", "bbb"]]


def test_a_judge_s_rewards_make_pairs_and_say_what_they_took(tmp_path: Path) -> None:
    with serving(by_length) as server:
        scores = score({"judge": judge(server)}, completions(TEXTS), Place(str(tmp_path)))
        again = score({"judge": judge(server)}, completions(TEXTS), Place(str(tmp_path)))
        assert len(server.bodies) == 6 + 3
    pairs, dropped = best_against_worst(scores)
    assert not dropped and pairs.num_rows == 2
    best = [
        scores["text"].to_pylist()[scores["reward"].to_pylist().index(each)]
        for each in pairs["chosen_reward"].to_pylist()
    ]
    assert best == ["aaaa", "bbb"]
    assert (tally_of(scores).calls, tally_of(again).cached) == (9, 9) and tally_of(scores).asked == 9
    assert again["reward"] == scores["reward"]
    kept = pa.concat_tables([scores])  # as parts are written
    Place(str(tmp_path / "part")).write_table(kept)
    assert tally_of(Place(str(tmp_path / "part")).read_table()) == tally_of(scores)


def test_a_judge_may_be_a_part_of_a_sum() -> None:
    length = {"function": "sampo_ray.rewards.length:reward", "arguments": {"target": 1}, "weight": 1.0}
    with serving(lambda body: completion("7")) as server:
        parts = [length, {"judge": judge(server, mode="pointwise"), "weight": 0.5}]
        scores = score({"sum": parts}, completions([["a", "b"]]))
    alone = score({"sum": [length]}, completions([["a", "b"]]))
    assert scores["reward"].to_pylist() == [each + 3.5 for each in alone["reward"].to_pylist()]


def test_a_completion_without_a_verdict_has_no_reward() -> None:
    def answer(body: Body) -> Answer:
        return completion("who knows") if "aaaa" in body["messages"][-1]["content"] else completion("3")

    with serving(answer) as server:
        scores = score({"judge": judge(server, mode="pointwise")}, completions(TEXTS))
    assert scores["reward"].to_pylist() == [3.0, 3.0, 3.0, None, 3.0, 3.0, 3.0, 3.0]
    assert tally_of(scores).nonsense == 1


def test_a_judge_that_refuses_the_key_ends_the_stage_instead_of_dropping_all_completions() -> None:
    with serving(lambda body: problem(401)) as server, pytest.raises(JudgeError, match="look at key_env"):
        score({"judge": judge(server)}, completions(TEXTS))


def test_no_completions_are_no_calls() -> None:
    with serving(by_length) as server:
        scores = score({"judge": judge(server)}, completions(TEXTS).slice(0, 0))
        assert scores.num_rows == 0 and not server.bodies
    assert tally_of(scores) == Tally()


@pytest.fixture
def tree(tmp_path: Path, tiny_model: Path) -> dict[str, dict[str, object]]:
    rows = [{"prompt": f"Say {n}"} for n in range(8)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {
        "model": {"path": str(tiny_model)},
        "data": {"prompts": str(tmp_path / "prompts.jsonl"), "max_length": 256},
        "rounds": {"mode": "online"},
        "rollout": {"prompts": 8, "samples": 4, "max_tokens": 32},
        "serve": {"enabled": False},
        "profile": "laptop",  # type: ignore[dict-item]
        "run": {"dir": str(tmp_path / "run")},
    }


def test_a_dry_run_calls_the_judge_once_and_says_what_rounds_cost(
    tmp_path: Path, tree: dict[str, dict[str, object]]
) -> None:
    with serving(lambda body: by_length(body, sure=0.9)) as server:
        tree["reward"] = {
            "judge": {"url": server.url, "model": "tiny-judge", "cache": "kept"},
            "length_controlled": True,
        }
        status, output = dry_run(recipe(tmp_path, tree))
        assert status == 0, output
        assert len(server.bodies) == 1
    said = " ".join(line.lstrip("# ") for line in output.splitlines())
    assert f"reward.judge: tiny-judge at {server.url} answers; pairwise, preset helpful, verdicts weighted" in said
    assert "reward.judge: at most 6 calls for the 4 completions of a prompt, 48 a round" in said
    decided = load_config(yaml.safe_load(output)).reward
    assert decided.judge is not None and decided.judge.weighted is True and decided.length_controlled
    assert decided.judge.cache == str(Path("kept").resolve())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preset": "alpaca_eval"}, "reward.judge: the judge 'tiny-judge' at .* gives no log-probs"),
        ({"key_env": "NO_SUCH_KEY_AT_ALL"}, "reward.judge: key_env='NO_SUCH_KEY_AT_ALL': the environment has no such"),
    ],
)
def test_a_dry_run_refuses_a_judge_that_cannot_be_used(
    tmp_path: Path, tree: dict[str, dict[str, object]], changes: dict[str, object], message: str
) -> None:
    with serving(by_length) as server:
        tree["reward"] = {"judge": {"url": server.url, "model": "tiny-judge", "retries": 0, **changes}}
        status, output = dry_run(recipe(tmp_path, tree))
    assert status != 0
    from re import search

    assert search(message, " ".join(output.split())), output


def online(**reward: object) -> RunConfig:
    tree = {
        "model": {"path": "m"},
        "data": {"prompts": "p"},
        "rounds": {"mode": "online"},
        "run": {"dir": "r"},
        "reward": reward.pop("reward"),
        **reward,
    }
    return load_config(tree)


HERE = {"url": "http://h/v1", "model": "m"}


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"reward": {"judge": HERE, "model": "m"}}, "reward.model and judge are set together; keep one"),
        ({"reward": {"sum": [{"judge": HERE}], "judge": HERE}}, "sum is set beside judge"),
        ({"reward": {"judge": HERE}, "serve": {"gates": {"min_win_rate": 0.5}}}, "use reward.judge.mode=pointwise"),
        ({"reward": {"judge": {**HERE, "mode": "both"}}}, "reward.judge.mode"),
        ({"reward": {"judge": {**HERE, "concurrency": 0}}}, "reward.judge.concurrency"),
        ({"reward": {"judge": {"url": "http://h/v1"}}}, "reward.judge.model: missing"),
        (
            {"reward": {"length_controlled": True}, "rounds": {"mode": "offline"}, "data": {"train": "t"}},
            "reward.length_controlled corrects the rewards of sampled completions",
        ),
        ({"reward": {}}, "reward.function, reward.model or reward.judge is missing"),
    ],
)
def test_a_judge_that_goes_with_nothing_else_is_refused(tree: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        online(**tree)
    gates = {"gates": {"min_win_rate": 0.5}}
    assert online(reward={"judge": {**HERE, "mode": "pointwise"}}, serve=gates).reward.judge is not None


def test_a_worker_finds_out_itself_how_verdicts_are_weighted_where_nobody_has() -> None:
    with serving(lambda body: by_length(body, sure=0.9)) as server:
        scores = score({"judge": judge(server, weighted=None)}, completions([["a", "bb"]]))
        assert len(server.bodies) == 2
    assert scores["reward"].to_pylist() == pytest.approx([-0.2, 0.2])
    with serving(by_length) as server, pytest.raises(JudgeError, match="gives no log-probs"):
        score({"judge": judge(server, weighted=None, preset="alpaca_eval")}, completions([["a", "bb"]]))


def test_a_judge_takes_no_gpu() -> None:
    assert not online(reward={"judge": HERE}).reward.has_model
