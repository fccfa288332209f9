"""Shows that a chat template writes the answers of ordinary conversations as they are, so that it need not be run for
each of them.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jinja2 import Environment, TemplateSyntaxError, nodes

from sampo_ray.data.template import Asked, Turn, answer_text, opened_by, rendered
from sampo_ray.sources.messages import Message, Unusable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_GENERATION = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")  # a statement that transformers adds
_JOINING = ("join", "tojson", "default", "d", "indent", "map", "selectattr", "rejectattr", "select", "reject")
"""Filters whose arguments are not looked for in the text."""
_SYSTEM, _ODD = "Be brief.\n", " What about {{ this }}, <b>that</b>\nand \"these\" & 'those'?\n\n"
_TURNS = (
    ("user", "Where is the mill?"),
    ("assistant", "In a copper hill:\n\n1. walk, 2. ask"),
    ("user", _ODD),
    ("assistant", "\tThere."),
    ("user", "7"),
)
_ANSWERS = (
    "Yes",
    "It's in {{ a }} hill; [see] this & \\n that, <b>1 < 2</b>:\n\n```py\nif x:\n    y = {'a': \"b\"}\n```\n\n- Ü 北",
    "{" + "A long answer, with 12 words a line and a line that ends here.\n" * 64 + "}",
)


@dataclass(frozen=True)
class Verbatim:
    """A template that writes an answer as `lead`, the answer, `after` in an ordinary conversation: a system turn or
    none, then turns of user and assistant, without tools, none of which holds one of `words`.
    """

    lead: str
    after: str
    words: tuple[str, ...]

    @classmethod
    def of(cls, tokenizer: "PreTrainedTokenizerBase", turn: Turn) -> "Verbatim | None":
        """What is shown by trying the template on made-up conversations; None where it is not so."""
        words = _looked_for(str(tokenizer.get_chat_template()))
        if words is None or any(len(word.strip()) < 2 for word in words):  # which most texts hold
            return None
        if opened_by(turn.prompt) or not _tried(tokenizer, turn):
            return None
        # Templates know these by name.
        words |= {str(token) for token in tokenizer.special_tokens_map.values()}
        return cls(turn.lead, turn.after, tuple(word for word in words if not any(o in word for o in words - {word})))

    def response(self, asked: Asked, answer: Message) -> str | None:
        """The text of an answer as a response to a prompt, where it is known without running the template."""
        text: str = answer["content"]
        if asked.tools or text != text.strip() or not text or len(answer) > 2 or not _is_ordinary(asked.messages):
            return None
        texts = [text, *(message["content"] for message in asked.messages)]
        if any(word in each for word in self.words for each in texts):
            return None
        return self.lead + text + self.after


def _is_ordinary(messages: Sequence[Message]) -> bool:
    turns = messages[1:] if messages[0]["role"] == "system" else messages
    roles = ("user", "assistant")
    return len(turns) % 2 == 1 and all(len(turn) == 2 and turn["role"] == roles[i % 2] for i, turn in enumerate(turns))


def _tried(tokenizer: "PreTrainedTokenizerBase", turn: Turn) -> bool:
    for messages in _conversations():
        try:
            text = rendered(tokenizer, messages, ask=True)
        except ValueError:
            continue  # a prompt of this kind is refused
        for answer in _ANSWERS:
            try:
                made = answer_text(tokenizer, turn, Asked(messages, None, text), _message("assistant", answer))
            except Unusable:
                return False
            if made != turn.lead + answer + turn.after:
                return False
    return True


def _conversations() -> Iterator[list[Message]]:
    turns = [_message(*each) for each in _TURNS]
    for first in ([], [_message("system", _SYSTEM)]):
        yield from ([*first, *turns[begin:end]] for begin, end in ((0, 1), (2, 3), (0, 3), (2, 5), (0, 5)))


def _looked_for(template: str) -> set[str] | None:
    """What a template may look for within a text, or take off or out of it: all of its constants but those that it only
    writes, or compares whole. None if it cannot be read.
    """
    try:
        tree = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(_GENERATION.sub("", template))
    except TemplateSyntaxError:
        return None
    used: list[nodes.Node] = []
    for compare in tree.find_all(nodes.Compare):
        used.append(compare.expr)
        # A role is a word that is compared whole; what is no word may be a part of a text.
        plain = _is_named(compare.expr)
        used += [op for op in compare.ops if not (plain and all(map(_is_word, _constants(op))))]
    for call in tree.find_all(nodes.Call):
        if getattr(call.node, "attr", None) != "get" and getattr(call.node, "name", None) != "raise_exception":
            used += [*call.args, *call.kwargs]
    for each in tree.find_all(nodes.Filter):
        used += each.args if each.name not in _JOINING else []
    used += [assign.node for assign in tree.find_all(nodes.Assign)]
    used += [loop.iter for loop in tree.find_all(nodes.For)]
    constants = (const.value for node in used for const in _constants(node))
    return {value for value in constants if isinstance(value, str) and value.strip()}


def _is_named(node: nodes.Node) -> bool:
    """Whether an expression is a value by name, such as a message's role, and not a part of a text."""
    if isinstance(node, nodes.Getitem):
        return isinstance(node.arg, nodes.Const) and isinstance(node.arg.value, str)
    return isinstance(node, nodes.Name | nodes.Getattr)


def _is_word(const: nodes.Const) -> bool:
    return not isinstance(const.value, str) or re.fullmatch(r"\w*", const.value) is not None


def _constants(node: nodes.Node) -> Iterator[nodes.Const]:
    """The constants of an expression, without the names of keys."""
    keys = {id(each.arg) for each in (node, *node.find_all(nodes.Getitem)) if isinstance(each, nodes.Getitem)}
    found = (node,) if isinstance(node, nodes.Const) else node.find_all(nodes.Const)
    yield from (const for const in found if id(const) not in keys)


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}
