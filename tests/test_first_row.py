"""What `--dry-run` prints of the first row: as it was understood, and still a recipe."""

import copy
from dataclasses import replace

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from sampo_ray.config.sections import DataConfig
from sampo_ray.console.comments import WIDTH, comment, first_row
from sampo_ray.data.chat import ChatFormat
from sampo_ray.data.first_row import FirstRow, Part, text_of, understood
from sampo_ray.sources.rows import Row


@pytest.fixture(scope="module")
def chat(tiny_model):
    return ChatFormat.load(tiny_model, "llama3-sampo")


def row(prompt, chosen="five", rejected="Let me think about it."):
    answers = [text and {"role": "assistant", "content": text} for text in (chosen, rejected)]
    return Row("pairs.jsonl:1", "pairs.jsonl:1", prompt, *answers, {})


def user(text):
    return {"role": "user", "content": text}


def printed(found):
    return comment(first_row(found)).splitlines()


TOOLS = (
    "{{ tools | tojson }}{% for m in messages if m.tool_calls or m.role == 'tool' %}{{ m | tojson }}{% endfor %}"
    "{% set messages = messages | rejectattr('role', 'equalto', 'tool') | list %}"
)
QUESTION = "What is two plus three?\nThink."


def test_each_turn_and_answer_is_shown_with_its_role_text_and_tokens(chat):
    prompt = [{"role": "system", "content": "Be brief."}, user(QUESTION)]
    system, question = (len(ids) for ids in chat.encode_prompts(["Be brief.", QUESTION]))
    chosen, rejected = (len(ids) for ids in chat.encode_responses(["five", "Let me think about it."]))
    whole = len(chat.prompt_ids(prompt))
    assert printed(understood(row(prompt), chat, DataConfig(max_length=128))) == [
        "#",
        "# first row (pairs.jsonl:1) as it is read, with tokens:",
        f"#   system   {system:>6}  Be brief.",
        f"#   user     {question:>6}  What is two plus three?↵",
        "#                    Think.",
        f"#   chosen   {chosen:>6}  five",
        f"#   rejected {rejected:>6}  Let me think about it.",
        f"#   with the template: prompt {whole} (at most 96), with chosen {whole + chosen}, with rejected "
        f"{whole + rejected} (at most 128)",
        "#",
    ]


def test_what_is_cut_is_not_shown_and_is_counted(chat):
    prompt, answer = [user("some text " * 40)], "one two three " * 20
    found = understood(row(prompt, chosen=answer), chat, DataConfig(max_length=64, max_prompt_length=32))
    [question, chosen, rejected] = found.parts
    size = len(chat.prompt_ids([user(question.text)]))
    lost = len(prompt[0]["content"]) - len(question.text)
    assert prompt[0]["content"].endswith(question.text) and 28 < size <= 32
    assert f"prompt {size} (at most 32, cut: without the first {lost} characters of its last question), " in found.size
    assert "with chosen 64, with rejected" in found.size
    kept = chat.response_ids(answer)[: 64 - size]
    assert chosen == Part(
        "chosen", chat.text(kept), len(chat.response_ids(answer)), f"cut here: {chosen.tokens - len(kept)} tokens go on"
    )
    assert rejected.cut == ""
    assert any(line.endswith(f"[{chosen.cut}]") for line in printed(found))


def test_a_prompt_alone_is_shown_alone(chat):
    lines = printed(understood(row([user("Why?")], None, None), chat, DataConfig(max_length=128)))
    assert [line.split()[1] for line in lines if line != "#"] == ["first", "user", "with"]


def test_tools_and_what_else_a_turn_holds_are_shown(chat):
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
    turn = {"role": "assistant", "content": "", "tool_calls": [call]}
    tokenizer = copy.deepcopy(chat.tokenizer)
    tokenizer.chat_template = TOOLS + tokenizer.chat_template
    takes_tools = replace(chat, tokenizer=tokenizer)
    found = understood(replace(row([user("2+2?")]), tools=[{"name": "add"}]), takes_tools, DataConfig(max_length=256))
    assert found.parts[0].role == "tools" and '"add"' in found.parts[0].text
    assert '"arguments"' in text_of(turn)


@given(st.text(max_size=3000) | st.text(st.sampled_from("a \n\t\x1b\u2028\x85\ufeff語"), max_size=3000))
def test_whatever_a_text_holds_the_lines_stay_comments_of_a_terminals_width(text):
    lines = printed(FirstRow("a.jsonl:1", [Part("user", text, 1, "cut")], text))
    output = "\n".join(lines)
    assert yaml.safe_load(f"{output}\nmodel: {{}}") == {"model": {}}
    assert output.splitlines() == lines
    assert all(line.startswith("#") and cell_len(line) <= WIDTH for line in lines)
    assert len(lines) < 60


def test_of_a_long_text_the_beginning_and_the_end_are_shown():
    text = "beginning " + "word " * 2000 + "end"
    lines = printed(FirstRow("a.jsonl:1", [Part("user", text, 2000)], ""))
    assert "beginning" in lines[2] and "characters ...]" in " ".join(line[2:].strip() for line in lines)
    assert any(line.endswith("word end") for line in lines)
    assert len(lines) < 16
