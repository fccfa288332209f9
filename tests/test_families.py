"""One family of each kind against plain transformers; `make families` tries all."""

import pytest
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as TYPES

from tests.families.families import LEFT_OUT, SPECS, named
from tests.families.report import summary
from tests.families.trial import Result, try_family

ONE_OF_EACH_KIND = {
    "Llama 3.1": "segments",
    "Mistral 0.1": "segments",
    "Gemma 2": "segments",
    "gpt-oss": "segments",
    "Llama 4 text": "own",
    "Cohere 2": "segments",
    "Phi": "segments",
    "Pythia": "segments",
    "DeepSeek V3": "segments",
    "Mixtral": "segments",
    "GPT-2": "segments",
    "PhiMoE, window, jitter as shipped": "segments",
    "Qwen3.5": "own",
    "Mamba 2": "own",
    "Falcon RW": "own",
}
"""Families and how their attention is computed: rotary, windows, caps, sinks, chunks, a scale and a bias of the head,
another name of it, latent keys and buffers, experts, learned positions, jitter, linear attention, a state space, ALiBi.
"""


@pytest.mark.parametrize(("family", "way"), ONE_OF_EACH_KIND.items())
def test_a_family_trains_exports_and_adapts_as_transformers_computes_it(family: str, way: str) -> None:
    (spec,) = named([family])
    result = try_family(spec)
    assert (result.faults, result.refusal, result.way) == ([], "", way)


@pytest.mark.parametrize("family", ["CPM-Ant", "Reformer", "XLNet", "EmbeddingGemma, bidirectional"])
def test_a_family_that_sees_tokens_before_they_are_written_is_refused(family: str) -> None:
    (spec,) = named([family])
    result = try_family(spec)
    assert result.refusal.startswith("model.path")
    assert result.faults == []


@pytest.mark.parametrize(
    ("family", "said"), [("xLSTM", "cannot be trained"), ("Doge, keeps the best 16 keys", "16 keys")]
)
def test_a_family_that_would_fail_or_differ_at_long_sequences_is_refused(family: str, said: str) -> None:
    (spec,) = named([family])
    result = try_family(spec)
    assert said in result.refusal
    assert result.faults == []


def test_the_last_line_counts_families_and_those_before_it_say_what_is_not_exact() -> None:
    exact, refused, wrong = (Result(spec) for spec in SPECS[:3])
    refused.refusal = "model.path: no"
    wrong.limit("log-probs", 0.5)
    *others, last = summary([wrong, exact, refused])
    assert last == "1 of 3 families exact, 33.3 %"
    assert [line.partition(" ")[0] for line in others] == ["refused", "wrong"]
    assert "log-probs: 5.0e-01" in others[1]


def test_every_type_that_generates_text_is_tried_or_left_out_with_a_reason() -> None:
    tried = {spec.model_type for spec in SPECS}
    assert tried | set(LEFT_OUT) == set(TYPES)
    assert not tried & set(LEFT_OUT)


def test_each_variant_has_a_name_of_its_own() -> None:
    assert len({spec.family for spec in SPECS}) == len(SPECS)
