"""What is served: the endpoint, its keys, its gates, its feedback, and how new versions get there."""

import ipaddress
import os
from typing import Annotated, Literal

from pydantic import Field, SecretStr, field_validator, model_validator

from sampo_ray.config.section import Section
from sampo_ray.config.tools import AUTO, PARSERS
from sampo_ray.errors import ConfigError, suggestion


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a host name or address; IPv4 addresses may be mapped into IPv6."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost"
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def _keys_from_environment() -> tuple[SecretStr, ...]:
    return tuple(SecretStr(key) for key in os.environ.get("SAMPO_API_KEYS", "").split(",") if key)


class PublishConfig(Section):
    every_steps: int = Field(10, ge=1)
    """Optimizer steps between published weight versions; the end of a round always publishes."""
    keep: int = Field(2, ge=1)
    """Published versions kept on disk besides those that begin or end a round."""
    transport: Literal["host", "ipc", "broadcast"] = "host"
    """How weights reach the policy replicas' workers: through host memory; from the memory of the GPU that they share
    with the trainer (`ipc`); or sent to all at once (`broadcast`). A transfer that fails goes through host memory."""


class GatesConfig(Section):
    """Checks that a version must pass before it goes live. Default: none. Probes are greedy answers."""

    finite: bool = False
    """No weight is NaN or infinite."""
    smoke: str | None = Field(None, min_length=1)
    """A prompt that must get an answer which ends by itself."""
    max_mean_tokens: float | None = Field(None, gt=0)
    """Mean tokens of an answer to the probe prompts, at most."""
    max_growth: float | None = Field(None, gt=0)
    """The same, as a multiple of the last version that passed."""
    min_win_rate: float | None = Field(None, ge=0, le=1)
    """Share of probe prompts that get a higher reward than from the last version that passed (ties half), at least."""
    verifiers: float | None = Field(None, ge=0, le=1)
    """By how much the share of verifiable instructions that answers follow may be below that of the last version that
    passed. For prompts with columns in IFEval's or IFBench's format."""
    probe: bool = False
    """The evaluation at the end of its round found no collapse (`evaluate.every=round`)."""
    probes: int = Field(32, ge=1, le=512)
    """Number of prompts of the run's data to probe with."""

    @property
    def any(self) -> bool:
        return self.finite or self.probe or self.probing

    @property
    def probing(self) -> bool:
        """Whether a check needs answers of the version."""
        needing = self.smoke, self.max_mean_tokens, self.max_growth, self.min_win_rate, self.verifiers
        return any(gate is not None for gate in needing)


class FeedbackConfig(Section):
    keep_hours: float = Field(0.0, ge=0)
    """Hours that answers are kept to be voted on (`POST /feedback`); 0: none is kept, and feedback is refused."""
    max_answers: int = Field(10_000, ge=1)
    """Answers kept, at most; the oldest go first."""
    max_votes: int = Field(100_000, ge=1)
    """Votes that a run takes."""
    max_bytes: int = Field(256 << 20, ge=1 << 20)
    """Bytes of the answers kept, at most, and likewise of the votes; prompts count."""


class ServeConfig(Section):
    enabled: bool = True
    """Whether the run has a live endpoint."""
    host: str = "127.0.0.1"
    """Address the endpoint binds to, unless Serve runs already; anything but loopback needs an API key, or `open`."""
    port: int = Field(8000, ge=0, le=65535)
    """Port of the endpoint, unless Serve runs already; 0 picks a free one."""
    api_keys: tuple[Annotated[SecretStr, Field(min_length=1)], ...] | None = Field(
        default_factory=_keys_from_environment
    )
    """Keys accepted as `Authorization: Bearer ...`; none means an open (loopback) endpoint. Default: those of the
    environment variable SAMPO_API_KEYS, separated by commas. They are never written to the run directory, which has
    null where there were some: they have to be given again."""
    keys_file: str | None = None
    """File of further keys with scopes (`sampo keys add`), which may change while the endpoint runs: a path (on a
    cluster one that all its machines share) or any fsspec URL."""
    open: bool = False
    """Anyone who reaches the endpoint may use it without a key, on any address; `/admin` still needs one."""
    max_body_bytes: int = Field(1 << 20, ge=1024)
    """Largest request body."""
    max_prompt_tokens: int | None = Field(None, ge=1)
    """Longest prompt. Default: what the model allows."""
    max_answer_tokens: int | None = Field(None, ge=1)
    """Most tokens that a request may ask for, over all its completions. Default: what the model allows for each."""
    requests_per_minute: int | None = Field(None, ge=1)
    """Requests a minute for each key. Default: no limit."""
    tokens_per_minute: int | None = Field(None, ge=1)
    """Tokens of prompts and answers a minute for each key. Default: no limit."""
    request_timeout_s: float = Field(300.0, gt=0)
    """Seconds a request may take before it is cancelled."""
    start_timeout_s: float = Field(120.0, ge=0)
    """Seconds of them that it may wait for a replica while none runs (after scaling to zero, for example)."""
    follow: Literal["latest", "round", "manual"] = "latest"
    """Which versions go live automatically: all that are published, those that end rounds, or none."""
    swap: Literal["keep", "wait"] = "keep"
    """`keep`: answers in flight continue with the new weights. `wait`: they finish first (one version an answer)."""
    tools: str | None = None
    """Tool calls: who reads them from an answer, `auto` (by the form of calls in the model's chat template) or a parser
    of vLLM's by name. Default: requests with tools are refused. It needs `model.template: tokenizer`."""
    gates: GatesConfig = GatesConfig()
    feedback: FeedbackConfig = FeedbackConfig()

    @property
    def keyed(self) -> bool:
        """Whether there are keys, in the configuration or in a file."""
        return bool(self.api_keys or self.keys_file)

    @model_validator(mode="after")
    def _known_parser(self) -> "ServeConfig":
        if self.tools is not None and self.tools not in (AUTO, *PARSERS):
            raise ValueError(f"tools={self.tools!r} is not known; {suggestion(self.tools, [AUTO, *PARSERS])}")
        return self

    @field_validator("api_keys", mode="before")
    @classmethod
    def _given_again(cls, keys: object) -> object:
        return (_keys_from_environment() or None) if keys is None else keys

    def check_keyed(self) -> None:
        """ConfigError where the endpoint would let in whom it should not, for want of keys.

        For where an endpoint starts: a run directory, which holds no keys, is read without them as well.
        """
        how = "set SAMPO_API_KEYS in the environment, or serve.keys_file (`sampo keys add`)"
        if not self.enabled or self.keyed:
            return
        if self.api_keys is None:
            raise ConfigError(
                f"serve.api_keys=null: this run was begun with keys, which its directory does not keep; {how}, or "
                "serve.api_keys=[] to do without"
            )
        if not is_loopback(self.host) and not self.open:
            raise ConfigError(
                f"serve.host={self.host!r} is not loopback and there are no API keys (a run directory keeps none); "
                f"{how}, or serve.open=true to let in whoever reaches it"
            )
