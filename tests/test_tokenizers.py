import json
from functools import partial

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, ByT5Tokenizer

from sampo_ray.data.chat import ChatFormat
from sampo_ray.data.tokenizer import PROBES
from sampo_ray.errors import ConfigError

SPECIAL = ["<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>"]
TEXTS = ["two and two is four, it is in the copper hill. Where is the mill? user assistant"] * 4
ZEPHYR = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
INST = (
    "{% for m in messages %}{% if m.role == 'user' %}<s>[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} </s>{% endif %}{% endfor %}"
)


def byte_level(prefix=False, normalizer=None):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(prefix), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def sentencepiece(normalizer=None, pre_tokenizer=None, strip=True):
    """Pieces with a mark for spaces, and bytes for unknown characters."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pre_tokenizer
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps if strip else steps[:3])
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=500, special_tokens=[*SPECIAL, *bytes_]))
    tree = json.loads(tokenizer.to_str())
    tree["added_tokens"] = [token for token in tree["added_tokens"] if token["content"] in SPECIAL]
    return Tokenizer.from_str(json.dumps(tree))


def spaces(*before):
    return normalizers.Sequence([*before, normalizers.Replace(" ", "▁")])


def pieces_without_bytes():
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=100, special_tokens=SPECIAL, unk_token="<unk>")
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def word_pieces():
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    tokenizer.train_from_iterator(TEXTS, trainers.WordPieceTrainer(vocab_size=200, special_tokens=SPECIAL))
    return tokenizer


LLAMA_2 = partial(sentencepiece, spaces(normalizers.Prepend("▁")))
LOSSLESS = {
    "byte-level": byte_level,
    "byte-level with a space in front": partial(byte_level, prefix=True),
    "sentencepiece with a space in front": LLAMA_2,
    "sentencepiece, first": partial(
        sentencepiece, pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    ),
    "sentencepiece without": partial(sentencepiece, spaces(), strip=False),
}


def write(folder, tokenizer, kind="PreTrainedTokenizerFast", template=ZEPHYR, model_type=None, **settings):
    tokenizer.save(str(folder / "tokenizer.json"))
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = {"tokenizer_class": kind, "chat_template": template, **tokens, **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if model_type:
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return folder


def ids_of_file(folder):
    own = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return [own.encode(probe, add_special_tokens=False).ids for probe in PROBES]


@pytest.mark.parametrize("model_type", [None, "llama"])
@pytest.mark.parametrize("kind", ["LlamaTokenizerFast", "LlamaTokenizer", "GemmaTokenizer", "Qwen2Tokenizer"])
def test_a_byte_level_file_keeps_its_ids_whatever_class_the_folder_names(tmp_path, kind, model_type):
    chat = ChatFormat.load(write(tmp_path, byte_level(), kind, model_type=model_type), "tokenizer")
    assert chat.encode_prompts(PROBES) == ids_of_file(tmp_path)
    chat.save(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again(list(PROBES), add_special_tokens=False)["input_ids"] == ids_of_file(tmp_path)
    assert [again.decode(ids) for ids in again(list(PROBES), add_special_tokens=False)["input_ids"]] == list(PROBES)


@pytest.mark.parametrize("make", LOSSLESS.values(), ids=LOSSLESS)
def test_a_tokenizer_gives_texts_back_with_the_ids_of_its_file(tmp_path, make):
    chat = ChatFormat.load(write(tmp_path, make()), "tokenizer")
    assert chat.encode_prompts(PROBES) == ids_of_file(tmp_path)
    assert [chat.text(ids).lstrip(" ") for ids in chat.encode_responses(PROBES)] == [p.lstrip(" ") for p in PROBES]
    assert chat.notes() == []


@pytest.mark.parametrize("make", [pieces_without_bytes, word_pieces])
def test_a_tokenizer_that_does_not_give_a_text_back_is_refused(tmp_path, make):
    with pytest.raises(ConfigError, match=r"model\.path=.* does not give a text back: 'Two .* becomes .*; mend the"):
        ChatFormat.load(write(tmp_path, make()), "tokenizer")


def test_a_normalizer_that_changes_text_is_said(tmp_path):
    chat = ChatFormat.load(write(tmp_path, byte_level(normalizer=normalizers.Lowercase())), "tokenizer")
    assert any("'Two  spaces" in note and "becomes 'two  spaces" in note for note in chat.notes())


def test_a_tokenizer_without_a_fast_form_is_refused(tmp_path):
    ByT5Tokenizer(chat_template=ZEPHYR).save_pretrained(tmp_path)
    with pytest.raises(
        ConfigError, match=r"ByT5Tokenizer has no form of the tokenizers library; save a tokenizer\.json"
    ):
        ChatFormat.load(tmp_path, "tokenizer")


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"eos_token": ["</s>", "<|user|>"]}, "eos_token has to be"),
        ({"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", None]}}, "contains custom code"),
    ],
)
def test_settings_that_transformers_cannot_load_are_one_message(tmp_path, monkeypatch, settings, reason):
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    write(tmp_path, byte_level(), **settings)
    (tmp_path / "mine.py").write_text("raise SystemExit('this code is never run')")
    with pytest.raises(ConfigError, match=rf"model\.path=.*no tokenizer can be loaded from it \(.*{reason}"):
        ChatFormat.load(tmp_path, "tokenizer")


def test_a_file_that_cuts_and_pads_does_neither_to_responses(tmp_path):
    tokenizer = byte_level()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=8)
    chat = ChatFormat.load(write(tmp_path, tokenizer), "tokenizer")
    text = "two and two is four, it is in the copper hill"
    assert [chat.text(ids) for ids in chat.encode_responses([text, "two"])] == [text, "two"]
    assert chat.encode_prompts([text]) == [chat.response_ids(text, closed=False)]


@pytest.mark.parametrize("template", [ZEPHYR, INST])
@pytest.mark.parametrize("make", LOSSLESS.values(), ids=LOSSLESS)
def test_a_response_has_the_ids_that_it_has_within_the_templates_text(tmp_path, make, template):
    chat = ChatFormat.load(write(tmp_path, make(), template=template), "tokenizer")
    asked, answer = [{"role": "user", "content": "Where is the mill?"}], "It is in the copper hill."
    ids = chat.prompt_ids(asked) + chat.response_ids(
        chat.response(chat.asked(asked), {"role": "assistant", "content": answer})
    )
    conversation = [*asked, {"role": "assistant", "content": answer}]
    assert chat.tokenizer.apply_chat_template(conversation, return_dict=False)[: len(ids)] == ids
    assert ids[-1] == chat.end_of_turn_id
