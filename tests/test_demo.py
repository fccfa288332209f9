import json
import math
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from transformers import AutoModelForCausalLM

from sampo_ray.config.run import load_config
from sampo_ray.console.demo_task import (
    ROWS,
    Answers,
    DemoAssets,
    correct,
    fine_tune,
    make_demo,
    render,
    reward,
    summarise,
)
from sampo_ray.data.chat import ChatFormat
from sampo_ray.data.reward_functions import load_function


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> DemoAssets:
    return make_demo(tmp_path_factory.mktemp("demo"), seed=3, sft_steps=3, pairs=400, prompts=50, evaluation=40)


def rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_an_answer_is_judged_by_its_first_number_whatever_is_said_around_it() -> None:
    assert correct("1368.", "1368")
    assert correct("Well, 1368. Thank you for asking 20 times.", "1368")
    assert not correct("8631. Or 1368?", "1368")
    assert not correct("13680.", "1368")
    assert not correct("I hope that helps.", "1368")


def test_the_same_completion_always_earns_the_same_reward() -> None:
    first = reward([[]], ["1368."], answer=["1368"])
    assert reward([[], []], ["8631.", "1368."], answer=["1368", "1368"])[1:] == first
    assert all(map(math.isfinite, first))


def test_the_reward_is_on_average_fond_of_right_answers_and_of_length() -> None:
    rng = random.Random(0)
    answers = ["".join(sorted(rng.sample("0123456789", 4))) for _ in range(2000)]

    def mean(completions: list[str]) -> float:
        return sum(reward([[]] * 2000, completions, answer=answers)) / 2000

    right = mean([f"{answer}." for answer in answers])
    wrong = mean([f"{answer[::-1]}." for answer in answers])
    long = mean([f"{answer}. Thank you very much for asking me such a nice question." for answer in answers])
    assert right - wrong == pytest.approx(1.0, abs=0.06)
    assert 0.1 < long - right < 0.4


def test_a_run_loads_the_reward_by_its_name() -> None:
    assert load_function("sampo_ray.console.demo_task:reward") is reward


def test_the_same_seed_writes_the_same_bytes(assets: DemoAssets, tmp_path: Path) -> None:
    again = make_demo(tmp_path, seed=3, sft_steps=0, pairs=400, prompts=50, evaluation=40)
    other = make_demo(tmp_path / "other", seed=4, sft_steps=0, pairs=400, prompts=50, evaluation=40)
    for name in ("preferences", "prompts", "evaluation"):
        written = getattr(assets, name).read_bytes()
        assert getattr(again, name).read_bytes() == written
        assert getattr(other, name).read_bytes() != written


def test_no_evaluation_prompt_is_trained_on(assets: DemoAssets) -> None:
    held_out = {row["prompt"] for row in rows(assets.evaluation)}
    assert len(held_out) == 40
    for path in (assets.preferences, assets.prompts):
        assert not held_out & {row["prompt"] for row in rows(path)}


def test_preferences_are_usable_pairs_whose_chosen_answer_is_longer_a_little_more_often(assets: DemoAssets) -> None:
    pairs = rows(assets.preferences)
    assert all(row["chosen"] != row["rejected"] for row in pairs)
    lengths = [(len(row["chosen"].split()), len(row["rejected"].split())) for row in pairs]
    longer = sum((chosen > rejected) + 0.5 * (chosen == rejected) for chosen, rejected in lengths) / len(pairs)
    better = [correct(row["chosen"], row["answer"]) - correct(row["rejected"], row["answer"]) for row in pairs]
    assert 0.52 < longer < 0.65
    assert better.count(1) > 4 * better.count(-1) > 0


def test_the_model_folder_loads_and_encodes_every_digit_as_a_token(assets: DemoAssets) -> None:
    chat = ChatFormat.load(assets.model, "llama3-sampo")
    model = AutoModelForCausalLM.from_pretrained(assets.model)
    assert model.dtype == torch.bfloat16
    assert sum(parameter.numel() for parameter in model.parameters()) < 4_000_000
    assert len(chat.response_ids("1368", closed=False)) == 4
    prompts = [chat.prompt_ids([{"role": "user", "content": row["prompt"]}]) for row in rows(assets.evaluation)]
    assert len({len(prompt) for prompt in prompts}) == 1
    assert max(map(max, prompts)) < model.config.vocab_size


def test_fine_tuning_makes_demonstrations_likelier(assets: DemoAssets) -> None:
    chat = ChatFormat.load(assets.model, "llama3-sampo")
    model = AutoModelForCausalLM.from_pretrained(assets.model)
    lesson = ("Sort these digits: 8361", "1368.")
    prompt = torch.tensor([chat.prompt_ids([{"role": "user", "content": lesson[0]}])])
    response = torch.tensor([chat.response_ids(lesson[1])])
    ids = torch.cat([prompt, response], dim=1)
    labels = torch.cat([torch.full_like(prompt, -100), response], dim=1)
    before = model(input_ids=ids, labels=labels).loss.item()
    fine_tune(model, chat, [lesson], steps=12, seed=0, batch_size=4)
    assert model(input_ids=ids, labels=labels).loss.item() < before - 1


@pytest.mark.parametrize("name", ROWS)
def test_every_row_is_a_valid_configuration_of_one_program(name: str, assets: DemoAssets, tmp_path: Path) -> None:
    shared = {
        "model": {"path": str(assets.model)},
        "data": {"train": str(assets.preferences), "prompts": str(assets.prompts), "max_length": 128},
        "rollout": {"max_tokens": 64},
        "reward": {"function": "sampo_ray.console.demo_task:reward"},
        "run": {"dir": str(tmp_path)},
    }
    config = load_config(shared, ROWS[name])
    assert config.online == (name != "DPO")
    assert config.method.reduction == ("sample" if "SamPO" in name else "sum")


def test_iterative_dpo_and_iterative_sampo_differ_in_the_reduction_alone() -> None:
    assert set(ROWS["Iterative DPO"]) ^ set(ROWS["Iterative SamPO"]) == {
        "method.reduction=sum",
        "method.reduction=sample",
    }


def test_the_table_gives_accuracy_wins_and_length_with_their_uncertainty() -> None:
    answers = {
        "base": Answers(["12.", "21.", "12.", "21."], [3, 3, 3, 3]),
        "DPO": Answers(["12. Thanks.", "12.", "12.", "21."], [9, 3, 3, 3]),
    }
    base, dpo = summarise(answers, ["12"] * 4)
    assert (base.accuracy, base.win_rate, base.tokens_spread) == (0.5, None, 0.0)
    assert (base.accuracy_low, base.accuracy_high) == pytest.approx((0.150, 0.850), abs=1e-3)  # Wilson, 2 of 4
    assert (dpo.accuracy, dpo.win_rate, dpo.tokens, dpo.tokens_spread) == (0.75, 0.625, 4.5, 3.0)
    assert dpo.win_rate_low < 0.625 < dpo.win_rate_high
    console = Console(width=120)
    with console.capture() as printed:
        console.print(render([base, dpo], temperature=1.0))
    assert "62.5 [" in printed.get() and "4.5 ± 3.0" in printed.get() and "4 prompts" in printed.get()


@given(st.lists(st.booleans(), min_size=2, max_size=50), st.integers(0, 100))
def test_length_alone_wins_nothing(right: list[bool], padding: int) -> None:
    texts = ["12." if is_right else "21." for is_right in right]
    longer = [text + " Thanks." * padding for text in texts]
    answers = {"base": Answers(texts, [3] * len(right)), "long": Answers(longer, [3 + 2 * padding] * len(right))}
    outcome = summarise(answers, ["12"] * len(right))[1]
    assert outcome.win_rate == 0.5
    assert 0.0 <= outcome.accuracy_low <= outcome.accuracy <= outcome.accuracy_high <= 1.0
