import json
from datetime import datetime

import pytest
from transformers import AutoTokenizer
from transformers.utils import chat_template_utils

from sampo_ray.config.run import load_config
from sampo_ray.config.sections import DataConfig
from sampo_ray.console.demo_task import tiny_llama, tiny_tokenizer
from sampo_ray.data.chat import ChatFormat
from sampo_ray.data.preferences import tokenized_pairs
from sampo_ray.errors import ConfigError
from sampo_ray.loop.data_check import try_format
from sampo_ray.loop.validate import check
from sampo_ray.sources.messages import Unusable
from sampo_ray.sources.rows import Counts, Row, read_rows

SPECIAL = [
    "<|im_start|>",
    "<|im_end|>",
    "<|channel|>",
    "<|message|>",
    "<|user|>",
    "<|assistant|>",
    "[THINK]",
    "[/THINK]",
]
ASKED = [{"role": "user", "content": "What is two and two?"}]
PLAIN, THOUGHT = "Four.", "<think>\nTwo and two.\n</think>\n\nFour."

TURN = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
ASK = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def chatml(turn=TURN, ask=ASK):
    return f"{{% for m in messages %}}{turn}{{% endfor %}}{ask}"


def answers(text, others=TURN):
    """ChatML whose answers are written so."""
    return f"{{% if m.role == 'assistant' %}}<|im_start|>assistant\n{text}<|im_end|>\n{{% else %}}{others}{{% endif %}}"


OPENS = "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
STRIPS = answers("{{ m.content.split('</think>')[-1] }}")  # as R1's does
EMPTY_BLOCK = answers("{% if '</think>' not in m.content %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}")


@pytest.fixture
def load(tmp_path):
    def load(template, eos="<|im_end|>"):
        tokenizer = tiny_tokenizer(["user assistant what is two and two four"] * 4)
        tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
        tokenizer.add_tokens(["<think>", "</think>"])
        tokenizer.bos_token, tokenizer.eos_token, tokenizer.chat_template = "<|begin_of_text|>", eos, template
        tokenizer.save_pretrained(tmp_path)
        return ChatFormat.load(tmp_path, "tokenizer")

    return load


def trained(chat, answer, asked=ASKED):
    """Token ids of prompt and answer, up to the end of the turn, and their text."""
    ids = chat.prompt_ids(asked) + chat.response_ids(
        chat.response(chat.asked(asked), {"role": "assistant", "content": answer})
    )
    return ids, chat.tokenizer.decode(ids)


def own(chat, answer, asked=ASKED):
    """What the template makes of the whole conversation."""
    return chat.tokenizer.apply_chat_template([*asked, {"role": "assistant", "content": answer}], return_dict=False)


@pytest.mark.parametrize(
    ("template", "answer", "written"),
    [
        (chatml(), PLAIN, "Four."),
        (chatml(), " Four. \n", " Four. \n"),
        (chatml(answers("{{ m.content | trim }}")), " Four. \n", "Four."),
        (chatml(EMPTY_BLOCK), PLAIN, "<think>\n\n</think>\n\nFour."),
        (chatml(EMPTY_BLOCK), THOUGHT, THOUGHT),
        (chatml(EMPTY_BLOCK, OPENS), PLAIN, "\n</think>\n\nFour."),
        (chatml(EMPTY_BLOCK, OPENS), THOUGHT, "Two and two.\n</think>\n\nFour."),
        (chatml(answers("{{ m.content }} ")), PLAIN, "Four. "),
    ],
)
def test_an_answer_is_trained_with_the_ids_that_the_template_gives_it(load, template, answer, written):
    chat = load(template)
    assert chat.response(chat.asked(ASKED), {"role": "assistant", "content": answer}) == written
    ids, _ = trained(chat, answer)
    assert own(chat, answer)[: len(ids)] == ids
    assert ids[-1] == chat.end_of_turn_id


@pytest.mark.parametrize("template", [chatml(STRIPS, OPENS), chatml(TURN, OPENS), chatml(EMPTY_BLOCK, OPENS)])
@pytest.mark.parametrize("answer", [THOUGHT, THOUGHT.removeprefix("<think>\n"), "Two and two.\n</think>\n\nFour."])
def test_an_answer_with_thinking_continues_the_block_that_its_prompt_opens(load, template, answer):
    _, text = trained(load(template), answer)
    assert text.endswith(f"<|im_start|>assistant\n{THOUGHT}<|im_end|>")


ALWAYS_OPEN = answers("<think>\n{{ m.content }}")


@pytest.mark.parametrize("turn", [STRIPS, TURN, ALWAYS_OPEN])
def test_an_answer_is_not_trained_inside_a_block_that_its_prompt_opens(load, turn, tmp_path):
    chat = load(chatml(turn, OPENS))
    assert any("ends a prompt with <think>" in note for note in chat.notes())
    with pytest.raises(Unusable, match="the prompt opens and the answer leaves open"):
        chat.response(chat.asked(ASKED), {"role": "assistant", "content": PLAIN})
    rows = [
        Row(f"{i}", f"file:{i}", ASKED, *({"role": "assistant", "content": text} for text in (PLAIN, "Five.")), {})
        for i in range(2)
    ]
    with pytest.raises(
        ConfigError, match=r"data\.train: no row of the first 2 .* leaves open \(first at file:0\); write"
    ):
        try_format(rows, "pairs", chat, DataConfig(), "data.train")


def test_pairs_that_cannot_be_trained_are_dropped_and_counted(load, tmp_path):
    chat, counts = load(chatml(STRIPS, OPENS)), Counts()
    pairs = [
        {"prompt": "a", "chosen": THOUGHT, "rejected": "No.</think>Five."},
        {"prompt": "a", "chosen": "b", "rejected": "c"},
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    [block] = tokenized_pairs(read_rows(str(tmp_path / "pairs.jsonl"), "pairs", counts), chat, DataConfig(), counts)
    [pair] = block.to_pylist()
    assert chat.tokenizer.decode(pair["prompt"] + pair["rejected"]).endswith("<think>\nNo.</think>Five.<|im_end|>")
    assert counts.dropped == {"thinking that the prompt opens and the answer leaves open": 1}


def test_marks_of_thinking_that_are_special_tokens_are_trained_as_such(load):
    chat = load(chatml(TURN, OPENS.replace("<think>\n", "[THINK]")))
    ids, text = trained(chat, "[THINK]Two and two.[/THINK]Four. <|im_end|>")
    assert text.endswith("assistant\n[THINK]Two and two.[/THINK]Four. <|im_end|><|im_end|>")
    assert ids.count(chat.tokenizer.convert_tokens_to_ids("[/THINK]")) == 1
    assert ids.count(chat.end_of_turn_id) == 2  # of the prompt's turn and the answer's: what the answer says is text


def test_special_tokens_before_an_answer_are_trained_as_such(load):
    chat = load(
        chatml(answers("<|channel|>final<|message|>{{ m.content }}"), ASK.replace("\n", "")).replace(
            "assistant\n", "assistant"
        )
    )
    ids, _ = trained(chat, "Four. <|message|>")
    assert ids.count(chat.tokenizer.convert_tokens_to_ids("<|message|>")) == 1
    assert trained(chat, PLAIN)[0] == own(chat, PLAIN)[: len(trained(chat, PLAIN)[0])]
    assert any("'<|channel|>final<|message|>' before an answer" in note for note in chat.notes())


def test_a_turn_that_only_the_next_one_ends_stops_where_that_begins(load):
    chat = load(
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    assert trained(chat, PLAIN)[1] == "<|user|>What is two and two?<|assistant|>Four.<|user|>"


def test_thinking_of_earlier_turns_is_left_out_of_prompts_as_the_template_does(load):
    earlier = [*ASKED, {"role": "assistant", "content": THOUGHT}, {"role": "user", "content": "And three?"}]
    turn = answers("{{ m.content if loop.last else m.content.split('</think>')[-1] }}")
    chat = load(chatml(turn))
    ids, text = trained(chat, THOUGHT, earlier)
    assert own(chat, THOUGHT, earlier)[: len(ids)] == ids
    assert text.count("<think>") == 1


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (chatml(ask=""), r"writes '<\|im_start\|>assistant\\n' before an answer but ignores add_generation_prompt"),
        (chatml(ask=ASK.replace("assistant", "bot")), r"ends its generation prompt with .*bot\\n', which it does not"),
        (chatml(answers("{{ raise_exception('no') }}")), r"refuses a conversation of one question and its answer"),
        (
            chatml("<|im_start|>{% if m.content is not string %}{{ m.content }}{% endif %}<|im_end|>"),
            "leaves out the text",
        ),
        (chatml() + "{{ tools | length }}", r"refuses a conversation of one question .*NoneType"),
        (chatml() + "{{ strftime_now(format) }}", r"writes a date in a form that is not known in advance"),
        ("", r"has no chat template"),
        ({"tool_use": chatml()}, r"has chat templates for tool_use and no `default`"),
    ],
)
def test_a_template_that_cannot_be_trained_with_is_refused(load, template, message):
    with pytest.raises(ConfigError, match=rf"model\.template='tokenizer': the .*{message}"):
        load(template)


def test_a_question_that_ends_with_the_header_of_its_answer_needs_no_generation_prompt(load):
    turn = "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}<|im_end|>{% endif %}"
    assert trained(load(chatml(turn, ask="")), PLAIN)[1] == "[INST] What is two and two? [/INST] Four.<|im_end|>"


def test_a_template_that_changes_an_answer_drops_it(load):
    chat = load(chatml(answers("{{ m.content.split('</think>')[-1] }}")))
    with pytest.raises(Unusable, match="an answer that the chat template changes"):
        chat.response(chat.asked(ASKED), {"role": "assistant", "content": THOUGHT})
    assert chat.response(chat.asked(ASKED), {"role": "assistant", "content": PLAIN}) == PLAIN


def test_two_bos_tokens_are_said(load):
    chat = load("{{ bos_token }}{{ bos_token }}" + chatml())
    assert any("two BOS tokens" in note for note in chat.notes())
    assert chat.prompt_ids(ASKED)[:2] == [chat.bos_id] * 2


@pytest.mark.parametrize("call", ["strftime_now('%d %b %Y')", 'strftime_now( format="%Y-%m-%d" )'])
def test_a_template_with_a_date_keeps_that_of_its_first_day(load, call, tmp_path, monkeypatch):
    class Later(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime(2199, 1, 2)

    day = f"{{% if strftime_now is defined %}}{{% set day = {call} %}}{{% endif %}}"
    chat = load(day + "<|im_start|>system\n{{ day }}<|im_end|>\n" + chatml())
    assert any("writes the date" in note for note in chat.notes())
    prompt = chat.render(ASKED)
    assert str(datetime.now().year) in prompt
    saved = tmp_path / "saved"
    chat.save(saved)
    monkeypatch.setattr(chat_template_utils, "datetime", Later)
    chat_template_utils._compile_jinja_template.cache_clear()
    assert ChatFormat.load(saved, "tokenizer").render(ASKED) == prompt
    assert ChatFormat.load(saved, "tokenizer").notes() == []
    assert (
        AutoTokenizer.from_pretrained(saved).apply_chat_template(ASKED, tokenize=False, add_generation_prompt=True)
        == prompt
    )
    as_given = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(ASKED, tokenize=False)
    assert "2199" in as_given


def test_a_template_that_writes_eos_keeps_the_models(load):
    template = chatml(TURN + "{{ eos_token }}")
    chat = load(template, eos="<|eot_id|>")
    assert chat.tokenizer.eos_token == "<|im_end|>"
    assert chat.render(ASKED) == "<|im_start|>user\nWhat is two and two?<|im_end|>\n<|eot_id|><|im_start|>assistant\n"


def test_of_named_templates_the_default_is_the_format_and_all_are_kept(load, tmp_path):
    chat = load({"default": chatml(), "tool_use": chatml() + "{{ tools }}"})
    chat.save(tmp_path / "saved")
    again = ChatFormat.load(tmp_path / "saved", "tokenizer")
    assert again.render(ASKED) == chat.render(ASKED)
    assert set(again.tokenizer.chat_template) == {"default", "tool_use"}


def test_the_validation_says_what_a_template_does_and_refuses_pairs_that_it_leaves_open(load, tmp_path):
    tiny_llama(load(chatml(STRIPS, OPENS)).tokenizer).save_pretrained(tmp_path)
    data = tmp_path / "pairs.jsonl"
    recipe = {"model": {"path": str(tmp_path), "template": "tokenizer"}, "data": {"train": str(data), "max_length": 64}}
    recipe["run"] = {"dir": str(tmp_path / "run")}
    data.write_text(json.dumps({"prompt": "a", "chosen": THOUGHT, "rejected": "No.</think>Five."}))
    checked = check(load_config(recipe))
    assert [note for note in checked.notes if "ends a prompt with <think>" in note]
    assert checked.config.model.attention == "segments", "what is chosen is recorded"
    data.write_text(json.dumps({"prompt": "a", "chosen": PLAIN, "rejected": "Five."}))
    with pytest.raises(ConfigError, match=r"data\.train: .*the answer leaves open .*write its thinking"):
        check(load_config(recipe))
