"""The Serve deployment of policy replicas: engine settings, scaling, and where it draws its weights from."""

from typing import Any

import torch
from ray import serve
from ray.serve.llm import LLMConfig, build_llm_deployment

from sampo_ray.actors.policy.server import PolicyServer, Source
from sampo_ray.actors.transfer.backend import BACKEND
from sampo_ray.config.fleet import GeneratorsConfig
from sampo_ray.internals.torch import cpu_has_bf16


def cpu_engine(max_model_len: int) -> dict[str, Any]:
    """vLLM's settings where there is no GPU: nothing to compile, whole prompts only, and arithmetic the CPU has.

    Where a CPU has no bf16 instructions, vLLM's products of bf16 matrices were measured 7 times slower than fp32 ones
    (64 rows); the weights are the same numbers in both.

    vLLM 0.29 rewinds the random generator of a seeded request whose prompt it cuts into chunks, which on a CPU kills
    the engine ("CPU Generator does not use offset").
    """
    return {
        "dtype": "bfloat16" if cpu_has_bf16() else "float32",
        "enforce_eager": True,
        "kv_cache_memory_bytes": 1 << 30,
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(max_model_len, 4096),
    }


def cpu_environment() -> dict[str, str]:
    """Environment of an engine on CPUs: as many threads as the caller has (`OMP_NUM_THREADS`), on any core.

    Left alone, vLLM keeps a core free and ties all engines of a machine to the same other ones: on two cores a 135M
    model had 80 tokens/s instead of 132, and two engines took 39 s to start instead of 24.

    And memory that it once had is kept (glibc's settings): that of the weights which a swap replaces serves the next.
    """
    kept = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
    return {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(torch.get_num_threads()), **kept}


def policy_deployment(
    model_id: str,
    model_folder: str,
    chat_folder: str,
    source: Source,
    config: GeneratorsConfig,
    max_model_len: int,
    name: str = "policy",
) -> serve.Application:
    """The Serve deployment of policy replicas, which serve `source` under the name `model_id`.

    `model_folder` is a complete version (the one to pin, or 000000 until the store's weights are in), `chat_folder` the
    run's tokenizer with its chat template and end-of-turn token, both paths or fsspec URLs that every node reaches; the
    store that `source` names must run. `config.num_gpus` decides between GPU and CPU.
    """
    gpus = config.num_gpus or 0
    llm_config = LLMConfig(
        model_loading_config={"model_id": model_id, "model_source": model_folder},
        accelerator_config={"kind": "gpu" if gpus else "cpu"},
        placement_group_config={"bundle_per_worker": {"GPU": gpus} if gpus else {"CPU": 0}},
        deployment_config={"ray_actor_options": {"num_cpus": 1 if config.num_cpus is None else config.num_cpus}},
        # Ray sends tokens on every 50 ms, which only delays those that take longer.
        experimental_configs={} if gpus else {"stream_batching_interval_ms": 0},
        runtime_env={"env_vars": {"HF_HUB_OFFLINE": "1", **({} if gpus else cpu_environment())}},
        engine_kwargs={
            "tokenizer": chat_folder,
            "max_model_len": max_model_len,
            "generation_config": "vllm",
            "enable_prompt_tokens_details": True,
            "worker_extension_cls": "sampo_ray.actors.transfer.backend.WorkerExtension",
            "weight_transfer_config": {"backend": BACKEND},
            # Another backend would have to stay the engine's for good, whoever's first request wanted it.
            "structured_outputs_config": {"backend": "xgrammar"},
            **({"enable_lora": True, "max_lora_rank": source.max_rank, "max_loras": 4} if source.adapters else {}),
            **({"dtype": "bfloat16"} if gpus else cpu_engine(max_model_len)),
            **config.engine,
        },
    )
    options = {
        "name": name,
        "autoscaling_config": config.autoscaling,
        "max_ongoing_requests": config.max_ongoing_requests,
        "max_queued_requests": config.max_queued_requests,
        "graceful_shutdown_timeout_s": source.drain_s,  # answers in flight end before the replica does
    }
    return build_llm_deployment(
        llm_config,
        bind_kwargs={"source": source, "chat_folder": chat_folder},
        override_serve_options=options,
        deployment_cls=PolicyServer,
    )
