"""A user's model folder: what is wrong with it is found before anything starts, and what can be mended is."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from sampo_ray.data.chat import ChatFormat
from sampo_ray.loop.fleet import write_shell


def set_json(file: Path, **changes: Any) -> None:
    """Changes fields of a JSON file; None removes one."""
    fields = json.loads(file.read_text()) | changes if file.exists() else changes
    file.write_text(json.dumps({name: value for name, value in fields.items() if value is not None}))


@pytest.fixture
def folder(tmp_path: Path, tiny_model: Path) -> Path:
    """A copy of the tiny model's folder."""
    return shutil.copytree(tiny_model, tmp_path / "model")


def shell_of(folder: Path, out: Path) -> Path:
    model = AutoModelForCausalLM.from_pretrained(folder)
    write_shell(model, ChatFormat.load(folder, "llama3"), out)
    return out


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0.6, "top_p": 0.9},
        {"do_sample": False, "top_k": 20, "typical_p": 0.9},
        {"output_scores": True},
        {"pad_token_id": -1},
        {"num_beams": 1, "length_penalty": 2.0, "early_stopping": True},
        {"min_length": 5, "of_a_later_version": 3},
        {"do_sample": True, "temperature": 0.6},
    ],
)
def test_a_version_samples_as_the_models_generation_configuration_says(
    tmp_path: Path, folder: Path, fields: dict[str, Any]
) -> None:
    file = folder / "generation_config.json"
    file.write_text(json.dumps({"eos_token_id": [7, 8], **fields}))
    shell = shell_of(folder, tmp_path / "shell")
    meant, written = (GenerationConfig.from_pretrained(each).to_diff_dict() for each in (folder, shell))
    end = ChatFormat.load(folder, "llama3").end_of_turn_id
    assert written.pop("eos_token_id") == [end, *meant.pop("eos_token_id")]
    assert written == meant and fields.items() <= written.items() | {("do_sample", False), ("num_beams", 1)}


@pytest.mark.parametrize("same", [True, False], ids=["same", "other"])
def test_a_head_of_its_own_beside_tied_embeddings_makes_the_version_untied(
    tmp_path: Path, folder: Path, same: bool
) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    if same:
        model.get_output_embeddings().weight.data.copy_(model.get_input_embeddings().weight)
    model.save_pretrained(folder)
    set_json(folder / "config.json", tie_word_embeddings=True)
    shell = shell_of(folder, tmp_path / "shell")
    assert json.loads((shell / "config.json").read_text())["tie_word_embeddings"] is same
    head = AutoModelForCausalLM.from_pretrained(folder).get_output_embeddings().weight
    assert torch.equal(head, model.get_output_embeddings().weight)
