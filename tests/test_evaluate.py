"""`sampo evaluate`: what is asked of a version, what is refused before, and what a result says."""

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from sampo_ray.config.run import load_config
from sampo_ray.console.main import app
from sampo_ray.data.chat import ChatFormat
from sampo_ray.errors import EvaluationError
from sampo_ray.evaluation import asking
from sampo_ray.evaluation.asking import Question, Scoring, answers_to, scores_of
from sampo_ray.evaluation.harnesses import plan, run
from sampo_ray.evaluation.offline import check_data, environment
from sampo_ray.evaluation.plans import Asking
from sampo_ray.evaluation.records import check_writable, results_in, write_result
from sampo_ray.evaluation.scoring import score_of
from sampo_ray.evaluation.subject import Subject, Thinking, leading_bos
from sampo_ray.evaluation.tasks import TASKS
from sampo_ray.run.directory import create_run
from sampo_ray.run.storage import Place
from sampo_ray.run.version_files import write_version
from sampo_ray.run.versions import VersionInfo
from tests.model_server import ModelServer, serving
from tests.waiting import scaled

NUMBERS = range(3, 15)
CHOICES = ["It is two.", "It is a very large number of hundreds.", "Nobody knows."]


def configured(folder: Path, config: str, **files: str) -> None:
    listed = "".join(f"  - split: {split}\n    path: {name}\n" for split, name in files.items())
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: {config}\n  data_files:\n{listed}---\n")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of our own in the shape of GSM8K and TruthfulQA, where lm-eval's tasks find them."""
    root = tmp_path_factory.mktemp("data")
    gsm8k, truthful = root / "openai/gsm8k", root / "truthfulqa/truthful_qa"
    for folder in (gsm8k, truthful):
        folder.mkdir(parents=True)
    rows = [{"question": f"What is {n} and {n}?", "answer": f"It is so.\n#### {2 * n}"} for n in NUMBERS]
    for name in ("train", "test"):
        (gsm8k / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    configured(gsm8k, "main", train="train.jsonl", test="test.jsonl")
    targets = {"choices": CHOICES, "labels": [1, 0, 0]}
    questions = [{"question": f"What is {n}?", "mc1_targets": targets, "mc2_targets": targets} for n in NUMBERS]
    (truthful / "validation.jsonl").write_text("\n".join(map(json.dumps, questions)))
    configured(truthful, "multiple_choice", validation="validation.jsonl")
    return root


@pytest.fixture(scope="module")
def folder(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tokenizer folder of a run."""
    folder = tmp_path_factory.mktemp("tokenizer")
    ChatFormat.load(tiny_model, "llama3-sampo").save(folder)
    return folder


@pytest.fixture(scope="module")
def chat(folder: Path) -> ChatFormat:
    return ChatFormat.load(folder, "tokenizer")


@pytest.fixture
def server(tiny_model: Path, chat: ChatFormat, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModelServer]:
    monkeypatch.setattr(asking, "BACKOFF", lambda state: 0.01)
    with serving(tiny_model, chat) as server:
        yield server


def subject(server: ModelServer, folder: Path) -> Subject:
    at = {"url": server.url, "model": "policy@3", "tokenizer": str(folder), "context": 4096}
    return Subject(**at, label="final", name="tiny", run="r1", version=3, dtype="bfloat16", concurrency=4)


def solved(messages: list[Any]) -> str:
    """The right answer to every other question."""
    n = int(messages[-1]["content"].split()[3])
    return f"So.\n#### {2 * n + n % 2}"


def test_generated_answers_are_scored_by_the_harness_under_conditions_that_say_all(
    server: ModelServer, folder: Path, chat: ChatFormat, data: Path, tmp_path: Path
) -> None:
    server.say = solved
    task, asked = TASKS["gsm8k"], Asking(data=data)
    planned = plan(task, chat, 4096, asked, "bfloat16")
    result, samples = run(task, subject(server, folder), asked)
    about = result.conditions
    assert about.planned == planned.conditions.planned, "so that a second call knows the result"
    found = result.score("exact_match,strict-match")
    assert found and found.value == 0.5 and found.count == len(NUMBERS) and found.low and found.low < 0.5
    assert (about.shots, about.card_shots, about.shots_form, about.total, about.limit) == (8, 8, "turns", 12, None)
    assert (about.route, about.max_tokens, about.bos, about.task_version) == ("chat", 256, 1, "3.0")
    assert about.packages["lm_eval"] == "0.4.13" and about.sampling["top_p"] == 1.0 and about.template
    first = server.asked[0]
    assert len(first["messages"]) == 17 and first["messages"][-1]["content"].endswith("?\nAnswer:")
    assert first["stop"] == ["Question:", "</s>", "<|im_end|>"] and first["repetition_penalty"] == 1.0
    assert chat.text(about.first_prompt).startswith("user\n\nQuestion: What is")
    lines = [json.loads(line) for line in samples.splitlines()]
    assert sorted(line["scores"]["exact_match,strict-match"] for line in lines) == [0.0] * 6 + [1.0] * 6
    assert all(line["answer"].startswith("So.") and line["finish"] == "stop" for line in lines)
    write_result(Place(str(tmp_path)), result, samples)
    assert list(results_in(Place(str(tmp_path)))) == [result]


def test_a_limit_is_part_of_the_conditions_as_a_seed_is(chat: ChatFormat, data: Path) -> None:
    task = TASKS["truthfulqa_mc1"]
    limited = [plan(task, chat, 4096, Asking(limit=n, seed=seed, data=data)) for n, seed in ((5, 1), (6, 1), (5, 2))]
    assert (limited[0].conditions.limit, limited[0].conditions.total, limited[0].count) == (5, 12, 15)
    assert len({each.conditions.model_dump_json() for each in limited}) == 3


def test_choices_are_the_likeliest_by_the_models_own_log_probs_after_one_bos(
    server: ModelServer, folder: Path, chat: ChatFormat, data: Path
) -> None:
    result, samples = run(TASKS["truthfulqa_mc1"], subject(server, folder), Asking(limit=3, data=data))
    about = result.conditions
    assert (about.route, about.bos, about.shots, about.card_shots) == ("completions", 1, 0, 3)
    assert (about.shots_form, about.template, about.max_tokens) == ("in the task", None, None)
    assert all(body["prompt"].count(chat.bos_id) == 1 and body["prompt"][0] == chat.bos_id for body in server.asked)
    for line in map(json.loads, samples.splitlines()):
        for choice in line["choices"]:
            context = chat.tokenizer.encode(line["prompt"], add_special_tokens=False)
            whole = chat.tokenizer.encode(line["prompt"] + choice["text"], add_special_tokens=False)
            ids = torch.tensor([[chat.bos_id, *whole]])
            with torch.no_grad():
                logprobs = server.model(ids).logits[0].float().log_softmax(-1)
            positions = range(len(context), len(whole))
            expected = sum(float(logprobs[at, whole[at]]) for at in positions)
            assert choice["logprob"] == pytest.approx(expected, abs=1e-4)
        best = max(range(3), key=lambda i: line["choices"][i]["logprob"])
        assert line["scores"]["acc,none"] == float(best == 0)


def test_prompts_that_would_have_to_be_cut_are_counted_and_refused(chat: ChatFormat, data: Path) -> None:
    longest = plan(TASKS["gsm8k"], chat, 4096, Asking(data=data)).conditions.longest_prompt
    assert longest is not None
    plan(TASKS["gsm8k"], chat, longest + 256, Asking(data=data))
    with pytest.raises(EvaluationError, match=rf"of 12 prompts do not fit: the longest has {longest:,} tokens"):
        plan(TASKS["gsm8k"], chat, longest + 255, Asking(data=data))
    with pytest.raises(EvaluationError, match="12 of 12 prompts do not fit"):
        plan(TASKS["gsm8k"], chat, 200, Asking(data=data))
    assert plan(TASKS["gsm8k"], chat, longest + 9, Asking(max_tokens=9, data=data)).conditions.max_tokens == 9


def test_a_task_with_too_many_empty_or_failed_answers_has_no_score(
    server: ModelServer, folder: Path, data: Path
) -> None:
    server.say = lambda messages: "" if messages[-1]["content"].startswith("Question: What is 3") else solved(messages)
    with pytest.raises(
        EvaluationError, match="gsm8k has no score: of 12 answers 1 are empty and 0 failed, more than 5%"
    ):
        run(TASKS["gsm8k"], subject(server, folder), Asking(data=data))
    refused = 400, {"error": {"message": "stop: too many"}}, {}
    server.say, server.first = solved, [refused] * 5
    with pytest.raises(EvaluationError, match="5 of 12 answers failed, the last: 400: stop: too many"):
        run(TASKS["gsm8k"], subject(server, folder), Asking(data=data))


def test_a_log_likelihood_that_fails_fails_the_task(server: ModelServer, folder: Path, data: Path) -> None:
    server.first = [(400, {"error": {"message": "prompt: too long"}}, {})]
    with pytest.raises(EvaluationError, match="a log-likelihood failed.*prompt: too long"):
        run(TASKS["truthfulqa_mc1"], subject(server, folder), Asking(limit=2, data=data))


def test_choices_of_one_token_are_one_request_unless_one_is_unlikely(
    server: ModelServer, folder: Path, chat: ChatFormat
) -> None:
    context = chat.prompt_ids([{"role": "user", "content": "A or B?"}])
    with torch.no_grad():
        logprobs = server.model(torch.tensor([context])).logits[0, -1].float().log_softmax(-1)
    likely, unlikely = logprobs.topk(3).indices.tolist(), int(logprobs.argmin())
    scored = scores_of(subject(server, folder), [Scoring([*context, token], 1) for token in (*likely, unlikely)])
    expected = [float(logprobs[token]) for token in (*likely, unlikely)]
    assert [each.logprob for each in scored] == pytest.approx(expected, abs=1e-4)
    assert [each.greedy for each in scored] == [True, False, False, False]
    assert len(server.asked) == 2, "the likely ones at once, and the unlikely one"
    server.lost = 19
    again = scores_of(subject(server, folder), [Scoring([*context, token], 1) for token in likely])
    assert [each.logprob for each in again] == pytest.approx(expected[:3], abs=1e-4) and len(server.asked) == 5


def questions(chat: ChatFormat, count: int = 3) -> list[Question]:
    asked: list[Any] = [[{"role": "user", "content": f"Say {n}"}] for n in range(count)]
    return [Question(messages, chat.prompt_ids(messages), 16) for messages in asked]


def test_a_busy_endpoint_is_asked_again(server: ModelServer, folder: Path, chat: ChatFormat) -> None:
    busy = {"error": {"message": "busy"}}
    server.first = [(503, busy, {"retry-after": "0"}), (429, busy, {"retry-after": "0"}), (503, busy, {})]
    answers = answers_to(subject(server, folder), questions(chat), chat)
    assert [answer.text for answer in answers] == ["an answer"] * 3 and len(server.asked) == 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"headers": {"x-policy-version": "4", "x-policy-run": "r1"}},
            "answered by version 4 of run r1, not by version 3",
        ),
        ({"headers": {"x-policy-version": "3", "x-policy-run": "r2"}}, "answered by version 3 of run r2"),
        ({"shift": 1}, "the endpoint's prompt is not the tokenizer's: .* the first that differs at 0"),
        ({"first": [(401, {"error": {"message": "no key"}}, {})]}, "refuses policy@3: 401: no key"),
    ],
)
def test_answers_of_something_else_are_refused(
    server: ModelServer, folder: Path, chat: ChatFormat, change: dict[str, Any], message: str
) -> None:
    for name, value in change.items():
        setattr(server, name, value)
    with pytest.raises(EvaluationError, match=message):
        answers_to(subject(server, folder), questions(chat), chat)


def test_an_endpoint_that_is_gone_is_one_message(
    server: ModelServer, folder: Path, chat: ChatFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asking, "PATIENCE_S", 0.05)
    gone = dataclasses.replace(subject(server, folder), url="http://127.0.0.1:9")
    with pytest.raises(EvaluationError, match="does not answer any more"):
        answers_to(gone, questions(chat), chat)


def test_keys_are_sent_and_never_shown(server: ModelServer, folder: Path) -> None:
    keyed = dataclasses.replace(subject(server, folder), key="secret-key")
    assert "secret-key" not in repr(keyed)


@pytest.fixture(scope="module")
def thinking(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> ChatFormat:
    """The format of a model whose template opens its thinking."""
    folder = tmp_path_factory.mktemp("thinking")
    chat = ChatFormat.load(tiny_model, "llama3-sampo")
    text = str(chat.tokenizer.chat_template)
    chat.tokenizer.chat_template = text.replace(
        "assistant<|end_header_id|>\\n\\n' -", "assistant<|end_header_id|>\\n\\n<think>\\n' -"
    )
    chat.save(folder)
    return ChatFormat.load(folder, "tokenizer")


def test_an_answer_is_read_after_its_thinking(chat: ChatFormat, thinking: ChatFormat) -> None:
    assert Thinking(thinking) and not Thinking(chat)
    assert Thinking(thinking).after("hm, 4?\n</think>\n\nIt is 5.", []) == "It is 5."
    assert Thinking(thinking).after("hm, 4? or 5, or", []) == "", "its thinking was cut"
    assert Thinking(chat).after("It is 5.", []) == "It is 5."
    assert Thinking(chat).after("<think>\n4?</think> It is 5.", []) == "It is 5."


def test_a_thinking_model_is_not_stopped_in_its_thinking_nor_asked_for_log_likelihoods(
    thinking: ChatFormat, data: Path
) -> None:
    with pytest.raises(EvaluationError, match="truthfulqa_mc1 compares log-likelihoods of answers without thinking"):
        plan(TASKS["truthfulqa_mc1"], thinking, 4096, Asking(data=data))
    question = dataclasses.replace(questions(thinking, 1)[0], stop=("Question:",))
    assert "stop" not in asking.chat_body(question, "policy@3", thinks=True)
    assert asking.chat_body(question, "policy@3", thinks=False)["stop"] == ["Question:"]
    assert asking.cut_at("5. Question: 6", question.stop) == "5. "


def test_the_bos_of_a_text_is_one_that_begins_conversations_and_no_turn(folder: Path, chat: ChatFormat) -> None:
    assert leading_bos(chat) == chat.bos_id
    of_turns = ChatFormat.load(folder, "tokenizer")
    of_turns.tokenizer.bos_token = "<|start_header_id|>"  # as ChatML's tokenizers call the token that opens a turn
    assert leading_bos(of_turns) is None


def test_a_score_of_samples_with_several_parts_is_their_ratio_with_its_interval() -> None:
    score = score_of("inst_level_strict_acc,none", 0.6, [[True, False], [True], [False, True]])
    assert score.count == 3 and score.stderr and score.low is not None and score.low < 0.6 < (score.high or 0)
    with pytest.raises(EvaluationError, match="by the harness and"):
        score_of("acc,none", 0.9, [1.0, 0.0])


def fake_ifbench(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As narrow as the interface that is used: what is on this machine has no such package."""

    class Shorter:
        def __init__(self, name: str) -> None:
            self.most = 0

        def build_description(self, **given: int) -> None:
            self.most = given["characters"]

        def get_instruction_args(self) -> dict[str, int]:
            return {"characters": self.most}

        def check_following(self, answer: str) -> bool:
            return len(answer) < self.most

    package, registry = ModuleType("ifbench"), ModuleType("ifbench.instructions_registry")
    vars(registry)["INSTRUCTION_DICT"] = {"length:shorter": Shorter}
    vars(package).update(instructions_registry=registry, data_path=lambda: path)
    monkeypatch.setitem(sys.modules, "ifbench", package)
    monkeypatch.setitem(sys.modules, "ifbench.instructions_registry", registry)


def test_ifbench_verifies_answers_with_the_functions_of_its_package(
    server: ModelServer, folder: Path, chat: ChatFormat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = [{"characters": 8, "other": None}, {"characters": 30}]
    row = {"prompt": "Say it.", "instruction_id_list": ["length:shorter"] * 2, "kwargs": given}
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({**row, "key": str(n)}) + "\n" for n in range(4)))
    fake_ifbench(tmp_path / "rows.jsonl", monkeypatch)
    server.say = lambda messages: "title\na line of text"
    result, samples = run(TASKS["ifbench"], subject(server, folder), Asking(limit=3))
    values = {score.name: score.value for score in result.scores}
    assert values == {
        **{"prompt_level_loose_acc": 1.0, "inst_level_loose_acc": 1.0},
        **{"prompt_level_strict_acc": 0.0, "inst_level_strict_acc": 0.5},
    }
    assert (result.conditions.limit, result.conditions.total, result.conditions.max_tokens) == (3, 4, 1280)
    assert json.loads(samples.splitlines()[0])["weights"] == {"inst_level_loose_acc": 2, "inst_level_strict_acc": 2}


def test_data_that_are_not_there_are_one_message(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="data: task piqa reads baber/piqa, which .* does not hold"):
        check_data([TASKS["piqa"]], tmp_path)
    (tmp_path / "nltk_data").mkdir()
    assert environment(tmp_path)["NLTK_DATA"].endswith("nltk_data")


def test_a_live_endpoints_limits_are_known_before_it_is_asked(chat: ChatFormat, data: Path, tmp_path: Path) -> None:
    from sampo_ray.loop.evaluated import Live

    planned = plan(TASKS["gsm8k"], chat, 4096, Asking(limit=2, data=data))
    tree = {"model": {"path": "m"}, "data": {"train": "t"}, "run": {"dir": str(tmp_path)}}
    for limit in ({"max_answer_tokens": 255}, {"max_prompt_tokens": 100}):
        live = Live(create_run(load_config({**tree, "serve": limit})), "http://127.0.0.1:9", None)
        shutil.rmtree(tmp_path)
        with pytest.raises(EvaluationError, match=f"gsm8k: it needs .* takes serve.{next(iter(limit))}="):
            live.check(planned)


def test_where_no_result_can_be_written_nothing_is_asked(tmp_path: Path) -> None:
    (tmp_path / "evaluations").write_text("a file")
    with pytest.raises(EvaluationError, match="results cannot be written there"):
        check_writable(Place(str(tmp_path)))


def test_the_registry_names_the_tasks_of_the_harness_as_they_are() -> None:
    import lm_eval
    import yaml

    class Loader(yaml.SafeLoader):
        """Functions of tasks are no matter here."""

    Loader.add_constructor("!function", lambda loader, node: None)
    folder = Path(lm_eval.__file__).parent / "tasks"
    files = {
        **{"gsm8k": "gsm8k/gsm8k.yaml", "ifeval": "ifeval/ifeval.yaml", "piqa": "piqa/piqa.yaml"},
        **{"mmlu": "mmlu/default/_default_template_yaml", "truthfulqa_mc1": "truthfulqa/truthfulqa_mc1.yaml"},
    }
    for name, file in files.items():
        tree, task = yaml.load((folder / file).read_text(), Loader), TASKS[name]
        assert tree["dataset_path"] == task.dataset
        assert (tree["output_type"] == "generate_until") == (task.kind == "generative")
        (column,) = task.columns
        assert column.score.partition(",")[0] in [each["metric"] for each in tree["metric_list"]]
    assert len(list((folder / "mmlu/default").glob("mmlu_*.yaml"))) == TASKS["mmlu"].parts


def refused(*words: str) -> str:
    result = CliRunner().invoke(app, ["evaluate", *words])
    assert result.exit_code == 1, result.output
    return result.output.removeprefix("error: ").strip()


def test_what_cannot_be_evaluated_is_one_message_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    here = str(tmp_path)
    assert refused(here, "--tasks", "gsm8").startswith("tasks: there is no task 'gsm8'; did you mean 'gsm8k'?")
    assert refused(here, "--tasks", "probe").startswith("tasks: probe is what a run asks of itself each round")
    assert refused(f"{here}/none").startswith(
        f"'{here}/none' is neither a run directory (no manifest.json) nor a local"
    )
    missing = refused(here, "--tasks", "gsm8k", "--data", f"{here}/none")
    assert missing.startswith(f"data: '{here}/none' is no folder")
    assert refused(here, "--tasks", "alpaca_eval").startswith("tasks: alpaca_eval needs --judge and --alpaca-data")
    assert refused(here, "--tasks", "gsm8k", "--judge", "x").startswith("--judge=x: none of the tasks is judged")
    assert "ifbench" not in sys.modules and "pip install ifbench" in refused(here, "--tasks", "ifbench")
    assert refused(here, "--tasks", "truthfulqa_mc1", "--versions", "base").startswith("versions=base: ")


@pytest.mark.slow
def test_versions_of_a_run_that_is_not_served_are_evaluated_and_the_run_is_left_as_it_was(
    shared: Path, tmp_path: Path
) -> None:
    from sampo_ray.console.demo_task import tiny_llama, tiny_tokenizer

    tokenizer, model = tiny_tokenizer(["Question: How many eggs? Answer: 3"]), tmp_path / "model"
    tiny_llama(tokenizer, positions=8192).save_pretrained(model)
    tokenizer.save_pretrained(model)
    tree = {"model": {"path": str(model)}, "data": {"train": "t", "max_length": 1024}}
    run = create_run(load_config({**tree, "run": {"dir": str(tmp_path / "run")}}))
    chat = ChatFormat.load(model, "llama3-sampo")
    for folder in (model, tmp_path / "run/tokenizer"):
        chat.save(folder)
    for version in (0, 5):
        state = tiny_llama(tokenizer, positions=8192, seed=version).state_dict()
        info = VersionInfo(version=version, round=0, step=version, labels=("final",) if version else ())
        write_version(f"{run.versions.url}/{version:06d}", state.items(), str(model), info)
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))

    words = ["--tasks", "gsm8k,truthfulqa_mc1", "--limit", "6", "--max-tokens", "24"]
    words += ["--data", str(shared / "data/lm_eval")]
    done = sampo_evaluate(run.place.path, *words)
    found = {(result.version, result.task): result for result in results_in(run.place)}
    assert set(found) == {(version, task) for version in (0, 5) for task in ("gsm8k", "truthfulqa_mc1")}, done
    assert "base" in done and "final" in done and "6 of 817" in done
    first, last = found[0, "truthfulqa_mc1"], found[5, "truthfulqa_mc1"]
    assert first.conditions == last.conditions and (first.conditions.bos, first.conditions.total) == (1, 817)
    assert found[0, "gsm8k"].conditions.dtype == "bfloat16" and found[0, "gsm8k"].run == run.id
    samples = [run.place.at("evaluations", f"{n:06d}", "truthfulqa_mc1", "samples.jsonl").read() for n in (0, 5)]
    assert samples[0] != samples[1], "they are different weights"
    after = [path.relative_to(tmp_path) for path in tmp_path.rglob("*") if "evaluations" not in path.parts]
    assert sorted(after) == before, "neither versions nor what is served were touched"
    assert "starting an endpoint" not in sampo_evaluate(run.place.path, *words), "they have results"


def sampo_evaluate(*words: str) -> str:
    command = [sys.executable, "-m", "sampo_ray", "evaluate", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=scaled(300))
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
