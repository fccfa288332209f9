"""AlpacaEval 2 from answers to rates, over real HTTP: a small model's stand-in answers, a judge's stand-in compares."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from sampo_ray.config.sections import RewardSource
from sampo_ray.data.chat import ChatFormat
from sampo_ray.errors import EvaluationError
from sampo_ray.evaluation import alpaca_eval
from sampo_ray.evaluation.alpaca_data import BASELINE, read_outputs
from sampo_ray.evaluation.alpaca_eval import AlpacaSettings
from sampo_ray.evaluation.alpaca_judging import read_judge
from sampo_ray.evaluation.subject import Subject
from sampo_ray.run.storage import Place
from tests.judge_server import Answer, Body, JudgeServer, by_length, completion, problem, serving
from tests.waiting import scaled

pytest.importorskip("alpaca_eval")


@pytest.fixture(scope="module")
def folder(shared: Path) -> Path:
    return shared / "data" / "alpaca_eval"


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model's tokenizer with a chat template, as endpoints serve it."""
    saved = tmp_path_factory.mktemp("tokenizer")
    ChatFormat.load(tiny_model, "llama3").save(saved)
    return saved


def echo(body: Body) -> Answer:
    """An answer of the length of its question, and with it."""
    return completion(body["messages"][-1]["content"][:50] + "!")


@pytest.fixture(scope="module")
def endpoint() -> Iterator[JudgeServer]:
    with serving(echo) as server:
        yield server


def subject(server: JudgeServer, tokenizer: Path, **changes: object) -> Subject:
    given = {"model": "policy", "tokenizer": str(tokenizer), "context": 100_000, "label": "final", "name": "tiny"}
    return Subject(url=server.url.removesuffix("/v1"), **{**given, **changes})  # type: ignore[arg-type]


def judged_by(server: JudgeServer, **changes: object) -> RewardSource:
    given = {"url": server.url, "model": "tiny-judge", "preset": "alpaca_eval", "retries": 0}
    return RewardSource.model_validate({"judge": {**given, **changes}})


def sure(body: Body) -> Answer:
    return by_length(body, sure=0.75)


def test_answers_are_judged_in_both_orders_and_rated_with_all_that_decides_it(
    endpoint: JudgeServer, tokenizer: Path, folder: Path, tmp_path: Path
) -> None:
    with serving(sure) as judge:
        given = AlpacaSettings(folder, judged_by(judge), max_tokens=64, verdicts=Place(str(tmp_path)))
        settings = alpaca_eval.check(given)
        assert len(judge.bodies) == 1  # the trial
        result, content = alpaca_eval.run(subject(endpoint, tokenizer), settings)
        assert len(judge.bodies) == 1 + 2 * 805
        again, _ = alpaca_eval.run(subject(endpoint, tokenizer), settings)
        assert len(judge.bodies) == 1 + 2 * 805
    names = [score.name for score in result.scores]
    assert names == ["win_rate,judge", "length_controlled_winrate,judge", "tokens,model", "characters"]
    rate, controlled, *_ = result.scores
    # The judge prefers the longer answer with 3/4, and answers are shorter than nearly all of the baseline's.
    assert 0.25 <= rate.value < 0.27 and rate.count == 805 and rate.low < rate.value < rate.high
    assert 0 < controlled.value < 1 and controlled.stderr is not None
    samples = [json.loads(line) for line in content.splitlines()]
    assert len(samples) == 805 and samples[3]["answer"].endswith("!")
    for score in result.scores:
        values = [sample["scores"][score.name] for sample in samples]
        assert sum(values) / 805 == pytest.approx(score.value)
    about = result.conditions
    assert (about.total, about.limit, about.max_tokens, about.route) == (805, None, 64, "chat")
    assert about.sampling["temperature"] == 0 and about.first_prompt and about.packages["alpaca_eval"] == "0.6.6"
    assert any("not by the official annotator" in note for note in about.notes)
    assert any("reconstructed preferences" in note for note in about.notes)
    planned = alpaca_eval.plan(ChatFormat.load(tokenizer, "tokenizer"), 100_000, settings)
    assert planned.conditions.planned == about.planned and planned.judge_calls == 1610  # by which a task is done
    other = alpaca_eval.plan(ChatFormat.load(tokenizer, "tokenizer"), 100_000, replace(settings, repeats=2))
    assert other.conditions.planned != about.planned
    record = about.judge
    assert record is not None and record.weighted and record.preset == "alpaca_eval"
    tally = record.tally
    assert (tally.calls, tally.cached, tally.prompt_tokens) == (1610, 0, 161_000)
    assert tally.first_share == pytest.approx(0.5, abs=0.01) and tally.flip_share < 0.01  # by equal lengths
    assert record.repeat_spread is None
    assert again.conditions.judge is not None and again.conditions.judge.tally.cached == 1610
    assert again.scores == result.scores


def test_a_reward_function_judges_without_an_endpoint_and_its_number_has_another_name(
    endpoint: JudgeServer, tokenizer: Path, folder: Path, tmp_path: Path
) -> None:
    file = tmp_path / "rewards.py"
    file.write_text("def longest(completions): return [len(text) for text in completions]")
    source = RewardSource(function=f"{file}:longest")
    result, content = alpaca_eval.run(subject(endpoint, tokenizer), AlpacaSettings(folder, source, max_tokens=64))
    assert [score.name for score in result.scores[:2]] == ["win_rate,reward", "length_controlled_winrate,reward"]
    values = {json.loads(line)["scores"]["win_rate,reward"] for line in content.splitlines()}
    assert values <= {0.0, 0.5, 1.0}
    assert result.conditions.judge is not None and result.conditions.judge.repeat_spread == 0.0


def test_repeats_ask_again_and_tell_their_spread(endpoint: JudgeServer, tokenizer: Path, folder: Path) -> None:
    calls = iter(range(10**6))

    def wavering(body: Body) -> Answer:
        return completion("m" if next(calls) % 5 else "M")

    with serving(wavering) as judge:
        settings = AlpacaSettings(folder, judged_by(judge, weighted=False), limit=40, repeats=3)
        result, content = alpaca_eval.run(subject(endpoint, tokenizer), settings)
        assert len(judge.bodies) == 3 * 2 * 40
    record = result.conditions.judge
    assert record is not None and record.repeats == 3 and record.repeat_spread is not None
    assert result.conditions.limit == 40
    assert [score.name for score in result.scores][:2] == ["win_rate,judge", "tokens,model"]
    assert any("needs all 805 rows" in note for note in result.conditions.notes)
    assert all(len(json.loads(line)["preferences"]) == 3 for line in content.splitlines())


def test_a_judge_of_nonsense_gives_no_score_and_is_given_up_early(
    endpoint: JudgeServer, tokenizer: Path, folder: Path
) -> None:
    with serving(lambda body: completion("The", {"The": 0.9})) as judge:
        settings = alpaca_eval.check(AlpacaSettings(folder, judged_by(judge), max_tokens=64))
        with pytest.raises(EvaluationError, match=r"64 of the first 64 answers have no verdict.*nonsense"):
            alpaca_eval.run(subject(endpoint, tokenizer), settings)
        assert len(judge.bodies) == 1 + 128


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda body: completion(""), "805 are empty"),
        (lambda body: completion("No."), "all 805 answers have 3 characters"),
        (lambda body: problem(400, "no"), "answers failed"),
    ],
)
def test_answers_that_say_nothing_are_not_judged(answer: object, message: str, tokenizer: Path, folder: Path) -> None:
    with serving(answer) as server, serving(sure) as judge:  # type: ignore[arg-type]
        settings = AlpacaSettings(folder, judged_by(judge), max_tokens=64)
        with pytest.raises(EvaluationError, match=message):
            alpaca_eval.run(subject(server, tokenizer), settings)
        assert not judge.bodies


def test_what_is_wrong_is_refused_before_anything_is_asked(
    endpoint: JudgeServer, tokenizer: Path, folder: Path, tmp_path: Path
) -> None:
    begun = len(endpoint.bodies)
    with serving(by_length) as judge:
        with pytest.raises(EvaluationError, match="gives no log-probs"):
            alpaca_eval.check(AlpacaSettings(folder, judged_by(judge)))
        with pytest.raises(EvaluationError, match="has no alpaca_eval_gpt4_baseline.json"):
            alpaca_eval.check(AlpacaSettings(tmp_path, judged_by(judge)))
        with pytest.raises(EvaluationError, match="is not Llama 3's tokenizer"):
            alpaca_eval.check(AlpacaSettings(folder, judged_by(judge), llama3=tokenizer))
        settings = AlpacaSettings(folder, judged_by(judge))
        with pytest.raises(EvaluationError, match="is the baseline's name"):
            alpaca_eval.run(subject(endpoint, tokenizer, name=BASELINE), settings)
        with pytest.raises(EvaluationError, match="prompts do not fit"):
            alpaca_eval.run(subject(endpoint, tokenizer, context=256), settings)
    assert len(endpoint.bodies) == begun


@pytest.mark.slow
def test_lengths_are_told_in_llama_3s_tokens(shared: Path, tokenizer: Path, tmp_path: Path) -> None:
    """The answers of Llama-3-8B-Instruct that the leaderboard has: 412 tokens, 1,899 characters."""
    command = [sys.executable, str(shared / "data" / "tokenizers" / "llama3" / "convert.py"), str(tmp_path)]
    subprocess.run(command, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}, timeout=scaled(300))
    rows = read_outputs(shared / "data" / "alpaca_eval" / "outputs" / "Meta-Llama-3-8B-Instruct.jsonl.gz")
    chat = ChatFormat.load(tokenizer, "tokenizer")
    found = alpaca_eval._lengths([row["output"] for row in rows], chat, tmp_path)
    means = {name: sum(each for each in values if each is not None) / 805 for name, values in found.items()}
    assert means["tokens,llama3"] == pytest.approx(412.1, abs=0.1)
    assert means["characters"] == pytest.approx(1899, abs=1)
    assert list(found) == ["tokens,llama3", "tokens,model", "characters"]


def test_what_judges_is_read_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "judge.yaml"
    for text, kinds in (
        ("url: http://h/v1\nmodel: m", ["judge"]),
        ("judge: {url: http://h/v1, model: m}", ["judge"]),
        ("model: some/reward", ["model"]),
        ("function: a:b", ["function"]),
    ):
        file.write_text(text)
        assert read_judge(file).kinds == kinds
    for text, message in (
        ("", "holds no fields"),
        ("[", "cannot be read as YAML"),
        ("preset: helpful", "preset"),
        ("url: nowhere\nmodel: m", "url='nowhere' is no base URL"),
        ("{}", "names neither"),
    ):
        file.write_text(text)
        with pytest.raises(EvaluationError, match=message):
            read_judge(file)
    with pytest.raises(EvaluationError, match="cannot be read"):
        read_judge(tmp_path / "none.yaml")


def test_a_win_rate_of_one_has_an_interval() -> None:
    score = alpaca_eval._score("win_rate,reward", [1.0] * 20, None)
    assert score.value == score.high == 1.0 and score.low == pytest.approx(0.839, abs=1e-3)
