"""LoRA adapters that users bring: which are taken, and that they are served as peft computes them."""

import asyncio
import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from ray import serve
from ray.serve.llm.openai_api_models import CompletionRequest
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from sampo_ray.actors.policy.adapters import ReplicaAdapters
from sampo_ray.actors.policy.deployment import SLOTS, policy_deployment
from sampo_ray.actors.policy.messages import Chunks
from sampo_ray.actors.policy.replica_weights import WeightsSource
from sampo_ray.config.run import load_config
from sampo_ray.config.sections import GeneratorsConfig
from sampo_ray.console.demo_task import tiny_llama, tiny_tokenizer
from sampo_ray.console.main import app
from sampo_ray.data.chat import ChatFormat
from sampo_ray.errors import ConfigError, WeightsError
from sampo_ray.run.adapters import MAX_RANK, READ, SETTINGS, UNCHANGING, WEIGHTS, PlainAdapter, read_adapter
from sampo_ray.run.directory import create_run
from sampo_ray.run.serving import Adapter, add_adapter, edit_serving, read_serving, remove_adapter
from sampo_ray.run.storage import Place
from sampo_ray.run.version_files import write_version
from sampo_ray.run.versions import VersionInfo, WeightsId, adapter_model, version_folder
from sampo_ray.training.lora import MATRICES, adaptable_layers, file_name
from tests.conftest import TEXTS

TARGETS = ["q_proj", "v_proj", "down_proj"]
TOKENS = torch.arange(5, 45)[None]
TOLERANCE = 0.1  # of log-probs: bf16 in the engine, fp32 in peft


def save_adapter(base: Path, folder: Path, seed: int = 0, strength: float = 0.3, **settings: Any) -> Path:
    """An adapter that peft made and saved, with random weights."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted = get_peft_model(model, LoraConfig(**{"r": 8, "target_modules": TARGETS, **settings}))
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=strength if "lora_A" in name else 0.1, generator=random)
    adapted.save_pretrained(folder)
    return folder


def logits_of(base: Path, adapter: Path | None, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    model: nn.Module = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter:
        model = PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        return model.eval()(tokens).logits


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    settings = json.loads((folder / SETTINGS).read_text())
    change(settings)
    (folder / SETTINGS).write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"lora_alpha": 3},
        {"use_rslora": True, "lora_alpha": 5},
        {"alpha_pattern": {"q_proj": 64, r"layers\.1\.mlp\.down_proj": 2}},
        {"rank_pattern": {"v_proj": 2, r"model\.layers\.0\.mlp\.down_proj": 12}},
        {"use_rslora": True, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 64, "v_proj": 7}},
        {"layers_to_transform": [1], "layers_pattern": "layers"},
        {"exclude_modules": ["v_proj"]},
        {"target_modules": r".*\.1\..*_proj", "lora_dropout": 0.1},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "orthogonal"},
        {"init_lora_weights": "mica"},
        {"fan_in_fan_out": True, "task_type": "CAUSAL_LM"},
    ],
    ids=str,
)
def test_what_is_kept_of_an_adapter_computes_what_peft_computes(tiny_model, tmp_path, settings):
    adapter = save_adapter(tiny_model, tmp_path / "adapter", **settings)
    plain = read_adapter(str(adapter), str(tiny_model))
    plain.write(Place(str(tmp_path / "run")))
    kept = tmp_path / "run" / "adapters" / plain.content
    config = json.loads((kept / SETTINGS).read_text())
    assert config["r"] == config["lora_alpha"] == plain.rank  # a scaling of 1, all that vLLM reads of it
    shapes = {tuple(t.shape)[0 if "lora_A" in name else 1] for name, t in load_file(kept / WEIGHTS).items()}
    assert shapes == {plain.rank}
    expected = logits_of(tiny_model, adapter)
    assert (expected - logits_of(tiny_model, None)).abs().max() > 0.05
    torch.testing.assert_close(logits_of(tiny_model, kept), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, r"use_dora=True cannot be served .*merge_and_unload"),
        ({"bias": "all"}, r"bias=all cannot be served"),
        ({"bias": "lora_only"}, r"bias=lora_only cannot be served"),
        ({"lora_bias": True}, r"lora_bias=True cannot be served"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\] cannot be served"),
        ({"trainable_token_indices": [3]}, r"trainable_token_indices=\[3\] cannot be served"),
        ({"layer_replication": [[0, 2], [1, 2]]}, r"layer_replication=.* cannot be served"),
        ({"init_lora_weights": "pissa"}, r"init_lora_weights='pissa' changed the model's own weights: .*merge_and"),
        ({"init_lora_weights": "olora"}, r"init_lora_weights='olora' changed"),
        ({"target_modules": ["lm_head"]}, r"lm_head\.\S+ is no A or B of a linear layer between .*merge_and_unload"),
        ({"target_modules": ["embed_tokens", "q_proj"]}, r"embed_tokens\.\S+ is no A or B"),
    ],
    ids=str,
)
def test_an_adapter_that_would_be_served_wrongly_is_refused(tiny_model, tmp_path, settings, message):
    adapter = save_adapter(tiny_model, tmp_path / "adapter", **settings)
    with pytest.raises(ConfigError, match=message):
        read_adapter(str(adapter), str(tiny_model))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "only LoRA adapters"),
        ({"task_type": "SEQ_CLS"}, "only LoRA adapters"),
        ({"of_next_year": {"a": 1}}, r"of_next_year=\{'a': 1\} cannot be served"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"target_parameters": ["experts.down_proj"]}, "target_parameters"),
        ({"megatron_config": {"a": 1}}, "megatron_config"),
        ({"use_qalora": True}, "use_qalora"),
        ({"r": 4}, "has rank 8, and r and rank_pattern say 4"),
        ({"lora_alpha": None}, "lora_alpha and alpha_pattern say None"),
    ],
    ids=str,
)
def test_a_field_that_says_something_else_than_the_weights_is_refused(tiny_model, tmp_path, change, message):
    adapter = edit(save_adapter(tiny_model, tmp_path / "adapter"), lambda settings: settings.update(change))
    with pytest.raises(ConfigError, match=message):
        read_adapter(str(adapter), str(tiny_model))


def test_every_field_of_pefts_configuration_is_looked_at():
    """Those of variants and other models are refused when they are set; a new one of peft is refused too."""
    refused = {
        *("use_dora", "modules_to_save", "trainable_token_indices", "layer_replication", "lora_bias"),
        *("megatron_config", "alora_invocation_tokens", "use_qalora", "target_parameters", "use_bdlora"),
        *("velora_config", "monteclora_config", "arrow_config", "kasa_config"),
    }
    assert set(LoraConfig(r=8).to_dict()) == READ | UNCHANGING | refused


def test_weights_that_are_damaged_or_of_another_model_are_refused(tiny_model, tmp_path):
    adapter = save_adapter(tiny_model, tmp_path / "adapter")
    good = load_file(adapter / WEIGHTS)
    a, b = (file_name("model.layers.0.self_attn.q_proj", side) for side in MATRICES)
    for change, message in (
        ({a: torch.zeros(8, 4)}, r"A \[8, 4\] and B .* do not fit the layer"),
        ({b: good[b] * torch.inf}, "are not all finite"),
        ({"base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight": good[a].clone()}, "is no A or B"),
        ({a: torch.zeros(MAX_RANK + 1, 64), b: torch.zeros(64, MAX_RANK + 1)}, r"rank 513"),
    ):
        save_file({**good, **change}, adapter / WEIGHTS)
        with pytest.raises(ConfigError, match=message):
            read_adapter(str(adapter), str(tiny_model))
    save_file({name: tensor for name, tensor in good.items() if name != b}, adapter / WEIGHTS)
    with pytest.raises(ConfigError, match="an A or a B alone"):
        read_adapter(str(adapter), str(tiny_model))
    (adapter / WEIGHTS).write_bytes(b"\x01")
    with pytest.raises(ConfigError, match="a damaged adapter"):
        read_adapter(str(adapter), str(tiny_model))
    adapter = save_adapter(tiny_model, tmp_path / "again")
    (adapter / SETTINGS).write_text("[]")
    with pytest.raises(ConfigError, match="is no mapping"):
        read_adapter(str(adapter), str(tiny_model))
    (adapter / SETTINGS).unlink()
    with pytest.raises(ConfigError, match=r"adapter_config.json is missing"):
        read_adapter(str(adapter), str(tiny_model))


def test_an_adapter_is_told_from_others_by_its_weights(tiny_model, tmp_path):
    contents = [
        read_adapter(str(save_adapter(tiny_model, tmp_path / str(n), seed)), str(tiny_model)).content
        for n, seed in enumerate((1, 1, 2))
    ]
    assert contents[0] == contents[1] != contents[2]


@pytest.mark.parametrize("tied", [False, True])
def test_adapters_are_never_on_the_head_or_the_embeddings(tied):
    model = tiny_llama(tiny_tokenizer(TEXTS), tied=tied)
    layers = adaptable_layers(model)
    assert {name.rpartition(".")[2] for name in layers} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
    model.extra = nn.Linear(64, model.config.vocab_size, bias=False)
    model.extra.weight = model.get_input_embeddings().weight
    assert adaptable_layers(model).keys() == layers.keys(), "a layer that shares its weights with the embeddings"


class Engine:
    """What an engine has loaded, by name: the content of the file."""

    def __init__(self) -> None:
        self.loaded: dict[str, bytes] = {}

    async def load(self, model: str, folder: str) -> None:
        await asyncio.sleep(0)
        assert model not in self.loaded
        self.loaded[model] = (Path(folder) / WEIGHTS).read_bytes()

    async def unload(self, model: str) -> None:
        del self.loaded[model]


def serve_adapter(run: Place, name: str, weights: bytes) -> str:
    """Adds an adapter of these bytes to a run; returns its engine name."""
    adapter = PlainAdapter(8, ("layer",), weights)
    adapter.write(run)
    added = Adapter(base=0, rank=8, content=adapter.content)
    edit_serving(run, lambda state: add_adapter(state, name, added))
    return adapter_model(name, adapter.content)


def test_an_adapter_that_is_added_again_is_loaded_anew_and_a_removed_one_is_unloaded(tmp_path):
    run, engine = Place(str(tmp_path)), Engine()
    adapters = ReplicaAdapters(run, tmp_path / "copies", engine.load, engine.unload)

    async def ask(*models: str) -> None:
        async with contextlib.AsyncExitStack() as requests:
            for model in models:
                await requests.enter_async_context(adapters.using(model))

    old, other = serve_adapter(run, "tune", b"old"), serve_adapter(run, "other", b"other")
    asyncio.run(ask(old, other, old))
    assert engine.loaded == {old: b"old", other: b"other"}
    edit_serving(run, lambda state: remove_adapter(state, "tune"))
    new = serve_adapter(run, "tune", b"new")
    asyncio.run(ask(new))
    assert engine.loaded == {old: b"old", other: b"other", new: b"new"} and new != old

    async def unload_while_in_use() -> None:
        async with adapters.using(old):
            await adapters.unload_removed()
            assert old in engine.loaded, "a request uses it"
        await adapters.unload_removed()

    asyncio.run(unload_while_in_use())
    assert engine.loaded == {other: b"other", new: b"new"}
    with pytest.raises(WeightsError, match="was added before adapters were looked at; remove it and add it again"):
        asyncio.run(ask("policy@old"))
    with pytest.raises(WeightsError, match="not in the run any more"):
        asyncio.run(ask(adapter_model("tune", "0" * 32)))


def sampo(*arguments: object) -> str:
    """What a command prints, on one line."""
    return " ".join(CliRunner().invoke(app, [str(argument) for argument in arguments]).output.split())


def test_the_command_keeps_an_adapter_by_its_content_and_removes_what_no_name_has(tiny_model, tmp_path):
    run = create_run(
        load_config({"model": {"path": str(tiny_model)}, "data": {"train": "d"}, "run": {"dir": str(tmp_path / "run")}})
    ).place
    weights = AutoModelForCausalLM.from_pretrained(tiny_model).state_dict()
    info = VersionInfo(version=0, round=0, step=0)
    write_version(version_folder(run.at("versions").url, 0), weights.items(), str(tiny_model), info)
    good, dora = (save_adapter(tiny_model, tmp_path / str(on), use_dora=on) for on in (False, True))
    for name in ("tune", "same"):
        assert f"policy@{name}: served on version 0" in sampo("adapter", "add", run.url, good, name)
    assert "the name 'tune' is taken" in sampo("adapter", "add", run.url, good, "tune")
    assert "use_dora=True cannot be served" in sampo("adapter", "add", run.url, dora, "dora")
    kept = read_adapter(str(good), str(tiny_model))
    assert {name: adapter.content for name, adapter in read_serving(run).adapters.items()} == {
        "tune": kept.content,
        "same": kept.content,
    }
    assert run.at("adapters").names() == [kept.content]
    assert run.at("adapters", kept.content).names() == [SETTINGS, WEIGHTS]
    sampo("adapter", "remove", run.url, "tune")
    assert run.at("adapters").names() == [kept.content]
    sampo("adapter", "remove", run.url, "same")
    assert run.at("adapters").names() == [] and read_serving(run).all_pinned == []


@dataclass(frozen=True)
class Asked:
    """A request for a prompt's completion by a model, and the adapter that ought to answer: None for the base alone."""

    model: str
    adapter: Path | None
    prompt: tuple[int, ...]


class Pinned:
    """A replica of version 0 of a run with adapters on it, more than its engine has slots for."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.run, self.saved = Place(str(folder / "run")), folder
        self.base = Path(version_folder(self.run.at("versions").url, 0))
        weights = AutoModelForCausalLM.from_pretrained(model).state_dict()
        weights["lm_head.weight"] *= 5  # spread the logits, so that log-probs tell weights apart
        write_version(str(self.base), weights.items(), str(model), VersionInfo(version=0, round=0, step=0))
        tokenizer = self.run.at("tokenizer").path
        ChatFormat.load(model, "llama3-sampo").save(tokenizer)
        source = WeightsSource(pinned=WeightsId("run", 0), adapters=self.run.url, max_rank=16)
        config = GeneratorsConfig(num_cpus=0.5, max_ongoing_requests=32)
        app = policy_deployment("policy@0", str(self.base), tokenizer, source, config, 640)
        self.handle = serve.run(app, name="adapters-test", route_prefix=None)

    def add(self, name: str, seed: int, **settings: Any) -> tuple[str, Path]:
        """Serves a new adapter; returns its engine name, and where peft saved it."""
        saved = save_adapter(self.base, self.saved / f"{name}-{seed}", seed, **settings)
        plain = read_adapter(str(saved), str(self.base))
        plain.write(self.run)
        added = Adapter(base=0, rank=plain.rank, content=plain.content)
        edit_serving(self.run, lambda state: add_adapter(state, name, added))
        return adapter_model(name, plain.content), saved

    def check(self, requests: list[Asked], echo: bool) -> None:
        """Sends requests at the same time. What each model says must be what its weights say, by peft's own forward."""
        calls = []
        for each in requests:
            options = {"max_tokens": 32, "logprobs": 0, "temperature": 0, "ignore_eos": True, "echo": echo}
            body = CompletionRequest(
                model=each.model, prompt=list(each.prompt), return_tokens_as_token_ids=True, **options
            )
            calls.append(self.handle.options(stream=True).completions.remote(body))
        for each, call in zip(requests, calls, strict=True):
            said = list(call)[-1].response.choices[0].logprobs
            ids = [int(token.removeprefix("token_id:")) for token in said.tokens]
            tokens = torch.tensor([ids if echo else [*each.prompt, *ids]])
            expected = logits_of(self.base, each.adapter, tokens).log_softmax(-1)[0, :-1]
            expected = expected.gather(1, tokens[0, 1:, None])[:, 0]
            skipped = 0 if echo else len(each.prompt) - 1
            found = torch.tensor(said.token_logprobs[1:] if echo else said.token_logprobs)
            assert (found - expected[skipped:]).abs().max() < TOLERANCE, each.model


@pytest.fixture(scope="module")
def pinned(own_serve: None, tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Pinned]:
    yield Pinned(tmp_path_factory.mktemp("pinned"), tiny_model)
    serve.delete("adapters-test")


@pytest.mark.slow
@pytest.mark.parametrize("echo", [False, True], ids=["completions", "prompts too"])
def test_whatever_shares_its_batch_a_request_is_answered_by_its_own_weights(pinned: Pinned, echo: bool) -> None:
    served = [pinned.add(f"{'echo' if echo else 'plain'}{n}", seed=n) for n in range(SLOTS + 2)]
    models = [("policy@0", None), *served[:SLOTS], ("policy@0", None), *served[SLOTS:]]
    requests = [Asked(*each, tuple(range(5 + n, 45 + n))) for n, each in enumerate(models)]
    pinned.check(requests, echo)
    pinned.check(requests[:1], echo)


@pytest.mark.slow
def test_an_adapter_that_is_added_again_under_its_name_answers_with_its_new_weights(pinned: Pinned) -> None:
    prompt = tuple(n % 50 + 5 for n in range(300))  # two blocks of the prefix cache
    old, other = pinned.add("tune", seed=10), pinned.add("other", seed=11)
    pinned.check([Asked(*old, prompt), Asked(*other, prompt)], echo=False)
    edit_serving(pinned.run, lambda state: remove_adapter(state, "tune"))
    patterns = {"alpha_pattern": {"q_proj": 64}, "rank_pattern": {"v_proj": 2}}
    new = pinned.add("tune", seed=12, **patterns)
    pinned.check([Asked(*new, prompt), Asked(*other, prompt), Asked("policy@0", None, prompt)], echo=False)


@pytest.mark.slow
def test_users_see_the_name_of_an_adapter_in_a_stream_too(pinned: Pinned) -> None:
    model, _ = pinned.add("named", seed=20)
    body = CompletionRequest(model=model, prompt="hello", max_tokens=2, stream=True)
    items = list(pinned.handle.options(stream=True).completions.remote(body))
    text = "".join(event for item in items if isinstance(item, Chunks) for event in item.events)
    assert '"model":"policy@named"' in text and model not in text
