"""All families that are tried, and the types that are left out."""

from collections.abc import Iterable

from tests.families.specs import Spec
from tests.families.specs_classic import CLASSIC
from tests.families.specs_dense import LLAMA_LIKE, OTHERS
from tests.families.specs_experts import LATENT, PLAIN
from tests.families.specs_multimodal import MULTIMODAL
from tests.families.specs_recurrent import RECURRENT

SPECS: tuple[Spec, ...] = (*LLAMA_LIKE, *OTHERS, *PLAIN, *LATENT, *RECURRENT, *CLASSIC, *MULTIMODAL)

ENCODERS = (
    *("bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert"),
    *("rembert", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl", "xmod"),
)
DECODERS_OF_TWO = (
    *("bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "mvp", "pegasus", "plbart"),
    *("prophetnet", "trocr", "whisper"),
)
LEFT_OUT: dict[str, str] = {
    **dict.fromkeys(ENCODERS, "an encoder that a switch makes causal, as bert"),
    **dict.fromkeys(DECODERS_OF_TWO, "the decoder of an encoder-decoder model, as bart"),
    **dict.fromkeys(("musicgen", "musicgen_melody"), "writes audio codes"),
    **dict.fromkeys(("gemma4_assistant", "gemma4_unified_assistant"), "drafts from another model's hidden states"),
    "gemma3n": "its vision part needs timm; the text part is gemma3n_text",
}
"""Types of MODEL_FOR_CAUSAL_LM_MAPPING_NAMES that are not tried, and why."""


def named(names: Iterable[str]) -> tuple[Spec, ...]:
    """The variants with these names or of these types; all for none."""
    wanted = set(names)
    found = tuple(spec for spec in SPECS if not wanted or spec.family in wanted)
    types = wanted - {spec.family for spec in found}
    return tuple(spec for spec in SPECS if spec in found or spec.model_type in types)
