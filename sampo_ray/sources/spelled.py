"""Lists and objects that a cell of a table spells as text: as JSON, as Python writes them, or as NumPy does."""

import ast
import io
import itertools
import json
import re
import tokenize


def spelled(value: object) -> object:
    """The list or object that a text spells; any other value, and text that spells neither, as it is."""
    if not isinstance(value, str):
        return value
    text = value.strip()
    if text[:1] + text[-1:] not in ("[]", "{}"):
        return value
    for read in (json.loads, _of_python):
        try:
            found = read(text)
        except (ValueError, SyntaxError, tokenize.TokenError, RecursionError, MemoryError):
            continue
        return found if isinstance(found, list | dict) else value
    return value


def _of_python(text: str) -> object:
    return ast.literal_eval(_with_commas(re.sub(r"\}\s*\n\s*\{", "}, {", text)))


def _with_commas(text: str) -> str:
    """NumPy's text with commas between its elements; Python would take two texts without one for a single text."""
    parts = [token for token in tokenize.generate_tokens(io.StringIO(text).readline) if token.string.strip()]
    joined = [_is_element(one) and _is_element(other) for one, other in itertools.pairwise(parts)]
    if not any(joined):
        return text
    commas = ["," if comma else "" for comma in [*joined, False]]
    return " ".join(part.string + comma for part, comma in zip(parts, commas, strict=True))


def _is_element(token: tokenize.TokenInfo) -> bool:
    return token.type in (tokenize.STRING, tokenize.NUMBER)
