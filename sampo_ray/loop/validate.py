"""Checks a configuration against the files that it names, in seconds, before Ray or an engine starts."""

import warnings

from transformers import AutoConfig, PretrainedConfig

from sampo_ray.config.keys import is_json, parse
from sampo_ray.config.run import RunConfig
from sampo_ray.data.chat import ChatFormat
from sampo_ray.data.rewards import check_reward
from sampo_ray.data.sources import check_source
from sampo_ray.errors import ConfigError, KeysError
from sampo_ray.run.storage import Place, absolute
from sampo_ray.run.trackers import check_trackers
from sampo_ray.training.memory import check_device
from sampo_ray.training.policy import check_architecture, on_meta


def check(config: RunConfig) -> None:
    """Opens the model's configuration and tokenizer, the data and the reward source, and tries the prompt format.

    Raises ConfigError or DataError, naming the field and the fix.
    """
    path = config.model.path
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model.path={path!r}: no model can be opened there ({str(error).splitlines()[0]}); "
            "name a Hugging Face folder or hub name"
        ) from None
    check_architecture(on_meta(model, config.model.lora))
    positions = getattr(model, "max_position_embeddings", None)
    if positions is not None and config.data.max_length > positions:
        raise ConfigError(
            f"data.max_length={config.data.max_length} is more than the {positions} positions of {path!r}; "
            "make it smaller"
        )
    check_rope(model, config.data.max_length)
    chat = ChatFormat.load(path, config.model.template)
    if len(chat.tokenizer) > model.vocab_size:
        raise ConfigError(
            f"model.path={path!r}: the tokenizer has {len(chat.tokenizer)} tokens, the model {model.vocab_size}; "
            "they do not belong together"
        )
    if config.online:
        row = check_source(str(config.data.prompts), "prompts")
        check_reward(config.reward)
    else:
        row = check_source(str(config.data.train), "pairs")
    chat.prompt_ids(row.prompt)
    check_trackers(config)
    check_keys_file(config.serve.keys_file)


def check_rope(model: PretrainedConfig, max_length: int) -> None:
    """ConfigError where rotary frequencies would depend on other pairs: `longrope` goes by a row's largest position."""
    settings = getattr(model, "rope_parameters", None) or {}
    name = "original_max_position_embeddings"
    trained = int(settings.get(name) or getattr(model, name, None) or 0)
    if settings.get("rope_type") == "longrope" and max_length > trained:
        raise ConfigError(
            f"data.max_length={max_length} is more than the {trained} positions up to which longrope is one model; "
            "make it smaller"
        )


def check_fit(config: RunConfig) -> None:
    """ConfigError when a resolved configuration needs GPUs that it lacks, or is for this machine and does not fit."""
    if config.model.flex and not config.trainer.num_gpus:
        raise ConfigError(
            "model.attention='flex' needs GPUs, since it has no backward pass on CPUs; use model.attention=segments"
        )
    if config.profile == "laptop":
        check_device(AutoConfig.from_pretrained(config.model.path), config)


def check_keys_file(file: str | None) -> None:
    """ConfigError when the endpoint could not read its keys."""
    try:
        if file is not None:
            parse(Place(absolute(file)).read(), is_json(file))
    except (OSError, KeysError) as error:
        reason = f"cannot be read ({type(error).__name__})" if isinstance(error, OSError) else str(error)
        raise ConfigError(
            f"serve.keys_file={file!r}: {reason}; make it with `sampo keys add {file} --name NAME`"
        ) from None
