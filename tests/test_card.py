"""The model card: valid metadata, what the run's files say, and nothing else."""

import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from typer.testing import CliRunner

from sampo_ray.config.run import load_config
from sampo_ray.console.main import app
from sampo_ray.errors import EvaluationError
from sampo_ray.evaluation.card import model_name, newest_export, public_name, rewards, write_card
from sampo_ray.evaluation.licences import licence_of
from sampo_ray.run.directory import read_settings
from sampo_ray.run.manifest import DataRecord, RoundRecord, StageRecord, read_manifest
from sampo_ray.run.storage import Place
from tests.results import evaluated, judge, run_of


def trained(folder: Path, tiny_model: Path, model: str = "meta-llama/Meta-Llama-3-8B-Instruct") -> Place:
    """A finished run of one round, with its export."""
    from sampo_ray.data.chat import ChatFormat

    run = run_of(folder, "iterative-sampo", model)
    export = Path(run.path, "exports", "round-1")
    ChatFormat.load(tiny_model, "llama3-sampo").save(export)
    (export / "model-00001-of-00001.safetensors").write_bytes(b"weights")
    (export / "config.json").write_text(json.dumps({"model_type": "llama", "dtype": "float16"}))
    (export / "version.json").write_text(json.dumps({"version": 300, "round": 0, "step": 300}))
    stages = {"pairs": StageRecord(rows=[40, 24])}
    manifest = read_manifest(run).model_copy(
        update={
            "data": DataRecord(rows=[40, 24], rows_read=70, dropped={"tie": 6}, fingerprint="f00d", source="x"),
            "rounds": [RoundRecord(index=0, start_version=0, steps=300, stages=stages, committed=True)],
        }
    )
    run.at("manifest.json").write(manifest.model_dump_json().encode())
    step = {"round": 0, "step": 1, "version": 1, "chosen_tokens": 31.0, "rejected_tokens": 28.0, "accuracy": 0.75}
    run.at("metrics.jsonl").write((json.dumps(step) + "\n").encode())
    return run


def text_of(run: Place, **arguments: str) -> str:
    return write_card(run.url, **arguments).read().decode()


def test_the_card_has_what_the_run_says_and_metadata_that_the_hub_reads(tmp_path, tiny_model):
    run = trained(tmp_path, tiny_model)
    evaluated(run, 0, "base", 0.2, 421)
    evaluated(run, 300, "final", 0.4, 377)
    text = text_of(run)
    data = ModelCard(text).data
    assert data.base_model == "meta-llama/Meta-Llama-3-8B-Instruct" and data.datasets == ["some/pairs"]
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-generation")
    assert data.license == "llama3" and data.model_name == "Llama-3-8B-Instruct-Iterative-SamPO"
    results = {result.metric_name: result for result in data.eval_results}
    assert len(results) == 4
    for words in ("| beta | 0.1 |", "| 64 of 70 read |", "f00d", "| 1 | 64 | 1 | 31.0 | 28.0 | 0.75 |"):
        assert words in text, words
    for words in ("sigmoid", "4e-07", "128 pairs", "8-shot (turns)", "2406.10957"):
        assert words in text, words
    assert "### Length of answers" in text and str(tmp_path) not in text


def test_a_number_of_some_samples_is_marked_everywhere(tmp_path, tiny_model):
    run = trained(tmp_path, tiny_model)
    evaluated(run, 300, "final", 0.4, 377, count=50)
    text = text_of(run)
    (gsm8k,) = (each for each in ModelCard(text).data.eval_results if each.dataset_type == "openai/gsm8k")
    assert "trial: 50 of 1319 samples" in gsm8k.dataset_name and "trial: 50 of 1319 samples" in gsm8k.metric_name
    assert gsm8k.dataset_args == {"num_few_shot": 8, "limit": 50} and gsm8k.metric_type == "exact_match"
    assert "| GSM8K (exact\\_match,strict-match) |" in text and "0* [" in text
    assert "50 of 1319 samples: a trial, not the benchmark's number" in text.replace("\\", "")


def test_a_run_without_results_says_so_and_names_none(tmp_path, tiny_model):
    run = trained(tmp_path, tiny_model)
    evaluated(run, 200, "round-1/step-200", 0.4, 377)
    text = text_of(run)
    assert "This version was not evaluated." in text and ModelCard(text).data.eval_results is None


def test_the_prompt_format_is_that_of_the_exported_tokenizer(tmp_path, tiny_model):
    text = text_of(trained(tmp_path, tiny_model))
    frame = "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nName three rivers of Europe.<|eot_id|>\n"
    assert frame in text and "with 1 beginning-of-text token;" in text and "an answer ends with `<|eot_id|>`" in text


def test_a_llama_3_base_brings_its_name_its_notice_and_its_licence(tmp_path, tiny_model):
    base = tmp_path / "Meta-Llama-3-8B-Instruct"
    base.mkdir()
    (base / "LICENSE").write_text("the licence")
    run = trained(tmp_path, tiny_model, str(base))
    text, export = text_of(run), newest_export(run)
    assert "Built with Meta Llama 3" in text and "# Llama-3-8B-Instruct-Iterative-SamPO" in text
    notice = "Meta Llama 3 is licensed under the Meta Llama 3 Community License, Copyright © Meta Platforms, Inc."
    assert export.at("NOTICE").read().decode().startswith(notice)
    assert export.at("LICENSE").read() == b"the licence" and "has to be added" not in text
    assert ModelCard(text).data.get("base_model") is None, "a folder of this machine is no name on the hub"
    with pytest.raises(EvaluationError, match="asks for a name that begins with Llama-3"):
        text_of(run, name="my-model")


def test_a_licence_text_that_is_not_at_hand_is_asked_for(tmp_path, tiny_model):
    assert "has to be added to this folder as LICENSE" in text_of(trained(tmp_path, tiny_model))


@pytest.mark.parametrize(
    ("name", "readme", "id", "built_with"),
    [
        ("Meta-Llama-3-8B-Instruct", None, "llama3", "Built with Meta Llama 3"),
        ("llama3-8b", None, "llama3", "Built with Meta Llama 3"),
        ("Llama-3.1-8B-Instruct", None, "llama3.1", "Built with Llama"),
        ("Llama-3.2-1B", None, "llama3.2", "Built with Llama"),
        ("any", "---\nlicense: other\nlicense_name: llama3\n---\n", "other", "Built with Meta Llama 3"),
        ("any", "---\nlicense: apache-2.0\n---\n", "apache-2.0", None),
        ("any", "no metadata --- here ---", None, None),
        ("any", "---\n: [\n---\n", None, None),
        ("SmolLM2-135M-Instruct", None, None, None),
        ("Llama-2-7b", None, None, None),
    ],
)
def test_licences_are_known_by_the_bases_readme_or_else_by_a_llamas_name(tmp_path, name, readme, id, built_with):
    folder = tmp_path / name
    folder.mkdir()
    if readme is not None:
        (folder / "README.md").write_text(readme)
    found = licence_of(str(folder))
    assert found.id == id and (found.llama.built_with if found.llama else None) == built_with


def test_an_unknown_licence_is_said_to_be_unknown(tmp_path, tiny_model):
    text = text_of(trained(tmp_path, tiny_model, "some/model"))
    assert "license" not in text.split("---")[1] and "Unknown: the base model's files" in text


def test_a_card_that_people_changed_is_not_overwritten(tmp_path, tiny_model):
    run = trained(tmp_path, tiny_model)
    text_of(run)
    file = Path(write_card(run.url).path)
    file.write_text(file.read_text().replace("# Llama", "# My Llama"))
    with pytest.raises(EvaluationError, match="was changed by hand; move it away"):
        write_card(run.url)


def test_names_and_notes_have_no_markup_of_their_own(tmp_path, tiny_model):
    run = trained(tmp_path, tiny_model)
    evil = "<img src=x onerror=alert(1)> | a\n# b"
    evaluated(run, 300, "final", 0.4, 377, judge=judge().model_copy(update={"name": evil}), notes=(evil,))
    body = text_of(run).partition("\n---\n")[2]
    assert "<img" not in body.replace("\\<img", "") and "\n# b" not in body


def test_reward_sources_of_online_runs_are_named_without_paths():
    judge = {"url": "http://127.0.0.1:1/v1", "model": "a-judge"}
    parts = [{"function": "/home/me/f.py:g"}, {"model": "org/rm", "weight": 0.5}, {"judge": judge}]
    tree = {"model": {"path": "m"}, "data": {"prompts": "p"}, "run": {"dir": "d"}, "rounds": {"mode": "online"}}
    found = list(rewards(load_config({**tree, "reward": {"sum": parts}})))
    assert found[:2] == ["the function f.py:g", "0.5 times the reward model org/rm"]
    assert found[2].startswith("the judge a-judge (") and "127.0.0.1" not in found[2]


def test_a_machines_paths_stay_on_it():
    assert public_name("/home/someone/data/pairs.jsonl") == "pairs.jsonl"
    assert public_name("s3://bucket/secret/pairs") == "pairs"
    assert public_name("org/name:train") == "org/name:train"


def test_the_name_says_base_and_method(tmp_path):
    config = load_config(read_settings(run_of(tmp_path, "dpo", "org/Some-Model")))
    assert model_name(config, licence_of("org/Some-Model")) == "Some-Model-DPO"


def test_a_run_without_an_export_is_refused_in_one_message(tmp_path):
    result = CliRunner().invoke(app, ["card", run_of(tmp_path, "dpo").path])
    assert result.exit_code == 1 and "has no exported model yet" in result.output
    result = CliRunner().invoke(app, ["card", str(tmp_path / "none")])
    assert result.exit_code == 1 and "holds no run" in result.output
