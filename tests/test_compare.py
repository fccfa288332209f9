"""Runs compared: what may be compared, what is claimed, and the page."""

import random
import re
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sampo_ray.console.main import app
from sampo_ray.errors import EvaluationError
from sampo_ray.evaluation.charts import ticks
from sampo_ray.evaluation.comparison import Comparison, compare
from sampo_ray.evaluation.differences import Sample, difference, paired_interval, unpaired_interval
from sampo_ray.evaluation.page import page
from sampo_ray.evaluation.records import read_result, result_place
from sampo_ray.evaluation.subjects import read_results, with_names
from sampo_ray.run.storage import Place
from tests.endpoint.test_page import CONTRASTS
from tests.results import evaluated, four_rows, judge, run_of, score

KEY = "exact_match,strict-match"


def compared(*runs: str | Place, names: tuple[str, ...] = ()) -> Comparison:
    urls = [run if isinstance(run, str) else run.url for run in runs]
    return compare(with_names([read_results(url) for url in urls], names))


def test_the_four_rows_are_named_by_their_settings_and_stand_beside_what_was_published(tmp_path):
    found = compared(*four_rows(tmp_path))
    assert [row.name for row in found.rows] == ["base", "DPO", "Iterative DPO", "Iterative SamPO"]
    assert [column.title for column in found.columns] == ["GSM8K", "AlpacaEval2", "LC AlpacaEval2", "tokens"]
    assert [row.cells["GSM8K"].published for row in found.rows] == [75.06, 75.59, 74.91, 77.81]
    assert not found.rows[0].cells["LC AlpacaEval2"].same_measure, "of another judge"
    assert found.published and not found.rows[0].differences
    assert found.rows[0].cells["tokens"].same_measure, "in Llama 3's tokens"
    assert "gsm8k: 200 of 1319 samples: a trial, not the benchmark's number" in found.notes


def test_published_values_stand_beside_no_other_base_model(tmp_path):
    run = run_of(tmp_path, "dpo", "some/other-8b")
    evaluated(run, 0, "base", 0.2, 400)
    for task in ("gsm8k", "alpaca_eval"):
        file = result_place(run, "000000", task).at("result.json")
        file.write(file.read().replace(b"Meta-Llama-3-8B-Instruct", b"other-8b"))
    found = compared(run)
    assert not found.published and all(cell.published is None for cell in found.rows[0].cells.values())


def test_the_same_samples_are_compared_in_pairs(tmp_path):
    found = compared(*four_rows(tmp_path))
    gap = found.rows[3].differences["GSM8K"]
    assert gap.paired and gap.shown and gap.low < gap.value < gap.high
    run = Place(str(tmp_path / "iterative-sampo"))
    result_place(run, "000300", "gsm8k").at("samples.jsonl").remove()
    gap = compared(run).rows[1].differences["GSM8K"]
    assert not gap.paired and gap.value == found.rows[3].differences["GSM8K"].value


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"limit": 100}, "limit: 100 and 200"),
        ({"limit": None}, "limit: all and 200"),
        ({"shots": 0}, "shots: 0 and 8"),
        ({"template": "cd34"}, "chat template: cd34 and ab12"),
        ({"max_tokens": 64}, "max_tokens: 64 and 256"),
        ({"seed": 1}, "seed: 1 and 0"),
        ({"packages": {"lm_eval": "0.4.9"}}, "lm_eval: 0.4.9 and None"),
        ({"sampling": {"temperature": 1.0}}, "sampling: {'temperature': 1.0} and {}"),
        ({"first_prompt": (1, 2)}, "the first prompt"),
    ],
)
def test_results_under_other_conditions_are_not_compared_and_it_is_said_why(tmp_path, changed, words):
    run = run_of(tmp_path, "dpo")
    evaluated(run, 0, "base", 0.2, 400)
    evaluated(run, 100, "final", 0.9, 400, **changed)
    gap = compared(run).rows[1].differences["GSM8K"]
    assert gap.value is None and not gap.shown and words in gap.why and gap.why.startswith("not compared (")


def test_results_of_other_judges_are_not_compared(tmp_path):
    run = run_of(tmp_path, "dpo")
    evaluated(run, 0, "base", 0.2, 400)
    evaluated(run, 100, "final", 0.9, 400, judge=judge().model_copy(update={"name": "other"}))
    gaps = compared(run).rows[1].differences
    assert gaps["AlpacaEval2"].why == "not compared (judge: other and a-judge)"


@pytest.mark.parametrize(
    ("spread", "words"),
    [
        (0.0, ""),
        (0.9, "no difference shown: within the judge's spread over repeats"),
        (None, "no difference shown: the judge's spread over repeats was not measured"),
    ],
)
def test_a_judged_difference_is_claimed_only_beyond_what_repeats_make(tmp_path, spread, words):
    run = run_of(tmp_path, "dpo")
    for version, label, rate in ((0, "base", 0.2), (100, "final", 0.9)):
        evaluated(run, version, label, rate, 400, judge=judge(spread))
    gap = compared(run).rows[1].differences["AlpacaEval2"]
    assert (gap.why, gap.shown) == (words, not words) and gap.low > 0


def test_few_samples_show_nothing(tmp_path):
    run = run_of(tmp_path, "dpo")
    evaluated(run, 0, "base", 0.0, 400, count=8)
    evaluated(run, 100, "final", 1.0, 400, count=8)
    gap = compared(run).rows[1].differences["GSM8K"]
    assert gap.value == 1 and gap.why == "no difference shown: fewer than 10 samples"


def test_samples_of_one_name_with_other_content_are_not_compared(tmp_path):
    run = run_of(tmp_path, "dpo")
    evaluated(run, 0, "base", 0.2, 400)
    evaluated(run, 100, "final", 0.9, 400)
    for version, digest in (("000000", b'"hash": "a", "id"'), ("000100", b'"hash": "b", "id"')):
        file = result_place(run, version, "gsm8k").at("samples.jsonl")
        file.write(file.read().replace(b'"id"', digest))
    assert "other content" in compared(run).rows[1].differences["GSM8K"].why


def test_intervals_of_differences_hold_the_truth():
    drawn = random.Random(0)
    held = {"paired": 0, "unpaired": 0}
    for _ in range(600):
        a, b = ([float(drawn.random() < rate) for _ in range(60)] for rate in (0.7, 0.6))
        pairs = [[Sample(value, 1, None) for value in values] for values in (a, b)]
        for name, interval in (
            ("paired", paired_interval(*pairs, share=True)),
            ("unpaired", unpaired_interval(score("x", a), score("x", b))),
        ):
            held[name] += interval[0] <= 0.1 <= interval[1]
    assert all(0.925 < each / 600 < 0.98 for each in held.values()), held
    alike = [Sample(1.0, 1, None)] * 20, [Sample(0.0, 1, None)] * 20
    low, high = paired_interval(*alike, share=True)
    assert low < high, "samples that all agree are no proof of an exact number"


def test_a_weighted_score_is_paired_with_its_weights():
    a = [Sample(1.0, 3, None), Sample(0.0, 1, None)] * 20
    b = [Sample(0.0, 3, None), Sample(0.0, 1, None)] * 20
    low, high = paired_interval(a, b, share=False)
    assert (low + high) / 2 == pytest.approx(0.75)


def test_samples_that_do_not_add_up_to_the_score_are_not_paired(tmp_path):
    run = run_of(tmp_path, "dpo")
    evaluated(run, 0, "base", 0.2, 400)
    evaluated(run, 100, "final", 0.9, 400)
    result = read_result(result_place(run, "000100", "gsm8k"))
    found, wrong = result.score(KEY), result.score(KEY).model_copy(update={"value": 0.5})
    other = (run, read_result(result_place(run, "000000", "gsm8k")))
    assert difference((run, result), other, found, other[1].score(KEY)).paired
    assert not difference((run, result), other, wrong, other[1].score(KEY)).paired


def test_curves_go_from_the_base_over_the_rounds(tmp_path):
    found = compared(*four_rows(tmp_path))
    figure = found.figures[0]
    assert [curve.name for curve in figure.curves] == ["DPO", "Iterative DPO", "Iterative SamPO"]
    assert [point.label for point in figure.curves[2].points] == ["base", "round-1", "round-2", "round-3"]


def test_a_version_of_a_run_can_be_named(tmp_path):
    runs = four_rows(tmp_path)
    found = compared(f"{runs[2].url}@round-1", f"{runs[2].url}@200")
    assert [row.name for row in found.rows] == ["base", "Iterative SamPO, round-1", "Iterative SamPO, round-2"]
    with pytest.raises(EvaluationError, match=r"'round-9' was not evaluated; .*100 \(round-1\)"):
        compared(f"{runs[2].url}@round-9")


def test_rows_of_one_name_are_told_apart(tmp_path):
    first, second = (run_of(tmp_path / name, "dpo") for name in ("a", "b"))
    for run in (first, second):
        evaluated(run, 100, "final", 0.5, 400)
    with pytest.raises(EvaluationError, match="is named twice"):
        compared(first, first)
    Path(second.path).rename(other := Path(second.path).with_name("second"))
    assert [row.name for row in compared(first, str(other)).rows] == ["DPO (dpo)", "DPO (second)"]


def test_folders_are_compared_with_the_first_where_no_base_is(tmp_path):
    for label, rate in (("before", 0.2), ("after", 0.9)):
        folder = Place(str(tmp_path / "out"))
        evaluated(folder, None, label, rate, 400)
    with pytest.raises(EvaluationError, match=r"has results of after, before; name one, as in .*out@after"):
        compared(folder)
    found = compared(f"{folder.url}@before", f"{folder.url}@after")
    assert [row.name for row in found.rows] == ["before", "after"] and found.against == "before"
    assert found.rows[1].differences["GSM8K"].shown and "Differences to before" in page(found)


def test_mistakes_are_named(tmp_path):
    run = run_of(tmp_path, "dpo")
    with pytest.raises(EvaluationError, match="no results of evaluations"):
        compared(run)
    with pytest.raises(EvaluationError, match="not there"):
        compared(str(tmp_path / "none"))
    evaluated(run, 100, "final", 0.5, 400)
    with pytest.raises(EvaluationError, match="2 names for 1 runs"):
        compared(run, names=("a", "b"))


def test_the_command_prints_a_table_and_writes_one_page_without_other_files(tmp_path):
    runs = [run.path for run in four_rows(tmp_path)]
    out = tmp_path / "compare.html"
    result = CliRunner().invoke(app, ["compare", *runs, "--out", str(out)], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert "no difference shown" in result.output and "44.0*" in result.output and "published 77.81" in result.output
    text = out.read_text()
    assert text.count("<svg") == 3 and "round-3" in text
    assert not re.search(r"<script|<link|<img|<iframe|@import|url\(|\b(?:src|href)=|https?:", text)


def test_the_page_holds_no_markup_of_names_and_notes(tmp_path):
    run = run_of(tmp_path, "dpo")
    evil = "<script>alert(1)</script>&\"'"
    evaluated(run, 100, "final", 0.5, 400, notes=(evil,), judge=judge().model_copy(update={"name": evil}))
    text = page(compared(run, names=(f"{evil}",)))
    assert "<script" not in text and "&lt;script&gt;" in text


def test_ticks_are_round_and_hold_the_values():
    for low, high in ((0.0, 1.0), (377.0, 421.0), (22.6, 35.1), (5.0, 5.0), (-3.0, 40.0)):
        found = ticks(low, high)
        assert found[0] <= low and found[-1] >= high and 2 <= len(found) <= 8


@pytest.mark.slow
def test_the_page_fits_any_screen_and_asks_for_nothing(tmp_path):
    sync_api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or pytest.skip("needs Debian's package chromium")
    file = tmp_path / "compare.html"
    file.write_text(page(compared(*four_rows(tmp_path))))
    with sync_api.sync_playwright() as playwright:
        browser, asked, said = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"]), [], []
        for scheme, width in (("light", 1280), ("dark", 360)):
            view = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
            view.on("request", lambda request: asked.append(request.url))
            view.on("console", lambda message: said.append(message.text))
            view.goto(file.as_uri())
            assert view.evaluate("document.documentElement.scrollWidth") == width
            heights = "[...document.querySelectorAll('svg text')].map((e) => e.getBoundingClientRect().height)"
            assert min(view.evaluate(heights)) >= 9, "text of charts can be read"
            assert not [found for found in view.evaluate(CONTRASTS) if found[0] < 4.5]
        assert (asked, said) == ([file.as_uri()] * 2, [])
        browser.close()
