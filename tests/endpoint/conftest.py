"""One real policy replica on a tiny model, behind endpoints, for all tests of this folder."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import ray
import torch
from playwright.sync_api import Browser, Page, Request, expect, sync_playwright
from ray import serve
from transformers import AutoModelForCausalLM

from sampo_ray.config.keys import render
from sampo_ray.config.sections import GeneratorsConfig
from sampo_ray.config.serving import FeedbackConfig, ServeConfig
from sampo_ray.run.manifest import Manifest
from sampo_ray.run.storage import Place
from tests.conftest import require
from tests.endpoint.live import CONTEXT, KEY, OTHER_KEY, Endpoint, Visit, key_entry
from tests.waiting import scaled, wait_until

REFUSALS = re.compile(r"Failed to load resource: (the server responded with a status of 40[0134]|net::ERR_FAILED)")
TOOL_TURNS = r"""
{%- if tools -%}
    {{- '<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n' -}}
    {%- for tool in tools -%}{{- tool.function.name + ': ' + tool.function.description + '\n' -}}{%- endfor -%}
    {{- '<|eot_id|>\n' -}}
    {%- for m in messages -%}
        {{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + (m.content or '') -}}
        {%- for call in m.tool_calls or [] -%}
            {{- '<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' -}}
            {{- (call.function.arguments | tojson) + '}\n</tool_call>' -}}
        {%- endfor -%}
        {{- '<|eot_id|>\n' -}}
    {%- endfor -%}
    {%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}{%- endif -%}
{%- else -%}PLAIN{%- endif -%}
"""
"""A chat template that has turns for tools; without tools it is PLAIN."""


@pytest.fixture(scope="package")
def own_serve(local_ray: None) -> Iterator[None]:
    yield
    serve.shutdown()


def begin(target: serve.RunTarget) -> None:
    serve.run_many([target], wait_for_applications_running=False)


def await_running(app: str) -> None:
    def runs() -> bool:
        status = serve.status().applications[app]
        assert status.status != "DEPLOY_FAILED", status.message
        return status.status == "RUNNING"

    wait_until(runs, f"application {app}", 240, every=1.0)


def route(name: str) -> str:
    return "/" if name == "endpoint" else f"/{name}"


@pytest.fixture(scope="package")
def endpoint(own_serve: None, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    from sampo_ray.actors.policy.deployment import policy_deployment, with_tools
    from sampo_ray.actors.policy.replica_weights import WeightsSource
    from sampo_ray.actors.weights.store import start_weight_store
    from sampo_ray.data.chat import ChatFormat
    from sampo_ray.run.storage import Place
    from sampo_ray.run.version_files import write_version
    from sampo_ray.run.versions import VersionInfo
    from sampo_ray.serve.endpoint import await_endpoint, deploy_endpoint, free_port, start_serve

    run = tmp_path_factory.mktemp("run")
    chat = ChatFormat.load(tiny_model, "llama3-sampo")
    chat.tokenizer.chat_template = TOOL_TURNS.replace("PLAIN", chat.tokenizer.chat_template)
    chat.save(run / "tokenizer")
    state = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16).state_dict()
    write_version(f"{run}/versions/000000", state.items(), str(tiny_model), VersionInfo(version=0, round=0, step=0))
    config = ServeConfig(
        port=free_port("127.0.0.1"),
        api_keys=(KEY, OTHER_KEY),
        max_body_bytes=20_000,
        start_timeout_s=3.0,
        feedback=FeedbackConfig(keep_hours=1.0),
    )
    start_serve(config)
    store = start_weight_store("test-endpoint", f"{run}/store.json")
    ray.get(store.attach.remote("run-a", f"{run}/versions"), timeout=scaled(60))
    tokenizer = Place(str(run / "tokenizer"))
    generators = with_tools(GeneratorsConfig(max_ongoing_requests=4, num_cpus=0.5), "auto", tokenizer)
    policy = policy_deployment(
        "policy", f"{run}/versions/000000", tokenizer.url, WeightsSource("test-endpoint"), generators, CONTEXT
    )
    everybody = config.model_copy(update={"api_keys": (), "feedback": FeedbackConfig(), "tools": "auto"})
    hasty = everybody.model_copy(update={"request_timeout_s": scaled(2.0)})
    keys_file = run / "keys.yaml"
    keys_file.write_bytes(render([key_entry("use"), key_entry("admin")], False))
    limits = {"max_prompt_tokens": 100, "max_answer_tokens": 40, "requests_per_minute": 60_000}
    limited = config.model_copy(
        update={"api_keys": (), "keys_file": str(keys_file), "tokens_per_minute": 100_000, **limits}
    )
    endpoints = {"endpoint": config, "open": everybody, "hasty": hasty, "limited": limited}
    begin(serve.RunTarget(policy, name="test-policy", route_prefix=None))
    for name, settings in endpoints.items():  # each imports for seconds: one at a time, beside the policy's start
        deploy_endpoint(f"test-{name}", "test-policy", "test-endpoint", settings, [route(name)])
        await_running(f"test-{name}")
    await_running("test-policy")
    urls = [await_endpoint(f"test-{name}", route(name)) for name in endpoints]
    yield Endpoint(*urls, keys_file, store, f"{run}/versions", tiny_model)
    ray.kill(store)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    chromium = require(shutil.which("chromium"), "Debian's package chromium")
    expect.set_options(timeout=scaled(15_000))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser: Browser, endpoint: Endpoint) -> Iterator[Visit]:
    """Opens the page. Afterwards: no error in any console, and no request went elsewhere.

    A browser reports each 4xx in its console; those of a login and of routes that are off are no errors.
    """
    run = Place(str(Path(endpoint.versions).parent))
    run.at("manifest.json").write(Manifest(id="run-a").model_dump_json().encode())
    home, problems, contexts = urlsplit(endpoint.url).netloc, [], []

    def open_page(url: str, **options: Any) -> Page:
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(scaled(20_000))
        page.on("console", lambda said: said.type == "error" and problems.append(said.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda asked: asked.url.startswith("data:") or note_host(asked))
        page.goto(url)
        return page

    def note_host(asked: Request) -> None:
        if urlsplit(asked.url).netloc != home:
            problems.append(f"request to {asked.url}")

    yield open_page
    for context in contexts:
        context.close()
    assert [problem for problem in problems if not REFUSALS.match(problem)] == []
