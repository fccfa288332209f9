"""The command line: how mistakes are reported."""

import pytest
import typer
import yaml
from typer.testing import CliRunner

from sampo_ray.console.main import Commands, app
from sampo_ray.errors import StageError


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
