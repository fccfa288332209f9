"""`data.columns`: what users write, and what is stored of it."""

import pytest

from sampo_ray.config.columns import Columns
from sampo_ray.config.run import load_config
from sampo_ray.errors import ConfigError

TREE = {"model": {"path": "m"}, "data": {"train": "a.jsonl"}, "run": {"dir": "r"}}


def columns(*overrides):
    return load_config(TREE, overrides).data.columns


def test_columns_are_written_as_a_mapping_a_field_or_a_list_with_one_a_source():
    assert columns() is None
    assert columns("data.columns={prompt: question, system: sys}") == Columns(prompt="question", system="sys")
    assert columns("data.columns.answers=[a, b]") == Columns(answers=("a", "b"))
    assert columns("data.train=[a.jsonl, b.jsonl]", "data.columns=[{prompt: q}, {}]") == (
        Columns(prompt="q"),
        Columns(),
    )


def test_a_null_that_is_written_down_stays_one_when_the_configuration_is_stored():
    config = load_config(TREE, ["data.columns={prompt: q, system: null}"])
    stored = load_config(config.model_dump(mode="json")).data.columns
    assert stored == config.data.columns
    assert stored.model_fields_set == {"prompt", "system"}
    assert not stored.complete
    assert Columns(**dict.fromkeys(Columns.model_fields)).complete


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.columns={promt: q}", r"^data\.columns\.promt: unknown key; did you mean 'prompt'"),
        ("data.columns=[{prompt: q}, {choosen: c}]", r"^data\.columns\.1\.choosen: unknown key; did you mean 'chosen'"),
        (
            "data.columns={chosen: a, rejected: a}",
            r"^data\.columns\.chosen and rejected are both 'a'; name two columns$",
        ),
        ("data.columns=[{answers: [a, a]}]", r"^data\.columns\.0\.answers and answers are both 'a'"),
        ("data.columns.prompt=''", r"^data\.columns\.prompt names no column; write null if none is to be used$"),
        ("data.columns={prompt: 3}", r"^data\.columns\.prompt: input should be a valid string \(got 3\)"),
        ("data.columns={means: best}", r"^data\.columns\.means: input should be 'index'"),
    ],
)
def test_a_mistake_in_columns_names_the_field(override, message):
    with pytest.raises(ConfigError, match=message):
        columns(override)


@pytest.mark.parametrize(
    "overrides",
    [
        ["data.columns=prompt:q", "data.columns=chosen:a"],  # what bash makes of {prompt:q,chosen:a} without quotes
        ["data.columns={prompt:q,chosen:a}"],
        ["data.columns=[{prompt: q}, {prompt:q}]"],
        ["data.columns=question"],
    ],
)
def test_columns_that_a_shell_or_a_missing_space_has_spoilt_are_refused_with_the_right_way(overrides):
    with pytest.raises(ConfigError, match=r"^data\.columns=.* 'data\.columns=\{prompt: question, chosen: good\}'$"):
        columns(*overrides)
