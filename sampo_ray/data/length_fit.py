"""What a fit of rewards against length has found. Imports no numbers' library, as it is part of a run's manifest."""

from pydantic import BaseModel, ConfigDict


class LengthFit(BaseModel):
    """How rewards go with length within prompts."""

    model_config = ConfigDict(frozen=True)

    slope: float
    """Reward for each further token."""
    stderr: float
    r2: float
    """Share of the rewards' variance within prompts that length explains."""
    spread: float
    """Standard deviation of rewards within prompts."""
    completions: int
    prompts: int

    @property
    def figures(self) -> dict[str, float]:
        """By the names of metrics."""
        return {"length_slope": self.slope, "length_slope_stderr": self.stderr, "length_r2": self.r2}

    def text(self) -> str:
        return (
            f"slope {self.slope:.3g} a token (standard error {self.stderr:.2g}), R2 {self.r2:.3f}, of "
            f"{self.completions} completions to {self.prompts} prompts"
        )
