"""One family of each kind against plain transformers; `make families` tries all."""

import pytest
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as TYPES

from tests.families.families import LEFT_OUT, SPECS, named
from tests.families.trial import try_family

ONE_OF_EACH_KIND = ("Llama 3.1", "Qwen2, tied", "Gemma", "OLMo 2", "GLM 4")


@pytest.mark.parametrize("family", ONE_OF_EACH_KIND)
def test_a_family_trains_exports_and_adapts_as_transformers_computes_it(family: str) -> None:
    (spec,) = named([family])
    result = try_family(spec)
    assert (result.verdict, result.faults, result.refusal) == ("exact", [], "")


def test_every_type_that_generates_text_is_tried_or_left_out_with_a_reason() -> None:
    tried = {spec.model_type for spec in SPECS}
    assert tried | set(LEFT_OUT) == set(TYPES)
    assert not tried & set(LEFT_OUT)


def test_each_variant_has_a_name_of_its_own() -> None:
    assert len({spec.family for spec in SPECS}) == len(SPECS)
