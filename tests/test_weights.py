"""Buckets, durable versions and the weight store."""

import asyncio
import threading
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import filelock
import numpy as np
import pytest
import ray
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from sampo_ray.actors.policy.replica_weights import merging
from sampo_ray.actors.weights import loaded as loaded_module
from sampo_ray.actors.weights import store as store_module
from sampo_ray.actors.weights.client import Weights, fetch, find_weight_store
from sampo_ray.actors.weights.loaded import LoadedVersions, LongPoll
from sampo_ray.actors.weights.publish import NewVersion, publish_adapters, publish_version
from sampo_ray.actors.weights.store import WeightStore, start_weight_store
from sampo_ray.config.sections import LoraConfig
from sampo_ray.console.demo_task import tiny_llama, tiny_tokenizer
from sampo_ray.errors import VersionError, WeightsError
from sampo_ray.internals.transformers import saved_tensors
from sampo_ray.run import commands
from sampo_ray.run.buckets import Bucket, pack, unpack
from sampo_ray.run.serving import Serving
from sampo_ray.run.storage import Place
from sampo_ray.run.version_files import adapters_info, begin_version, read_version, write_version
from sampo_ray.run.versions import (
    AdaptersInfo,
    VersionInfo,
    WeightsId,
    complete_versions,
    read_info,
    version_folder,
)
from sampo_ray.training.lora import file_name
from tests.waiting import scaled

BASE = VersionInfo(version=0, round=0, step=0)

tensors = st.builds(
    lambda dtype, shape, seed: torch.randint(0, 100, shape, generator=torch.Generator().manual_seed(seed)).to(dtype),
    st.sampled_from([torch.bfloat16, torch.float32, torch.float16, torch.int64, torch.bool]),
    st.lists(st.integers(0, 9), max_size=3),
    st.integers(0, 99),
)


@given(st.lists(tensors, max_size=12), st.integers(1, 2000))
@settings(deadline=None)
def test_unpacking_gives_back_the_packed_tensors_bit_for_bit(values: list[torch.Tensor], bucket_bytes: int) -> None:
    named = [(f"t{i}", value) for i, value in enumerate(values)]
    buckets = list(pack(named, bucket_bytes))
    found = [pair for bucket in buckets for pair in unpack(bucket)]
    assert [name for name, _ in found] == [name for name, _ in named]
    for (_, before), (_, after) in zip(named, found, strict=True):
        assert after.dtype == before.dtype
        assert torch.equal(after, before)
    assert all(bucket.data.size <= bucket_bytes or len(bucket.specs) == 1 for bucket in buckets)


def test_a_bucket_with_a_flipped_bit_is_refused() -> None:
    (bucket,) = pack([("w", torch.ones(10))], 1000)
    damaged = bucket.data.copy()
    damaged[7] ^= 1
    with pytest.raises(WeightsError, match=r"bucket of w: checksum"):
        list(unpack(replace(bucket, data=damaged)))


def test_each_tensor_is_copied_before_the_next_is_asked_for() -> None:
    def reused() -> Iterator[tuple[str, torch.Tensor]]:
        buffer = torch.empty(4)
        for i in range(3):
            yield f"w{i}", buffer.fill_(i)

    found = [tensor[0].item() for bucket in list(pack(reused(), 1000)) for _, tensor in unpack(bucket)]
    assert found == [0, 1, 2]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bucket_bytes", [50_000, 1 << 30])
def test_a_written_version_loads_with_plain_transformers(tmp_path: Path, tied: bool, bucket_bytes: int) -> None:
    model = tiny_llama(tokenizer := tiny_tokenizer(["hello"]), tied=tied)
    model.config.dtype = torch.float32  # what a shell may still say, whatever the weights have become
    shell = tmp_path / "shell"
    model.config.save_pretrained(shell)
    tokenizer.save_pretrained(shell)
    folder = str(tmp_path / "versions" / "000000")
    write_version(folder, saved_tensors(model), str(shell), BASE, bucket_bytes)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    for name, value in model.state_dict().items():
        assert loaded.state_dict()[name].dtype == torch.bfloat16
        assert torch.equal(loaded.state_dict()[name], value)
    names = {spec.name for bucket in read_version(folder) for spec in bucket.specs}
    assert names == dict(saved_tensors(model)).keys()
    assert ("lm_head.weight" in names) != tied
    assert (Path(folder) / "tokenizer.json").exists()


def test_a_version_may_live_behind_any_fsspec_url(tiny_model: Path) -> None:
    versions = "memory://run/versions"
    write_version(
        version_folder(versions, 3), [("w", torch.ones(5))], str(tiny_model), VersionInfo(version=3, round=0, step=3)
    )
    assert complete_versions(versions) == [3]
    assert [name for bucket in read_version(version_folder(versions, 3)) for name, _ in unpack(bucket)] == ["w"]


def test_a_version_is_complete_only_with_its_version_json(tmp_path: Path, tiny_model: Path) -> None:
    for version in (0, 10, 20):
        write_version(version_folder(str(tmp_path), version), [("w", torch.ones(5))], str(tiny_model), BASE)
    (tmp_path / "000010" / "version.json").unlink()
    (tmp_path / ".000030.abc").mkdir()
    assert complete_versions(str(tmp_path)) == [0, 20]
    with pytest.raises(WeightsError, match="not a complete version"):
        read_info(str(tmp_path / "000010"))
    write_version(str(tmp_path / "000010"), [("w", torch.zeros(5))], str(tiny_model), BASE)
    assert complete_versions(str(tmp_path)) == [0, 10, 20]


def test_a_complete_version_is_never_rewritten_but_its_source_is_drained(tmp_path: Path, tiny_model: Path) -> None:
    folder = str(tmp_path / "000000")
    write_version(folder, [("w", torch.ones(5))], str(tiny_model), BASE)
    source = iter([("w", torch.zeros(5))])
    write_version(folder, source, str(tiny_model), BASE)
    assert next(source, None) is None
    (bucket,) = read_version(folder)
    assert dict(unpack(bucket))["w"].tolist() == [1] * 5


def test_a_damaged_or_missing_file_of_a_version_is_named(tmp_path: Path, tiny_model: Path) -> None:
    folder = tmp_path / "000000"
    write_version(str(folder), [("w", torch.ones(5))], str(tiny_model), BASE)
    shard = folder / "model-00001-of-00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(WeightsError, match=r"model-00001-of-00001.safetensors: checksum"):
        list(read_version(str(folder)))
    shard.unlink()
    with pytest.raises(WeightsError, match=r"model-00001-of-00001.safetensors: missing"):
        list(read_version(str(folder)))


STORE = "test-weights"


class Run:
    """A run directory that the store works for; `publish` writes a version whose one tensor holds `value`."""

    def __init__(self, folder: Path, shell: Path, name: str) -> None:
        self.name, self.folder, self.shell, self.versions = name, folder, str(shell), str(folder / "versions")
        self.store = find_weight_store(STORE)

    def call(self, method: str, *args: object) -> object:
        return ray.get(getattr(self.store, method).remote(*args), timeout=scaled(90))

    def publish(self, version: int, value: float) -> WeightsId:
        tensors = [("w", torch.full((5,), value))]
        return publish_version(self.store, self.new(version), tensors, self.shell, timeout_s=scaled(60))

    def new(self, version: int, adapters: AdaptersInfo | None = None) -> NewVersion:
        info = VersionInfo(version=version, round=0, step=version, adapters=adapters)
        return NewVersion(self.name, Place(self.versions), info)

    def value(self, weights: object) -> float:
        (bucket,) = weights.buckets  # type: ignore[attr-defined]
        return dict(unpack(fetch(bucket, 30)))["w"][0].item()


@pytest.fixture(scope="module")
def store(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = start_weight_store(STORE, str(tmp_path_factory.mktemp("store") / "store.json"))
    yield
    ray.kill(store)


@pytest.fixture
def run(store: None, tmp_path: Path, tiny_model: Path) -> Run:
    run = Run(tmp_path / "run", tiny_model, f"run-{tmp_path.name}")
    run.call("attach", run.name, run.versions)
    return run


@pytest.mark.slow
def test_published_weights_wake_a_waiting_reader(run: Run) -> None:
    assert run.call("wait", None, 0.1) is None
    waiting = run.store.wait.remote(None, 30)
    run.publish(10, 1.0)
    weights = ray.get(waiting, timeout=scaled(60))
    assert weights.id == WeightsId(run.name, 10)
    assert weights.info.step == 10
    assert run.value(weights) == 1.0
    assert run.call("wait", weights.id, 0.1) is None
    assert run.call("wait", None, 0).id == weights.id


@pytest.mark.slow
def test_weights_never_go_backwards_and_publishing_again_changes_nothing(run: Run) -> None:
    run.publish(10, 1.0)
    run.publish(20, 2.0)
    assert run.publish(10, 1.0) == WeightsId(run.name, 20)
    assert run.publish(20, 3.0) == WeightsId(run.name, 20)
    assert run.value(run.call("wait", None, 5)) == 2.0


@pytest.mark.slow
def test_a_version_that_is_not_durable_does_not_go_live(run: Run) -> None:
    begin_version(version_folder(run.versions, 10))
    with pytest.raises(WeightsError, match="not a complete version"):
        run.call("publish", run.name, 10)
    with pytest.raises(WeightsError, match="is not attached"):
        run.call("publish", "another", 10)
    assert run.call("wait", None, 0.1) is None


@pytest.mark.slow
def test_adapters_are_handed_out_with_the_weights_that_they_belong_to(run: Run) -> None:
    lora, name = LoraConfig(rank=1), "layer.weight"

    def value(weights: Weights) -> list[list[float]]:
        merge = merging(fetch(weights.adapters, 30), weights.info.adapters.scaling)
        (bucket,) = weights.buckets
        return dict(unpack(merge(fetch(bucket, 30))))["layer.weight"].tolist()

    publish_version(run.store, run.new(10), [(name, torch.ones(2, 2).bfloat16())], run.shell, timeout_s=scaled(60))
    a, b = torch.tensor([[1.0, 2.0]]).bfloat16(), torch.tensor([[1.0], [0.0]]).bfloat16()
    parts, new = [(file_name(name, "A"), a), (file_name(name, "B"), b)], run.new(15, adapters_info(lora, 10))
    assert publish_adapters(run.store, new, parts, lora, timeout_s=scaled(60)).version == 15
    weights = run.call("wait", WeightsId(run.name, 10), 30)
    assert weights.id.version == 15 and value(weights) == [[3.0, 5.0], [1.0, 1.0]]
    ray.kill(run.store, no_restart=False)
    assert value(run.call("wait", WeightsId(run.name, 10), 30)) == [[3.0, 5.0], [1.0, 1.0]]
    publish_version(run.store, run.new(20), [(name, torch.zeros(2, 2))], run.shell, timeout_s=scaled(60))
    assert run.call("wait", weights.id, 30).adapters is None


@pytest.mark.slow
def test_a_killed_store_comes_back_with_the_latest_durable_version(run: Run) -> None:
    run.publish(10, 1.0)
    write_version(
        version_folder(run.versions, 20),
        [("w", torch.full((5,), 2.0))],
        run.shell,
        VersionInfo(version=20, round=0, step=20),
    )
    ray.kill(run.store, no_restart=False)
    weights = run.call("wait", WeightsId(run.name, 10), 30)
    assert weights.id.version == 20
    assert run.value(weights) == 2.0


@pytest.mark.slow
def test_weights_outlive_the_process_that_published_them(run: Run) -> None:
    publisher = ray.remote(Run).options(num_cpus=0).remote(run.folder, Path(run.shell), run.name)
    ray.get(publisher.publish.remote(10, 1.0), timeout=scaled(60))
    weights = run.call("wait", None, 5)
    ray.kill(publisher)
    assert run.value(weights) == 1.0
    assert np.all(run.value(run.call("wait", None, 5)) == 1.0)


@pytest.mark.slow
def test_a_store_serves_one_run_after_another(run: Run) -> None:
    run.publish(10, 1.0)
    other = str(run.folder / "other" / "versions")
    write_version(version_folder(other, 0), [("w", torch.full((5,), 7.0))], run.shell, BASE)
    assert run.call("attach", "other", other) == WeightsId("other", 0)
    weights = run.call("wait", WeightsId(run.name, 10), 5)
    assert weights.id == WeightsId("other", 0)
    assert run.value(weights) == 7.0
    ray.kill(run.store, no_restart=False)
    assert run.call("wait", None, 30).id == WeightsId("other", 0)


def test_a_command_does_not_wait_for_weights_that_are_being_read(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, entered = threading.Event(), threading.Event()

    def slow(bucket: Bucket) -> Bucket:
        if not bucket.data[-1]:  # the last version's, which is zero
            entered.set()
            assert gate.wait(scaled(60))
        return bucket

    monkeypatch.setattr(store_module, "kept", slow)

    async def work() -> None:
        store = WeightStore(str(tmp_path / "store.json"))
        for version in (0, 10, 20):
            write(tmp_path / "versions", tiny_model, version, 1.0)
        await store.attach("run", str(tmp_path / "versions"))
        write(tmp_path / "versions", tiny_model, 30, 0.0)
        publishing = asyncio.create_task(store.publish("run", 30))
        assert await asyncio.to_thread(entered.wait, scaled(60))
        command = asyncio.create_task(store.command(commands.Promote("10"), "first"))
        while store._policy.serving.live != 10:
            await asyncio.sleep(0.01)
        assert not publishing.done()
        gate.set()
        answer = await command
        assert (answer.done.live, answer.repeated, answer.state.serving.live) == (10, False, 10)
        assert await publishing in (WeightsId("run", 10), WeightsId("run", 20)), "it may still be read"
        newest = await store.wait(None, scaled(30), "training")
        assert newest is not None and newest.id.version == 30

    asyncio.run(work())


@pytest.mark.slow
def test_a_command_that_is_sent_again_happens_once_even_after_a_restart_of_the_store(run: Run) -> None:
    for version in (0, 10, 20):
        run.publish(version, float(version))
    answers = [run.call("command", commands.Rollback(), "mine") for _ in range(2)]
    ray.kill(run.store, no_restart=False)
    answers.append(run.call("command", commands.Rollback(), "mine"))
    assert [(each.done.live, each.repeated, each.state.serving.live) for each in answers] == [
        (10, False, 10),
        (10, True, 10),
        (10, True, 10),
    ]
    with pytest.raises(VersionError, match="is that of another command"):
        run.call("command", commands.Pin("10"), "mine")
    assert run.call("command", commands.Rollback(), "other").done.live == 0


@pytest.mark.slow
def test_publishing_goes_on_while_serving_json_is_held_or_damaged(run: Run) -> None:
    run.publish(0, 0.0)
    file = Place(run.versions.removesuffix("versions") + "serving.json")
    good = file.read()
    file.write(b"{")
    assert run.publish(10, 1.0) == WeightsId(run.name, 0)
    assert [trouble.what for trouble in run.call("state").troubles] == ["serving.json"]
    ray.kill(run.store, no_restart=False)  # even then
    assert run.call("wait", None, 30, "training").id.version == 10
    assert run.publish(20, 2.0) is None and not run.call("serves", None)
    file.write(good)
    assert run.call("wait", None, scaled(60)).id.version == 20
    with filelock.FileLock(file.path.replace(".json", ".lock")):
        assert run.publish(30, 3.0) == WeightsId(run.name, 20)
    assert run.call("wait", WeightsId(run.name, 20), scaled(60)).id.version == 30


def loaded(folder: Path) -> LoadedVersions:
    return LoadedVersions("run", str(folder), put=lambda bucket: bucket)


def write(folder: Path, shell: Path, version: int, value: float = 1.0) -> None:
    info = VersionInfo(version=version, round=0, step=version)
    write_version(version_folder(str(folder), version), [("w", torch.full((5,), value))], str(shell), info)


def test_the_newest_version_on_disk_is_read_once(tmp_path: Path, tiny_model: Path) -> None:
    versions = loaded(tmp_path)
    assert versions.read_newest() is None
    for version in (0, 5):
        write(tmp_path, tiny_model, version)
    assert versions.read_newest() == 5
    assert versions.read_newest() is None
    assert versions.training is not None and versions.training.id == WeightsId("run", 5)


class Objects:
    """Stands for the object store: the bytes that it has, and the most that there ever were."""

    def __init__(self) -> None:
        self.held = self.most = 0

    def put(self, bucket: Bucket) -> Bucket:
        data = np.array(bucket.data)
        self.held += data.nbytes
        self.most = max(self.most, self.held)
        weakref.finalize(data, self._free, data.nbytes)
        return replace(bucket, data=data)

    def _free(self, nbytes: int) -> None:
        self.held -= nbytes


VERSIONS = range(0, 60, 10)


@given(st.lists(st.sampled_from([None, *VERSIONS]), max_size=20))
@settings(deadline=None, max_examples=60)
def test_no_more_than_two_versions_are_ever_in_memory(
    versions_on_disk: tuple[Path, int], events: list[int | None]
) -> None:
    """None: the next version is published; else one that is there goes live, as an operator may want."""
    folder, nbytes = versions_on_disk
    objects, there = Objects(), list[int]()
    versions = LoadedVersions("run", str(folder), objects.put)

    def newest(url: str, after: int) -> int | None:
        return max((version for version in there if version > after), default=None)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loaded_module, "newest_version", newest)
        for sequence, event in enumerate(events, start=1):
            if event is None and len(there) < len(VERSIONS):
                there.append(VERSIONS[len(there)])
                assert versions.read_newest() == there[-1]
                assert versions.training is not None and versions.training.id.version == there[-1]
            elif event in there:
                versions.make_live(Serving(live=event, sequence=sequence))
                assert versions.live is not None and versions.live.id.version == event
    assert objects.most <= 2.3 * nbytes, "two whole versions, and adapters"


@pytest.fixture(scope="module")
def versions_on_disk(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> tuple[Path, int]:
    """Versions 0, 10, ... 50, every other of adapters alone on the one before; the bytes of a whole one."""
    folder, whole = tmp_path_factory.mktemp("versions"), 10_000
    for version in VERSIONS:
        alone = version % 20 == 10
        info = VersionInfo(version=version, round=0, step=version)
        if alone:
            info = VersionInfo(**{**dict(info), "adapters": AdaptersInfo(base=version - 10, rank=1, scaling=1.0)})
        tensors = [("w", torch.zeros(10 if alone else whole))]
        write_version(version_folder(str(folder), version), tensors, str(tiny_model), info)
    return folder, 4 * whole


def test_a_version_is_live_once_for_each_sequence(tmp_path: Path, tiny_model: Path) -> None:
    versions = loaded(tmp_path)
    write(tmp_path, tiny_model, 0)
    versions.make_live(Serving())
    assert versions.live is None
    versions.make_live(Serving(live=0, sequence=1))
    before = versions.live
    versions.make_live(Serving(live=0, sequence=1))
    assert versions.live is before
    versions.make_live(Serving(live=0, sequence=3))
    assert versions.live is not None and versions.live.sequence == 3


def test_a_long_poll_answers_at_once_when_a_channel_differs_and_else_when_it_changes() -> None:
    first, second = (
        Weights(WeightsId("run", n), VersionInfo(version=n, round=0, step=n), (), sequence=n) for n in (1, 2)
    )

    async def polled() -> list[Weights | None]:
        poll, current = LongPoll(), [first]
        at_once = await poll.wait(lambda: current[0], None, None, 0)
        unchanged = await poll.wait(lambda: current[0], first.id, first.sequence, 0)
        other_sequence = await poll.wait(lambda: current[0], first.id, 7, 0)
        waiting = asyncio.create_task(poll.wait(lambda: current[0], first.id, None, 60))
        await asyncio.sleep(0)
        current[0] = second
        await poll.announce()
        return [at_once, unchanged, other_sequence, await waiting]

    assert asyncio.run(polled()) == [first, None, first, second]
