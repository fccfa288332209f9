"""A model's tokenizer, with the ids of its own file: transformers builds some anew, which then lose spaces or bytes."""

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from sampo_ray.errors import ConfigError, first_line

PROBES = (
    "two and two is four",
    "Two  spaces, then:\n\n  an indented line\n\tand a tab.",
    "def f(x):\n    return x[0] + 12345 * 3.14  # I'll don't",
    "Ünïcödé, 北京 и Москва, ½ 🙂 ﬁ",
    " a space in front",
)
"""Texts on which a tokenizer is tried: what people write, with what tokenizers are known to lose."""

_ADDS_NO_SPACE: dict[str, dict[str, object]] = {
    "Metaspace": {"prepend_scheme": "never"},
    "ByteLevel": {"add_prefix_space": False},
}


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The policy's tokenizer, from a Hugging Face folder or hub name. ConfigError if there is none that can be used."""
    where = f"model.path={str(path)!r}"
    try:
        tokenizer = exact_tokenizer(path)
    except (OSError, ValueError, KeyError, TypeError) as error:  # TypeError: a list as `eos_token`
        reason, advice = first_line(error), "name a Hugging Face folder or hub name that has one"
        raise ConfigError(f"{where}: no tokenizer can be loaded from it ({reason}); {advice}") from None
    if not isinstance(getattr(tokenizer, "backend_tokenizer", None), Tokenizer):
        raise ConfigError(
            f"{where}: its tokenizer {type(tokenizer).__name__} has no form of the tokenizers library; save a "
            "tokenizer.json into the folder, or name another model"
        )
    return tokenizer


def exact_tokenizer(path: str | Path, **settings: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a Hugging Face folder or hub name, with the ids of its `tokenizer.json` where it has one.

    Raises ValueError if it cannot be had with those ids, and what AutoTokenizer raises.
    """
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path, trust_remote_code=False, **settings)
    file = _file_of(path)
    if file is None or not _differs(tokenizer, own := Tokenizer.from_file(file)):
        return tokenizer
    # The class that the folder names builds its own normalizer and splitting around the file's vocabulary.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(path, **settings)
    if probe := _differs(tokenizer, own):
        raise ValueError(f"transformers tokenizes {probe!r} unlike the folder's tokenizer.json")
    return tokenizer


def plain_tokenizer(tokenizer: PreTrainedTokenizerBase, known: Sequence[str] = (), prefix: bool = True) -> Tokenizer:
    """The tokenizer for text in which special tokens are plain text, but for those in `known`; never cut or padded.

    Without `prefix` it adds no space in front, as within a text.
    """
    plain: Tokenizer = copy.deepcopy(tokenizer.backend_tokenizer)  # another thread may be encoding a prompt with it
    if known or not prefix:
        tree: dict[str, Any] = json.loads(plain.to_str())
        for token in tree["added_tokens"]:
            token["special"] = token["special"] and token["content"] not in known
        if not prefix:
            tree["normalizer"], tree["pre_tokenizer"] = _inner(tree["normalizer"]), _inner(tree["pre_tokenizer"])
        plain = Tokenizer.from_str(json.dumps(tree))
    plain.encode_special_tokens = True
    plain.no_truncation()
    plain.no_padding()
    return plain


def token_starts(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The characters of a text at which its tokens begin; all of them where the tokenizer does not say it."""
    if not tokenizer.is_fast:
        return list(range(len(text)))
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return sorted({begin for begin, _ in offsets})


def lost_text(tokenizer: PreTrainedTokenizerBase, plain: Tokenizer) -> tuple[str, str] | None:
    """The first of PROBES that comes back neither as it is nor as the normalizer has it, with what comes back."""
    for probe in PROBES:
        back = _decoded(tokenizer, plain, probe)
        if back.strip(" ") not in (probe.strip(" "), _normalized(plain, probe)):
            return probe, back
    return None


def changed_text(tokenizer: PreTrainedTokenizerBase, plain: Tokenizer) -> tuple[str, str] | None:
    """The first of PROBES that the tokenizer's normalizer changes, with what comes back."""
    for probe in PROBES:
        back = _decoded(tokenizer, plain, probe)
        if back.strip(" ") != probe.strip(" "):
            return probe, back
    return None


def _file_of(path: str | Path) -> str | None:
    """The `tokenizer.json` of a folder, or of a hub name that was loaded."""
    if Path(path).is_dir():
        file = Path(path) / "tokenizer.json"
        return str(file) if file.exists() else None
    cached = try_to_load_from_cache(str(path), "tokenizer.json")
    return cached if isinstance(cached, str) else None


def _decoded(tokenizer: PreTrainedTokenizerBase, plain: Tokenizer, text: str) -> str:
    ids = plain.encode(text, add_special_tokens=False).ids
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _normalized(plain: Tokenizer, text: str) -> str:
    """`text` as the tokenizer's normalizer has it, with spaces written as spaces and none around it."""
    return (plain.normalizer.normalize_str(text) if plain.normalizer else text).replace("▁", " ").strip(" ")


def _differs(tokenizer: PreTrainedTokenizerBase, own: Tokenizer) -> str | None:
    """The first of PROBES whose ids are not those of the file."""
    own.no_truncation()
    own.no_padding()
    for probe in PROBES:
        if tokenizer(probe, add_special_tokens=False)["input_ids"] != own.encode(probe, add_special_tokens=False).ids:
            return probe
    return None


def _inner(part: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """A normalizer or pre-tokenizer that adds no space in front of a text."""
    if part is None or part["type"] == "Prepend":
        return None
    changed = {**part, **{k: v for k, v in _ADDS_NO_SPACE.get(part["type"], {}).items() if k in part}}
    for name in ("normalizers", "pretokenizers"):
        if name in part:
            changed[name] = [each for each in map(_inner, part[name]) if each is not None]
    return changed
