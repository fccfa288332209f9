"""Uploads to a stand-in of the Hugging Face hub: what goes, what does not, and what is said when it cannot."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants as constants
import pytest
from typer.testing import CliRunner

from sampo_ray.console.main import app
from sampo_ray.evaluation.card import write_card
from sampo_ray.run.checksums import checksum_of_file
from sampo_ray.run.storage import Place
from tests.hub import READER, WRITER, Hub, Repository, running_hub
from tests.test_card import trained

REPO = "me/Some-Model"
NAMES = {"README.md", "chat_template.jinja", "config.json", "tokenizer.json", "tokenizer_config.json"}
WEIGHTS = "model-00001-of-00001.safetensors"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with running_hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", WRITER)
        yield hub


@pytest.fixture
def run(tmp_path: Path, tiny_model: Path) -> Place:
    """A run with an exported model and its card."""
    run = trained(tmp_path, tiny_model, "some/Some-Model")
    write_card(run.url)
    return run


def export(run: Place) -> Path:
    return Path(run.path, "exports", "round-1")


def pushed(run: Place, *arguments: str, repo: str = REPO) -> str:
    """What the command prints; it has failed if that begins with `error`."""
    result = CliRunner().invoke(app, ["push", run.path, repo, *arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    lines = [line for line in result.output.splitlines() if line.startswith("error:")]
    assert len(lines) == (result.exit_code != 0)
    return result.output


def test_a_model_goes_with_its_card_in_one_commit(hub, run):
    (export(run) / "evaluations").mkdir()
    assert "pushed: " in pushed(run)
    found = hub.repositories[REPO]
    assert found.commits == 1 and not found.private and set(found.files) == {*NAMES, WEIGHTS}
    assert found.files[WEIGHTS] == b"weights" and found.files["README.md"].startswith(b"---\nbase_model: some")
    assert not {"version.json", "evaluations"} & set(found.files)


def test_the_command_takes_address_and_token_from_the_librarys_own_places(hub, run, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "token").write_text(WRITER)
    names = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
    }
    environment = {key: value for key, value in os.environ.items() if key != "HF_TOKEN"} | names
    command = [sys.executable, "-m", "sampo_ray", "push", run.path, REPO, "--private"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    assert hub.repositories[REPO].private and WRITER not in done.stdout + done.stderr


def test_a_dry_run_prints_files_and_sizes_and_sends_nothing(hub, run, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    text = pushed(run, "--dry-run", "--private")
    assert f"              7  {WEIGHTS}" in text and "bytes in all; stays here: version.json" in text
    assert f"nothing was sent; would go to {REPO} (private)" in text and hub.requests == []


def test_without_a_card_nothing_goes(hub, run):
    (export(run) / "README.md").unlink()
    assert "has no card (README.md); write one with `sampo card RUN`" in pushed(run) and hub.requests == []


@pytest.mark.parametrize("name", ["optimizer.pt", "pytorch_model.bin", ".env", "samples.jsonl", "model.py", "token"])
def test_files_that_are_no_part_of_a_model_stop_the_upload(hub, run, name):
    (export(run) / name).write_text("x")
    assert f"{name} would go to the hub and is no part of a model" in pushed(run, "--dry-run") and hub.requests == []


def test_links_and_folders_stop_the_upload(hub, run, tmp_path):
    (export(run) / "LICENSE").symlink_to(tmp_path / "elsewhere")
    assert "LICENSE would go" in pushed(run)
    (export(run) / "LICENSE").unlink()
    (export(run) / "config_config.json").mkdir()
    assert "config_config.json would go" in pushed(run)


def test_weights_that_are_missing_or_damaged_stop_the_upload(hub, run):
    index = {"weight_map": {"a": WEIGHTS, "b": "model-00002-of-00002.safetensors"}}
    (export(run) / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model-00002-of-00002.safetensors is missing; name a whole export" in pushed(run)
    (export(run) / "model.safetensors.index.json").unlink()
    sums = {WEIGHTS: checksum_of_file(export(run) / WEIGHTS)}
    (export(run) / "version.json").write_text(json.dumps({"version": 300, "round": 0, "step": 300, "files": sums}))
    (export(run) / WEIGHTS).write_bytes(b"weight!")
    assert "its checksum is not that of version.json" in pushed(run) and hub.requests == []


def test_a_llama_goes_only_by_its_name_and_with_its_licence(hub, tmp_path, tiny_model):
    run = trained(tmp_path, tiny_model)
    write_card(run.url)
    assert "asks for a name that begins with Llama-3" in pushed(run, repo="me/other")
    assert "asks for LICENSE; put it into the folder" in pushed(run, repo="me/Llama-3-8B-mine")
    (export(run) / "LICENSE").write_text("the licence")
    assert "pushed: " in pushed(run, repo="me/Llama-3-8B-mine")


def test_an_upload_that_was_interrupted_shows_nothing_and_goes_on(hub, run, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._http.time", type("T", (), {"sleep": lambda _: None, "time": time.time}))
    hub.broken = "/object/"
    text = pushed(run)
    assert f"the upload to {REPO} was interrupted" in text and "nothing of it is visible there" in text
    assert hub.repositories[REPO].files == {}
    hub.broken = "/commit/"
    assert "was interrupted (status 503" in pushed(run) and hub.repositories[REPO].files == {}
    sent = sum(each.startswith("PUT") for each in hub.requests)
    hub.broken = None
    assert "pushed: " in pushed(run) and set(hub.repositories[REPO].files) == {*NAMES, WEIGHTS}
    assert sum(each.startswith("PUT") for each in hub.requests) == sent, "what arrived is not sent twice"


@pytest.mark.parametrize("error", [RuntimeError("storage is away"), PermissionError("storage is away")])
def test_what_xet_storage_raises_is_one_message(hub, run, monkeypatch, error):
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("huggingface_hub.HfApi.create_commit", fail)
    assert "was interrupted (storage is away)" in pushed(run)


def test_a_hub_that_is_not_there_is_one_message(hub, run, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "was interrupted" in pushed(run)


def test_a_repository_that_is_there_is_replaced_if_it_holds_nothing_else(hub, run):
    hub.repositories[REPO] = Repository(files={"README.md": b"old", WEIGHTS: b"old"})
    assert "pushed: " in pushed(run) and hub.repositories[REPO].files[WEIGHTS] == b"weights"
    hub.repositories[REPO].files["model.safetensors"] = b"another model"
    assert "is there already and holds model.safetensors, which this model does not replace" in pushed(run)


def test_a_private_model_does_not_go_to_a_public_repository(hub, run):
    hub.repositories[REPO] = Repository()
    assert "is there already, and public" in pushed(run, "--private") and hub.repositories[REPO].files == {}


def test_without_a_token_or_its_rights_it_says_which(hub, run, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", READER)
    assert f"the token may not write to {REPO}" in pushed(run)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    text = pushed(run)
    assert "does not take the token" in text and "hf_wrong" not in text
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nowhere")
    assert "no token for the Hugging Face hub is there; log in with `hf auth login`" in pushed(run)


def test_offline_mode_is_named(hub, run, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in pushed(run)


@pytest.mark.parametrize("repo", ["a/b/c", "me/name with spaces", "../x", ""])
def test_a_name_that_cannot_be_one_is_refused(hub, run, repo):
    assert "is no name of a repository" in pushed(run, repo=repo) and hub.requests == []


def test_what_is_no_run_is_refused(tmp_path):
    assert "is neither a run nor an exported model" in pushed(Place(str(tmp_path)))
