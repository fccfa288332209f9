import asyncio
import math

import pyarrow as pa
import pytest
import torch

from sampo_ray.actors.scoring.workers import RewardWorker, build_reward_app
from sampo_ray.config.sections import FleetConfig, RewardConfig
from sampo_ray.data.chat import ChatFormat
from sampo_ray.data.preferences import SCORES
from sampo_ray.data.rewards import RewardModel, call_function, check_reward, columns_of, function_source, load_function
from sampo_ray.errors import ConfigError, RewardError
from tests.waiting import scaled

PROMPTS = [[{"role": "user", "content": "What is 2+2?"}], [{"role": "user", "content": "Why? " * 100}]]
FILE = """
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

async def coroutine(prompts, completions):
    return []

NUMBER = 3
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "my_rewards.py"
    path.write_text(FILE)
    return path


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory, tiny_model):
    from transformers import AutoConfig, LlamaForSequenceClassification

    folder = tmp_path_factory.mktemp("reward") / "model"
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(tiny_model, num_labels=1)
    LlamaForSequenceClassification(config).save_pretrained(folder)
    ChatFormat.load(tiny_model, "llama3").save(folder)
    return folder


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
    assert load_function("math:fsum") is math.fsum


def test_a_function_in_a_file_loads_from_its_text_where_the_file_does_not_exist(file):
    source = function_source(f"{file}:length")
    file.unlink()
    assert load_function(f"{file}:length", source)([], ["ab"]) == [2]
    assert function_source("math:fsum") is None


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("length", "write it as package.module:function"),
        ("no_such_module:length", "importing no_such_module failed with ModuleNotFoundError"),
        ("no_such_file.py:length", "cannot be read"),
        ("{file}:lenth", "has no function 'lenth'; it has length, right"),
        ("{file}:NUMBER", "has no function 'NUMBER'"),
        ("{file}:coroutine", "plain `def`"),
        ("{broken}:length", "failed with SyntaxError"),
    ],
)
def test_a_function_that_cannot_be_loaded_is_an_error_with_a_fix(file, tmp_path, spec, message):
    broken = tmp_path / "broken.py"
    broken.write_text("def length(:")
    with pytest.raises(ConfigError, match=message) as error:
        check_reward(RewardConfig(function=spec.format(file=file, broken=broken)))
    assert str(error.value).startswith("reward.function=")


def test_a_function_gets_the_columns_that_it_names():
    columns = {"solution": ["4", "5"], "other": [1, 2], "prompts": [3, 4]}

    def named(prompts, completions, solution):
        return [float(solution == ["4", "5"])] * 2

    def all_others(prompts, completions, **rest):
        return [float(set(rest) == {"solution", "other"})] * 2

    def none(prompts, completions):
        return [1, 1]

    for function in (named, all_others, none):
        assert call_function(function, PROMPTS, ["4", "x"], columns) == [1.0, 1.0]


def test_a_column_that_the_data_lacks_is_an_error_and_not_a_failed_call():
    def needs(prompts, completions, solution):
        return [1.0]

    with pytest.raises(RewardError, match=r"solution.*the data's other columns are answer"):
        call_function(needs, PROMPTS, ["a", "b"], {"answer": [1, 2]})


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0, math.nan], "returned nan for a completion of the prompt 'Why"),
        ([math.inf, 1.0], "returned inf for a completion of the prompt 'What is 2\\+2\\?'"),
        ([1.0, None], "returned None"),
        ([1.0], r"returned 1 scores for 2 completions.*What is 2\+2"),
        (3.0, "returned float instead of a list"),
        (None, "returned NoneType instead of a list"),
    ],
)
def test_anything_but_one_finite_number_each_is_an_error_that_quotes_a_shortened_prompt(returned, message):
    with pytest.raises(RewardError, match=message) as error:
        call_function(lambda prompts, completions: returned, PROMPTS, ["a", "b"], {})
    assert len(str(error.value)) < 400


def test_arrays_and_tensors_are_taken_as_numbers():
    for returned in (torch.tensor([1.0, 2.0]), torch.tensor([1, 2]).numpy(), (True, 2)):
        assert call_function(lambda prompts, completions, out=returned: out, PROMPTS, ["a", "b"], {}) == [1.0, 2.0]


def test_columns_are_lists_with_none_where_a_row_lacks_them():
    block = pa.table({"columns": ['{"a": 1, "b": "x"}', '{"a": [2]}']})
    assert columns_of(block) == {"a": [1, [2]], "b": ["x", None]}


def test_a_reward_model_scores_a_batch_as_it_scores_single_rows(reward_model):
    texts = ["four", "x" * 30, "", "it is four, I think"]
    together = RewardModel(str(reward_model), "cpu")([PROMPTS[0]] * 4, texts, {})
    alone = RewardModel(str(reward_model), "cpu", batch_tokens=1)([PROMPTS[0]] * 4, texts, {})
    assert together == pytest.approx(alone, abs=1e-5)
    assert len(set(together)) == 4


def test_a_reward_model_reads_a_conversation_in_its_own_template(reward_model):
    model = RewardModel(str(reward_model), "cpu")
    ids = model.tokenizer(
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nWhat is 2+2?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n4<|eot_id|>",
        return_tensors="pt",
        add_special_tokens=False,
    )
    with torch.inference_mode():
        expected = model.model(**ids).logits.item()
    assert model(PROMPTS[:1], ["4"], {}) == [pytest.approx(expected, abs=1e-6)]


def test_a_reward_model_without_template_or_padding_token_scores_within_its_context(reward_model):
    model = RewardModel(str(reward_model), "cpu")
    model.tokenizer.chat_template = None
    model.tokenizer.pad_token = None
    model.model.config.pad_token_id = None
    model.max_length = 16
    assert len(model([*PROMPTS, PROMPTS[0]], ["4", "5", "6" * 200], {})) == 3
    assert len(model._encode(PROMPTS[1], "6" * 200)["input_ids"]) == 16


def test_a_reward_model_with_several_labels_is_refused_before_it_is_loaded(tiny_model, tmp_path):
    from transformers import AutoConfig

    AutoConfig.from_pretrained(tiny_model, num_labels=3).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"reward\.model=.*3 labels.*num_labels=1"):
        check_reward(RewardConfig(model=str(tmp_path)))
    with pytest.raises(ConfigError, match=r"reward\.model='/no/such/model': cannot be opened"):
        check_reward(RewardConfig(model="/no/such/model"))


def worker(file, name, **config):
    spec = f"{file}:{name}"
    return RewardWorker(RewardConfig(function=spec, **config), function_source(spec), hung_limit=1)


def test_a_failing_call_is_retried_and_then_its_rewards_are_null(file):
    flaky = asyncio.run(worker(file, "flaky", retries=2).score(completions(["a", "b"])))
    assert flaky["reward"].to_pylist() == [3.0, 3.0]
    failing = asyncio.run(worker(file, "failing", retries=1).score(completions(["a", "b"])))
    assert failing["reward"].to_pylist() == [None, None]
    assert failing.schema == SCORES


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
        "the reward source returned nan for a completion of the prompt 'What is 2+2?'; return a finite number"
    )


@pytest.mark.slow
def test_reward_workers_score_with_a_model(deploy, reward_model):
    handle = deploy(RewardConfig(model=str(reward_model)))
    rewards = scored(handle, completions(["4", "no idea"]))["reward"].to_pylist()
    expected = RewardModel(str(reward_model), "cpu")([PROMPTS[0]] * 2, ["4", "no idea"], {})
    assert rewards == pytest.approx(expected, abs=1e-5)
