"""Reward functions that are ready to use: what they say of answers, of bad settings, and of input made to hurt them."""

import asyncio
import gzip
import importlib.util
import json
import math
import threading
import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sampo_ray.actors.scoring.workers import RewardWorker
from sampo_ray.config.run import load_config
from sampo_ray.config.sections import RewardConfig
from sampo_ray.data.reward_functions import check_function, load_function
from sampo_ray.data.rewards import weighted_sum
from sampo_ray.errors import ConfigError, RewardError
from sampo_ray.loop.validate import check_reward
from sampo_ray.rewards import gsm8k, ifeval, length, regex
from tests.test_rewards import completions as block
from tests.test_rewards import samples
from tests.waiting import scaled

HAS_HARNESS = importlib.util.find_spec("lm_eval") is not None
READY = "sampo_ray.rewards."
NEVER = r"^(a|aa)+$"
"""Takes exponential time for a text of many a with another letter at its end."""
texts = st.text() | st.from_regex(r"(#### )?-?\$?[0-9.,]{0,20}\.?", fullmatch=True) | st.just("#### 1,234.")


@pytest.mark.parametrize("module", ["gsm8k", "regex", "length", "ifeval"])
def test_each_is_found_by_the_name_that_recipes_use(module):
    assert load_function(f"{READY}{module}:reward").__doc__


@pytest.mark.parametrize(
    ("match", "text", "answer", "reward"),
    [
        ("strict", "6 * 7 = 42\n#### 42", "So it is.\n#### 42", 1.0),
        ("strict", "#### 42 and then #### 43", "#### 42", 1.0),
        ("strict", "It is 42.", "#### 42", 0.0),
        ("strict", "#### 1,234.", "#### 1234", 1.0),
        ("flexible", "It is $1,234.", "#### 1,234", 1.0),
        ("flexible", "First 42, then 43", 42, 0.0),
        ("flexible", "It is 42", 42, 1.0),
        ("flexible", "", "#### 42", 0.0),
        ("flexible", "It is 42.0", "#### 42", 0.0),
    ],
)
def test_answers_of_arithmetic_are_compared_as_the_harness_does(match, text, answer, reward):
    assert gsm8k.reward([text], [answer], match) == [reward]


@pytest.mark.skipif(not HAS_HARNESS, reason="lm_eval is not installed")
@given(text=texts, answer=texts.map(lambda text: f"Because.\n#### {text}"))
def test_they_are_right_exactly_where_the_harness_says_so(text, answer):
    from lm_eval.api.metrics import exact_match_hf_evaluate
    from lm_eval.filters.extraction import RegexFilter

    ignored = [",", r"\$", r"(?s).*#### ", r"\.$"]
    for match, pattern, group in (
        ("strict", r"#### (\-?[0-9\.\,]+)", 0),
        ("flexible", "(-?[$0-9.,]{2,})|(-?[0-9]+)", -1),
    ):
        [[read]] = RegexFilter(pattern, group_select=group).apply([[text]], [{}])
        theirs = exact_match_hf_evaluate([read], [answer], regexes_to_ignore=ignored, ignore_case=True)
        assert gsm8k.reward([text], [answer], match) == [theirs["exact_match"]]


def test_a_row_without_an_answer_has_no_reward():
    assert gsm8k.reward(["#### 42"], [None]) == [None]


def test_numbers_of_any_size_are_compared():
    huge = "9" * 100_000
    assert gsm8k.reward([f"#### {huge}", f"#### {huge}8"], [huge, huge]) == [1.0, 0.0]


def test_a_regular_expression_is_found_anywhere():
    assert regex.reward(["Well, YES", "no"], "(?i)yes") == [1.0, 0.0]
    assert regex.reward(["<think>a\nb</think>c", "c"], r"^(?s:<think>.+</think>.+)$") == [1.0, 0.0]


def test_a_regular_expression_that_never_ends_gives_no_reward_and_lets_others_work(monkeypatch):
    monkeypatch.setattr(regex, "LIMIT_S", 0.5)
    ticks, over = [], threading.Event()

    def tick():
        while not over.wait(0.01):
            ticks.append(time.monotonic())

    thread = threading.Thread(target=tick)
    thread.start()
    assert regex.reward(["a" * 60 + "b", "aa"], NEVER) == [None, 1.0]
    over.set()
    thread.join()
    assert len(ticks) > 5


@given(st.integers(1, 1000), st.integers(1, 1000), st.lists(st.integers(0, 5000), min_size=2))
def test_the_length_penalty_falls_from_target_to_limit_and_is_bounded(target, more, sizes):
    sizes.sort()
    rewards = length.reward([range(size) for size in sizes], target, target + more)
    assert rewards == sorted(rewards, reverse=True)
    for size, reward in zip(sizes, rewards, strict=True):
        assert -1 <= reward <= 0
        assert (reward == 0) == (size <= target)
        assert (reward == -1) == (size >= target + more)


values = st.none() | st.floats(allow_nan=False, allow_infinity=False)


@given(st.lists(st.tuples(values, values)), st.floats(-1e300, 1e300), st.floats(-1e300, 1e300))
@example([(1e308, 1e308)], 1.0, 1.0)
def test_a_weighted_sum_is_finite_or_none(rows, a, b):
    sums = weighted_sum([[row[0] for row in rows], [row[1] for row in rows]], [a, b])
    for row, total in zip(rows, sums, strict=True):
        assert total is None or math.isfinite(total)
        if None in row:
            assert total is None


def test_a_worker_adds_up_its_parts():
    parts = [
        {"function": f"{READY}gsm8k:reward", "weight": 2},
        {"function": f"{READY}length:reward", "arguments": {"target": 1, "limit": 2}, "weight": 0.5},
        {"function": f"{READY}regex:reward", "arguments": {"pattern": "four"}, "weight": -1},
    ]
    worker = RewardWorker(RewardConfig(sum=parts), [None] * 3, None, hung_limit=1)
    table = block(["#### 4", "four"], '{"answer": "#### 4"}')
    assert asyncio.run(worker.score(table))["reward"].to_pylist() == [2.0, -1.0]


@pytest.mark.parametrize(
    ("module", "arguments", "columns", "message"),
    [
        ("regex", {"pattern": "("}, {}, r"pattern='\(' is no regular expression \(.*\); correct it"),
        ("regex", {"pattern": 3}, {}, "pattern=3 is no regular expression"),
        ("regex", {"patern": "a"}, {}, r"reward.arguments has 'patern', .* did you mean 'pattern'\?"),
        ("regex", {}, {}, "nothing is given for its parameter pattern; .* a value in reward.arguments, or add"),
        (
            "regex",
            {"pattern": "a", "completions": []},
            {},
            "has 'completions', which is given to every reward function",
        ),
        ("length", {"target": 0}, {}, "target=0 is no number of tokens; use 1 or more"),
        ("length", {"target": "9"}, {}, "target='9' is no number of tokens; use 1 or more"),
        ("length", {"target": 9, "limit": 9}, {}, "limit=9 is not above target=9"),
        ("gsm8k", {}, {}, "nothing is given for its parameter answer; .* add the column to data.prompts"),
        ("gsm8k", {"match": "exact"}, {"answer": ["4", "4"]}, "match='exact' is not known; use strict or flexible"),
        ("ifeval", {}, {"kwargs": [[{}]] * 2}, "nothing is given for its parameter instruction_id_list"),
    ],
)
def test_bad_settings_are_one_message_before_a_run_starts(module, arguments, columns, message):
    with pytest.raises(ConfigError, match=message) as raised:
        check_function(f"{READY}{module}:reward", samples(**columns), scaled(30), arguments)
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ({"sum": [{"function": "a:b"}], "function": "a:b"}, "sum is set beside function; make that a part"),
        ({"sum": [{"weight": 2}]}, "function, model or judge is missing"),
        ({"sum": [{"function": "a:b", "weight": 0}]}, "weight=0 makes a part that does not count"),
        ({"sum": [{"function": "a:b", "weight": "inf"}]}, "finite number"),
        ({"sum": [{"function": "a:b", "wieght": 2}]}, "wieght"),
        ({"arguments": {"target": 1}, "model": "m"}, "are for a function; set it, or drop them"),
    ],
)
def test_a_sum_that_makes_no_sense_is_refused(reward, message):
    tree = {"model": {"path": "m"}, "data": {"prompts": "p"}, "rounds": {"mode": "online"}, "run": {"dir": "r"}}
    with pytest.raises(ConfigError, match=message) as raised:
        load_config({**tree, "reward": reward})
    assert len(str(raised.value).splitlines()) == 1


def test_a_dry_run_names_the_part_of_a_sum_that_is_wrong_and_notes_one_without_a_reward():
    tree = {"model": {"path": "m"}, "data": {"prompts": "p"}, "rounds": {"mode": "online"}, "run": {"dir": "r"}}
    good = {"function": f"{READY}gsm8k:reward"}
    bad = {"function": f"{READY}length:reward", "arguments": {"target": -1}}
    tried = samples(answer=[None, None])
    config = load_config({**tree, "reward": {"sum": [good, bad]}})
    with pytest.raises(ConfigError, match=r"reward\.sum\.1: reward\.function='.*target=-1"):
        check_reward(config, tried)
    notes = check_reward(load_config({**tree, "reward": good}), tried)
    assert notes == [
        f"reward.function={READY + 'gsm8k:reward'!r}: has no reward for made-up completions of the first prompt (None)"
    ]


@pytest.fixture
def verifiers(shared, monkeypatch):
    """The harness' verifiers, with tables for sentences."""
    if not HAS_HARNESS:
        pytest.skip("lm_eval is not installed")
    monkeypatch.setenv("NLTK_DATA", str(shared / "data" / "nltk_data"))
    ifeval._verifiers.cache_clear()
    yield
    ifeval._verifiers.cache_clear()


def verified(ids, kwargs, *answers):
    rows = len(answers)
    return ifeval.reward(answers, [[{"role": "user", "content": "Do it."}]] * rows, [ids] * rows, [kwargs] * rows)


def test_the_share_of_instructions_that_are_followed(verifiers):
    ids = ["punctuation:no_comma", "length_constraints:number_words"]
    kwargs = [{"num_words": None}, {"relation": "at least", "num_words": 3}]
    assert verified(ids, kwargs, "one two three", "one, two", "one two", "") == [1.0, 0.0, 0.5, 0.0]


def test_rows_that_cannot_be_verified_have_no_reward(verifiers):
    assert verified(None, None, "text") == [None]
    assert verified(["no:such"], [{}], "text") == [None]
    assert verified(["length_constraints:number_words"], [{"relation": None}], "text") == [None]
    assert verified(["detectable_format:number_bullet_lists"], [{"num_bullets": 0}], "text") == [None]
    assert verified(["punctuation:no_comma"], [], "text") == [None]
    assert verified(["keywords:existence"], [{"keywords": ["C++("]}], "text") == [None]
    assert verified(["punctuation:no_comma"], [{"other": 1}], "text") == [None]


def test_a_keyword_that_never_ends_as_a_pattern_holds_nothing_up(verifiers):
    hostile = [{"keywords": [NEVER]}]
    assert verified(["keywords:existence"], hostile, "a" * 60 + "b", "aa") == [None, 1.0]


def test_what_is_said_of_the_language_of_short_texts_does_not_change(verifiers):
    asked = ["language:response_language"], [{"language": "fr"}], *["la table est no"] * 20
    first = verified(*asked)
    ifeval._verifiers.cache_clear()  # another process
    assert len({*first, *verified(*asked)}) == 1


IFBENCH = """
class Shouting:
    def __init__(self, name):
        self.times = None

    def build_description(self, times=None):
        self.times = times

    def get_instruction_args(self):
        return {"times": self.times}

    def get_instruction_args_keys(self):
        return ["times"]

    def check_following(self, value):
        return value.count("!") == self.times

INSTRUCTION_DICT = {"made_up:shouting": Shouting}
"""


def test_instructions_of_ifbench_are_verified_where_it_is_installed(verifiers, monkeypatch, tmp_path):
    ids, kwargs = ["made_up:shouting", "punctuation:no_comma"], [{"times": 2}, {}]
    if importlib.util.find_spec("ifbench") is None:
        assert verified(ids, kwargs, "Hey!!") == [None]
    ifeval._verifiers.cache_clear()
    (tmp_path / "ifbench").mkdir()
    (tmp_path / "ifbench" / "__init__.py").write_text("")
    (tmp_path / "ifbench" / "instructions_registry.py").write_text(IFBENCH)
    monkeypatch.syspath_prepend(tmp_path)
    assert verified(ids, kwargs, "Hey!!", "Hey, you!") == [1.0, 0.0]


def test_each_row_of_the_official_data_can_be_verified(verifiers, shared):
    with gzip.open(shared / "data" / "lm_eval" / "google" / "IFEval" / "train.jsonl.gz", "rt") as file:
        rows = [json.loads(line) for line in file]
    asked = [[{"role": "user", "content": row["prompt"]}] for row in rows]
    columns = [[row[name] for row in rows] for name in ("instruction_id_list", "kwargs")]
    rewards = ifeval.reward([row["prompt"] for row in rows], asked, *columns)
    assert all(reward is not None and 0 <= reward <= 1 for reward in rewards)
    assert 0 < sum(rewards) < len(rewards)


def test_missing_tables_are_one_message(verifiers, monkeypatch, tmp_path):
    monkeypatch.setenv("NLTK_DATA", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(RewardError, match=r"need NLTK's punkt_tab; install it with .* NLTK_DATA"):
        verified(["punctuation:no_comma"], [{}], "text")


def test_a_process_that_is_killed_is_replaced(verifiers):
    assert verified(["punctuation:no_comma"], [{}], "text") == [1.0]
    ifeval._verifiers()._process.kill()
    ifeval._verifiers()._process.wait()
    assert verified(["punctuation:no_comma"], [{}], "text", "text") == [None, 1.0]
