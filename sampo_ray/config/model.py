"""`model`: what is trained, and how."""

from typing import Literal

from pydantic import Field

from sampo_ray.config.base import Section


class LoraConfig(Section):
    rank: int = Field(16, ge=1, le=512)
    """Rank of the adapters."""
    alpha: int | None = Field(None, ge=1)
    """Adapters count `alpha` / `rank`. Default: twice `rank`."""
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Linear layers that get adapters, by the ends of their names (q_proj, mlp.down_proj); never the head."""

    @property
    def scaled_by(self) -> int:
        return self.alpha if self.alpha is not None else 2 * self.rank


class ModelConfig(Section):
    path: str
    """Hugging Face folder or hub name of the model to start from."""
    template: Literal["llama3-sampo", "llama3", "tokenizer"] = "llama3-sampo"
    """Prompt format: the card's, Meta's, or the one the tokenizer brings."""
    lora: LoraConfig | None = None
    """Train adapters on a frozen model; a round ends with them merged in. Default: train all weights."""
    attention: Literal["segments", "flex"] = "segments"
    """How trainer and reference compute attention: two calls a pair, or PyTorch's FlexAttention, one for a whole row,
    which needs GPUs."""

    @property
    def flex(self) -> bool:
        return self.attention == "flex"
