"""`data`: preference pairs and prompts."""

from pydantic import Field, model_validator

from sampo_ray.config.base import Section


class DataConfig(Section):
    train: str | None = None
    """Preference pairs (offline mode): JSONL(.gz), Parquet, a `datasets` folder or hub name, or any fsspec URL."""
    prompts: str | None = None
    """Prompts (online mode), in the same formats; a preference file works too, its answers are not read."""
    max_length: int = Field(8192, ge=8)
    """Tokens of prompt plus response, at most."""
    max_prompt_length: int | None = Field(None, ge=1)
    """Tokens of a prompt, at most; longer ones are cut on the left. Default: 3/4 of `max_length`."""

    @property
    def prompt_limit(self) -> int:
        return self.max_prompt_length if self.max_prompt_length is not None else self.max_length * 3 // 4

    @model_validator(mode="after")
    def _room_for_a_response(self) -> "DataConfig":
        if self.prompt_limit >= self.max_length:
            raise ValueError(
                f"max_prompt_length={self.max_prompt_length} leaves no room for a response within "
                f"max_length={self.max_length}; make it smaller"
            )
        return self
