"""AlpacaEval 2: answers to its 805 instructions, compared with the baseline's; win rate, length-controlled win rate,
and lengths.

The length-controlled rate is alpaca_eval's own model of the preferences (`win_rates`). Its published values are of the
annotator `weighted_alpaca_eval_gpt4_turbo`; of any other the number is another, which its name here says.
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from transformers import PreTrainedTokenizerBase

from sampo_ray.config.sections import RewardSource
from sampo_ray.data.chat import ChatFormat
from sampo_ray.data.tokenizer import exact_tokenizer
from sampo_ray.errors import EvaluationError, first_line
from sampo_ray.evaluation import statistics
from sampo_ray.evaluation.alpaca_data import BASELINE, ROWS, AlpacaData, open_data
from sampo_ray.evaluation.alpaca_judging import Preferences, Row, calls_of, checked, kind_of, planned, preferences
from sampo_ray.evaluation.asking import GREEDY, Answer, Question, answers_to
from sampo_ray.evaluation.offline import versions_of
from sampo_ray.evaluation.prompts import Prompts
from sampo_ray.evaluation.records import Conditions, Score, TaskResult, Unit
from sampo_ray.evaluation.scoring import lost
from sampo_ray.evaluation.subject import Subject, bos_in, template_digest
from sampo_ray.evaluation.win_rates import WinRates, check_answers, check_model, win_rates
from sampo_ray.run.storage import Place
from sampo_ray.sources.messages import Message

TASK = "alpaca_eval"
PACKAGES = ("alpaca_eval", "scikit-learn", "openai", "transformers", "sampo-ray")
MOST_TOKENS = 2048
"""Of an answer, where the context allows it: as the outputs of most models on the leaderboard were made."""
LLAMA3_TOKENS, LLAMA3_EOT = 128_256, 128_009
"""Size of Llama 3's vocabulary with its special tokens, and <|eot_id|> in it."""


@dataclass(frozen=True)
class AlpacaSettings:
    """How the task is run. `data`: folder with the official files; `judge`: what compares answers, as `checked`
    returns it; `llama3`: folder of the tokenizer in whose tokens lengths are counted, as on the card; `limit`: the
    first rows only, which have no length-controlled rate; `verdicts`: where judges keep what they said.
    """

    data: Path
    judge: RewardSource
    llama3: Path | None = None
    max_tokens: int | None = None
    repeats: int = 1
    limit: int | None = None
    seed: int = 0
    verdicts: Place | None = None


@dataclass(frozen=True)
class AlpacaPlan:
    """What will be asked: `questions` of the model, and `judge_calls` at most of the judge."""

    data: AlpacaData
    questions: list[Question]
    conditions: Conditions
    judge_calls: int


def check(settings: AlpacaSettings) -> AlpacaSettings:
    """The settings with a judge that was tried. Nothing is asked of a model. EvaluationError, ConfigError."""
    open_data(settings.data)
    if settings.llama3 is not None:
        _llama3(settings.llama3)
    if settings.repeats < 1 or (settings.limit is not None and settings.limit < 1):
        raise EvaluationError(f"repeats={settings.repeats} and limit={settings.limit} must be 1 or more")
    return AlpacaSettings(**{**vars(settings), "judge": checked(settings.judge)})


def plan(chat: ChatFormat, context: int, settings: AlpacaSettings, dtype: str | None = None) -> AlpacaPlan:
    """Builds all prompts without asking anything. EvaluationError where prompts and answers do not fit `context`."""
    data = open_data(settings.data)
    texts = data.instructions[: settings.limit]
    conversations = [[Message(role="user", content=text)] for text in texts]
    ids = [chat.prompt_ids(messages) for messages in conversations]
    tokens = settings.max_tokens or max(1, min(MOST_TOKENS, context - max(map(len, ids))))
    questions = [
        Question(messages, ids, tokens, seed=settings.seed) for messages, ids in zip(conversations, ids, strict=True)
    ]
    prompts = Prompts(context)
    prompts.ask(questions, chat)
    conditions = Conditions(
        packages=versions_of(PACKAGES),
        task_version="2",
        limit=settings.limit,
        total=ROWS,
        route="chat",
        template=template_digest(chat),
        first_prompt=prompts.first,
        bos=bos_in(prompts.first, chat),
        longest_prompt=prompts.longest,
        max_tokens=tokens,
        sampling=dict(GREEDY),
        dtype=dtype,
        seed=settings.seed,
        judge=planned(settings.judge, settings.repeats),
        notes=tuple(_notes(data, settings, tokens, settings.llama3 is not None or _is_llama3(chat.tokenizer))),
    )
    return AlpacaPlan(data, questions, conditions, calls_of(settings.judge, len(questions), settings.repeats))


def run(subject: Subject, settings: AlpacaSettings) -> tuple[TaskResult, bytes]:
    """The result and its samples, a JSON line each. EvaluationError where there is no honest score."""
    begun, chat = time.monotonic(), subject.chat()
    check_model(subject.name)
    asked = plan(chat, subject.context, settings, subject.dtype)
    answers = answers_to(subject, asked.questions, chat)
    counts = lost(answers, TASK)
    check_answers([answer.text for answer in answers])
    rows = [
        Row(question.messages, None if answer.error else answer.text, theirs)
        for question, answer, theirs in zip(asked.questions, answers, asked.data.outputs, strict=False)
    ]
    judged = preferences(settings.judge, rows, chat, settings.repeats, settings.verdicts)
    texts, values = [answer.text for answer in answers], judged.means
    rates = _rates(asked.data, subject.name, texts, values) if settings.limit is None else None
    headline = [_headline(asked.data, subject.name, texts, repeat, rates is not None) for repeat in judged.repeats]
    by_row = {**_by_row(kind_of(settings.judge), values, rates), **_lengths(texts, chat, settings.llama3)}
    conditions = asked.conditions.model_copy(update={**counts, "judge": judged.with_spread(headline)})
    scores = tuple(_score(name, found, rates) for name, found in by_row.items())
    result = subject.result(TASK, scores, conditions, begun)
    return result, b"".join(_samples(asked, answers, judged, by_row))


def _rates(data: AlpacaData, model: str, texts: Sequence[str], values: Sequence[float | None]) -> WinRates:
    return win_rates(data, model, data.instructions, texts, [None if each is None else 1 + each for each in values])


def _headline(
    data: AlpacaData, model: str, texts: Sequence[str], values: Sequence[float | None], controlled: bool
) -> float:
    """The rate whose spread over repeats is told: length-controlled where there is such."""
    if controlled:
        return _rates(data, model, texts, values).length_controlled
    return fmean(each for each in values if each is not None)


def _by_row(kind: str, values: Sequence[float | None], rates: WinRates | None) -> dict[str, list[float | None]]:
    """Scores of each row, of which a score is the mean, by name."""
    found = {f"win_rate,{kind}": list(values)}
    return found if rates is None else {**found, f"length_controlled_winrate,{kind}": list(rates.at_equal_length)}


def _lengths(texts: Sequence[str], chat: ChatFormat, llama3: Path | None) -> dict[str, list[float | None]]:
    """Tokens without the end of turn, in Llama 3's where its tokenizer is known, and characters."""
    own, found = chat.tokenizer, dict[str, list[float | None]]()
    tokenizer = own if _is_llama3(own) else _llama3(llama3) if llama3 is not None else None
    if tokenizer is not None:
        found["tokens,llama3"] = [float(n) for n in _counts(tokenizer, texts)]
    found["tokens,model"] = [float(n) for n in _counts(own, texts)]
    return {**found, "characters": [float(len(text)) for text in texts]}


def _counts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[int]:
    return [len(ids) for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]]


def _is_llama3(tokenizer: PreTrainedTokenizerBase) -> bool:
    return len(tokenizer) == LLAMA3_TOKENS and tokenizer.convert_tokens_to_ids("<|eot_id|>") == LLAMA3_EOT


def _llama3(folder: Path) -> PreTrainedTokenizerBase:
    try:
        tokenizer = exact_tokenizer(str(folder))
    except (OSError, ValueError, KeyError) as error:
        raise EvaluationError(f"{folder}: no tokenizer can be loaded ({first_line(error)})") from None
    if not _is_llama3(tokenizer):
        raise EvaluationError(
            f"{folder}: is not Llama 3's tokenizer ({len(tokenizer)} tokens instead of {LLAMA3_TOKENS}, <|eot_id|> is "
            f"{tokenizer.convert_tokens_to_ids('<|eot_id|>')}); name the tokenizer folder of a Llama-3 model"
        )
    return tokenizer


def _score(name: str, values: Sequence[float | None], rates: WinRates | None) -> Score:
    given = [each for each in values if each is not None]
    mean, error = fmean(given), statistics.standard_error(given)
    if rates is not None and name.startswith("length_controlled"):
        mean, error = rates.length_controlled, rates.length_controlled_stderr
    elif rates is not None and name.startswith("win_rate"):
        mean, error = rates.win_rate, rates.win_rate_stderr
    unit: Unit = "tokens" if name.startswith("tokens") else "characters" if name == "characters" else "share"
    low, high = (None, None) if error is None else (mean - statistics.Z * error, mean + statistics.Z * error)
    if name.startswith("win_rate"):  # preferences vary at most as wins and losses do; at 0 and 1 an error says nothing
        low, high = statistics.wilson(mean * len(given), len(given))
    elif unit == "share" and low is not None and high is not None:
        low, high = max(low, 0.0), min(high, 1.0)
    return Score(name=name, value=mean, unit=unit, stderr=error, low=low, high=high, count=len(given))


def _notes(data: AlpacaData, settings: AlpacaSettings, tokens: int, llama3: bool) -> list[str]:
    judge = settings.judge.judge
    who = judge.model if judge else settings.judge.model or settings.judge.function
    notes = [
        f"judged by {who}, not by the official annotator weighted_alpaca_eval_gpt4_turbo: another number than the "
        f"published ones, against the same baseline {BASELINE}",
        *data.notes,
    ]
    if settings.limit is not None:
        notes.append(f"no length-controlled rate: it needs all {ROWS} rows")
    if tokens < MOST_TOKENS:
        notes.append(f"answers of at most {tokens} tokens; {MOST_TOKENS} is usual")
    if not llama3:
        notes.append("lengths are in the model's tokens, not in Llama 3's: --llama3-tokenizer was not given")
    return notes


def _samples(
    asked: AlpacaPlan, answers: Sequence[Answer], judged: Preferences, by_row: Mapping[str, Sequence[float | None]]
) -> list[bytes]:
    lines = []
    for row, (question, answer) in enumerate(zip(asked.questions, answers, strict=True)):
        sample = {
            "id": row,
            "instruction": question.messages[-1]["content"],
            "answer": answer.text,
            "reference": asked.data.outputs[row],
            "tokens": answer.tokens,
            "finish": answer.finish,
            "error": answer.error,
            "preferences": [repeat[row] for repeat in judged.repeats],
            "scores": {name: values[row] for name, values in by_row.items() if values[row] is not None},
        }
        lines.append(json.dumps(sample).encode() + b"\n")
    return lines
