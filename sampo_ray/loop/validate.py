"""Checks a configuration against the files that it names, in seconds, before Ray or an engine starts."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import AutoConfig, PretrainedConfig

from sampo_ray.config.keys import is_json, parse
from sampo_ray.config.run import RunConfig
from sampo_ray.config.section import Section
from sampo_ray.config.sections import RewardSource
from sampo_ray.config.sizing import ModelMemory, RankMemory
from sampo_ray.data.chat import ChatFormat
from sampo_ray.data.first_row import FirstRow
from sampo_ray.data.reward_functions import check_function
from sampo_ray.data.reward_models import check_model
from sampo_ray.data.rewards import Samples
from sampo_ray.data.tools import tool_arguments
from sampo_ray.errors import ConfigError, KeysError, RewardError
from sampo_ray.evaluation.verifiers import followed
from sampo_ray.loop.data_check import check_probe, check_sources, columns_of, made_up_samples, tokenized_rows
from sampo_ray.loop.judge_check import check_judges
from sampo_ray.run.directory import Run
from sampo_ray.run.storage import Place, absolute
from sampo_ray.run.trackers import check_trackers
from sampo_ray.sources.rows import Row
from sampo_ray.training.architecture import keys_picked, on_meta
from sampo_ray.training.choice import choose_attention
from sampo_ray.training.memory import Shape, check_device, plan_memory
from sampo_ray.training.model_files import ModelFiles
from sampo_ray.training.pretrained import open_model


@dataclass(frozen=True)
class Checked:
    """A configuration that was checked against the files that it names, with what these decide filled in.

    `notes` are what the user is told, a line each; `details` are for a dry run, with the first row of each source.
    """

    config: RunConfig
    notes: list[str]
    details: list[str]
    firsts: list[FirstRow]


def check(config: RunConfig, run: Run | None = None) -> Checked:
    """Opens the model's configuration and tokenizer, the data and the reward source, and tries the prompt format.

    Fills in how attention is computed, what the columns of the data are, and in which type models are exported. The
    data of a `run` that has tokenized it is not opened again. ConfigError or DataError, naming the field and the fix.
    """
    path = config.model.path
    opened = open_model("model.path", path)
    attention, said = choose_attention(opened.config, config.model, config.data.max_length)
    chat = ChatFormat.load(path, config.model.template)
    check_sizes(config, opened.config.get_text_config(), len(chat.tokenizer))
    tokenized = run if run is not None and run.manifest.data.fingerprint else None
    sources = [] if tokenized else check_sources(config, chat)
    if config.online:
        rows = tokenized_rows(tokenized) if tokenized else sources[0].rows
        said += check_prompts(config, rows, chat, "data.prompts")
    if config.evaluates and config.evaluate.prompts and not (tokenized and tokenized.manifest.data.probe):
        probed = check_probe(config.evaluate.prompts, chat, config)
        said += [*probed.notes, *check_prompts(config, probed.rows, chat, "evaluate.prompts")]
    reward, judges = check_judges(config) if config.scores else (config.reward, [])
    if config.serve.tools is not None:
        tool_arguments(config.serve.tools, chat.tokenizer)
    check_trackers(config)
    check_keys_file(config.serve.keys_file)
    found: dict[str, Section] = {"model": config.model.model_copy(update={"attention": attention}), "reward": reward}
    if sources:
        found["data"] = config.data.model_copy(update={"columns": columns_of(sources)})
    return Checked(
        decided(config.model_copy(update=found)),
        [*opened.notes, *said, *judges, *chat.notes(), *(note for source in sources for note in source.notes)],
        [detail for source in sources for detail in source.details],
        [source.first for source in sources],
    )


def decided(config: RunConfig) -> RunConfig:
    """A checked configuration with what the model's files decide where it says nothing: `run.export_dtype`."""
    if config.run.export_dtype is not None:
        return config
    files = ModelFiles.find("model.path", config.model.path)
    types = Counter(weight.dtype for weight in files.weights(files.settings("config.json")).values())
    dtype = "bfloat16" if types.most_common()[0][0] == "BF16" else "float16"
    return config.model_copy(update={"run": config.run.model_copy(update={"export_dtype": dtype})})


def check_prompts(config: RunConfig, rows: Sequence[Row], chat: ChatFormat, field: str) -> list[str]:
    """Tries the reward source on the first of the prompts that `field` names, and looks for what a gate needs of those
    that versions are probed with. ConfigError; returns notes."""
    notes = check_reward(config, made_up_samples(rows, chat))
    if field == "data.prompts" and config.evaluate.prompts:  # versions are probed with those
        return notes
    if config.serve.gates.verifiers is None and not config.evaluates:
        return notes
    return [*notes, *check_instructions(rows, field, config.serve.gates.verifiers is not None)]


def check_reward(config: RunConfig, samples: Samples) -> list[str]:
    """Tries each reward function on `samples`, or opens a reward model's configuration and tokenizer. ConfigError;
    returns notes."""
    notes = []
    for n, part in enumerate(config.reward.parts):
        where = f"reward.sum.{n}: " if config.reward.sum else ""
        try:
            notes += [f"{where}{note}" for note in _check_source(config, part, samples)]
        except ConfigError as error:
            raise ConfigError(f"{where}{error}") from error.__cause__
    return notes


def _check_source(config: RunConfig, source: RewardSource, samples: Samples) -> list[str]:
    if source.model is not None:
        check_model(source.model, samples, config.data.max_length)
    if source.function is None:
        return []
    rewards = check_function(source.function, samples, config.reward.timeout_s, source.arguments)
    if any(reward is not None for reward in rewards):
        return []
    return [f"reward.function={source.function!r}: has no reward for made-up completions of the first prompt (None)"]


def check_instructions(rows: Sequence[Row], field: str, needed: bool) -> list[str]:
    """Tries the verifiers of instructions, if rows have some. ConfigError where they are `needed` and there are none,
    or cannot be used; else a note."""
    columns = [(row.columns.get("instruction_id_list"), row.columns.get("kwargs")) for row in rows]
    first = next((each for each in columns if each[0] and each[1] is not None), None)
    if first is None and needed:
        raise ConfigError(
            f"serve.gates.verifiers: no row of {field} has the columns instruction_id_list and kwargs of IFEval's or "
            "IFBench's format; name prompts with instructions, or drop it"
        )
    try:
        followed(*(first or (None, None)), "", "So.")
    except RewardError as error:
        if needed:
            raise ConfigError(f"serve.gates.verifiers: {error}") from None
        return [f"{field}: instructions are not verified; {error}"]
    return []


def check_sizes(config: RunConfig, model: PretrainedConfig, tokens: int) -> None:
    """ConfigError where a language model has too few positions for the run, or too few `tokens` for its tokenizer."""
    positions = getattr(model, "max_position_embeddings", None) or getattr(model, "max_seq_len", None)  # MPT's
    if positions is not None and config.data.max_length > positions:
        raise ConfigError(
            f"data.max_length={config.data.max_length} is more than the {positions} positions of "
            f"{config.model.path!r}; make it smaller"
        )
    kept = getattr(model, "keep_window_size", None)  # Doge's: which of equal keys it keeps goes by a batch's length
    if kept is not None and config.data.max_length > kept:
        raise ConfigError(
            f"data.max_length={config.data.max_length} is more than the {kept} keys that {config.model.path!r} keeps "
            "(keep_window_size), and its choice among them depends on other sequences; make it smaller"
        )
    picked = keys_picked(model)
    if picked is not None and config.data.max_length > picked and config.trainer.zero_stage == 3:
        raise ConfigError(
            f"data.max_length={config.data.max_length} is more than the {picked} keys that {config.model.path!r} picks "
            "(index_topk), and longer answers are computed one by one, which trainer.zero_stage=3 does not allow; make "
            "it smaller, or use trainer.zero_stage=2"
        )
    if tokens > model.vocab_size:
        raise ConfigError(
            f"model.path={config.model.path!r}: the tokenizer has {tokens} tokens, the model {model.vocab_size}; "
            "they do not belong together"
        )


def check_fit(config: RunConfig) -> None:
    """ConfigError when a resolved configuration needs GPUs that it lacks, or is for this machine and does not fit."""
    if config.model.attention == "flex" and not config.trainer.num_gpus:
        raise ConfigError(
            "model.attention='flex' needs GPUs, since it has no backward pass on CPUs; use model.attention=segments"
        )
    if config.profile == "laptop":
        check_device(AutoConfig.from_pretrained(config.model.path), config)


def memory_of(config: RunConfig) -> ModelMemory:
    """What the run's model takes: estimates, for the plan of where actors go."""
    model = AutoConfig.from_pretrained(config.model.path)
    shape = Shape.of(on_meta(model, config.model.lora))
    text = model.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    cached = 2 * 2 * shape.layers * heads * width if isinstance(heads, int) and isinstance(width, int) else 0
    resident = config.method.needs_distributions and config.model.lora is None

    def rank(sized: RunConfig) -> RankMemory:
        trainer, tokens = sized.trainer, sized.row_budget.tokens_per_row
        plan = plan_memory(shape, trainer, tokens, "cuda" if trainer.num_gpus else "cpu", resident)
        return RankMemory(plan.total, plan.host + (0 if trainer.num_gpus else plan.total))

    return ModelMemory(2 * shape.parameters, cached, rank)


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
