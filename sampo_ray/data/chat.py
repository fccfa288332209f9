"""The prompt format of trainer, rollouts and endpoint: a chat template and the token that ends a turn.

`ChatFormat.save` writes both into a tokenizer folder. vLLM renders requests with that folder, so the endpoint's token
ids are those of `ChatFormat.prompt_ids`.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from sampo_ray.data.calls import KNOWN, Tools, as_requested, left_out, with_calls
from sampo_ray.data.template import (
    KEYS,
    NAMES,
    REFUSED,
    SPECIAL,
    TOOLS,
    Asked,
    Turn,
    answer_text,
    marks_of_thinking,
    opened_by,
    rendered,
    turn_of,
    with_date,
    with_eos,
)
from sampo_ray.data.tokenizer import changed_text, load_tokenizer, lost_text, plain_tokenizer, token_starts
from sampo_ray.data.tools import tools_left_out
from sampo_ray.data.verbatim import Verbatim
from sampo_ray.errors import ConfigError
from sampo_ray.sources.messages import Message, Unusable

TemplateName = Literal["llama3-sampo", "llama3", "tokenizer"]

_LLAMA3_TOKENS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
# The only differences: Meta's format trims each turn; the SamPO model card's adds a newline after each turn.
_LLAMA3_CONTENT = {"llama3-sampo": "message['content']", "llama3": "message['content'] | trim"}
_LLAMA3_AFTER_TURN = {"llama3-sampo": r"\n", "llama3": ""}
_LLAMA3 = r"""
{{- '<|begin_of_text|>' -}}
{%- for message in messages -%}
    {%- if message['role'] not in ['system', 'user', 'assistant'] -%}
        {{- raise_exception('a message has a role other than system, user or assistant') -}}
    {%- endif -%}
    {%- if message['content'] is not string -%}
        {{- raise_exception('the content of a message is not text') -}}
    {%- endif -%}
    {%- set turn = namespace(text=CONTENT) -%}
    {%- for mark in MARKS -%}
        {%- set turn.text = turn.text | replace(mark, mark[0] + ' ' + mark[1:]) -%}
    {%- endfor -%}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + turn.text + '<|eot_id|>AFTER_TURN' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}
{%- endif -%}
"""


@dataclass(frozen=True)
class ChatFormat:
    """A tokenizer with the chat template of a run.

    The `llama3*` templates turn special tokens that a message holds into plain text, by putting a space into them
    (`<|eot_id|>` becomes `< |eot_id|>`). The template does this, so the endpoint does it too. The `tokenizer` template
    is the model's: there typed special tokens become special ids, in training as at the endpoint. If it writes the date
    (`dated`), that is the day on which it was loaded from the model. Responses are encoded as plain text with every
    template, but for marks of thinking.
    """

    name: str
    tokenizer: PreTrainedTokenizerBase
    turn: Turn
    dated: bool = False

    @classmethod
    def load(cls, path: str | Path, template: TemplateName) -> "ChatFormat":
        """Loads the tokenizer of a Hugging Face folder or hub name. ConfigError if it does not fit `template`."""
        tokenizer, where = load_tokenizer(path), f"model.path={str(path)!r}"
        if template != "tokenizer":
            tokenizer.chat_template = _llama3_template(tokenizer, path, template)
        given = _templates(tokenizer, where)
        _set_templates(tokenizer, dated := {name: with_date(text, where) for name, text in given.items()})
        turn = turn_of(tokenizer, where)
        if turn.end != (eos := tokenizer.eos_token):
            _set_templates(tokenizer, {name: with_eos(text, eos) for name, text in dated.items()})
            tokenizer.eos_token = turn.end
        chat = cls(template, tokenizer, turn, dated != given)
        if lost := lost_text(tokenizer, chat._plain):
            raise ConfigError(
                f"{where}: its tokenizer does not give a text back: {lost[0]!r} becomes {lost[1]!r}; mend the decoder "
                "in its tokenizer.json, or use another model"
            )
        return chat

    @cached_property
    def end_of_turn_id(self) -> int:
        """The token that ends an answer."""
        return int(self.tokenizer.get_vocab()[self.turn.end])

    def render(self, messages: Sequence[Message]) -> str:
        """The text of a conversation, up to the header of the answer. ValueError if the template refuses it."""
        return rendered(self.tokenizer, messages, ask=True)

    def asked(self, messages: Sequence[Message], tools: Tools | None = None) -> Asked:
        """A conversation as an answer is asked for. Unusable where the template refuses it, or leaves something out."""
        odd = [each for each in messages if len(each) != 2 or each["role"] == "tool"]
        if any(each.keys() - KNOWN for each in odd):
            raise Unusable(KEYS)
        calls = [each for each in odd if with_calls(each)]
        given = as_requested(tools) if tools else None
        if (given or calls) and self._tools_left_out:
            raise Unusable(TOOLS)
        try:
            text = rendered(self.tokenizer, messages, ask=True, tools=given)
        except ValueError:
            raise Unusable(REFUSED) from None
        if any(left_out(each, text) for each in calls):
            raise Unusable(TOOLS)
        if any(each["name"] not in text for each in odd if each["role"] != "tool" and each.get("name")):
            raise Unusable(NAMES)
        return Asked(messages, given, text)

    def response(self, asked: Asked, answer: Message) -> str:
        """The text of `answer` as a response to a prompt: as the template writes it, up to the end of its turn.
        Unusable where the template writes no such answer.
        """
        if self._verbatim and (text := self._verbatim.response(asked, answer)) is not None:
            return text
        if answer.keys() - KNOWN:
            raise Unusable(KEYS)
        if answer.get("tool_calls"):
            if self._tools_left_out:
                raise Unusable(TOOLS)
            said = json.dumps(answer, ensure_ascii=False)
            if any(token in said for token in self._special):
                raise Unusable(SPECIAL)
        text = answer_text(self.tokenizer, self.turn, asked, answer)
        if answer.get("name") and answer["name"] not in text:
            raise Unusable(NAMES)
        return text

    def encode_prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts from `render`. No BOS is added: the template has written it."""
        return self.tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []

    def encode_answers(self, answers: Sequence[tuple[Message, str]]) -> list[list[int]]:
        """Token ids of answers with what `response` says of each. In a call of tools, special tokens are the template's
        and become special ids.
        """
        calls = [text for answer, text in answers if answer.get("tool_calls")]
        called = iter(self._written.encode_batch_fast(calls, add_special_tokens=False) if calls else [])
        said = iter(self.encode_responses([text for answer, text in answers if not answer.get("tool_calls")]))
        end = self.end_of_turn_id
        return [[*next(called).ids, end] if answer.get("tool_calls") else next(said) for answer, _ in answers]

    def token_starts(self, text: str) -> list[int]:
        """The characters of a text at which its tokens begin."""
        return token_starts(self.tokenizer, text)

    def encode_responses(self, texts: Sequence[str], closed: bool = True) -> list[list[int]]:
        """Token ids of responses; with `closed`, each ends in the end-of-turn token."""
        end = [self.end_of_turn_id] if closed else []
        return [ids + end for ids in self._encode(self._plain, texts)]

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation, including the header of the answer. `llama3*`: exactly one BOS, in front."""
        return self.encode_prompts([self.render(messages)])[0]

    def response_ids(self, text: str, closed: bool = True) -> list[int]:
        """Token ids of one response; with `closed`, it ends in the end-of-turn token."""
        return self.encode_responses([text], closed)[0]

    def text(self, ids: Sequence[int]) -> str:
        """The text of a response's token ids, without special tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    @property
    def bos_id(self) -> int | None:
        """The BOS token, if the tokenizer has one; it stays in front when a prompt is cut."""
        bos_id: int | None = self.tokenizer.bos_token_id
        return bos_id

    def notes(self) -> list[str]:
        """What a user should know of the format, a line each."""
        notes, (prompt, whole) = list[str](), self._example
        if self.dated:
            notes.append(
                "the chat template writes the date: the run, its endpoint and its exports keep that of its start"
            )
        if self.turn.lead:
            notes.append(
                f"the chat template writes {self.turn.lead!r} before an answer; it is trained as its beginning"
            )
        if opened := opened_by(self.turn.prompt):
            notes.append(
                f"the chat template ends a prompt with {opened[0]}: completions begin after it, also for rewards"
            )
        if self.bos_id is not None and prompt[:2] == [self.bos_id] * 2:
            notes.append("the chat template opens a conversation with two BOS tokens, in training as at the endpoint")
        if changed := changed_text(self.tokenizer, self._plain):
            notes.append(f"the tokenizer changes text: {changed[0]!r} becomes {changed[1]!r}")
        if prompt + self.response_ids(self.turn.response) != whole:
            notes.append(
                "where an answer follows its prompt, the text as a whole would be tokenized otherwise; answers "
                "are trained as they follow the prompts of the endpoint"
            )
        return notes

    def save(self, folder: str | Path) -> None:
        """Writes a tokenizer folder with the template and, as `eos_token`, the end-of-turn token."""
        self.tokenizer.save_pretrained(folder)

    @cached_property
    def _plain(self) -> Tokenizer:
        """For responses: special tokens are text to it, but for marks of thinking."""
        return plain_tokenizer(self.tokenizer, marks_of_thinking(self._special), self._prefix)

    @cached_property
    def _written(self) -> Tokenizer:
        """For responses that are all the template's: special tokens are such to it."""
        return plain_tokenizer(self.tokenizer, self._special, self._prefix)

    @cached_property
    def _prefix(self) -> bool:
        """Whether a response is encoded with the space that the tokenizer adds in front of a text: where it has one
        within the template's text.
        """
        marks = marks_of_thinking(self._special)
        prompt, whole = self._example
        for prefix in (True, False):
            plain = plain_tokenizer(self.tokenizer, marks, prefix)
            ids = [*prompt, *self._encode(plain, [self.turn.response])[0], self.end_of_turn_id]
            if ids == whole or (not prefix and self.tokenizer.decode(ids) == self.tokenizer.decode(whole)):
                return prefix
        return True

    @cached_property
    def _verbatim(self) -> Verbatim | None:
        return Verbatim.of(self.tokenizer, self.turn)

    @cached_property
    def _tools_left_out(self) -> bool:
        """Whether the template refuses tools, or leaves out them, their calls or results."""
        try:
            return bool(tools_left_out(self.tokenizer)[1])
        except ValueError:
            return True

    @cached_property
    def _example(self) -> tuple[list[int], list[int]]:
        """A prompt's token ids, and those of the text of prompt and answer as a whole, up to the end of the turn."""
        prompt = self.turn.prompt
        first, whole = self.encode_prompts([prompt, prompt + self.turn.response + self.turn.end])
        return first, whole

    @cached_property
    def _special(self) -> list[str]:
        return [str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special]

    @cached_property
    def _lead(self) -> tuple[str, list[int]]:
        """What the template writes before an answer up to its last special token, as text and as token ids."""
        lead = self.turn.lead
        until = max((lead.rfind(token) + len(token) for token in self._special if token in lead), default=0)
        return lead[:until], self.encode_prompts([lead[:until]])[0]

    def _encode(self, plain: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
        lead, ids = self._lead
        led = [ids if text.startswith(lead) else [] for text in texts]
        encodings = plain.encode_batch_fast([text.removeprefix(lead) for text in texts], add_special_tokens=False)
        return [first + each.ids for first, each in zip(led, encodings, strict=True)]


def _llama3_template(tokenizer: PreTrainedTokenizerBase, path: str | Path, template: str) -> str:
    special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    if missing := [token for token in _LLAMA3_TOKENS if token not in special]:
        raise ConfigError(
            f"model.template={template!r} needs the special tokens {', '.join(missing)}, which the tokenizer of "
            f"model.path={str(path)!r} lacks; use model.template=tokenizer"
        )
    # Numbered tokens (<|reserved_special_token_7|>) are recognised by the text before the number.
    marks = sorted({re.sub(r"\d+\|>$", "", token) for token in special})
    text = _LLAMA3.strip().replace("CONTENT", _LLAMA3_CONTENT[template])
    return text.replace("AFTER_TURN", _LLAMA3_AFTER_TURN[template]).replace("MARKS", repr(marks))


def _templates(tokenizer: PreTrainedTokenizerBase, where: str) -> dict[str, str]:
    """The tokenizer's chat templates by name; that of conversations without tools is `default`."""
    templates = tokenizer.chat_template
    named = dict(templates or {}) if not isinstance(templates, str) else {"default": templates} if templates else {}
    if "default" not in named:
        kind = "no chat template" if not named else f"chat templates for {', '.join(sorted(named))} and no `default`"
        raise ConfigError(
            f"model.template='tokenizer': the tokenizer of {where} has {kind}; "
            f"use model.template=llama3-sampo or llama3, or a chat model"
        )
    return named


def _set_templates(tokenizer: PreTrainedTokenizerBase, named: dict[str, str]) -> None:
    tokenizer.chat_template = named["default"] if len(named) == 1 else named
