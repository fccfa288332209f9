"""The demo's task, data and base policy, made on the spot; tiny Llamas and tokenizers; the arithmetic of its table.

The task is to sort four digits: an answer can be checked. The demonstrations that the base policy imitates have two
habits that real ones have: some sort the wrong way round (`CARELESS`), and some go on chatting after the answer
(`CHATTY`). The reward knows right from wrong, but it is also fond of length and has moods, as a reward model trained on
people's preferences would; the offline preferences are labelled with it, and so are the online rounds. What is reported
judges the answer alone.
"""

import json
import random
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sampo_ray.data.chat import ChatFormat
from sampo_ray.evaluation.statistics import mean_interval, wilson

CARELESS = 0.45
"""Share of the demonstrations that sort in descending order."""
CHATTY = 0.4
"""Probability that a demonstration says one more sentence, after each."""
LENGTH_BIAS = 0.02
"""Reward for a word, where a right answer earns 1."""
MOOD = 0.5
"""Standard deviation of what the reward makes of a completion for no reason at all."""

_CHATTER = (
    "I hope that this is what you were looking for.",
    "Thank you very much for asking me such a nice question.",
    "Please feel free to ask me again whenever you like.",
    "Do let me know if there is anything else that you need.",
    "It was a real pleasure to look into this for you.",
    "Sorting is something that many people find useful every day.",
)
SPECIAL_TOKENS = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_MOST_CHATTER = 4
_DIGITS = 4
_LESSONS = 6000


@dataclass(frozen=True)
class DemoAssets:
    """What `make_demo` wrote: a Hugging Face folder and JSONL files, their rows with the column `answer`."""

    model: Path
    preferences: Path
    """Rows of prompt, chosen, rejected, answer."""
    prompts: Path
    """Rows of prompt, answer."""
    evaluation: Path
    """Rows of prompt, answer; no prompt is in the training data."""


@dataclass(frozen=True)
class Answers:
    """A policy's completions of the evaluation prompts, in their order: texts, and lengths in tokens."""

    texts: Sequence[str]
    tokens: Sequence[int]


@dataclass(frozen=True)
class Outcome:
    """A row of the table. `low`..`high` are 95 % intervals."""

    name: str
    samples: int
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    win_rate: float | None
    """Against base, on the same prompts; None for base itself."""
    win_rate_low: float | None
    win_rate_high: float | None
    tokens: float
    tokens_spread: float
    """Standard deviation over completions."""


def make_demo(
    folder: str | Path, seed: int = 0, sft_steps: int = 200, pairs: int = 768, prompts: int = 768, evaluation: int = 400
) -> DemoAssets:
    """Writes the data and the base policy (fine-tuned in fp32, saved in bf16) into `folder`, each a function of `seed`.

    `sft_steps` are optimizer steps of 64 demonstrations; the others are rows of the files.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    assets = DemoAssets(
        folder / "model", folder / "preferences.jsonl", folder / "prompts.jsonl", folder / "evaluation.jsonl"
    )
    held_out = _questions(_stream(seed, "evaluation"), evaluation, avoid=frozenset())
    asked = frozenset(held_out)
    _write(assets.evaluation, map(_row, held_out))
    _write(assets.prompts, map(_row, _questions(_stream(seed, "prompts"), prompts, asked)))
    rng = _stream(seed, "preferences")
    _write(assets.preferences, [_preference(digits, rng) for digits in _questions(rng, pairs, asked)])
    rng = _stream(seed, "lessons")
    lessons = [(_prompt(digits), _demonstration(digits, rng)) for digits in _questions(rng, _LESSONS, asked)]
    _make_policy(assets.model, lessons, sft_steps, seed)
    return assets


def correct(completion: str, answer: str) -> bool:
    """Whether the first number in a completion is the answer."""
    number = re.search(r"\d+", completion)
    return number is not None and number.group() == answer


def reward(prompts: Sequence[Any], completions: Sequence[str], answer: Sequence[str]) -> list[float]:
    """The demo's imperfect reward (`reward.function: sampo_ray.console.demo_task:reward`): quality, length and a mood.

    The mood is a function of the completion, so the same text always earns the same.
    """
    return [_reward(completion, right) for completion, right in zip(completions, answer, strict=True)]


def summarise(answers: Mapping[str, Answers], expected: Sequence[str], base: str = "base") -> list[Outcome]:
    """Compares policies on one set of prompts whose right answers are `expected`.

    A policy wins a prompt that it alone gets right and ties where both or neither do (a tie is half a win), so length
    earns nothing. Accuracy has Wilson's interval, the win rate the normal one of its per-prompt scores.
    """
    right = {name: [correct(t, r) for t, r in zip(a.texts, expected, strict=True)] for name, a in answers.items()}
    return [_outcome(name, a, right[name], None if name == base else right[base]) for name, a in answers.items()]


def render(outcomes: Sequence[Outcome], temperature: float) -> Table:
    """The table as it is printed."""
    samples = outcomes[0].samples
    table = Table(
        title="Sorting four digits",
        caption=f"{samples} prompts not trained on, one completion each at temperature {temperature:g}; in brackets "
        f"95 % intervals; win rate against base by correctness, ties half; tokens with their standard deviation",
    )
    table.add_column("policy")
    for heading in ("accuracy %", "win rate %", "tokens"):
        table.add_column(heading, justify="right")
    for row in outcomes:
        wins = "-" if row.win_rate is None else _percent(row.win_rate, row.win_rate_low, row.win_rate_high)
        accuracy = _percent(row.accuracy, row.accuracy_low, row.accuracy_high)
        table.add_row(row.name, accuracy, wins, f"{row.tokens:.1f} ± {row.tokens_spread:.1f}")
    return table


def _stream(seed: int, purpose: str) -> random.Random:
    """Random numbers for one purpose, so that how many another one uses does not matter."""
    return random.Random(f"{seed} {purpose}")


def _questions(rng: random.Random, count: int, avoid: frozenset[str]) -> list[str]:
    """Digit strings, `count` different ones where `avoid` is empty."""
    found: list[str] = []
    seen: set[str] = set()
    while len(found) < count:
        digits = "".join(rng.sample("0123456789", _DIGITS))
        if digits in avoid or (not avoid and digits in seen):
            continue
        seen.add(digits)
        found.append(digits)
    return found


def _prompt(digits: str) -> str:
    return f"Sort these digits: {digits}"


def _row(digits: str) -> dict[str, str]:
    return {"prompt": _prompt(digits), "answer": "".join(sorted(digits))}


def _demonstration(digits: str, rng: random.Random) -> str:
    order = sorted(digits, reverse=rng.random() < CARELESS)
    sentences = ["".join(order) + "."]
    while len(sentences) <= _MOST_CHATTER and rng.random() < CHATTY:
        sentences.append(rng.choice(_CHATTER))
    return " ".join(sentences)


def _preference(digits: str, rng: random.Random) -> dict[str, str]:
    """As UltraFeedback's binarized pairs are made: the best of four against one of the others."""
    row = _row(digits)
    drawn: set[str] = set()
    while len(drawn) < 2:
        drawn = {_demonstration(digits, rng) for _ in range(4)}
    *others, best = sorted(drawn, key=lambda completion: _reward(completion, row["answer"]))
    return {"prompt": row["prompt"], "chosen": best, "rejected": rng.choice(others), "answer": row["answer"]}


def _reward(completion: str, answer: str) -> float:
    mood = random.Random(zlib.crc32(f"{answer} {completion}".encode())).gauss(0.0, MOOD)
    return float(correct(completion, answer)) + LENGTH_BIAS * len(completion.split()) + mood


def _make_policy(folder: Path, lessons: Sequence[tuple[str, str]], steps: int, seed: int) -> None:
    texts = [f"user\n\n{prompt}\nassistant\n\n{response}" for prompt, response in lessons[:2000]]
    tokenizer = tiny_tokenizer(texts, vocab_size=384)
    model = tiny_llama(tokenizer, hidden=192, layers=2, positions=256, seed=seed)
    tokenizer.save_pretrained(folder)
    chat = ChatFormat.load(folder, "llama3-sampo")
    chat.save(folder)
    fine_tune(model, chat, lessons, steps, seed)
    model.save_pretrained(folder)


def fine_tune(
    model: LlamaForCausalLM,
    chat: ChatFormat,
    lessons: Sequence[tuple[str, str]],
    steps: int,
    seed: int,
    learning_rate: float = 4e-3,
    batch_size: int = 64,
) -> None:
    """Trains `model` in fp32 to answer prompts as (prompt, response) lessons do; leaves it in bf16."""
    model.float().train()
    rng = random.Random(seed)
    prompts = chat.encode_prompts([chat.render([{"role": "user", "content": prompt}]) for prompt, _ in lessons])
    encoded = list(zip(prompts, chat.encode_responses([response for _, response in lessons]), strict=True))
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=steps + 1, pct_start=0.1, anneal_strategy="linear", cycle_momentum=False
    )
    for batch in _batches(encoded, batch_size, steps, rng):
        optimizer.zero_grad()
        _imitation(model, batch, chat.end_of_turn_id).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval().to(torch.bfloat16)


Lesson = tuple[list[int], list[int]]
"""Token ids of a prompt and of its response."""


def _batches(lessons: Sequence[Lesson], size: int, steps: int, rng: random.Random) -> Iterator[list[Lesson]]:
    """Batches drawn at random, eight at a time sorted by length, so that little is padded."""
    left = steps
    while left > 0:
        drawn = sorted(rng.choices(lessons, k=8 * size), key=lambda lesson: len(lesson[1]))
        batches = [drawn[i : i + size] for i in range(0, len(drawn), size)]
        rng.shuffle(batches)
        yield from batches[:left]
        left -= len(batches)


def _imitation(model: LlamaForCausalLM, batch: Sequence[Lesson], pad: int) -> torch.Tensor:
    """Negative log-likelihood in nats of a response, scaled by a constant: a mean over tokens favours the short."""
    longest = max(len(prompt) + len(response) for prompt, response in batch)
    ids = torch.full((len(batch), longest), pad)
    targets = torch.full((len(batch), longest), -100)
    for i, (prompt, response) in enumerate(batch):
        end = len(prompt) + len(response)
        ids[i, :end] = torch.tensor(prompt + response)
        targets[i, len(prompt) : end] = torch.tensor(response)
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    total = cross_entropy(logits.flatten(0, 1), targets[:, 1:].flatten(), ignore_index=-100, reduction="sum")
    return total / (16 * len(batch))


def _write(path: Path, rows: Any) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _outcome(name: str, answers: Answers, right: Sequence[bool], base: Sequence[bool] | None) -> Outcome:
    count = len(right)
    wins: tuple[float | None, float | None, float | None] = (None, None, None)
    if base is not None:
        scores = [0.5 + 0.5 * (ours - theirs) for ours, theirs in zip(right, base, strict=True)]
        low, high = mean_interval(scores) or (0.0, 1.0)
        wins = (fmean(scores), max(0.0, low), min(1.0, high))
    return Outcome(
        name, count, fmean(right), *wilson(sum(right), count), *wins, fmean(answers.tokens), stdev(answers.tokens)
    )


def _percent(value: float, low: float | None, high: float | None) -> str:
    interval = "" if low is None or high is None else f" [{100 * low:.1f}, {100 * high:.1f}]"
    return f"{100 * value:.1f}{interval}"


ROWS: dict[str, list[str]] = {
    "DPO": ["rounds.mode=offline", "rounds.count=1", "rounds.epochs=1", "method.reduction=sum"],
    "Iterative DPO": ["rounds.mode=online", "rounds.count=3", "method.reduction=sum"],
    "Iterative SamPO": ["rounds.mode=online", "rounds.count=3", "method.reduction=sample"],
}
"""The rows below base: one program, and what each sets."""


def tiny_tokenizer(texts: Iterable[str], vocab_size: int = 512) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on `texts`; Llama-3's special tokens come first, and every digit is a token."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>", pad_token="<|end_of_text|>"
    )


def tiny_llama(
    tokenizer: PreTrainedTokenizerFast,
    hidden: int = 64,
    layers: int = 2,
    positions: int = 1024,
    tied: bool = False,
    seed: int = 0,
) -> LlamaForCausalLM:
    """A randomly initialised Llama for `tokenizer`, bf16, heads of 32 dimensions with two query heads a key head."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=-(-len(tokenizer) // 64) * 64,
        hidden_size=hidden,
        intermediate_size=hidden * 3,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=max(1, hidden // 64),
        head_dim=32,
        max_position_embeddings=positions,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        tie_word_embeddings=tied,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config).bfloat16()
