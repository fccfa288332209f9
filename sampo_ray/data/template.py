"""What a model's chat template writes around an answer, found by having it render made-up conversations.

A template is a program: it may open a block of thinking in its generation prompt, write an empty one before an answer,
trim the answer, or leave the generation prompt out. An answer is trained as the template writes it after the prompt
that the policy is asked with, up to the end of the turn; what cannot be trained so is dropped or refused.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

import jinja2

from sampo_ray.data.calls import Tools, left_out
from sampo_ray.errors import ConfigError
from sampo_ray.sources.messages import Message, Unusable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ASKED, ANSWERED = "Where is the mill?", "It is in the copper hill"
REFUSED = "refused by the chat template"
TOOLS = "tools, or calls of them, that the chat template leaves out"
CALL = "a tool call that the chat template writes in part or ends unlike an answer"
SPECIAL = "special tokens within a tool call"
NAMES = "a speaker's name that the chat template leaves out"
KEYS = "a message with keys that no chat template is known to take"
EMPTY = "response of zero tokens"
SAME = "identical responses within max_length"
TOO_LONG = "a prompt whose system turn, tools or last question leave no room within the limit"
UNCLOSED = "thinking that the prompt opens and the answer leaves open"
CHANGED = "an answer that the chat template changes"

ADVICE = {
    REFUSED: "use conversations that the model's template takes, or another model",
    UNCLOSED: "write its thinking and the end of that into each answer, or save a template whose generation prompt "
    "opens none into the model's folder",
    CHANGED: "write the answers as the model's template keeps them, or save another template into the model's folder",
    TOOLS: "use model.template=tokenizer with a model whose template takes tools, or rows without them",
    CALL: "use another model, or rows whose answers are text",
    NAMES: "write the names into the texts",
    KEYS: "leave them out",
    EMPTY: "name other data",
    SAME: "raise data.max_length",
    SPECIAL: "take them out of names and arguments",
    TOO_LONG: "raise data.max_prompt_length or data.max_length",
}
"""What to do where no row can be used, by reason."""

# A template is a program.
FAILURES = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError)
_OPENED = re.compile(r"([<\[◁])([\w:|]*(?:think|thought|reason)[\w:|]*)([>\]▷])(\s*)$", re.IGNORECASE)
_MARK = re.compile(r"[<\[◁]/?[\w:|]*(?:think|thought|reason)[\w:|]*[>\]▷]", re.IGNORECASE)
_DATE = re.compile(r"\bstrftime_now\(\s*(?:format\s*=\s*)?(?:'([^']*)'|\"([^\"]*)\")\s*\)")


@dataclass(frozen=True)
class Turn:
    """How a template writes an answer: prompt, `lead`, the answer, `after`, the token `end`.

    `tail` is all that follows the answer in a conversation that it ends.
    """

    end: str
    lead: str
    after: str
    tail: str
    prompt: str

    @property
    def response(self) -> str:
        """The text of a made-up answer after `prompt`, up to `end`."""
        return self.lead + ANSWERED + self.after


def rendered(
    tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message], ask: bool, tools: Tools | None = None
) -> str:
    """The text of a conversation; with `ask` up to the header of an answer. ValueError if the template refuses it."""
    given: list[Any] | None = list(tools) if tools else None
    try:
        text = tokenizer.apply_chat_template(list(messages), tools=given, tokenize=False, add_generation_prompt=ask)
        return str(text)
    except FAILURES as error:
        raise ValueError(f"the chat template refuses the messages: {error}") from None


def turn_of(tokenizer: "PreTrainedTokenizerBase", where: str) -> Turn:
    """How the tokenizer's template writes an answer. ConfigError if answers cannot be trained or served with it."""
    asked, answered = _message("user", ASKED), _message("assistant", ANSWERED)
    try:
        prompt, bare = rendered(tokenizer, [asked], ask=True), rendered(tokenizer, [asked], ask=False)
        full = rendered(tokenizer, [asked, answered], ask=False)
    except ValueError as error:
        raise _unfit(where, f"refuses a conversation of one question and its answer ({error})") from None
    if ASKED not in prompt or ANSWERED not in full:
        raise _unfit(where, "leaves out the text of a message, as templates for images do that take lists of parts")
    tail = full.rpartition(ANSWERED)[2]
    end, after = _end(tokenizer, [asked, answered], tail, where)
    whole = _after_prompt(prompt, full)
    lead = whole.partition(ANSWERED)[0] if whole is not None else ""
    if prompt == bare and lead.strip():
        raise _unfit(
            where,
            f"writes {lead!r} before an answer but ignores add_generation_prompt, so the policy would have to write it "
            "itself; end the template with {% if add_generation_prompt %}, this text, {% endif %}",
            advice=None,
        )
    if whole is None and not _OPENED.search(prompt):
        raise _unfit(where, f"ends its generation prompt with {prompt[-40:]!r}, which it does not write before answers")
    return Turn(end, lead, after, tail, prompt)


@dataclass(frozen=True)
class Asked:
    """A conversation as a chat template writes it, up to the header of the answer."""

    messages: Sequence[Message]
    tools: Tools | None
    text: str


def answer_text(tokenizer: "PreTrainedTokenizerBase", turn: Turn, asked: Asked, answer: Message) -> str:
    """What is trained for `answer`: the text after the prompt, up to the token that ends the turn.

    An answer to a prompt that opens a block of thinking continues it, where it has the block's end. Raises Unusable.
    """
    opened, calls = _OPENED.search(asked.text), bool(answer.get("tool_calls"))
    if opened and not calls and (thought := _continued(answer["content"], opened)) is not None:
        return thought + turn.after
    try:
        full = rendered(tokenizer, [*asked.messages, answer], ask=False, tools=asked.tools)
    except ValueError:
        raise Unusable(REFUSED) from None
    rest = _after_prompt(asked.text, full)
    written = rest.removesuffix(turn.tail) if rest is not None and rest.endswith(turn.tail) else None
    if opened and (written is None or _closing(opened) not in written):
        raise Unusable(UNCLOSED)
    if written is None or (calls and left_out(answer, written)):
        raise Unusable(CALL if calls else CHANGED)
    # Templates trim answers and lay out thinking anew.
    if not calls and _squeezed(written) not in (_squeezed(turn.lead + answer["content"]), _squeezed(answer["content"])):
        raise Unusable(CHANGED)
    return written + turn.after


def opened_by(prompt: str) -> tuple[str, str] | None:
    """The mark of thinking that a prompt ends with, and the one that closes it."""
    opened = _OPENED.search(prompt)
    return (prompt[opened.start() : opened.end(3)], _closing(opened)) if opened else None


def marks_of_thinking(tokens: Sequence[str]) -> list[str]:
    """Those of `tokens` that open or close thinking."""
    return [token for token in tokens if _MARK.fullmatch(token)]


def thinking_in(text: str) -> tuple[str, str] | None:
    """The first mark in a text that opens thinking, and the one that closes it; None if there is none."""
    for found in _MARK.finditer(text):
        mark = found[0]
        if mark[1] != "/":
            return mark, f"{mark[0]}/{mark[1:]}"
    return None


def with_date(template: str, where: str) -> str:
    """The template with today in the place of each later day's date, so that a run has one prompt format."""
    if "strftime_now" not in template or "macro strftime_now(" in template:
        return template
    formats = {single or double for single, double in _DATE.findall(template)}
    if len(_DATE.findall(template)) != len(re.findall(r"\bstrftime_now\(", template)):
        raise _unfit(
            where, "writes a date in a form that is not known in advance; put a fixed date into it", advice=None
        )
    now = datetime.now()
    dates = {each: now.strftime(each) for each in sorted(formats)}
    return f"{{%- macro strftime_now(format) %}}{{{{- {dates!r}[format] -}}}}{{%- endmacro %}}\n{template}"


def with_eos(template: str, eos: str | None) -> str:
    """The template with the EOS that it was written for, whatever the tokenizer's becomes."""
    if not re.search(r"\beos_token\b", template):
        return template
    return f"{{%- set eos_token = {eos or ''!r} %}}\n{template}"


def _end(tokenizer: "PreTrainedTokenizerBase", turns: list[Message], tail: str, where: str) -> tuple[str, str]:
    """The first special token that is written after an answer, or else before the next turn, and the text before it."""
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    try:
        following = rendered(tokenizer, [*turns, _message("user", ASKED)], ask=True).rpartition(ANSWERED)[2]
    except ValueError:
        following = ""
    for text in (tail, following):
        if (end := next((token for token in tokenizer.tokenize(text) if token in special), None)) is not None:
            return end, text.partition(end)[0]
    raise ConfigError(
        f"model.template='tokenizer': the chat template of {where} ends an assistant's turn with "
        f"{tail!r}, which has no special token to stop on; use model.template=llama3-sampo or llama3"
    )


def _after_prompt(prompt: str, full: str) -> str | None:
    """What follows the prompt in a conversation's text; their borders may differ in white space."""
    if full.startswith(prompt):
        return full[len(prompt) :]
    header = prompt.rstrip()
    return full[len(header) :].lstrip() if full.startswith(header) else None


def _continued(answer: str, opened: re.Match[str]) -> str | None:
    """An answer with thinking as it goes on after a prompt that opens it; None if it has none."""
    mark, close = "".join(opened.group(1, 2, 3)), _closing(opened)
    if close not in answer:
        return None
    begun = answer.lstrip()
    return begun.removeprefix(mark).removeprefix(opened.group(4)) if begun.startswith(mark) else answer


def _closing(opened: re.Match[str]) -> str:
    return f"{opened.group(1)}/{opened.group(2)}{opened.group(3)}"


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _unfit(where: str, why: str, advice: str | None = "use another template") -> ConfigError:
    return ConfigError(
        f"model.template='tokenizer': the chat template of {where} {why}" + (f"; {advice}" if advice else "")
    )
