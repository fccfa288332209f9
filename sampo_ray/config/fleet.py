"""`fleet`: how many replicas there are, and how large they are."""

from typing import Any

from pydantic import Field, model_validator

from sampo_ray.config.base import Section


class FleetConfig(Section):
    min_replicas: int | None = Field(None, ge=0)
    """Fewest replicas. Default: 1."""
    max_replicas: int | None = Field(None, ge=1)
    """Most replicas. Default: 1 (laptop), one per free GPU (cluster)."""
    target_ongoing_requests: float | None = Field(None, gt=0)
    """Requests per replica that Serve scales towards. Default: 3/4 of `max_ongoing_requests`."""
    upscale_delay_s: float = Field(10.0, ge=0)
    """Seconds that more replicas must be wanted before they are started."""
    downscale_delay_s: float = Field(300.0, ge=0)
    """Seconds that fewer must be wanted before some are stopped."""
    max_ongoing_requests: int = Field(64, ge=1)
    """Requests a replica works on at once."""
    max_queued_requests: int = Field(4096, ge=1)
    """Requests that wait at a caller before it is told to slow down."""
    num_cpus: float | None = Field(None, ge=0)
    """Logical CPUs a replica asks Ray for."""
    num_gpus: float | None = Field(None, ge=0)
    """GPUs a replica asks Ray for. Default: 1 where the profile has them."""

    @property
    def autoscaling(self) -> dict[str, float]:
        """Ray Serve's `autoscaling_config`, with every size explicit."""
        least = 1 if self.min_replicas is None else self.min_replicas
        return {
            "min_replicas": least,
            "max_replicas": max(1, least, self.max_replicas or 1),
            "target_ongoing_requests": self.target_ongoing_requests or max(1.0, 0.75 * self.max_ongoing_requests),
            "upscale_delay_s": self.upscale_delay_s,
            "downscale_delay_s": self.downscale_delay_s,
        }

    @model_validator(mode="after")
    def _ordered(self) -> "FleetConfig":
        if self.min_replicas is not None and self.max_replicas is not None and self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas={self.min_replicas} is more than max_replicas={self.max_replicas}")
        return self


class GeneratorsConfig(FleetConfig):
    engine: dict[str, Any] = Field(default_factory=dict)
    """Further vLLM engine arguments, e.g. `tensor_parallel_size` or `gpu_memory_utilization`."""


class FleetsConfig(Section):
    generators: GeneratorsConfig = GeneratorsConfig()
    references: FleetConfig = FleetConfig(max_ongoing_requests=2)
    rewards: FleetConfig = FleetConfig(max_ongoing_requests=8)
