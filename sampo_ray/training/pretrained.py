"""Whether a pretrained model is all there, weight by weight, before any of it is loaded.

`from_pretrained` leaves weights that the files lack at random values, and drops those that the model's class lacks, and
only warns. Here tensors without data, as the headers of the files describe them, are loaded in their place, and what it
would warn of is an error. That takes a second for a dense model of 70B parameters.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from sampo_ray.internals.transformers import memory_names, written_names
from sampo_ray.training.architecture import reads_ahead
from sampo_ray.training.model_files import Field, ModelFiles, Weight

KINDS = {
    "model.path": (AutoModelForCausalLM, "causal language model", MODEL_FOR_CAUSAL_LM_MAPPING),
    "reward.model": (
        AutoModelForSequenceClassification,
        "sequence classifier",
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    ),
}
"""What each field's models are: the class that loads them, its name, and the model's class for each configuration."""
BAD_CONFIG = (
    *(OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError),
    StrictDataclassError,
)
"""What transformers raises for a config.json with fields that are wrong, or do not go together."""
OTHER_TASKS = re.compile(r"For(?!CausalLM|ConditionalGeneration)[A-Z]\w*$")
"""Names of classes (`architectures` of a config.json) whose models are no language models."""

OLD_BUFFERS = re.compile(
    r"(^|\.)(attn|attention)\.bias$|(^|\.)(masked_bias|causal_mask|inv_freq|cos_cached|sin_cached|position_ids)$"
    r"|(^|\.)embed_positions\.weights$"
)
"""Names of masks and tables of positions that older releases saved, which a model computes by itself."""
FURTHER_PREDICTION = re.compile(r"(^|\.)mtp[._]")
"""Names of layers that predict further tokens, for speculative decoding, and are no part of the model proper."""
OTHER_HEADS = re.compile(r"^(lm_head|cls)\.|(^|\.)pooler\.")
"""Names of heads that a sequence classifier may have from the model that it was made of, and does not use."""


@dataclass(frozen=True)
class Opened:
    """The configuration of a model that can be loaded, and what the user is told about its files."""

    config: PretrainedConfig
    notes: list[str]


def open_model(field: Field, path: str) -> Opened:
    """Checks the folder or hub name `path`: its files, its configuration, and that its weights are all the model's.

    ConfigError, naming field, value and fix.
    """
    files = ModelFiles.find(field, path)
    files.check_kind()
    settings = files.settings("config.json")
    config = open_config(files, settings)
    if field == "model.path":
        check_language_model(files, config)
    found = files.weights(settings)
    model = made_of(files, config)
    notes = list[str]()
    if type(config) is not type(model.config):
        kind = type(model).__name__
        notes.append(f"{field}={path!r}: only its language model is used; versions and exports are of {kind}")
    check_weights(files, config, model, found)
    if (head := other_head(files, model, found)) is not None:
        notes.append(
            f"{field}={path!r}: {head} differs from the embeddings, though its config.json has "
            "tie_word_embeddings: true; versions and exports have both, and say false"
        )
    return Opened(config, notes)


def open_config(files: ModelFiles, settings: Mapping[str, Any]) -> PretrainedConfig:
    """The configuration in config.json, whose fields `settings` are. ConfigError if transformers cannot use it."""
    kind, remote = settings.get("model_type"), settings.get("auto_map")
    if kind not in CONFIG_MAPPING and remote:
        raise files.error(
            f"its config.json names code of its own (auto_map) for model_type {kind!r}, and such code is not run; use "
            "a model whose class transformers has"
        )
    if not isinstance(kind, str):
        raise files.error(f"its config.json has no model_type (got {kind!r}); save the model with save_pretrained")
    if kind not in CONFIG_MAPPING:
        raise files.error(
            f"transformers {transformers.__version__} has no model_type {kind!r}; use a model that it has, or a "
            "later release of this program"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config: PretrainedConfig = AutoConfig.from_pretrained(files.path, trust_remote_code=False)
    except BAD_CONFIG as error:
        raise files.error(f"its config.json cannot be used ({on_one_line(error)}); correct it") from None
    if "generation_config.json" in files.names and files.field == "model.path":
        try:
            ends = GenerationConfig(**files.settings("generation_config.json")).eos_token_id
            if not all(isinstance(end, int | None) for end in (ends if isinstance(ends, list) else [ends])):
                raise ValueError(f"eos_token_id={ends!r} is no token id, nor a list of them")
        except (ValueError, TypeError, AttributeError) as error:
            reason = on_one_line(error)
            raise files.error(f"its generation_config.json cannot be used ({reason}); correct or remove it") from None
    return config


def check_language_model(files: ModelFiles, config: PretrainedConfig) -> None:
    """ConfigError unless a configuration is one of a model that continues a text."""
    named = next(iter(config.architectures or ()), "")
    if "modules.json" in files.names:
        raise files.error("is an embedding model (modules.json of sentence-transformers); name a causal language model")
    if config.is_encoder_decoder:
        raise files.error(f"is an encoder-decoder model ({config.model_type}); name a causal language model")
    if OTHER_TASKS.search(named):
        raise files.error(f"was saved as {named}, which is no causal language model; name one that was saved as such")
    if reason := reads_ahead(config):
        raise files.error(f"reads both ways, as encoders do ({reason}); name a causal language model")


def made_of(files: ModelFiles, config: PretrainedConfig) -> PreTrainedModel:
    """The model of a configuration, on the meta device."""
    auto, kind, known = KINDS[files.field]
    if type(config) not in known:
        part = config.get_text_config()
        fix = f"name its language model ({part.model_type}), saved by itself" if type(part) in known else "name another"
        raise files.error(f"transformers has no {kind} for model_type {config.model_type!r}; {fix}")
    try:
        with torch.device("meta"):
            model: PreTrainedModel = auto.from_config(config, trust_remote_code=False)
    except ImportError as error:
        raise files.error(f"needs a library that is not installed ({on_one_line(error)}); install it") from None
    except (*BAD_CONFIG, RuntimeError) as error:
        raise files.error(f"no model can be made of its config.json ({on_one_line(error)}); correct it") from None
    return model


@dataclass(frozen=True)
class Comparison:
    """What loading a checkpoint makes of a model: names of weights that it leaves at random, names that it drops, and
    shapes that differ (name, in the files, in the model). `unfit`: the weights cannot be converted into the model's.
    """

    missing: list[str]
    unused: list[str]
    shapes: list[tuple[str, list[int], list[int]]]
    unfit: bool = False

    @classmethod
    def of(cls, model: PreTrainedModel, found: Mapping[str, Weight]) -> Comparison:
        """Loads tensors without data into another model like this one, which may be on the meta device."""
        empty = {name: torch.empty(each.shape, dtype=torch.bfloat16, device="meta") for name, each in found.items()}
        load: Callable[..., Any] = type(model).from_pretrained
        where: dict[str, Any] = {"device_map": {"": "meta"}, "dtype": torch.bfloat16, "output_loading_info": True}
        try:
            _, loaded = load(None, config=model.config, state_dict=empty, ignore_mismatched_sizes=True, **where)
        except (RuntimeError, ValueError):  # of experts that are not all there, for example
            return cls(sorted(written_names(model) - found.keys()), [], [], unfit=True)
        shapes = [(name, list(there), list(here)) for name, there, here in loaded["mismatched_keys"]]
        made_of_several = any(name not in found for name, *_ in shapes)
        if made_of_several and (absent := written_names(model) - found.keys()):
            return cls(sorted(absent), [], [])
        return cls(sorted(loaded["missing_keys"]), sorted(loaded["unexpected_keys"]), sorted(shapes))

    @property
    def exact(self) -> bool:
        return not (self.missing or self.unused or self.shapes or self.unfit)


def check_weights(
    files: ModelFiles, config: PretrainedConfig, model: PreTrainedModel, found: Mapping[str, Weight]
) -> None:
    """ConfigError unless the files have all weights of `model` and no others. Those of a multimodal model may have its
    other parts; then `config` is of the whole model.
    """
    compared, name = Comparison.of(model, found), type(model).__name__
    if compared.shapes:
        weight, there, here = compared.shapes[0]
        raise files.error(
            f"{weight} has the shape {there} in its files and {here} by its config.json; correct config.json, or "
            "download or save the model again"
        )
    if len(compared.missing) == 1 and compared.missing[0] == head_name(model):
        raise files.error(
            f"has no weights for {compared.missing[0]}, and its config.json has tie_word_embeddings: false; set that "
            "to true if the head has the weights of the embeddings, else save the whole model again"
        )
    if compared.missing:
        raise files.error(lacks(compared.missing, model))
    if compared.unfit:
        raise files.error(f"its weights cannot be converted into those of {name}; download or save the model again")
    unused = [each for each in compared.unused if not is_harmless(files.field, model.config.get_text_config(), each)]
    if unused and not is_part(config, model, found):
        raise files.error(
            f"has weights that {name} lacks, so that versions would lack them: {some(unused)}; name a model without "
            f"them: load it as {name} and save it with save_pretrained, if it is right without them"
        )


def is_harmless(field: Field, config: PretrainedConfig, name: str) -> bool:
    """Whether a model of this text configuration is right without a weight of this name, which its class lacks."""
    layer = re.search(r"\blayers\.(\d+)\.", name)
    if layer and int(layer[1]) >= config.num_hidden_layers and getattr(config, "num_nextn_predict_layers", 0):
        return True
    known = [OLD_BUFFERS, FURTHER_PREDICTION, *([OTHER_HEADS] if field == "reward.model" else [])]
    return any(each.search(name) for each in known)


def is_part(config: PretrainedConfig, model: PreTrainedModel, found: Mapping[str, Weight]) -> bool:
    """Whether `model` is a part of the multimodal one that `config` and the files are of, which are complete."""
    whole = getattr(transformers, next(iter(config.architectures or ()), ""), None)
    if type(config) is type(model.config) or whole is None or not issubclass(whole, PreTrainedModel):
        return False
    with torch.device("meta"):
        return Comparison.of(whole._from_config(config), found).exact


def other_head(files: ModelFiles, model: PreTrainedModel, found: Mapping[str, Weight]) -> str | None:
    """The name of a head in the files that is not the embeddings, where the configuration ties the two."""
    if not is_tied(model):
        return None
    shape = model.get_output_embeddings().weight.shape
    same_shape = [name for name, weight in found.items() if weight.shape == shape]
    stored = {memory: name for name, memory in memory_names(model, same_shape).items()}
    pairs = [(stored.get(tied), stored.get(source)) for tied, source in model.all_tied_weights_keys.items()]
    for tied, source in pairs:
        if tied and source and not torch.equal(files.read(tied, found[tied]), files.read(source, found[source])):
            return tied
    return None


def is_tied(model: PreTrainedModel) -> bool:
    """Whether a model's head has the weights of its embeddings."""
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def head_name(model: PreTrainedModel) -> str | None:
    """The name of the weights of a model's head, if it has one."""
    head = model.get_output_embeddings()
    return next((name for name, each in model.named_parameters() if head and each is head.weight), None)


def lacks(missing: Sequence[str], model: PreTrainedModel) -> str:
    """What is said of files without these weights of a model."""
    name = type(model).__name__
    return f"has no weights for {some(missing)}, which would be random; use a model that was saved as {name}"


def some(names: Sequence[str]) -> str:
    """The first three of the names, and how many there are."""
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + rest


def on_one_line(error: BaseException) -> str:
    """The text of an error without line breaks: the first line of some only says where the second is from."""
    return " ".join(str(error).split())[:300] or type(error).__name__
