"""A judge: a language model behind an OpenAI-compatible endpoint that compares or rates answers."""

import re
from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from sampo_ray.config.section import Section

PresetName = Literal["alpaca_eval", "helpful", "summary"]


class JudgeConfig(Section):
    url: str
    """Base URL of an OpenAI-compatible API, such as http://127.0.0.1:8000/v1."""
    model: str
    """The model's name there."""
    key_env: str | None = None
    """Name of the environment variable that holds the API key, where calls are made. None: no key is sent."""
    preset: PresetName = "helpful"
    """What the judge is asked: which answer a careful annotator prefers, which is more helpful, which summary is
    better."""
    mode: Literal["pairwise", "pointwise"] = "pairwise"
    """Answers to a prompt are compared with each other, or each is rated by itself from 1 to 9."""
    weighted: bool | None = None
    """Whether verdicts are weighted by the log-probs of their token. None: where the endpoint gives log-probs, which
    preset alpaca_eval needs."""
    concurrency: int = Field(8, ge=1, le=1024)
    """Calls at once, of each process that judges."""
    timeout_s: float = Field(60.0, gt=0)
    """Seconds that one try of a call may take."""
    retries: int = Field(5, ge=0)
    """Further tries after errors that may pass (429, 5xx, no answer), with growing pauses."""
    seed: int = Field(0, ge=0)
    """Decides which of two answers is shown first."""
    cache: str | None = None
    """Folder or fsspec URL where verdicts are kept by the content of their calls. None: in the run directory."""

    @model_validator(mode="after")
    def _can_be_called(self) -> "JudgeConfig":
        parts = urlsplit(self.url)
        if parts.username or parts.password or parts.query:  # not quoted, since it may hold a key
            raise ValueError("url holds credentials or a query; name the key's environment variable in key_env instead")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"url={self.url!r} is no base URL; write it as in http://127.0.0.1:8000/v1")
        if parts.path.rstrip("/").endswith("/chat/completions"):
            raise ValueError(f"url={self.url!r} names a route; end it before /chat/completions, as in http://host/v1")
        if self.key_env is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.key_env):
            # Not quoted either: it may be the key.
            raise ValueError("key_env is no name of an environment variable; the key itself does not go here")
        return self

    @property
    def needs_logprobs(self) -> bool:
        return self.weighted is True or (self.weighted is None and self.preset == "alpaca_eval")
