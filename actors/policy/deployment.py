"""The Serve deployment of policy replicas: engine settings, scaling, and the source of its weights."""

import torch
from ray import serve
from ray.serve.llm import LLMConfig, build_llm_deployment

from sampo_ray.actors.policy.replica_weights import WeightsSource
from sampo_ray.actors.policy.server import PolicyServer
from sampo_ray.actors.transfer.backend import BACKEND
from sampo_ray.config.sections import GeneratorsConfig
from sampo_ray.internals.torch import cpu_has_bf16


def cpu_engine(max_model_len: int) -> dict[str, object]:
    """vLLM's settings where there is no GPU: nothing is compiled, prompts are not cut, and arithmetic that the CPU has.

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

    By default vLLM keeps a core free and ties all engines of a machine to the same other ones: on two cores a 135M
    model had 80 tokens/s instead of 132, and two engines took 39 s to start instead of 24.

    glibc's settings keep freed memory in the process, so that a swap can use that of the weights before.
    """
    kept = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
    return {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(torch.get_num_threads()), **kept}


def policy_deployment(
    model_id: str,
    model_folder: str,
    chat_folder: str,
    source: WeightsSource,
    config: GeneratorsConfig,
    max_model_len: int,
    name: str = "policy",
) -> serve.Application:
    """The Serve deployment of policy replicas, which serve `source` under the name `model_id`.

    `model_folder` is a complete version (the one to pin, or 000000 until the store's weights are loaded), `chat_folder`
    the run's tokenizer with its chat template and end-of-turn token. Both are paths or fsspec URLs that every node
    reaches. The store that `source` names must run. `config.num_gpus` decides between GPU and CPU.
    """
    gpus = config.num_gpus or 0
    llm_config = LLMConfig(
        model_loading_config={"model_id": model_id, "model_source": model_folder},
        accelerator_config={"kind": "gpu" if gpus else "cpu"},
        placement_group_config={"bundle_per_worker": {"GPU": gpus} if gpus else {"CPU": 0}},
        deployment_config={"ray_actor_options": {"num_cpus": 1 if config.num_cpus is None else config.num_cpus}},
        # By default Ray sends tokens every 50 ms; where a token takes longer, that is only a delay.
        experimental_configs={} if gpus else {"stream_batching_interval_ms": 0},
        runtime_env={"env_vars": {"HF_HUB_OFFLINE": "1", **({} if gpus else cpu_environment())}},
        engine_kwargs={"tokenizer": chat_folder, **engine_arguments(source, config, max_model_len)},
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


def engine_arguments(source: WeightsSource, config: GeneratorsConfig, max_model_len: int) -> dict[str, object]:
    """vLLM's engine arguments; those of `config.engine` come last."""
    return {
        "max_model_len": max_model_len,
        "generation_config": "vllm",
        "enable_prompt_tokens_details": True,
        "worker_extension_cls": "sampo_ray.actors.transfer.backend.WorkerExtension",
        "weight_transfer_config": {"backend": BACKEND},
        # Named, because vLLM would otherwise keep for good the backend that the first such request happens to need.
        "structured_outputs_config": {"backend": "xgrammar"},
        **({"enable_lora": True, "max_lora_rank": source.max_rank, "max_loras": 4} if source.adapters else {}),
        **({"dtype": "bfloat16"} if config.num_gpus else cpu_engine(max_model_len)),
        **config.engine,
    }
