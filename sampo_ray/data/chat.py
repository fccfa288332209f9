"""The prompt format of trainer, rollouts and endpoint: a chat template and the token that ends a turn.

`ChatFormat.save` writes both into a tokenizer folder. vLLM renders requests with that folder, so the endpoint's token
ids are those of `ChatFormat.prompt_ids`.
"""

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import jinja2
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from sampo_ray.data.sources import Message
from sampo_ray.errors import ConfigError, first_line

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

    The `llama3*` templates turn special tokens that a user types into plain text, by putting a space into them
    (`<|eot_id|>` becomes `< |eot_id|>`). The template does this, so the endpoint does it too. The `tokenizer` template
    is the model's, unchanged: there typed special tokens become special ids, in training as at the endpoint. Responses
    are encoded as plain text with every template.
    """

    name: str
    tokenizer: PreTrainedTokenizerBase
    end_of_turn_id: int

    @classmethod
    def load(cls, path: str | Path, template: TemplateName) -> "ChatFormat":
        """Loads the tokenizer of a Hugging Face folder or hub name. ConfigError if it does not fit `template`."""
        try:
            tokenizer = AutoTokenizer.from_pretrained(path)
        except (OSError, ValueError, KeyError) as error:
            reason, advice = first_line(error), "name a Hugging Face folder or hub name that has one"
            message = f"model.path={str(path)!r}: no tokenizer can be loaded from it ({reason}); {advice}"
            raise ConfigError(message) from None
        if template != "tokenizer":
            tokenizer.chat_template = _llama3_template(tokenizer, path, template)
        end_of_turn = _end_of_turn(tokenizer, path) if template == "tokenizer" else "<|eot_id|>"
        tokenizer.eos_token = end_of_turn
        return cls(template, tokenizer, tokenizer.get_vocab()[end_of_turn])

    def render(self, messages: Sequence[Message]) -> str:
        """The text of a conversation, up to the header of the answer. ValueError if the template refuses it."""
        try:
            return str(self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True))
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template refuses the messages: {error}") from None

    def encode_prompts(self, rendered: Sequence[str]) -> list[list[int]]:
        """Token ids of texts from `render`. No BOS is added: the template has written it."""
        return self.tokenizer(list(rendered), add_special_tokens=False)["input_ids"] if rendered else []

    def encode_responses(self, texts: Sequence[str], closed: bool = True) -> list[list[int]]:
        """Token ids of responses; with `closed`, each ends in the end-of-turn token."""
        end = [self.end_of_turn_id] if closed else []
        return [encoding.ids + end for encoding in self._plain.encode_batch_fast(list(texts), add_special_tokens=False)]

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

    def save(self, folder: str | Path) -> None:
        """Writes a tokenizer folder with the template and, as `eos_token`, the end-of-turn token."""
        self.tokenizer.save_pretrained(folder)

    @cached_property
    def _plain(self) -> Tokenizer:
        # A copy, because the switch is a state of the tokenizer and another thread may be encoding a prompt.
        plain: Tokenizer = copy.deepcopy(self.tokenizer.backend_tokenizer)
        plain.encode_special_tokens = True
        return plain


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


def _end_of_turn(tokenizer: PreTrainedTokenizerBase, path: str | Path) -> str:
    """The first special token that the model's template writes after an assistant's text."""
    if not tokenizer.chat_template:
        raise ConfigError(
            f"model.template='tokenizer': the tokenizer of model.path={str(path)!r} has no chat template; "
            f"use model.template=llama3-sampo or llama3, or a chat model"
        )
    conversation = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "sampo"}]
    tail = str(tokenizer.apply_chat_template(conversation, tokenize=False)).rpartition("sampo")[2]
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    if (token := next((token for token in tokenizer.tokenize(tail) if token in special), None)) is not None:
        return token
    raise ConfigError(
        f"model.template='tokenizer': the chat template of model.path={str(path)!r} ends an assistant's turn with "
        f"{tail!r}, which has no special token to stop on; use model.template=llama3-sampo or llama3"
    )
