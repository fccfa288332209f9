"""Results of evaluations on disk, and how sure their numbers are."""

import random
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sampo_ray.errors import EvaluationError
from sampo_ray.evaluation.records import (
    Conditions,
    Score,
    TaskResult,
    read_result,
    result_place,
    results_in,
    write_result,
)
from sampo_ray.evaluation.statistics import mean_interval, slope, wilson
from sampo_ray.run.storage import Place


def result(task: str = "gsm8k", version: int | None = 10) -> TaskResult:
    score = Score(name="exact_match,strict-match", value=0.5, stderr=0.1, low=0.3, high=0.7, count=25)
    conditions = Conditions(total=1319, limit=25, shots=8, card_shots=8, shots_form="turns", route="chat")
    about = {"run": "r", "version": version, "label": "round-1", "model": "m"}
    return TaskResult(task=task, scores=(score,), conditions=conditions, seconds=1.5, created=1, **about)


def test_results_are_read_as_they_were_written(tmp_path):
    root, two = Place(str(tmp_path)), (result("gsm8k"), result("ifeval", version=None))
    for each in two:
        write_result(root, each, b'{"id": 0}\n')
    assert sorted(results_in(root), key=lambda each: each.task) == list(two)
    assert result_place(root, "000010", "gsm8k").at("samples.jsonl").read() == b'{"id": 0}\n'
    assert read_result(result_place(root, "000011", "gsm8k")) is None
    assert two[0].score("exact_match,strict-match").count == 25 and two[0].score("acc") is None


def test_a_damaged_result_is_said_to_be_one(tmp_path):
    place = result_place(Place(str(tmp_path)), "000010", "gsm8k")
    place.at("result.json").write(b'{"task": "gsm8k"}')
    with pytest.raises(EvaluationError, match=r"result\.json is no result of an evaluation"):
        read_result(place)


@pytest.mark.parametrize("name", ["../x", "", "a/b", ".hidden"])
def test_names_cannot_lead_elsewhere(tmp_path, name):
    with pytest.raises(EvaluationError, match="cannot name a result"):
        result_place(Place(str(tmp_path)), name, "gsm8k")


@given(st.integers(1, 500), st.data())
def test_wilsons_interval_holds_the_share(count, data):
    successes = data.draw(st.integers(0, count))
    low, high = wilson(successes, count)
    assert 0 <= low <= successes / count <= high <= 1


def test_intervals_hold_the_truth_as_often_as_they_say():
    random.seed(0)
    draws = [[random.gauss(1.0, 2.0) for _ in range(50)] for _ in range(1000)]
    held = fmean(low <= 1.0 <= high for low, high in map(mean_interval, draws))
    assert 0.93 < held < 0.97
    assert mean_interval([1.0]) is None


def test_the_slope_is_that_of_least_squares():
    x = [1.0, 2.0, 4.0, 7.0]
    found, error = slope(x, [2 * each + 1 for each in x])
    assert found == pytest.approx(2) and error == pytest.approx(0, abs=1e-12)
    assert slope([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]) is None and slope([1.0, 2.0], [1.0, 2.0]) is None
