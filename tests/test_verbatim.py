"""Where an answer's text is known without running the template, it is what the template writes."""

from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sampo_ray.data.template import answer_text
from sampo_ray.data.verbatim import Verbatim
from sampo_ray.sources.messages import Unusable
from tests.test_tool_rows import WRAPPED, load

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ TEXT }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
pieces = st.sampled_from(
    ["Yes", " ", "\n", "</think>", "<think>", "<|im_end|>", "<|eot_id|>", "/no_think", '"', "{{ x }}", "<b>", "é", "#"]
)
texts = st.lists(pieces, min_size=1, max_size=5).map("".join)


@cache
def loaded(folder, name):
    return load(folder / name, name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("templates")


@given(
    name=st.sampled_from(["qwen3", "qwen2_5", "llama3", "gemma3", "gptoss"]),
    said=st.lists(texts, min_size=2, max_size=6),
    system=st.none() | texts,
)
def test_an_answer_that_is_known_is_the_one_that_the_template_writes(folder, name, said, system):
    chat = loaded(folder, name)
    *asked, answer = said if len(said) % 2 == 0 else said[1:]
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(asked)]
    messages = ([{"role": "system", "content": system}] if system else []) + messages
    try:
        prompt = chat.asked(messages)
    except Unusable:
        return
    message = {"role": "assistant", "content": answer}
    try:
        known = chat._verbatim.response(prompt, message) if chat._verbatim else None
        assert known in (None, answer_text(chat.tokenizer, chat.turn, prompt, message))
    except Unusable:
        assert known is None


def test_ordinary_answers_are_known(tmp_path):
    chat = load(tmp_path, "qwen3_instruct_2507")
    question = [{"role": "user", "content": "Is it?"}]
    [answer] = [{"role": "assistant", "content": "Yes.\n\n```c\nx[0] < 1 && y;\n```"}]
    assert chat._verbatim.response(chat.asked(question), answer) == answer["content"]
    assert chat._verbatim.response(chat.asked(question, [WRAPPED]), answer) is None
    assert chat._verbatim.response(chat.asked([*question, *question]), answer) is None


@pytest.mark.parametrize(
    "text",
    [
        "m.content | replace('secret', '')",
        "m.content.split('secret')[-1]",
        "('' if 'secret' in m.content else m.content)",
        "('' if m.content[-6:] == 'secret' else m.content)",
    ],
)
def test_answers_with_words_that_a_template_looks_for_are_not_taken_as_known(tmp_path, text):
    chat = load(tmp_path, "qwen2_5")
    chat.tokenizer.chat_template = CHATML.replace("TEXT", text)
    found = Verbatim.of(chat.tokenizer, chat.turn)
    question = [{"role": "user", "content": "Is it?"}]
    answers = [{"role": "assistant", "content": each} for each in ("Yes.", "a secret")]
    assert [found.response(chat.asked(question), each) for each in answers] == ["Yes.", None]
    hidden = [{"role": "user", "content": "What is the secret?"}]
    assert found.response(chat.asked(hidden), answers[0]) is None


@pytest.mark.parametrize("text", ["m.content | upper", "m.content | tojson", "m.content[:400]"])
def test_a_template_that_changes_texts_knows_no_answer(tmp_path, text):
    chat = load(tmp_path, "qwen2_5")
    chat.tokenizer.chat_template = CHATML.replace("TEXT", text)
    assert Verbatim.of(chat.tokenizer, chat.turn) is None
