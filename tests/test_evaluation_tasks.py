"""The registry of tasks."""

import pytest

from sampo_ray.errors import EvaluationError
from sampo_ray.evaluation.tasks import TASKS, task_named


def test_an_unknown_task_is_refused_with_the_name_that_may_be_meant() -> None:
    assert task_named("ifeval") is TASKS["ifeval"]
    with pytest.raises(EvaluationError, match="tasks: there is no task 'gsm8'; did you mean 'gsm8k'"):
        task_named("gsm8")


def test_no_two_columns_have_one_title() -> None:
    titles = [column.title for task in TASKS.values() for column in task.columns]
    assert len(titles) == len(set(titles))
