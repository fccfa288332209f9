"""Reward models: a score is that of the conversation alone, whatever pads."""

import logging
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from sampo_ray.data.chat import ChatFormat
from sampo_ray.data.reward_models import RewardModel, check_model
from sampo_ray.data.rewards import Samples
from sampo_ray.errors import ConfigError, RewardError

QUESTION = [{"role": "user", "content": "What is 2+2?"}]
TEXTS = ["four", "x" * 30, "", "it is four, I think", "no", "five"]
ENCODER = {
    "vocab_size": 320,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "initializer_range": 0.3,
}


def samples(texts=TEXTS, prompt=QUESTION):
    return Samples([prompt] * len(texts), list(texts), [[]] * len(texts), {})


def random_reward_model(folder: Path, tiny_model: Path, **config: object) -> Path:
    """A random sequence classifier of the tiny model's size, with its tokenizer and Meta's chat template."""
    torch.manual_seed(0)
    made = AutoConfig.from_pretrained(tiny_model, num_labels=1, dtype="float32", **config)
    AutoModelForSequenceClassification.from_config(made).save_pretrained(folder)
    ChatFormat.load(tiny_model, "llama3").save(folder)
    return folder


def without_template(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    return tokenizer


@pytest.fixture
def reward_model(tmp_path, tiny_model):
    return random_reward_model(tmp_path / "reward", tiny_model)


def alone(folder, scorer, texts=TEXTS):
    """What transformers computes for each conversation by itself, without padding and with the saved config."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        rows = [{name: torch.tensor([ids]) for name, ids in scorer.encode(QUESTION, text).items()} for text in texts]
        return [model(**row).logits.item() for row in rows]


def assert_scored_as_alone(folder):
    scorer = RewardModel(str(folder), "cpu")
    expected = alone(folder, scorer)
    assert scorer(samples()) == pytest.approx(expected, abs=1e-5)
    assert len({round(score, 4) for score in expected}) == len(TEXTS), "scores that a wrong position would change"
    return scorer


@pytest.mark.parametrize("of_tokenizer", ["eos", "pad", None])
@pytest.mark.parametrize("of_config", ["eos", "pad", "other", None, -1])
def test_whatever_pads_a_batch_is_scored_as_its_rows_alone(tmp_path, tiny_model, of_config, of_tokenizer):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    ids = {"eos": tokenizer.eos_token_id, "pad": tokenizer.pad_token_id, "other": 7}
    folder = random_reward_model(tmp_path / "reward", tiny_model, pad_token_id=ids.get(of_config, of_config))
    saved = AutoTokenizer.from_pretrained(folder)
    saved.pad_token = {"eos": saved.eos_token, "pad": saved.pad_token}.get(of_tokenizer)
    saved.padding_side = "left"
    saved.save_pretrained(folder)
    scorer = assert_scored_as_alone(folder)
    lengths = {i: len(scorer.encode(QUESTION, text)["input_ids"]) for i, text in enumerate(TEXTS)}
    assert len(scorer._batches(lengths)) == (1 if of_config in ids else len(set(lengths.values())))


@pytest.mark.parametrize("kind", ["qwen2", "mistral", "gemma2", "gpt2"])
def test_decoders_of_other_families_are_scored_as_alone(tmp_path, tiny_model, kind):
    folder = random_reward_model(tmp_path / "reward", tiny_model)
    sizes = ENCODER | {"num_key_value_heads": 1, "head_dim": 16, "intermediate_size": 64, "vocab_size": 512}
    made = AutoConfig.for_model(kind, num_labels=1, pad_token_id=4, **({} if kind == "gpt2" else sizes))
    if kind == "gpt2":
        made.n_embd, made.n_layer, made.n_head, made.vocab_size = 32, 2, 2, 512
    AutoModelForSequenceClassification.from_config(made).save_pretrained(folder)
    assert_scored_as_alone(folder)


@pytest.mark.parametrize(
    ("kind", "sizes", "padded"),
    [
        ("bert", ENCODER, True),
        ("roberta", ENCODER, True),
        ("deberta-v2", ENCODER, True),
        ("xlnet", {"vocab_size": 320, "d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 64}, False),
    ],
)
def test_encoders_read_a_text_pair_and_are_scored_as_alone(tmp_path, tiny_model, kind, sizes, padded):
    folder = random_reward_model(tmp_path / "reward", tiny_model)
    without_template(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.sep_token, tokenizer.model_max_length = tokenizer.eos_token, 500
    tokenizer.save_pretrained(folder)
    made = AutoConfig.for_model(kind, num_labels=1, pad_token_id=1, **sizes)
    made.vocab_size = 512
    AutoModelForSequenceClassification.from_config(made).save_pretrained(folder)
    scorer = assert_scored_as_alone(folder)
    assert (scorer._padding is not None) == padded, "XLNet reads its last position, padding or not"


def test_a_reward_model_reads_a_conversation_in_its_own_template(reward_model):
    model = RewardModel(str(reward_model), "cpu")
    ids = model.encode.tokenizer(
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nWhat is 2+2?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n4<|eot_id|>",
        return_tensors="pt",
        add_special_tokens=False,
    )
    with torch.inference_mode():
        expected = model.model(**ids).logits.item()
    assert model(samples(["4"])) == [pytest.approx(expected, abs=1e-6)]


def test_a_conversation_beyond_the_context_is_cut_with_a_warning(tmp_path, tiny_model, caplog):
    folder = random_reward_model(tmp_path / "reward", tiny_model, max_position_embeddings=32)
    scorer = RewardModel(str(folder), "cpu")
    with caplog.at_level(logging.WARNING):
        assert len(scorer(samples(["4", "6" * 200]))) == 2
    assert "1 of 2 conversations were cut to 32 tokens" in caplog.text and "666" not in caplog.text
    ids = scorer.encode(QUESTION, "6" * 200)["input_ids"]
    assert len(ids) == 32 and ids[0] == scorer.encode.tokenizer.bos_token_id
    earlier = [{"role": "user", "content": "old " * 9}, {"role": "assistant", "content": "Yes."}]
    assert scorer.encode([*earlier, *QUESTION], "4") == scorer.encode(QUESTION, "4"), "by whole turns where they fit"


def test_a_conversation_with_tools_has_no_reward_of_a_model_whose_template_leaves_them_out(reward_model):
    from dataclasses import replace

    model, asked = RewardModel(str(reward_model), "cpu"), samples(["4", "5"])
    with_tools = replace(asked, columns={"tools": [None, [{"name": "add"}]]})
    assert [reward is None for reward in model(with_tools)] == [False, True]
    with pytest.raises(ConfigError, match="leaves out tools"):
        check_model(str(reward_model), replace(asked, columns={"tools": [[{"name": "add"}]] * 2}), 64)


def test_a_context_that_is_smaller_than_the_runs_is_said_before_it_starts(tmp_path, tiny_model, caplog):
    folder = random_reward_model(tmp_path / "reward", tiny_model, max_position_embeddings=32)
    with caplog.at_level(logging.WARNING):
        check_model(str(folder), samples(), 33)
    assert "reads 32 tokens; longer conversations (data.max_length=33) are cut" in caplog.text


def test_a_model_that_cannot_read_conversations_is_refused_before_its_weights_are_loaded(tmp_path, tiny_model):
    with pytest.raises(ConfigError, match=r"reward\.model='/no/such/model': no model can be opened"):
        check_model("/no/such/model", samples(), 8)
    made = AutoConfig.from_pretrained(tiny_model, num_labels=3)
    AutoModelForSequenceClassification.from_config(made).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"reward\.model=.*3 labels.*num_labels=1"):
        check_model(str(tmp_path), samples(), 8)
    made.num_labels = 1
    AutoModelForSequenceClassification.from_config(made).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"reward\.model=.*no tokenizer can be loaded"):
        check_model(str(tmp_path), samples(), 8)
    ChatFormat.load(tiny_model, "llama3").save(tmp_path)
    check_model(str(tmp_path), samples(), 8)
    without_template(tmp_path)
    with pytest.raises(ConfigError, match=r"reward\.model=.*no chat template, and no separator for a text pair"):
        check_model(str(tmp_path), samples(), 8)


def test_a_template_that_refuses_a_conversation_is_an_error_at_the_start_and_no_reward_later(reward_model):
    tokenizer = AutoTokenizer.from_pretrained(reward_model)
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    tokenizer.chat_template = refusing + tokenizer.chat_template
    tokenizer.save_pretrained(reward_model)
    system = [{"role": "system", "content": "Be brief."}, *QUESTION]
    with pytest.raises(ConfigError, match=r"reward\.model=.* refuses the first prompt \(no system\)"):
        check_model(str(reward_model), samples(prompt=system), 8)
    refused, scored = RewardModel(str(reward_model), "cpu")(Samples([system, QUESTION], ["4", "4"], [[], []], {}))
    assert refused is None and scored is not None


def test_a_checkpoint_without_the_head_is_refused(reward_model, tiny_model):
    from safetensors.torch import load_file, save_file

    weights = load_file(reward_model / "model.safetensors")
    del weights["score.weight"]
    save_file(weights, reward_model / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=r"reward\.model=.*has no weights for score\.weight.*LlamaForSequence"):
        RewardModel(str(reward_model), "cpu")


def test_a_score_that_is_no_number_is_an_error(reward_model):
    scorer = RewardModel(str(reward_model), "cpu")
    torch.nn.init.constant_(scorer.model.score.weight, float("nan"))
    with pytest.raises(RewardError, match="the reward model returned nan"):
        scorer(samples())
