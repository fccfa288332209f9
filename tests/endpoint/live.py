"""A live endpoint as the tests of this folder see it."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import torch
from ray import serve
from transformers import AutoModelForCausalLM

from sampo_ray.config.keys import Key, digest
from tests.waiting import scaled, wait_until

KEY, OTHER_KEY = "first key of two", "second-key"
CONTEXT = 512
HI = [{"role": "user", "content": "hello world"}]
LONG = {"model": "policy", "messages": HI, "n": 200, "max_tokens": 450, "temperature": 1.0, "ignore_eos": True}


Visit = Callable[..., Any]
"""Opens a URL in a browser (playwright's Page); see the fixture `visit`."""


def get(url: str, **options: Any) -> httpx.Response:
    return httpx.get(url, timeout=scaled(60), **options)


def key_entry(scope: Any) -> Key:
    return Key(name=scope, sha256=digest(f"{scope}-key"), scopes=frozenset([scope]))


@dataclass(frozen=True)
class Endpoint:
    """A guarded endpoint at `url`, an `open` one (which has tools), an open one of little patience at `hasty`, one with
    limits and a file of keys (`use` and `admin`) at `limited`, and the weight store of their policy.
    """

    url: str
    open: str
    hasty: str
    limited: str
    keys_file: Path
    store: Any
    versions: str
    model: Path

    def post(self, route: str, body: Any, **more: Any) -> httpx.Response:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"authorization": f"Bearer {KEY}", **more.pop("headers", {})}
        return httpx.post(f"{self.url}/v1/{route}", content=content, headers=headers, timeout=scaled(60), **more)

    def judge(self, **said: Any) -> tuple[int, Any]:
        """Status of `POST /feedback`, and whether it was a duplicate or the error's message."""
        answer = httpx.post(
            f"{self.url}/feedback", json=said, headers={"authorization": f"Bearer {KEY}"}, timeout=scaled(30)
        )
        return answer.status_code, answer.json()["duplicate"] if answer.is_success else message(answer)

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0, timeout=scaled(60))

    def publish(self, version: int) -> None:
        """Makes noisy weights live and returns when the replica holds them."""
        from sampo_ray.actors.weights.publish import NewVersion, publish_version
        from sampo_ray.run.storage import Place
        from sampo_ray.run.versions import VersionInfo

        model = AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.bfloat16)
        noise = {name: tensor + torch.randn_like(tensor) * 0.02 for name, tensor in model.state_dict().items()}
        info = VersionInfo(version=version, round=0, step=version)
        new = NewVersion("run-a", Place(self.versions), info)
        publish_version(self.store, new, noise.items(), f"{self.versions}/000000")
        wait_until(lambda: self.live() == version, f"version {version}", every=0.01)

    def live(self) -> int:
        def held() -> int:
            return int(serve.get_app_handle("test-policy").weights.remote().result(timeout_s=scaled(30))["version"])

        with ThreadPoolExecutor(1) as thread:  # tests in a browser run in an event loop, where Serve refuses to wait
            return thread.submit(held).result(scaled(60))


def message(response: httpx.Response) -> str:
    """The error's message, after checking that the answer has OpenAI's form and gives nothing away."""
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert not any(leak in response.text for leak in ("Traceback", "/site-packages", 'File "', "sampo_ray", ".py"))
    return error["message"]
