"""Win rates at equal style."""

import numpy as np
import pytest
from typer.testing import CliRunner

from sampo_ray.console.main import app
from sampo_ray.errors import EvaluationError
from sampo_ray.evaluation.comparison import compare
from sampo_ray.evaluation.page import page
from sampo_ray.evaluation.style import features, fitted, logistic, normalised, style_controlled
from sampo_ray.evaluation.subjects import read_results, with_names
from tests.results import four_rows


def test_markdown_is_counted_outside_of_code():
    text = "# Title\n\n1. one\n- two\n\n**bold** and __bold__\n```\n# no\n- no\n```\n"
    length, headers, lists, bold = features(text)
    prose = len(text) - len("```\n# no\n- no\n```")
    assert length == len(text) and (headers, lists, bold) == (1 / prose, 2 / prose, 2 / prose)
    assert features("").tolist() == [0, 0, 0, 0]
    assert normalised(np.array([3.0, 0.0]), np.array([1.0, 0.0])).tolist() == [0.5, 0.0]


def test_a_win_rate_that_comes_of_length_alone_is_even_at_equal_style():
    drawn = np.random.default_rng(0)
    pairs = {"long": {}, "short": {}, "better": {}}
    for name, longer, gain in (("long", 0.4, 0.0), ("short", -0.4, 0.0), ("better", 0.4, 1.0)):
        for n in range(2000):
            gap = np.clip(drawn.normal(longer, 0.3), -0.95, 0.95)
            won = drawn.random() < 1 / (1 + np.exp(-(3 * gap + gain)))
            pairs[name][str(n)] = (np.array([gap, 0.0, 0.0, 0.0]), float(won))
    style = fitted(pairs)
    long, short, better = style.rows
    assert long.raw > 0.7 and short.raw < 0.3
    assert all(row.low < 0.5 < row.high for row in (long, short))
    assert better.low < 1 / (1 + np.exp(-1.0)) < better.high
    assert style.weights["length"] > 1 and style.weights["headers"] == 0


def test_the_fit_is_scikit_learns():
    linear_model = pytest.importorskip("sklearn.linear_model")
    drawn = np.random.default_rng(1)
    x = np.concatenate([np.ones((400, 1)), drawn.normal(size=(400, 3))], axis=1)
    y = (drawn.random(400) < 1 / (1 + np.exp(-(x @ [0.3, 1.0, -0.5, 0.0])))).astype(float)
    fit, covariance = logistic(x, y, [str(n) for n in range(400)])
    theirs = linear_model.LogisticRegression(C=1e3, fit_intercept=False, tol=1e-10).fit(x, y).coef_[0]
    assert fit == pytest.approx(theirs, abs=1e-4) and (np.diag(covariance) > 0).all()


def test_all_won_is_finite():
    pairs = {"a": {str(n): (np.array([0.1 * n, 0, 0, 0]), 1.0) for n in range(20)}}
    (row,) = fitted(pairs).rows
    assert 0.5 < row.rate <= 1 and np.isfinite([row.low, row.high]).all()


def test_the_command_adds_a_table_and_the_page_too(tmp_path):
    runs = [run.path for run in four_rows(tmp_path)]
    result = CliRunner().invoke(app, ["compare", *runs, "--style-control"], env={"COLUMNS": "200"})
    assert result.exit_code == 0 and "Win rate at equal style" in result.output and "log-odds" in result.output
    found = compare(with_names([read_results(run) for run in runs], ()))
    assert "Win rate at equal style" in page(found, style_controlled(found.rows))
    assert "Win rate at equal style" not in page(found)


def test_style_control_needs_judged_answers(tmp_path):
    with pytest.raises(EvaluationError, match="no run has results of alpaca_eval"):
        style_controlled([])
