"""What the user sees of a run."""

import io
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from rich.console import Console
from rich.table import Table

from sampo_ray.config.run import load_config
from sampo_ray.errors import ConfigError
from sampo_ray.loop.display import BETWEEN_LINES_S, LiveDisplay, PlainDisplay, duration, open_display
from sampo_ray.run.manifest import StepMetrics
from sampo_ray.run.storage import Place
from sampo_ray.run.trackers import TRACKERS, check_trackers, open_trackers

VALUES = {"loss": 0.5, "margin": 0.25, "accuracy": 0.75, "chosen_tokens": 100.2, "rejected_tokens": 120.0, "lr": 1e-6}
STEP = StepMetrics(0, 1, 1, VALUES)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def plain():
    """A display in a pipe, its clock, and a function that gives the lines so far."""
    out, clock = io.StringIO(), Clock()
    display = PlainDisplay(Console(file=out, width=40), clock)
    return SimpleNamespace(display=display, clock=clock, lines=lambda: out.getvalue().splitlines())


def test_a_pipe_gets_a_line_at_the_begin_and_the_end_of_a_stage(plain):
    plain.display.begin_round(0, 3)
    with plain.display.stage("generate", 64, "prompts") as stage:
        plain.clock.now = 4.0
        stage.advance(64)
    assert plain.lines() == [
        "round 1/3  generate begins: 64 prompts",
        "round 1/3  generate: 64 prompts in 4.0 s, 16/s",
    ]


def test_a_running_stage_says_no_more_than_a_line_every_few_seconds(plain):
    with plain.display.stage("train", 1000, "steps") as stage:
        for _ in range(999):
            plain.clock.now += BETWEEN_LINES_S / 100
            stage.advance()
    assert len(plain.lines()) == 2 + 9


def test_progress_names_rate_time_left_metrics_and_policy_version_on_one_line(plain):
    with plain.display.stage("train", 4, "steps") as stage:
        plain.clock.now = 20.0
        plain.display.metrics(STEP)
        plain.display.version(12)
        stage.advance()
        assert plain.lines()[-1] == (
            "train: 1/4 steps, 20.0 s each, 1 min 00 s left  "
            "loss 0.5000  margin +0.2500  accuracy 75%  chosen 100 tok  rejected 120 tok  policy v12"
        )


def test_metrics_are_not_repeated_by_the_stages_that_follow(plain):
    with plain.display.stage("train", 1, "steps") as stage:
        plain.display.metrics(STEP)
        stage.advance()
    with plain.display.stage("generate", None, "prompts"):
        pass
    assert "loss 0.5000" in plain.lines()[1]
    assert plain.lines()[2:] == ["generate begins", "generate: 0.0 s"]


def test_a_stage_that_fails_says_how_far_it_came_and_lets_the_error_through(plain):
    with pytest.raises(RuntimeError, match="engine"), plain.display.stage("generate", 8, "prompts") as stage:
        stage.advance(3)
        raise RuntimeError("engine")
    assert plain.lines()[-1].startswith("generate: 3/8 prompts")


def test_a_table_in_a_pipe_is_not_cut_to_eighty_columns(plain):
    table = Table("policy", "accuracy")
    table.add_row("x" * 100, "71 % ± 4")
    plain.display.console.print(table)
    assert any("x" * 100 in line and "71 % ± 4" in line for line in plain.lines())


def test_a_terminal_shows_the_stage_while_it_runs_and_keeps_its_result():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120, color_system=None, _environ={"TERM": "xterm"})
    with open_display(console) as display:
        assert isinstance(display, LiveDisplay)
        display.begin_round(1, 3)
        with display.stage("train", 4, "steps") as stage:
            stage.advance(3)
            display.metrics(STEP)
            console.print(display._render())
            shown = out.getvalue()
            stage.advance()
    assert "3/4 steps" in shown and "round 2/3  loss 0.5000" in shown
    assert "round 2/3  train: 4 steps in" in out.getvalue()


def test_output_that_is_no_terminal_gets_the_plain_display():
    assert isinstance(open_display(Console(file=io.StringIO())), PlainDisplay)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (9.96, "10 s"), (65, "1 min 05 s"), (3599.7, "1 h 00 min"), (7500, "2 h 05 min")],
)
def test_durations_read_naturally(seconds, text):
    assert duration(seconds) == text


def run_config(*overrides: str):
    return load_config({"model": {"path": "m"}, "data": {"train": "t"}, "run": {"dir": "r"}}, list(overrides))


@pytest.mark.parametrize("remote", [False, True])
def test_tensorboard_files_land_in_the_run_directory(tmp_path, remote):
    place = Place(f"memory://{tmp_path.name}" if remote else str(tmp_path))
    with open_trackers(run_config(), place, "run-1") as log:
        log(VALUES, 1)
        log(VALUES, 2)
    (events,) = place.at("tensorboard").names()
    assert b"margin" in place.at("tensorboard", events).read()


def test_a_tracker_that_is_not_installed_is_refused_by_name(monkeypatch):
    monkeypatch.setattr("sampo_ray.run.trackers.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"run\.trackers: 'wandb' is not installed"):
        check_trackers(run_config("run.trackers=[wandb]"))


def test_a_tracker_that_cannot_be_opened_says_why_in_one_line(tmp_path, monkeypatch):
    @contextmanager
    def refuses(config, run_id):
        raise RuntimeError("no login\nand much more")
        yield

    monkeypatch.setattr("sampo_ray.run.trackers.check_trackers", lambda config: None)
    monkeypatch.setitem(TRACKERS, "wandb", refuses)
    with (
        pytest.raises(ConfigError, match=r"^run\.trackers: wandb cannot be opened: no login$"),
        open_trackers(run_config("run.trackers=[wandb]"), Place(str(tmp_path)), "run-1"),
    ):
        pass


def test_a_resumed_run_goes_on_in_its_mlflow_run(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="MLflow is optional and not installed")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/mlruns")
    for step in (1, 2):
        with open_trackers(run_config("run.trackers=[mlflow]"), Place(str(tmp_path)), "run-1") as log:
            log(VALUES, step)
    (run,) = mlflow.search_runs(output_format="list")
    assert [point.step for point in mlflow.MlflowClient().get_metric_history(run.info.run_id, "margin")] == [1, 2]
