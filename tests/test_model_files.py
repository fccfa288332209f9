"""A user's model folder: what is wrong with it is found before anything starts, and what can be mended is."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    ApertusConfig,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertGenerationConfig,
    GenerationConfig,
    GPTNeoConfig,
    MixtralConfig,
    PretrainedConfig,
    T5Config,
)
from typer.testing import CliRunner

from sampo_ray.config.run import load_config
from sampo_ray.console.main import app
from sampo_ray.data.chat import ChatFormat
from sampo_ray.errors import ConfigError
from sampo_ray.internals.transformers import saved_tensors
from sampo_ray.loop.fleet import write_shell
from sampo_ray.loop.validate import check_sizes
from sampo_ray.run.version_files import write_version
from sampo_ray.run.versions import VersionInfo
from sampo_ray.training import model_files
from sampo_ray.training.loading import load_model
from sampo_ray.training.pretrained import check_weights, made_of, open_model
from tests.conftest import write_recipe

SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def set_json(file: Path, **changes: Any) -> None:
    """Changes fields of a JSON file; None removes one."""
    fields = json.loads(file.read_text()) | changes if file.exists() else changes
    file.write_text(json.dumps({name: value for name, value in fields.items() if value is not None}))


@pytest.fixture
def folder(tmp_path: Path, tiny_model: Path) -> Path:
    """A copy of the tiny model's folder."""
    return shutil.copytree(tiny_model, tmp_path / "model")


def shell_of(folder: Path, out: Path) -> Path:
    write_shell(load_model(folder), ChatFormat.load(folder, "llama3"), out)
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
    opened, shell = load_model(folder), shell_of(folder, tmp_path / "shell")
    info = VersionInfo(version=0, round=0, step=0)
    write_version(str(tmp_path / "version"), saved_tensors(opened), str(shell), info)
    assert json.loads((tmp_path / "version" / "config.json").read_text())["tie_word_embeddings"] is same
    published = AutoModelForCausalLM.from_pretrained(tmp_path / "version")
    assert torch.equal(published.get_output_embeddings().weight, model.get_output_embeddings().weight)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def set_weights(folder: Path, **changes: torch.Tensor | None) -> None:
    """Changes tensors of the folder; None removes one."""
    tensors = {name: tensor for name, tensor in (weights_of(folder) | changes).items() if tensor is not None}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def split(folder: Path) -> None:
    """Saves a model in several files with an index."""
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="100KB")
    (folder / "model.safetensors").unlink()


def as_bin(folder: Path) -> None:
    torch.save(AutoModelForCausalLM.from_pretrained(folder).state_dict(), folder / "pytorch_model.bin")
    for file in folder.glob("model*.safetensors*"):
        file.unlink()


def cut(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-100])


def lfs_pointer(folder: Path) -> None:
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (folder / "model.safetensors").write_text(text)


def without_a_shard(folder: Path) -> None:
    split(folder)
    next(folder.glob("model-00001-of-*.safetensors")).unlink()


def with_adapter(folder: Path) -> None:
    get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LoraConfig(target_modules=["q_proj"])).save_pretrained(
        folder
    )


def adapter_only(folder: Path) -> None:
    with_adapter(folder)
    (folder / "model.safetensors").unlink()
    (folder / "config.json").unlink()


def quantised(method: str) -> Callable[[Path], None]:
    return lambda folder: set_json(folder / "config.json", quantization_config={"quant_method": method})


def of(config: PretrainedConfig, auto: Any = AutoModelForCausalLM) -> Callable[[Path], None]:
    """Another model in the place of the folder's."""

    def replace(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        auto.from_config(config).save_pretrained(folder)

    return replace


def config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: set_json(folder / "config.json", **changes)


def weights(**changes: torch.Tensor | None) -> Callable[[Path], None]:
    return lambda folder: set_weights(folder, **{name.replace("__", "."): each for name, each in changes.items()})


def text(name: str, content: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(content) and None


def only(name: str) -> Callable[[Path], None]:
    """A file of this name instead of the weights."""

    def replace(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / name)

    return replace


def without_an_expert(folder: Path) -> None:
    of(MixtralConfig(**SIZES, num_local_experts=2))(folder)
    set_weights(folder, **{"model.layers.1.block_sparse_moe.experts.1.w2.weight": None})


def without_a_buffer(folder: Path) -> None:
    of(ApertusConfig(**SIZES))(folder)
    set_weights(folder, **{"model.layers.1.mlp.act_fn.beta": None})


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def gguf(folder: Path) -> None:
    only("model-q4.gguf")(folder)
    no_config(folder)


def also(file: str, content: str = "{}") -> Callable[[Path], None]:
    return text(file, content)


EMPTY = torch.zeros(1)
WRONG: dict[str, tuple[Callable[[Path], None], str]] = {
    "bin": (as_bin, "its weights are in pytorch_model.bin, and only safetensors files are read"),
    "none": (lambda folder: (folder / "model.safetensors").unlink(), "has no weights: no model.safetensors and no "),
    "other name": (only("consolidated.safetensors"), "no model.safetensors.index.json, but consolidated.safetensors;"),
    "cut": (cut, r"its model.safetensors is damaged \(.*\); download it again"),
    "lfs": (lfs_pointer, r"model.safetensors is damaged \(a Git LFS pointer .*git lfs pull"),
    "shard": (without_a_shard, r"index.json names model-00001-of-\S+, which is missing \(1 of \d+ files are\)"),
    "gguf": (gguf, "its weights are in model-q4.gguf, a GGUF file; name the model from which"),
    "gguf beside a config": (only("model-q4.gguf"), "its weights are in model-q4.gguf, a GGUF file"),
    "adapter": (with_adapter, "has an adapter_config.json beside a whole model.*move the adapter's files out"),
    "adapter only": (adapter_only, "holds an adapter of /.*model and no model; merge it"),
    "diffusers": (also("model_index.json"), "is a diffusers pipeline"),
    "embeddings": (also("modules.json", "[]"), "is an embedding model"),
    "no config": (no_config, r"no model can be opened there \(it has no config.json\)"),
    "mxfp4": (quantised("mxfp4"), r"is quantised \(mxfp4\).*quantization_config=Mxfp4Config\(dequantize=True\)"),
    "fp8": (quantised("fp8"), r"is quantised \(fp8\).*FineGrainedFP8Config\(dequantize=True\) and save it"),
    "bnb": (quantised("bitsandbytes"), r"is quantised \(bitsandbytes\).*call its dequantize\(\)"),
    "gptq": (quantised("gptq"), r"is quantised \(gptq\), and training needs plain weights; name the model from which"),
    "compressed": (quantised("compressed-tensors"), r"is quantised \(compressed-tensors\)"),
    "within text": (config(text_config={"quantization_config": {"quant_method": "awq"}}), r"is quantised \(awq\)"),
    "unnamed": (config(quantization_config={}), r"is quantised \(an unnamed method\)"),
    "old gptq": (also("quantize_config.json"), r"is quantised \(quantize_config.json\)"),
    "fp8 unsaid": (
        weights(lm_head__weight=torch.zeros(320, 64).to(torch.float8_e4m3fn)),
        r"is quantised \(lm_head.weight has the type F8_E4M3\)",
    ),
    "not json": (text("config.json", "{"), r"its config.json is damaged \(.*\); download"),
    "a list": (text("config.json", "[]"), r"its config.json is damaged \(no JSON object\)"),
    "no type": (config(model_type=None), r"its config.json has no model_type \(got None\)"),
    "unknown": (
        config(model_type="llama99"),
        f"transformers {transformers.__version__} has no model_type 'llama99'; use a model that it has",
    ),
    "remote code": (
        config(model_type="llama99", auto_map={"AutoConfig": "modeling.Config"}),
        r"names code of its own \(auto_map\) for model_type 'llama99', and such code is not run",
    ),
    "wrong size": (config(num_attention_heads=5), r"its config.json cannot be used \(.*multiple of .*heads \(5\).*\)"),
    "wrong kind": (config(hidden_size="64"), r"its config.json cannot be used \(.*'hidden_size' expected int"),
    "no such function": (
        config(hidden_act="selu6"),
        r"no model can be made of its config.json \('selu6'\); correct it",
    ),
    "generation": (also("generation_config.json", "["), "its generation_config.json is damaged"),
    "impossible generation": (
        also("generation_config.json", '{"max_new_tokens": 0}'),
        r"its generation_config.json cannot be used \(`max_new_tokens` must be.*\); correct or remove it",
    ),
    "an end that is text": (
        also("generation_config.json", '{"eos_token_id": ["</s>"]}'),
        r"its generation_config.json cannot be used \(eos_token_id=\['</s>'\] is no token id.*\); correct or remove it",
    ),
    "encoder-decoder": (
        of(
            T5Config(vocab_size=320, d_model=32, d_ff=48, num_layers=1, num_heads=2), transformers.AutoModelForSeq2SeqLM
        ),
        r"is an encoder-decoder model \(t5\)",
    ),
    "encoder": (of(BertConfig(**SIZES)), r"reads both ways, as encoders do \(bert with is_decoder=False\)"),
    "not a decoder": (of(BertGenerationConfig(**SIZES)), r"as encoders do \(bert-generation with is_decoder=False"),
    "a switch": (config(is_causal=False), r"reads both ways, as encoders do \(is_causal=False\); name a causal"),
    "padding": (
        config(pad_token_id=5000),
        r"made of its config.json \(Padding_idx must be within .*\); correct it",
    ),
    "classifier": (
        config(architectures=["LlamaForSequenceClassification"]),
        "was saved as LlamaForSequenceClassification, which is no causal language model",
    ),
    "no language model in it": (
        config(model_type="llava", text_config={"model_type": "llama"}, architectures=None),
        r"transformers has no causal language model for model_type 'llava'; name its language model \(llama\), saved",
    ),
    "no language model": (
        of(transformers.ViTConfig(hidden_size=32, num_attention_heads=2), transformers.AutoModel),
        "transformers has no causal language model for model_type 'vit'",
    ),
    "a layer more": (
        config(num_hidden_layers=3),
        r"has no weights for model.layers.2.input_layernorm.weight, model.layers.2.mlp.down_proj.weight, .* 6 more, "
        "which would be random; use a model that was saved as LlamaForCausalLM",
    ),
    "a layer less": (
        config(num_hidden_layers=1),
        r"has weights that LlamaForCausalLM lacks, so that versions would lack them: model.layers.1.* and 6 more;",
    ),
    "a value head": (weights(v_head__weight=EMPTY), "versions would lack them: v_head.weight; name a model without"),
    "a bias": (weights(model__layers__0__self_attn__q_proj__bias=EMPTY), "lack them: model.layers.0.self_attn.q_proj"),
    "other shape": (
        config(intermediate_size=64),
        r"model.layers.0.mlp.down_proj.weight has the shape \[64, 192\] in its files and \[64, 64\] by its config.json",
    ),
    "no head": (weights(lm_head__weight=None), "no weights for lm_head.weight, .*tie_word_embeddings: false; set that"),
    "an expert less": (without_an_expert, "no weights for model.layers.1.block_sparse_moe.experts.1.w2.weight, which"),
    "a buffer less": (without_a_buffer, "has no weights for model.layers.1.mlp.act_fn.beta, which would be random"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_with_a_folder_is_one_message_with_field_value_and_fix(folder: Path, case: str) -> None:
    spoil, message = WRONG[case]
    spoil(folder)
    with pytest.raises(ConfigError, match=message) as raised:
        open_model("model.path", str(folder))
    assert str(raised.value).startswith(f"model.path={str(folder)!r}: ") and ";" in str(raised.value)
    assert "\n" not in str(raised.value)


def notes_of(folder: Path) -> list[str]:
    return open_model("model.path", str(folder)).notes


def with_old_buffers(folder: Path) -> None:
    """What older releases wrote, and no class reads any more; the model of a base class, whose names have no prefix."""
    of(GPTNeoConfig(vocab_size=320, hidden_size=32, num_heads=2, num_layers=2, attention_types=[[["global"], 2]]))(
        folder
    )
    buffers = {"bias": torch.ones(1, 1, 8, 8), "masked_bias": torch.tensor(-1e9), "rotary_emb.inv_freq": torch.zeros(8)}
    names = dict.fromkeys(weights_of(folder))
    plain = {name.removeprefix("transformer."): each for name, each in weights_of(folder).items()}
    set_weights(folder, **names | plain | {f"h.0.attn.attention.{name}": each for name, each in buffers.items()})


def with_further_prediction(folder: Path) -> None:
    set_json(folder / "config.json", num_nextn_predict_layers=1)
    layer = {name.replace("layers.1.", "layers.2."): each for name, each in weights_of(folder).items() if ".1." in name}
    set_weights(folder, **layer, **{"mtp.norm.weight": torch.ones(1)})


def with_other_experts(folder: Path) -> None:
    of(MixtralConfig(**SIZES, num_local_experts=3))(folder)


def with_unused_files(folder: Path) -> None:
    for name in ("pytorch_model.bin", "training_args.bin", "consolidated.safetensors", "adapter_model.safetensors"):
        (folder / name).write_bytes(b"other")


def of_a_base_class(folder: Path) -> None:
    """Saved without its head and so without the prefix of the rest; the head is tied."""
    model = AutoModelForCausalLM.from_pretrained(folder, tie_word_embeddings=True)
    model.config.tie_word_embeddings = True
    model.model.save_pretrained(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: None,
        split,
        with_old_buffers,
        with_further_prediction,
        with_other_experts,
        with_unused_files,
        of_a_base_class,
        config(auto_map={"AutoConfig": "modeling.Config", "AutoModelForCausalLM": "modeling.Model"}),
        config(architectures=None),
        config(architectures=["RoFormerForCausalLM"]),
        config(quantization_config=None),
        text("generation_config.json", '{"temperature": 0.6}'),
    ],
)
def test_what_transformers_reads_as_it_was_meant_is_accepted(folder: Path, change: Callable[[Path], None]) -> None:
    change(folder)
    assert notes_of(folder) == []


def test_a_head_that_differs_from_tied_embeddings_is_said_and_one_that_does_not_is_not(folder: Path) -> None:
    set_json(folder / "config.json", tie_word_embeddings=True)
    (note,) = notes_of(folder)
    assert "lm_head.weight differs from the embeddings, though its config.json has tie_word_embeddings: true" in note
    set_weights(folder, **{"lm_head.weight": weights_of(folder)["model.embed_tokens.weight"].clone()})
    assert notes_of(folder) == []
    set_weights(folder, **{"lm_head.weight": None})
    assert notes_of(folder) == []


def multimodal() -> PretrainedConfig:
    """A Qwen3.5: a language model of two layers, one of each kind, and a vision tower."""
    text = SIZES | {"head_dim": 16, "layer_types": ["linear_attention", "full_attention"]}
    linear = {"linear_num_key_heads": 1, "linear_num_value_heads": 2}
    dims = {"linear_key_head_dim": 16, "linear_value_head_dim": 16}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 1, "out_hidden_size": 32}
    return AutoConfig.for_model("qwen3_5", text_config=text | linear | dims, vision_config=vision)


def test_of_a_multimodal_model_the_language_model_is_used_which_is_said(folder: Path) -> None:
    of(multimodal(), transformers.AutoModelForImageTextToText)(folder)
    (note,) = notes_of(folder)
    assert "only its language model is used; versions and exports are of Qwen3_5ForCausalLM" in note
    name = "model.language_model.layers.1.self_attn.q_norm.weight"
    set_weights(folder, **{name: None})
    with pytest.raises(ConfigError, match="has no weights for model.layers.1.self_attn.q_norm.weight"):
        open_model("model.path", str(folder))
    set_weights(folder, **{name: torch.ones(16), "model.language_model.layers.1.mlp.bias": EMPTY})
    with pytest.raises(ConfigError, match="versions would lack them: .*layers.1.mlp.bias"):
        open_model("model.path", str(folder))


def test_a_layer_too_many_of_a_model_that_is_trained_with_its_vision_tower_is_refused(folder: Path) -> None:
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    whole = AutoConfig.for_model(
        "gemma3", text_config=SIZES | {"head_dim": 16}, vision_config=vision | {"image_size": 28, "patch_size": 14}
    )
    of(whole, transformers.AutoModelForImageTextToText)(folder)
    set_weights(folder, **{"model.language_model.layers.9.mlp.bias": EMPTY})
    with pytest.raises(ConfigError, match="weights that Gemma3ForConditionalGeneration lacks.*layers.9.mlp.bias;"):
        open_model("model.path", str(folder))


def test_a_name_of_the_hubs_cache_is_checked_like_a_folder(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "hub"
    repository = cache / "models--someone--tiny"
    shutil.copytree(folder, repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    assert open_model("model.path", "someone/tiny").notes == []
    split(repository / "snapshots" / ("0" * 40))
    monkeypatch.setattr(model_files, "is_offline_mode", lambda: False)
    monkeypatch.setattr(model_files.HfApi, "list_repo_files", None)  # need not be asked
    assert open_model("model.path", "someone/tiny").notes == []
    monkeypatch.setattr(model_files, "is_offline_mode", lambda: True)
    as_bin(repository / "snapshots" / ("0" * 40))
    with pytest.raises(ConfigError, match="model.path='someone/tiny': its weights are in pytorch_model.bin"):
        open_model("model.path", "someone/tiny")
    with pytest.raises(ConfigError, match=r"model.path='someone/other': no model can be opened there \("):
        open_model("model.path", "someone/other")
    with pytest.raises(ConfigError, match=r"no model can be opened there \(no such folder, nor a possible name"):
        open_model("model.path", "./no/such/folder")


def test_a_folder_of_70_billion_parameters_is_checked_by_its_headers(tmp_path: Path) -> None:
    sizes = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "vocab_size": 128256}
    large = AutoConfig.for_model("llama", num_attention_heads=64, num_key_value_heads=8, **sizes)
    large.save_pretrained(tmp_path)
    with torch.device("meta"):
        tensors = AutoModelForCausalLM.from_config(large).state_dict()
    header, end = dict[str, Any](), 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [end, end + 2 * tensor.numel()]}
        end += 2 * tensor.numel()
    text = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)  # 140 GB without a block on the disk
    assert end > 1.4e11 and notes_of(tmp_path) == []


REWARD_WRONG: dict[str, tuple[Callable[[Path], None], str]] = {
    "bin": (as_bin, "its weights are in pytorch_model.bin"),
    "quantised": (quantised("awq"), r"is quantised \(awq\)"),
    "adapter": (also("adapter_config.json"), "has an adapter_config.json beside a whole model"),
    "no score": (weights(score__weight=None), "has no weights for score.weight, which would be random; use a model th"),
    "another head": (weights(value_head__weight=EMPTY), "has weights that LlamaForSequenceClassification lacks"),
    "no classifier": (
        of(transformers.ViTConfig(hidden_size=32, num_attention_heads=2), transformers.AutoModel),
        "transformers has no sequence classifier for model_type 'vit'",
    ),
}


@pytest.fixture
def reward_folder(folder: Path) -> Path:
    made = AutoConfig.from_pretrained(folder, num_labels=1)
    AutoModelForSequenceClassification.from_config(made).save_pretrained(folder)
    return folder


def test_a_reward_model_may_have_heads_of_the_model_that_it_was(reward_folder: Path) -> None:
    set_weights(reward_folder, **{"lm_head.weight": torch.zeros(4, 64), "model.pooler.dense.bias": torch.zeros(4)})
    assert open_model("reward.model", str(reward_folder)).notes == []


@pytest.mark.parametrize("case", REWARD_WRONG)
def test_what_is_wrong_with_a_reward_models_folder_is_found_before_it_is_loaded(reward_folder: Path, case: str) -> None:
    spoil, message = REWARD_WRONG[case]
    spoil(reward_folder)
    with pytest.raises(ConfigError, match=message) as raised:
        open_model("reward.model", str(reward_folder))
    assert str(raised.value).startswith(f"reward.model={str(reward_folder)!r}: ")


def test_a_dry_run_ends_with_the_message_and_says_its_notes(folder: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, folder, pairs=8)
    set_json(folder / "config.json", tie_word_embeddings=True)
    set_json(folder / "generation_config.json", temperature=0.6)
    result = CliRunner().invoke(app, ["train", str(recipe), "--dry-run"])
    assert result.exit_code == 0 and "# model.path=" in result.output and "differs from the embeddings" in result.output
    as_bin(folder)
    result = CliRunner().invoke(app, ["train", str(recipe), "--dry-run"])
    assert result.exit_code == 1 and result.output.startswith(f"error: model.path={str(folder)!r}: its weights are in")
    assert len(result.output.splitlines()) == 1


def test_positions_and_vocabulary_of_a_multimodal_model_are_its_language_models(folder: Path, tmp_path: Path) -> None:
    run, model = load_config(write_recipe(tmp_path, folder, pairs=8)), multimodal().get_text_config()
    model.max_position_embeddings = 128
    check_sizes(run, model, tokens=320)
    with pytest.raises(ConfigError, match=r"the tokenizer has 321 tokens, the model 320"):
        check_sizes(run, model, tokens=321)
    model.max_position_embeddings = 100
    with pytest.raises(ConfigError, match=r"data\.max_length=128 is more than the 100 positions"):
        check_sizes(run, model, tokens=320)
    with pytest.raises(ConfigError, match=r"data\.max_length=128 is more than the 64 positions"):
        check_sizes(run, transformers.MptConfig(max_seq_len=64), tokens=320)
    sharded = run.model_copy(update={"trainer": run.trainer.model_copy(update={"zero_stage": 3})})
    picking = transformers.DeepseekV32Config(vocab_size=320, index_topk=64, max_position_embeddings=128)
    check_sizes(run, picking, tokens=320)
    with pytest.raises(ConfigError, match=r"data\.max_length=128 is more than the 64 keys .* trainer\.zero_stage=2"):
        check_sizes(sharded, picking, tokens=320)


def test_weights_that_are_on_the_hub_only_are_checked_by_headers_that_it_sends(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [file.name for file in folder.iterdir()]
    tensors = {name: SimpleNamespace(dtype="F32", shape=list(each.shape)) for name, each in weights_of(folder).items()}
    (folder / "model.safetensors").unlink()
    monkeypatch.setattr(model_files, "is_offline_mode", lambda: False)
    monkeypatch.setattr(model_files, "snapshot_download", lambda name, allow_patterns: str(folder))
    monkeypatch.setattr(model_files.HfApi, "list_repo_files", lambda self, name: names)
    monkeypatch.setattr(
        model_files.HfApi, "parse_safetensors_file_metadata", lambda self, name, file: SimpleNamespace(tensors=tensors)
    )
    files = model_files.ModelFiles.find("model.path", "someone/tiny")
    files.check_kind()
    model = made_of(files, AutoConfig.from_pretrained(folder))
    check_weights(files, model.config, model, files.weights({}))
    del tensors["model.norm.weight"]
    with pytest.raises(ConfigError, match="model.path='someone/tiny': has no weights for model.norm.weight, which"):
        check_weights(files, model.config, model, files.weights({}))
