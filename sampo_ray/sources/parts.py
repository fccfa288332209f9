"""What a message's content holds: text, tool calls and results of tools. All else that has a meaning is refused."""

import functools
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from sampo_ray.sources.calls import calls_of, result_text
from sampo_ray.sources.unusable import EXTRAS, IMAGES, PREFIX, REASONING, Unusable

_TEXTS = ("text", "content", "value", "refusal")
_TEXT_TYPES = ("", "text", "input_text", "output_text", "refusal", "markdown")
_CALLS = ("tool_use", "tool_call", "tool_calls", "function_call")
_RESULTS = ("tool_result", "tool_response", "function_response")

_MEDIA = re.compile(
    r"(^|_)(images?|img|imgs|pictures?|photos?|audios?|videos?|attachments?|pixel_values)(_|$)|"
    r"^(files?|file_ids?|file_data|inline_data|blob|media|documents?|input_file)$"
)
_REASONING = re.compile(r"(^|_)(reasoning|thinking|thoughts?|cot)(_|$)")
_MEANING = re.compile(
    r"^(tools?|functions?|tool_\w+|function_\w+|system|system_prompt|instructions?|context|history|citations|input|"
    r"output|code|body|summary|suffix)$"
)
_BEGUN = re.compile(r"^(prefix|prefill|partial)$")
# Keys that only look like one of those.
_HARMLESS = ("reasoning_effort", "thinking_time", "tool_count", "system_fingerprint")


@dataclass
class Content:
    """The texts of a message's parts, its tool calls (OpenAI's form), and the turns of tools that it reports."""

    texts: list[str] = field(default_factory=list)
    calls: list[dict[str, Any]] = field(default_factory=list)
    results: list[dict[str, Any]] = field(default_factory=list)

    @property
    def text(self) -> str | None:
        """The parts' texts on lines of their own, as vLLM's chat endpoint joins them; None if there is none."""
        return "\n".join(self.texts) if self.texts else None


def content_of(value: object) -> Content:
    """The content of a message: text, a list of parts (OpenAI, Anthropic, Gemini, Bedrock), or one part. Unusable for
    parts that are lost in text, such as images or thoughts; a part whose fields are all null is nothing but its type.
    """
    content = Content()
    if isinstance(value, dict) and isinstance(value.get("parts"), list):  # an export of ChatGPT
        refuse_extras(value, ("parts", "content_type"))
        value = value["parts"]
    for part in value if isinstance(value, list) else [value]:
        if isinstance(part, str):
            content.texts.append(part)
        elif isinstance(part, dict):
            _add(part, content)
        elif part is not None:
            raise Unusable(EXTRAS)
    return content


def refuse_extras(value: Mapping[str, object], known: Collection[str]) -> None:
    """Unusable where keys other than the `known` ones hold what the text does not say: images and files, reasoning,
    tools, instructions, the beginning of an answer. Other keys, such as ids, names of models, times, scores and
    languages, are no part of what is trained.
    """
    for name, held in value.items():
        plain = snake(name)
        if name in known or plain in _HARMLESS or is_nothing(held):
            continue
        if _MEDIA.search(plain):
            raise Unusable(IMAGES)
        if _REASONING.search(plain) and not isinstance(held, int | float):
            raise Unusable(REASONING)
        if _BEGUN.search(plain):
            raise Unusable(PREFIX)
        if _MEANING.search(plain):
            raise Unusable(EXTRAS)


def is_nothing(value: object) -> bool:
    """Null, empty, false, zero, or a struct or list of such, as Parquet and Arrow fill in what a row lacks."""
    if isinstance(value, dict):
        return all(is_nothing(each) for each in value.values())
    return all(is_nothing(each) for each in value) if isinstance(value, list) else not value


@functools.cache
def snake(name: str) -> str:
    """A key in one spelling: `imageUrl`, `image-url` and `Image URL` are `image_url`."""
    return re.sub(r"[\s.-]+", "_", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name.strip())).lower()


def _add(part: Mapping[str, Any], content: Content) -> None:
    """Adds one part. Its kind is its `type`, or the only key that holds something (Gemini, Bedrock)."""
    kind = snake(str(part.get("type") or ""))
    nested = {snake(key): held for key, held in part.items() if isinstance(held, dict)}
    if kind in _CALLS or (not kind and any(key in ("function_call", "tool_use") for key in nested)):
        content.calls += calls_of([part])
    elif kind in _RESULTS:
        content.results.append(_result(part))
    elif not kind and (result := nested.get("function_response") or nested.get("tool_result")):
        content.results.append(_result(result))
    elif _MEDIA.search(kind):
        raise Unusable(IMAGES)
    elif _REASONING.search(kind) or part.get("thought") is True:
        if not is_nothing({key: held for key, held in part.items() if key not in ("type", "thought")}):
            raise Unusable(REASONING)
    elif kind in _TEXT_TYPES:
        refuse_extras(part, ("type", *_TEXTS))
        content.texts += [text for key in _TEXTS if isinstance(text := part.get(key), str)][:1]
    elif not is_nothing({key: held for key, held in part.items() if key != "type"}):
        raise Unusable(EXTRAS)


def _result(part: Mapping[str, Any]) -> dict[str, Any]:
    """The turn of a tool from a part that reports what it returned."""
    given = next((part[key] for key in ("content", "response", "output", "result") if part.get(key) is not None), "")
    inner = content_of(given) if isinstance(given, str | list) else Content([result_text(given)])
    names = {"tool_call_id": ("tool_use_id", "toolUseId", "tool_call_id", "id"), "name": ("name",)}
    found = {key: next((part[each] for each in keys if part.get(each)), None) for key, keys in names.items()}
    return {"role": "tool", "content": inner.text or ""} | {k: v for k, v in found.items() if isinstance(v, str)}
