"""vLLM's own model classes, without an engine: they take versions and exports whole, at the start and at a swap."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import (
    destroy_distributed_environment,
    destroy_model_parallel,
    init_distributed_environment,
    initialize_model_parallel,
)
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.models.registry import ModelRegistry

from sampo_ray.actors.transfer.spare_weights import SpareWeights
from sampo_ray.console.demo_task import tiny_tokenizer
from sampo_ray.internals.transformers import saved_tensors
from sampo_ray.internals.vllm import pack_again
from sampo_ray.run.version_files import write_version
from sampo_ray.run.versions import VersionInfo
from sampo_ray.training.loading import load_model

from .test_saved import small_files

SIZES = {"vocab_size": 320, "hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 4, "head_dim": 32}
SIZES |= {"num_key_value_heads": 2, "max_position_embeddings": 128}
MIXTURE = {"moe_intermediate_size": 64}
SERVED: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt_neox": {},
    "gpt2": {"n_embd": 128, "n_positions": 128},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 128},
    "phi": {"num_key_value_heads": 4, "intermediate_size": 512},  # of another width vLLM takes no notice
    "gemma2": {},
    "gemma3_text": {"sliding_window": 16},
    "cohere": {},
    "granite": {},
    "mixtral": {},
    "qwen3_moe": MIXTURE,
    "deepseek_v2": MIXTURE | {"kv_lora_rank": 64, "q_lora_rank": 64, "qk_rope_head_dim": 32, "qk_nope_head_dim": 32,
                              "v_head_dim": 32, "head_dim": None},
    "glm4_moe": MIXTURE,
    "ernie4_5_moe": MIXTURE,
    "gpt_oss": {"sliding_window": 16},
    "apertus": {},
}  # fmt: skip
"""Families of different kinds, in sizes that vLLM's kernels for CPUs take."""


class Reads(TorchDispatchMode):
    """Which of the tensors that are `given` out are read, by operations that are no views."""

    def __init__(self) -> None:
        super().__init__()
        self.unread, self._names, self._kept = set[str](), dict[int, str](), list[Tensor]()

    def given(self, tensors: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors:
            self.unread.add(name)
            self._names[tensor.untyped_storage().data_ptr()] = name
            self._kept.append(tensor)  # so that no other gets its memory
            yield name, tensor

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            for each in tree_leaves((args, kwargs)):
                if isinstance(each, Tensor) and each.device.type == "cpu":
                    self.unread.discard(self._names.get(each.untyped_storage().data_ptr(), ""))
        return func(*args, **(kwargs or {}))


def version(kind: str, folder: Path, seed: int = 0) -> Path:
    """The folder of a random model's version 0."""
    settings = {**SIZES, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **SERVED[kind]}
    shell = small_files(kind, folder / f"model-{seed}", seed, **settings)
    tiny_tokenizer(["one two three"], 300).save_pretrained(shell)
    written = folder / f"{seed:06d}"
    write_version(str(written), saved_tensors(load_model(shell)), str(shell), VersionInfo(version=0, round=0, step=0))
    return written


def engine_config(folder: Path) -> VllmConfig:
    (architecture,) = load_model(folder).config.architectures
    # Else vLLM starts a process for each class, to ask what it can do.
    ModelRegistry.register_model(architecture, ModelRegistry.models[architecture].load_model_cls())
    arguments = EngineArgs(model=str(folder), enforce_eager=True, max_model_len=64, dtype="bfloat16")
    return arguments.create_engine_config()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """vLLM's groups of one process, for mixtures of experts as well."""
    folder = tmp_path_factory.mktemp("group")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        with set_current_vllm_config(engine_config(version("mixtral", folder))):
            init_distributed_environment(1, 0, f"file://{folder / 'store'}", 0, "gloo")
            initialize_model_parallel(1, 1)
        yield
    destroy_model_parallel()
    destroy_distributed_environment()


def loaded(config: VllmConfig, reads: Reads) -> nn.Module:
    """vLLM's model, which says itself if a parameter gets no value."""
    loader: Any = get_model_loader(config.load_config)
    files = loader.get_all_weights
    loader.get_all_weights = lambda settings, model: reads.given(files(settings, model))
    with reads:
        return loader.load_model(vllm_config=config, model_config=config.model_config)


@pytest.mark.parametrize("kind", SERVED)
def test_every_tensor_of_a_version_is_one_that_vllm_loads(alone: None, kind: str, tmp_path: Path) -> None:
    config, reads = engine_config(version(kind, tmp_path)), Reads()
    with set_current_vllm_config(config):
        loaded(config, reads)
    assert reads._kept and not reads.unread


def computed(model: nn.Module) -> dict[str, Tensor]:
    """All tensors of a model, and what its linear layers make of the same input: on CPUs their weights are packed."""
    found = dict(model.state_dict())
    for name, module in model.named_modules():
        torch.manual_seed(0)
        if isinstance(module, ParallelLMHead):
            x = torch.randn(3, module.embedding_dim, dtype=torch.bfloat16)
            found[f"{name}()"] = module.quant_method.apply(module, x)
        elif isinstance(module, LinearBase):
            x = torch.randn(3, module.input_size, dtype=torch.bfloat16)
            found[f"{name}()"] = module.quant_method.apply(module, x, getattr(module, "bias", None))
        elif isinstance(module, VocabParallelEmbedding):
            found[f"{name}()"] = module(torch.arange(9))
    return found


@pytest.mark.parametrize("way", ["beside", "in place"])
@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "mixtral", "glm4_moe", "apertus"])
def test_a_swap_makes_the_model_that_the_new_weights_make(alone: None, kind: str, way: str, tmp_path: Path) -> None:
    config, new = engine_config(version(kind, tmp_path)), version(kind, tmp_path, seed=1)
    tensors = dict(saved_tensors(load_model(new)))
    with set_current_vllm_config(config):
        model: Any = loaded(config, Reads())
        before = {name: each.clone() for name, each in computed(model).items()}
        if way == "beside":
            spare = SpareWeights(model, torch.bfloat16)
            for _ in spare.prepare(tensors.items()):
                now = computed(model)
                assert all(torch.equal(now[name], each) for name, each in before.items())
            spare.adopt()
        else:
            initialize_layerwise_reload(model)
            model.load_weights(tensors.items())
            finalize_layerwise_reload(model, config.model_config)
            pack_again(model)
        swapped = computed(model)
        fresh = computed(loaded(engine_config(new), Reads()))
    assert swapped.keys() == fresh.keys()
    assert [name for name, each in fresh.items() if not torch.equal(swapped[name], each)] == []
    assert [name for name, each in fresh.items() if name.endswith("()") and torch.equal(before[name], each)] == []
