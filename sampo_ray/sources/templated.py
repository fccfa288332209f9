"""Conversations that a chat template has written already: ChatML, Llama, Gemma, Zephyr and others, as one text.

What such a template puts around a turn is taken off exactly. Its marks never stay in a text: an answer may end with an
end-of-turn mark, which is cut; every other mark that is left over, in the middle of a text or of half a template, makes
the row unusable, unless it stands in quotes of its own. So do placeholders of images.
"""

import re

from sampo_ray.sources.transcripts import Piece
from sampo_ray.sources.unusable import IMAGES, MARKS, Unusable

_ROLES = {
    **{name: name for name in ("system", "user", "assistant", "tool")},
    **dict.fromkeys(("developer", "[inst]<<sys>>", "[system_prompt]"), "system"),
    **dict.fromkeys(("prompter", "human", "[inst]", "<</sys>>"), "user"),
    **dict.fromkeys(("model", "chatbot", "[/inst]"), "assistant"),
    **dict.fromkeys(("ipython", "observation", "tool_response"), "tool"),
}


class _Template:
    """`header` opens a turn and names its `role`, `end` closes one; both take the white space that the template writes.

    `opens` is what may come in front of the first header (a group `system`: a turn without a header). `marked`: no
    turn ends where the next one begins, each has its end mark. `last`: the roles of turns that may end with the text.
    `trimmed`: white space around a text cannot be told from the template's.
    """

    def __init__(
        self,
        header: str,
        end: str,
        opens: str = "(?:<s>)?",
        *,
        marked: bool = True,
        last: tuple[str, ...] = ("assistant",),
        trimmed: bool = False,
    ) -> None:
        self.header, self.opens = re.compile(header), re.compile(rf"\s*(?:{opens})\s*")
        self.bound = re.compile(rf"(?P<end>{end})|(?={header})")
        self.marked, self.last, self.trimmed = marked, last, trimmed

    def split(self, text: str, more: str) -> list[Piece] | None:
        """The turns of `text` with `more` behind it; None for a text of another form. Raises Unusable."""
        opened = self.opens.match(text)
        at = opened.end() if opened else 0
        if not self.header.match(text, at):
            return None
        preface = (opened.groupdict().get("system") or "").strip() if opened else ""
        pieces, text = [Piece("system", preface)] if preface else [], text + more
        while at < len(text) and not (pieces and _ENDS.match(text, at)):
            if not (header := self.header.match(text, at)):
                raise Unusable(MARKS)
            piece, at = self._turn(text, header)
            pieces.append(piece)
        return pieces

    def _turn(self, text: str, header: re.Match[str]) -> tuple[Piece, int]:
        """The turn behind a header, and where it ends with all that the template writes behind it."""
        role = _ROLES.get("".join(header["role"].split()).lower())
        bound = self.bound.search(text, header.end())
        fits = role in self.last if bound is None else bound["end"] is not None or not self.marked
        if role is None or not fits:
            raise Unusable(MARKS)
        if bound is None:
            content, at = text[header.end() :], len(text)
        else:
            content, at = text[header.end() : bound.start()], bound.end()
            content = content if bound["end"] is not None else content.removesuffix("\n")
        return Piece(role, content.strip() if self.trimmed else content, closed=bound is not None), at


_PIPED = r"<\|(?P<role>system|user|assistant|prompter|observation)\|>\n?"
_TEMPLATES = (
    # ChatML, Phi-4
    _Template(
        r"<\|im_start\|>(?P<role>\w+)(?:<\|im_sep\|>|\n)",
        r"<\|im_end\|>\s*",
        r"(?:<s>|<\|begin_of_text\|>|<\|endoftext\|>|<\|startoftext\|>)?",
    ),
    # Llama 3 and 4
    _Template(
        r"<\|start_header_id\|>(?P<role>\w+)<\|end_header_id\|>\n{0,2}",
        r"<\|(?:eot_id|eom_id|end_of_text)\|>\s*",
        r"(?:<\|begin_of_text\|>)*",
    ),
    _Template(
        r"<\|header_start\|>(?P<role>\w+)<\|header_end\|>\n{0,2}", r"<\|eo[tm]\|>\s*", r"(?:<\|begin_of_text\|>)?"
    ),
    # Gemma
    _Template(r"<start_of_turn>(?P<role>\w+)\n", r"<end_of_turn>\s*", "(?:<bos>)*"),
    # Granite
    _Template(r"<\|start_of_role\|>(?P<role>\w+)<\|end_of_role\|>", r"<\|end_of_text\|>\s*"),
    # Command R
    _Template(
        r"<\|START_OF_TURN_TOKEN\|><\|(?P<role>USER|CHATBOT|SYSTEM)_TOKEN\|>",
        r"<\|END_OF_TURN_TOKEN\|>\s*",
        "(?:<BOS_TOKEN>)?",
    ),
    # Zephyr, Phi-3, Tulu, GLM-4, OpenAssistant
    _Template(
        _PIPED,
        r"(?:</s>|<\|end\|>|<\|endoftext\|>)\s*",
        r"(?:<s>|<\|endoftext\|>|\[gMASK\]\s?<sop>)?",
        marked=False,
        last=("system", "user", "assistant", "tool"),
    ),
    # OpenChat
    _Template(r"GPT4 Correct (?P<role>User|Assistant):[ ]?", r"<\|end_of_turn\|>\s*"),
    # NeMo-Aligner
    _Template(
        r"<extra_id_[01]>(?P<role>System|User|Assistant)\n",
        r"\n?<extra_id_1>\s*\Z",
        r"(?:<extra_id_0>System\n\s*(?=<extra_id_1>))?",  # it writes an empty one where there is none
        marked=False,
        last=("system", "user", "assistant"),
    ),
    # DeepSeek
    _Template(
        r"<\uff5c(?P<role>User|Assistant)\uff5c>",
        r"<\uff5cend▁of▁sentence\uff5c>\s*",
        r"<\uff5cbegin▁of▁sentence\uff5c>(?P<system>[^<]*)|",
        marked=False,
        last=("user", "assistant"),
        trimmed=True,
    ),
    # Llama 2, Mistral
    _Template(
        r"(?P<role>\[INST\]\s*<<SYS>>|<</SYS>>|\[/?INST\]|\[SYSTEM_PROMPT\])",
        r"\s*(?:</s>\s*(?:<s>)?|\[/SYSTEM_PROMPT\])\s*",
        "(?:<s>)*",
        marked=False,
        trimmed=True,
    ),
)

_MARK = re.compile(
    r"<\|/?[A-Za-z]\w{2,}\|>|<\uff5c[^\uff5c]{2,40}\uff5c>|</?(?:start|end)_of_turn>|\A\s*<s>|"
    r"\[/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS|gMASK)\]|<</?SYS>>|<(?:BOS|EOS)_TOKEN>|<extra_id_\d+>"
)
_ENDS = re.compile(
    r"(?:(?:<\|(?:im_end|eot_id|eom_id|eot|end|end_of_text|endoftext|end_of_turn|return|END_OF_TURN_TOKEN)\|>"
    r"|</s>|<end_of_turn>|<eos>|<\uff5cend▁of▁sentence\uff5c>)\s*)+\Z"
)
_IMAGE = re.compile(
    r"<\|(?:image|img|vision|audio|video|box|object_ref)\w*\|>|<(?:image|img|video|audio)[_ ]?\d+>|"
    r"<(?:start|end)_of_(?:image|audio)>|<(?:image|audio)_soft_token>|<image_placeholder>|<ImageHere>|<IMG_CONTEXT>|"
    r"\[IMG\]|<img>[^<]+</img>",
    re.IGNORECASE,
)
_PLACEHOLDER = re.compile(r"<image>(?![\s\S]*</image>)|\A\s*<(?:video|audio)>|^<(?:video|audio)>$", re.MULTILINE)
# In quotes of its own, a mark is what the text is about, such as code.
_QUOTED = re.compile(r"([\"'`])(?:<[^<>\s]{1,40}>|<<?/?SYS>>|\[/?[A-Za-z_]+\])\1")
_LEADING = re.compile(r"\s*<(image|video|audio)>(?!.*</\1>)", re.DOTALL)
# What each of the marks above has a part of, by its first character: a search for these is much faster.
_PARTS = {
    "<": [
        "<|",
        "<\uff5c",
        "<s>",
        "</s>",
        "_of_",
        "SYS>>",
        "_TOKEN>",
        "<extra_id_",
        "<eos>",
        "<im",
        "<Im",
        "<IM",
        "<video",
        "<audio",
    ],
    "[": ["INST]", "SYSTEM_PROMPT]", "[AVAILABLE_TOOLS]", "[TOOL_", "[gMASK]", "[IMG]", "[img]"],
    "GPT4 Correct ": [""],
}


def templated(text: str, more: str = "") -> list[Piece] | None:
    """The turns of `text` with `more` behind it; None if no known chat template has written `text`. Raises Unusable."""
    if not _suspect(text):
        return None
    return next((pieces for each in _TEMPLATES if (pieces := each.split(text, more)) is not None), None)


def plain(text: str, role: str) -> str:
    """A turn's text without the end-of-turn mark of an answer. Unusable if it has other marks, or stands for images."""
    if not _suspect(text):
        return text
    struck = "<s>" in text  # HTML: what is crossed out
    if role == "assistant" and not (struck and text.rstrip().endswith("</s>")):
        text = _ENDS.sub("", text)
    bare = _QUOTED.sub("", text)
    if _IMAGE.search(bare) or (_LEADING.match(bare) if role == "assistant" else _PLACEHOLDER.search(bare)):
        raise Unusable(IMAGES)
    if _MARK.search(bare) or ("</s>" in bare and not struck):
        raise Unusable(MARKS)
    return text


def _suspect(text: str) -> bool:
    return any(first in text and any(part in text for part in parts) for first, parts in _PARTS.items())
