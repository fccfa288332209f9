"""How attention is computed: chosen by the model, tried on the meta device, and said."""

import pytest
import transformers
from transformers import PretrainedConfig

from sampo_ray.config.sections import LoraConfig, ModelConfig
from sampo_ray.errors import ConfigError
from sampo_ray.training.architecture import EXACT, on_meta
from sampo_ray.training.choice import choose_attention, first_layers, trouble_of
from sampo_ray.training.policy import load_policy

SMALL = {
    **{"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
    **{"vocab_size": 300, "head_dim": 16, "max_position_embeddings": 2048, "pad_token_id": 0},
}
LINEAR = {"layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 4, "linear_num_key_heads": 2}


def small(kind: str, **fields: object) -> PretrainedConfig:
    config: PretrainedConfig = getattr(transformers, f"{kind}Config")(**{**SMALL, **fields})
    return config


KINDS = ["Llama", "Mistral", "Gemma2", "Qwen3Moe", "GPTNeoX", "GptOss", "Olmo3", "Gemma4Text"]


def choose(config: PretrainedConfig, attention: str | None = None, lora: LoraConfig | None = None, longest: int = 512):
    return choose_attention(config, ModelConfig(path="model", attention=attention, lora=lora), longest)


def test_types_are_those_of_transformers():
    assert all(kind in transformers.CONFIG_MAPPING for kind in EXACT)


@pytest.mark.parametrize("kind", KINDS)
def test_models_that_are_exact_in_rows_of_pairs_are_computed_so(kind):
    assert choose(small(kind)) == ("segments", [])


@pytest.mark.parametrize(
    ("kind", "fields", "reason"),
    [
        ("Qwen3_5Text", LINEAR, "Qwen3_5ForCausalLM is not computed in rows of pairs (it has an attention of its own)"),
        ("Bloom", {}, "BloomForCausalLM is not computed in rows of pairs"),
        ("Lfm2", {"layer_types": ["conv", "full_attention"]}, "it has layers of conv"),
        ("Doge", {}, "doge models were not compared"),
        ("Llama4Text", {"num_local_experts": 4}, "attn_temperature_tuning counts a row's tokens"),
    ],
)
def test_others_are_computed_as_transformers_does_which_is_said(kind, fields, reason):
    attention, notes = choose(small(kind, **fields))
    assert attention == "own"
    assert any(reason in note and "prompts are computed twice" in note for note in notes), notes
    assert choose(small(kind, **fields), "own") == ("own", []), "it was asked for"
    with pytest.raises(ConfigError, match="model.attention='segments' is not exact for .*; use model.attention=own"):
        choose(small(kind, **fields), "segments")


def test_a_type_that_was_not_compared_is_not_loaded_for_rows_of_pairs(tmp_path):
    fields = {"is_decoder": True, "intermediate_size": 64}  # its positions begin at 2
    transformers.AutoModelForCausalLM.from_config(small("Roberta", **fields)).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="not exact for RobertaForCausalLM: roberta models were not compared"):
        load_policy(tmp_path)
    assert load_policy(tmp_path, attention="own").attention == "own"


def test_longrope_is_computed_in_rows_up_to_where_its_frequencies_change():
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "factor": 4.0}
    rope |= {"rope_theta": 1e4, "original_max_position_embeddings": 512}
    assert choose(small("Llama", rope_parameters=rope))[0] == "segments"
    attention, notes = choose(small("Llama", rope_parameters=rope), longest=513)
    assert attention == "own" and "longrope goes by a row's largest position" in notes[0]


@pytest.mark.parametrize(
    ("kind", "fields", "words"),
    [
        ("Bert", {}, "BertLMHeadModel sees tokens before they are written .bert with is_decoder=False.;"),
        ("Gemma3Text", {"use_bidirectional_attention": True}, "are written .use_bidirectional_attention=True.; choose"),
        ("Llama", {"is_causal": False}, r"are written \(is_causal=False\); choose another"),
        ("Doge", {"is_moe": True}, r"are written \(is_moe=True\); choose another"),
        ("T5", {}, "not a causal language model"),
        ("GPTJ", {"rotary_dim": 64, "n_embd": 64, "n_head": 4}, "GPTJForCausalLM cannot be trained: RuntimeError"),
        ("Llama", {"pad_token_id": 999}, "no llama can be made of its config.json: AssertionError"),
    ],
)
def test_what_cannot_be_trained_is_refused_with_what_fails(kind, fields, words):
    with pytest.raises(ConfigError, match=rf"model\.path: .*{words}"):
        choose(small(kind, **fields))


def test_a_configuration_without_a_language_models_sizes_is_refused():
    with pytest.raises(ConfigError, match="model.path: BltForCausalLM has no hidden_size"):
        choose(transformers.BltConfig())


def test_dropout_and_jitter_as_shipped_are_not_trained_with_which_is_said():
    [note] = choose(small("GPT2", n_embd=64, n_head=4, n_layer=2))[1]
    assert "GPT2LMHeadModel is trained without the noise of its config.json" in note and "resid_pdrop=0.1" in note
    experts = {"num_local_experts": 4, "router_jitter_noise": 0.01}
    [note] = choose(small("Phimoe", **experts))[1]
    assert "router_jitter_noise=0.01" in note


def test_a_model_without_gradient_checkpointing_is_said_to_keep_everything():
    notes = choose(small("CTRL", n_embd=64, n_head=4, n_layer=2, dff=64))[1]
    assert any("trainer.gradient_checkpointing: CTRLLMHeadModel has none" in note for note in notes)


def test_a_trial_finds_what_the_first_row_would_raise():
    assert trouble_of(on_meta(small("Doge"), kind="segments"), "segments")
    assert trouble_of(on_meta(small("Llama"), LoraConfig(rank=2), "segments"), "segments") is None


def test_a_deep_model_is_tried_by_one_layer_of_each_kind():
    kinds = ["sliding_attention"] * 5 + ["full_attention"]
    model = on_meta(small("Gemma3Text", num_hidden_layers=24, layer_types=kinds * 4))
    with first_layers(model):
        assert len(model.model.layers) == model.config.num_hidden_layers == 6
    assert len(model.model.layers) == model.config.num_hidden_layers == 24


@pytest.mark.parametrize("kind", ["Llama", "Gemma2"])
def test_flex_attention_is_taken_where_it_is_asked_for(kind):
    assert choose(small(kind), "flex") == ("flex", [])
    with pytest.raises(ConfigError, match="model.attention='flex' is not exact for BloomForCausalLM"):
        choose(small("Bloom"), "flex")
