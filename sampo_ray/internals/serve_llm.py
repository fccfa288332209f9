"""The private interfaces of Ray Serve's LLM deployments, checked with ray 2.60.0 and vllm 0.29.0."""

import asyncio

from ray.llm._internal.serve.core.configs.llm_config import DiskMultiplexConfig
from ray.llm._internal.serve.engines.vllm.vllm_engine import VLLMEngine
from ray.serve.llm import LLMConfig, LLMServer
from ray.util.placement_group import PlacementGroup
from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.serve.lora.protocol import UnloadLoRAAdapterRequest
from vllm.platforms import current_platform
from vllm.v1.engine.async_llm import AsyncLLM

from sampo_ray.internals.processes import bind_spawned_processes


class OneProcessEngine(VLLMEngine):
    """Ray's vLLM engine. On a CPU, an engine of one rank computes in the process that schedules.

    vLLM gives a CPU rank its own process to tie its threads to cores, which our replicas do not want
    (actors/policy/deployment.py, `cpu_environment`). That process takes 10 s to import vLLM and holds 0.6 GB. Without
    it a tiny model was measured a quarter faster (4.2k tokens/s, was 3.4k). Reaches `_start_async_llm_engine`.

    An engine's processes end with this one, which starts them in the thread of the replica's event loop.
    """

    def _start_async_llm_engine(
        self, vllm_engine_args: AsyncEngineArgs, vllm_engine_config: VllmConfig, placement_group: PlacementGroup
    ) -> AsyncLLM:
        parallel = vllm_engine_config.parallel_config
        if current_platform.is_cpu() and parallel.world_size == 1:
            parallel.distributed_executor_backend = "uni"
        bind_spawned_processes()
        return super()._start_async_llm_engine(vllm_engine_args, vllm_engine_config, placement_group)


class EngineServer(LLMServer):
    """Ray's LLM server with vLLM's engine client within reach, and without telemetry. Reaches `_default_engine_cls`,
    `_start_engine` and `_llm_config` of `LLMServer`, and `VLLMEngine._engine_client`.
    """

    _default_engine_cls = OneProcessEngine

    async def _start_engine(self) -> None:
        await self.engine.start()  # no telemetry: the actor that Ray starts to collect it takes 6 s, and stays

    @property
    def client(self) -> AsyncLLM:
        """vLLM's engine client; LLMServer itself has no way to send token ids."""
        return self.engine._engine_client

    @property
    def model_id(self) -> str:
        """The model name that the engine answers to without adapters."""
        return self._llm_config.model_id

    async def __del__(self) -> None:
        """Ends the engine's processes as well, which Ray's server leaves to the end of its own process."""
        await super().__del__()
        if client := getattr(getattr(self, "engine", None), "_engine_client", None):
            await asyncio.to_thread(client.shutdown)  # vLLM waits for them, some seconds at most

    async def load_adapter(self, name: str, folder: str) -> None:
        """Makes the LoRA adapter in a local folder known to the engine as `name`. Reaches DiskMultiplexConfig."""
        lora = DiskMultiplexConfig(model_id=name, local_path=folder, lora_assigned_int_id=0, max_total_tokens=None)
        await self.engine.resolve_lora(lora)

    async def unload_adapter(self, name: str) -> None:
        """Frees an adapter that no request uses. Reaches `VLLMEngine._oai_models`."""
        models = self.engine._oai_models
        number = models.lora_requests[name].lora_int_id
        await models.unload_lora_adapter(UnloadLoRAAdapterRequest(lora_name=name))
        await self.client.remove_lora(number)


def use_local_folders(config: LLMConfig, model: str, tokenizer: str) -> None:
    """Has an engine of this configuration load model and tokenizer from folders of this node.

    Reaches `LLMConfig._engine_config`, which the driver has filled with URLs and which is made again, and the callback
    context's `run_init_node`: with all files here, no task has to download them, which would import vLLM (10 s).
    """
    config.engine_kwargs["tokenizer"] = tokenizer
    config.model_loading_config.model_source = model
    config._engine_config = None
    config.get_or_create_callback().ctx.run_init_node = False
