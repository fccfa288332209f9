"""What a dry run says of data, and what a resumed run makes of it."""

import json

import pytest
import yaml
from typer.testing import CliRunner

from sampo_ray.config.run import load_config
from sampo_ray.console.main import app
from sampo_ray.run.directory import create_run

ROW = {"house": "x", "system": "Be brief.", "question": "What is two plus three?", "chosen": "five", "rejected": "some"}


@pytest.fixture
def tree(tmp_path, tiny_model):
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ({**ROW, "chosen": ""}, ROW)))
    return {
        "model": {"path": str(tiny_model)},
        "data": {"train": str(tmp_path / "pairs.jsonl"), "max_length": 128},
        "serve": {"enabled": False},
        "profile": "laptop",
        "run": {"dir": str(tmp_path / "run")},
    }


def dry_run(*arguments):
    result = CliRunner().invoke(app, ["train", *arguments, "--dry-run"])
    return result.exit_code, result.stdout if result.exit_code == 0 else result.output


def recipe(tmp_path, tree):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    return str(tmp_path / "recipe.yaml")


def test_a_dry_run_says_how_rows_are_read_and_prints_a_recipe_that_says_the_same(tmp_path, tree):
    status, output = dry_run(recipe(tmp_path, tree))
    assert status == 0, output
    said = " ".join(line[1:].strip() for line in output.splitlines() if line.startswith("#"))
    assert "read as: system -> system, question -> prompt, chosen, rejected" in said
    assert "rows probed: 2; usable: 1; dropped: empty response (1, first at" in said
    assert "not used: house" in said
    assert "What is two plus three?" in said
    assert load_config(yaml.safe_load(output)).data.columns.complete
    (tmp_path / "again.yaml").write_text(output)
    assert dry_run(str(tmp_path / "again.yaml")) == (0, output)


def test_each_of_several_sources_is_said_and_its_columns_stored(tmp_path, tree):
    (tmp_path / "more.jsonl").write_text(json.dumps({"ask": "Why?", "better": "So.", "worse": "No."}))
    tree["data"] |= {"train": [tree["data"]["train"], str(tmp_path / "more.jsonl")], "columns": [{}, {"prompt": "ask"}]}
    status, output = dry_run(recipe(tmp_path, tree))
    assert status == 0, output
    assert "# data.train.0: read as: system" in output and "# data.train.1: read as: ask -> prompt" in output
    assert output.count("first row (") == 2
    assert [each["prompt"] for each in yaml.safe_load(output)["data"]["columns"]] == ["question", "ask"]


def test_probe_prompts_are_read_before_a_run_starts(tmp_path, tree):
    probe = tmp_path / "probe.jsonl"
    probe.write_text(json.dumps({"prompt": "What is one?", "answer": "#### 1"}) + "\n")
    evaluate = {"every": "round", "prompts": str(probe), "max_tokens": 16}
    reward = {"function": "sampo_ray.rewards.gsm8k:reward"}
    status, output = dry_run(recipe(tmp_path, {**tree, "evaluate": evaluate, "reward": reward}))
    assert status == 0, output
    assert "evaluate.prompts: rows probed: 1; usable: 1" in output
    verified = {**tree["serve"], "gates": {"verifiers": 0.1}}
    for changed, message in (
        ({"evaluate": {**evaluate, "prompts": str(tmp_path / "none.jsonl")}}, "none.jsonl"),
        ({"serve": verified}, "serve.gates.verifiers: no row of evaluate.prompts has the columns instruction_id_list"),
        ({"reward": {"function": "sampo_ray.rewards.ifeval:reward"}}, "nothing is given for its parameter instruction"),
    ):
        status, output = dry_run(recipe(tmp_path, {**tree, "evaluate": evaluate, "reward": reward, **changed}))
        assert status == 1 and message in " ".join(output.split()), output


def test_verifiers_that_are_not_installed_are_an_error_for_a_gate_and_a_note_for_an_evaluation(
    tmp_path, tree, monkeypatch
):
    row = {"prompt": "Why?", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    (tmp_path / "probe.jsonl").write_text(json.dumps(row) + "\n")
    evaluated = {**tree, "evaluate": {"every": "round", "prompts": str(tmp_path / "probe.jsonl")}}

    def without(request):
        return "verifiable instructions need lm_eval; install sampo-ray[eval]"

    monkeypatch.setattr("sampo_ray.rewards.ifeval._verifiers", lambda: without)
    status, output = dry_run(recipe(tmp_path, evaluated))
    assert status == 0 and "instructions are not verified; verifiable instructions need lm_eval" in output
    gated = {**evaluated, "serve": {**tree["serve"], "gates": {"verifiers": 0.1}}}
    status, output = dry_run(recipe(tmp_path, gated))
    assert status == 1 and "serve.gates.verifiers: verifiable instructions need lm_eval" in output


def begun(tree, tokenized):
    """A run directory as they were before configurations had columns."""
    run = create_run(load_config(tree))
    assert "columns: null" in run.place.at("config.yaml").read().decode()
    if tokenized:
        run.manifest.data.fingerprint = "of the data as it was"
        run.save()
    return tree["run"]["dir"]


def test_a_run_that_has_tokenized_its_data_is_resumed_without_it(tmp_path, tree):
    directory = begun(tree, tokenized=True)
    (tmp_path / "pairs.jsonl").unlink()
    status, output = dry_run("--resume", directory)
    assert status == 0, output
    assert yaml.safe_load(output)["data"]["columns"] is None


def test_a_run_that_has_not_finds_its_columns_when_it_is_resumed(tree):
    status, output = dry_run("--resume", begun(tree, tokenized=False))
    assert status == 0, output
    assert yaml.safe_load(output)["data"]["columns"]["system"] == "system"


@pytest.mark.parametrize("override", ["data.columns={prompt: question}", "data.mix=[0.5]", "data.train=other.jsonl"])
def test_a_resumed_run_keeps_its_data_and_how_it_is_read(tree, override):
    status, output = dry_run("--resume", begun(tree, tokenized=False), override)
    assert status == 1
    assert "a resumed run keeps its method, data and sizes; drop it" in output
