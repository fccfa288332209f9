import asyncio
import json
import math

import pyarrow as pa
import pytest
import torch

from sampo_ray.actors.scoring.workers import RewardWorker, build_reward_app
from sampo_ray.config.run import load_config
from sampo_ray.config.sections import FleetConfig, RewardConfig
from sampo_ray.data.preferences import SCORES
from sampo_ray.data.reward_functions import call_function, check_function, function_source, load_function
from sampo_ray.data.reward_models import RewardModel
from sampo_ray.data.rewards import Samples
from sampo_ray.errors import ConfigError, RewardError
from sampo_ray.loop.validate import check
from tests.test_reward_models import random_reward_model
from tests.waiting import scaled

PROMPTS = [[{"role": "user", "content": "What is 2+2?"}], [{"role": "user", "content": "Why? " * 100}]]
FILE = """
import asyncio
import functools
import threading

calls = []

def length(prompts, completions):
    return [len(text) for text in completions]

def right(prompts, completions, solution):
    if "fail" in completions:
        raise ConnectionError("asked to")
    return [float("nan") if text == "nan" else float(text == right) for text, right in zip(completions, solution)]

def flaky(prompts, completions):
    calls.append(0)
    if len(calls) < 3:
        raise ConnectionError("try again")
    return [len(calls)] * len(completions)

def failing(prompts, completions):
    raise ConnectionError("never works")

def hanging(prompts, completions):
    threading.Event().wait(0.6)

async def coroutine(completions, **columns):
    await asyncio.sleep(0)
    return [len(text) for text in completions]

def scaled(completions, scale, solution):
    return [scale * len(text) for text in completions]

class Judge:
    def __init__(self, weight=1.0):
        self.weight = weight

    def __call__(self, completions, **columns):
        return [self.weight * len(text) for text in completions]

NUMBER = 3
judge = Judge()
partial = functools.partial(scaled, scale=2)

def two_names(a, b):
    return [0.0] * len(b)

def by_place(prompts, completions, /):
    return [0.0] * len(completions)

def answer(completions, answer, **columns):
    return [0.0] * len(completions)

def trainer_state(completions, trainer_state):
    return [0.0] * len(completions)

def prompts_only(prompts, **_):
    return [0.0] * len(prompts)

def no_completions(prompts):
    return [0.0] * len(prompts)

def one_number(completions):
    return 1.0

def one_score(completions):
    return [1.0]

def not_finite(completions):
    return [float("inf") for _ in completions]

def words(completions):
    return ["good" for _ in completions]

def first_word(completions):
    return [len(text.split()[0]) for text in completions]

def messages(completions):
    return [len(completion[0]["content"]) for completion in completions if completion]

def leaving(completions):
    raise SystemExit(3)

def exhausted(completions):
    return next(iter([]))

def from_keywords(completions, **columns):
    return [float(columns["answer"] == "4") for _ in completions]
"""


def samples(texts=("It is 4.", ""), prompts=None, **columns):
    prompts = prompts or [PROMPTS[0]] * len(texts)
    return Samples(prompts, list(texts), [[2] * len(text) for text in texts], columns)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "my_rewards.py"
    path.write_text(FILE)
    return path


def completions(texts, columns="{}"):
    rows = [
        {
            "id": "p",
            "messages": '[{"role": "user", "content": "What is 2+2?"}]',
            "columns": columns,
            "prompt": [1],
            "sample": i,
            "completion": [2],
            "text": text,
            "finish_reason": "stop",
            "logprobs": [0.0],
            "first_version": 0,
            "last_version": 0,
        }
        for i, text in enumerate(texts)
    ]
    return pa.Table.from_pylist(rows, schema=pa.schema(list(SCORES)[:-1]))


def test_a_function_is_found_in_a_file_and_in_a_module(file):
    assert load_function(f"{file}:length")([], ["ab"]) == [2]
    assert load_function("sampo_ray.console.demo_task:reward").__name__ == "reward"


def test_a_function_in_a_file_loads_from_its_text_where_the_file_does_not_exist(file):
    source = function_source(f"{file}:length")
    file.unlink()
    assert load_function(f"{file}:length", source)([], ["ab"]) == [2]
    assert function_source("sampo_ray.console.demo_task:reward") is None


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("length", "write it as package.module:function"),
        ("no_such_module:length", "importing no_such_module failed with ModuleNotFoundError"),
        ("no_such_file.py:length", "cannot be read"),
        ("{file}:lenth", "has no function 'lenth'; it has length, right"),
        ("{file}:NUMBER", "has no function 'NUMBER'"),
        ("{file}:Judge", "is a class; name a function, or an object that can be called"),
        ("{broken}:length", "failed with SyntaxError"),
    ],
)
def test_a_function_that_cannot_be_loaded_is_an_error_with_a_fix(file, tmp_path, spec, message):
    broken = tmp_path / "broken.py"
    broken.write_text("def length(:")
    with pytest.raises(ConfigError, match=message) as error:
        check_function(spec.format(file=file, broken=broken), samples(), 60)
    assert str(error.value).startswith("reward.function=")


def test_a_function_gets_by_name_what_it_names_in_whatever_order():
    answers = samples(["It is 4.", "It is 5, I think."], answer=["4", "4"], other=[1, 2])

    def in_the_order_of_trl(completions, answer, **kwargs):
        assert kwargs["prompts"] == [PROMPTS[0]] * 2
        return [float(right in text) for text, right in zip(completions, answer, strict=True)]

    def reversed_order(completions, prompts):
        return [float("4" in text and prompt == PROMPTS[0]) for text, prompt in zip(completions, prompts, strict=True)]

    def keywords_only(*, answer, completions):
        return [float(right in text) for text, right in zip(completions, answer, strict=True)]

    def with_defaults(completions, answer=None, missing=("a", "b")):
        return [float(right in text) + (missing != ("a", "b")) for text, right in zip(completions, answer, strict=True)]

    for function in (in_the_order_of_trl, reversed_order, keywords_only, with_defaults):
        assert call_function(function, answers) == [1.0, 0.0]


def test_a_function_with_keyword_arguments_gets_everything():
    given = samples(["a", "b"], solution=["4", "5"], prompts=None)

    def everything(**given):
        return [float(set(given) == {"prompts", "completions", "completion_ids", "solution"})] * 2

    assert call_function(everything, given) == [1.0, 1.0]


def test_a_column_does_not_take_the_place_of_prompts_and_completions():
    given = Samples(PROMPTS, ["a", "b"], [[1], [2, 2]], {"completions": ["x", "y"], "completion_ids": [0, 0]})
    assert call_function(lambda completions, completion_ids: [float(completions == ["a", "b"]), 0.0], given)[0] == 1.0
    assert call_function(lambda completion_ids: [len(ids) for ids in completion_ids], given) == [1.0, 2.0]


def test_a_column_that_none_of_a_block_has_is_none_for_all():
    assert call_function(lambda completions, rare: [float(value is None) for value in rare], samples()) == [1.0, 1.0]
    assert call_function(lambda completions, rare=(3, 3): list(rare), samples()) == [3.0, 3.0]


@pytest.mark.parametrize("name", ["length", "coroutine", "judge", "partial", "prompts_only", "right"])
def test_what_can_be_called_by_name_is_taken(file, name):
    check_function(f"{file}:{name}", samples(solution=["4", "4"]), 60)


def test_coroutines_are_waited_for(file):
    assert call_function(load_function(f"{file}:coroutine"), samples(["ab", "a"])) == [2.0, 1.0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "two_names",
            "nothing is given for its parameter a, b; .* solution, prompts, completions, completion_ids",
        ),
        ("by_place", "takes prompts, completions by place only"),
        ("answer", "nothing is given for its parameter answer; .*add the column to data.prompts"),
        ("trainer_state", "nothing is given for its parameter trainer_state"),
        ("no_completions", "does not look at completions"),
        ("one_number", "returned float instead of a list of numbers"),
        ("one_score", "returned 1 scores for 2 completions"),
        ("not_finite", "returned inf for a completion"),
        ("words", "returned 'good' for a completion"),
        ("first_word", r"raised IndexError: list index out of range \(.*my_rewards.py:\d+\)"),
        ("messages", "raised TypeError: .* completions are texts"),
        ("failing", "raised ConnectionError: never works"),
        ("leaving", "raised SystemExit: 3"),
        ("from_keywords", "raised KeyError: 'answer'"),
    ],
)
def test_a_function_that_would_fail_after_a_rounds_generation_is_refused_before(file, name, message):
    with pytest.raises(ConfigError, match=message) as error:
        check_function(f"{file}:{name}", samples(solution=["4", "4"]), 60)
    assert str(error.value).startswith("reward.function=")


def test_a_function_that_does_not_return_is_refused_after_its_time_limit(file):
    with pytest.raises(ConfigError, match=r"did not return within reward\.timeout_s=0\.1"):
        check_function(f"{file}:hanging", samples(), 0.1)


def test_a_dry_run_tries_the_function_on_the_first_prompt_and_finds_columns_of_later_ones(file, tmp_path, tiny_model):
    rows = [{"prompt": "2+2?", "day": 1}, {"prompt": "3+3?", "answer": "6"}]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree = {
        "model": {"path": str(tiny_model)},
        "data": {"prompts": str(tmp_path / "prompts.jsonl"), "max_length": 64},
        "rounds": {"mode": "online"},
        "rollout": {"max_tokens": 16},
        "serve": {"enabled": False},
        "run": {"dir": str(tmp_path / "run")},
    }
    check(load_config(tree, [f"reward.function={file}:answer"]))
    with pytest.raises(ConfigError, match="parameter solution; .* one of day, answer, prompts"):
        check(load_config(tree, [f"reward.function={file}:right"]))


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0, math.nan], "returned nan for a completion of the prompt 'Why"),
        ([math.inf, 1.0], "returned inf for a completion of the prompt 'What is 2\\+2\\?'"),
        ([1.0, "2"], "returned '2'"),
        ([1.0], r"returned 1 scores for 2 completions.*What is 2\+2"),
        (3.0, "returned float instead of a list"),
        (None, "returned NoneType instead of a list"),
        ("12", "returned str instead of a list"),
        ({"a": 1, "b": 2}, "returned dict instead of a list"),
        (torch.tensor(1.0), "returned Tensor instead of a list"),
    ],
)
def test_anything_but_one_finite_number_each_is_an_error_that_quotes_a_shortened_prompt(returned, message):
    with pytest.raises(RewardError, match=message) as error:
        call_function(lambda completions: returned, samples("ab", PROMPTS))
    assert len(str(error.value)) < 400


def test_none_is_no_reward():
    assert call_function(lambda completions: [None, 2], samples("ab")) == [None, 2.0]


def test_arrays_and_tensors_are_taken_as_numbers():
    for returned in (torch.tensor([1.0, 2.0]), torch.tensor([1, 2]).numpy(), (True, 2)):
        assert call_function(lambda completions, out=returned: out, samples("ab", PROMPTS)) == [1.0, 2.0]


def test_samples_have_the_blocks_columns_with_none_where_a_row_lacks_them():
    block = completions(["a", "b"])
    columns = pa.array(['{"a": 1, "b": "x"}', '{"a": [2]}'])
    found = Samples.of(block.set_column(block.column_names.index("columns"), "columns", columns))
    assert found.columns == {"a": [1, [2]], "b": ["x", None]}
    assert (found.prompts, found.completions, found.completion_ids) == ([PROMPTS[0]] * 2, ["a", "b"], [[2], [2]])


def worker(file, name, **config):
    spec = f"{file}:{name}"
    return RewardWorker(RewardConfig(function=spec, **config), [function_source(spec)], None, hung_limit=1)


def test_a_failing_call_is_retried_and_then_its_rewards_are_null(file):
    flaky = asyncio.run(worker(file, "flaky", retries=2).score(completions(["a", "b"])))
    assert flaky["reward"].to_pylist() == [3.0, 3.0]
    failing = asyncio.run(worker(file, "failing", retries=1).score(completions(["a", "b"])))
    assert failing["reward"].to_pylist() == [None, None]
    assert failing.schema == SCORES


@pytest.mark.parametrize("name", ["leaving", "exhausted"])
def test_a_call_that_ends_in_an_unusual_way_fails_at_once(file, name):
    unusual = worker(file, name, retries=0, timeout_s=3600)
    assert asyncio.run(unusual.score(completions(["a"])))["reward"].to_pylist() == [None]


def test_a_call_that_hangs_times_out_and_makes_the_replica_unhealthy_until_it_returns(file):
    async def hang_and_return():
        hanging = worker(file, "hanging", retries=0, timeout_s=0.1)
        hanging.check_health()
        table = await hanging.score(completions(["a"]))
        with pytest.raises(RuntimeError, match=r"1 calls .* hang beyond reward\.timeout_s"):
            hanging.check_health()
        while hanging.hung:
            await asyncio.sleep(0.05)
        hanging.check_health()
        return table["reward"].to_pylist()

    assert asyncio.run(hang_and_return()) == [None]


@pytest.fixture
def deploy(own_serve):
    from ray import serve

    names = []

    fleet = FleetConfig(max_ongoing_requests=4, num_cpus=0.1)

    def start(config):
        names.append(f"rewards-test-{len(names)}")
        return serve.run(build_reward_app(config, fleet), name=names[-1], route_prefix=None)

    yield start
    for name in names:
        serve.delete(name)


def scored(handle, block):
    return handle.score.remote(block).result(timeout_s=scaled(60))


@pytest.mark.slow
def test_reward_workers_score_with_a_function_whose_file_no_longer_exists(deploy, file):
    handle = deploy(RewardConfig(function=f"{file}:right", retries=0))
    file.unlink()
    table = scored(handle, completions(["4", "5"], '{"solution": "4"}'))
    assert table.schema == SCORES
    assert table["reward"].to_pylist() == [1.0, 0.0]
    assert scored(handle, completions([]))["reward"].to_pylist() == []
    assert scored(handle, completions(["4", "fail"], '{"solution": "4"}'))["reward"].to_pylist() == [None, None]
    with pytest.raises(RewardError) as error:
        scored(handle, completions(["nan"], '{"solution": "4"}'))
    assert str(error.value.cause) == (
        "the reward source returned nan for a completion of the prompt 'What is 2+2?'; return a finite number, or None "
        "where it has no score"
    )


@pytest.mark.slow
def test_reward_workers_score_with_a_model(deploy, tmp_path, tiny_model):
    reward_model = random_reward_model(tmp_path, tiny_model)
    handle = deploy(RewardConfig(model=str(reward_model)))
    rewards = scored(handle, completions(["4", "no idea"]))["reward"].to_pylist()
    expected = RewardModel(str(reward_model), "cpu")(samples(["4", "no idea"]))
    assert rewards == pytest.approx(expected, abs=1e-5)
