"""What a rank publishes of its learner beside its steps: versions within a round and at its end; and its export."""

import dataclasses
import logging
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait

import ray
import torch
import torch.distributed as dist
from ray.actor import ActorHandle
from ray.exceptions import RayError
from tenacity import RetryCallState, Retrying, stop_after_attempt, wait_incrementing

from sampo_ray.actors.ranks.background import JOB_S, Background
from sampo_ray.actors.ranks.exchange import EXCHANGE_ANSWER_S, RoundSpec
from sampo_ray.actors.transfer.sending import start_sender
from sampo_ray.actors.weights.publish import NewVersion, offer, tell
from sampo_ray.config.sections import LoraConfig
from sampo_ray.errors import OverflowingWeightsError, PublishError, described
from sampo_ray.run.manifest import StepMetrics, Stored, lineage, read_manifest
from sampo_ray.run.version_files import (
    ADAPTERS_FILE,
    Draft,
    WrittenFile,
    adapters_info,
    begin_version,
    complete_adapters,
    complete_version,
    file_of_weights,
    write_version,
    write_weights,
)
from sampo_ray.run.versions import VersionInfo, clear_incomplete, export_folder, labels_of, version_folder
from sampo_ray.training.host_copies import HostBuffer
from sampo_ray.training.learner import Learner, drain
from sampo_ray.training.snapshots import Snapshot

logger = logging.getLogger(__name__)

TELL_S = 60.0
"""For the store, which finds new versions by looking, too; a round's end waits for it."""
ATTEMPTS, PAUSE_S = 3, 5.0
"""To write a version, and the growing pauses between them."""


class Publisher:
    """Publishes versions of the policy; collective. Each rank copies its share of the weights beside the passes of the
    next step, which changes none before that is done. All else is done in the `background`. One version is written at a
    time. Rank 0 sends versions by `transport` as well.
    """

    def __init__(self, store: ActorHandle, transport: str, device: torch.device, background: Background) -> None:
        self._store, self._device, self._background = store, device, background
        self._buffer, self._written = HostBuffer(), Future[None]()
        self._written.set_result(None)
        self._tellers, self._told = ThreadPoolExecutor(1, "tell"), self._written
        self._sender = start_sender(transport, store, device) if dist.get_rank() == 0 else None
        self._cleared = False

    def warm(self, learner: Learner) -> None:
        """Takes the host memory that snapshots need, which for the first time is slow."""
        self._snapshot(learner, adapters=learner.adapter_names is not None)

    def publish(self, spec: RoundSpec, learner: Learner, metrics: StepMetrics, last: bool) -> None:
        """Begins to publish the weights or, except at the round's end, only the adapters if there are any that can be.

        While a version is being written, the next is left out, unless it ends the round and so waits.
        """
        if last:
            wait([self._written], JOB_S)
        elif self._is_writing():
            self._background.report(Stored(overtaken=(metrics.version,)))
            return
        adapters = not last and learner.adapter_names is not None
        version = _Version(spec, metrics, last, spec.config.model.lora if adapters else None)
        snapshot = self._snapshot(learner, adapters)
        what = f"publishing version {metrics.version}"
        self._written = self._background.start(what, lambda: self._publish(version, snapshot))

    def check(self) -> None:
        """Raises why the last version could not be written, if so; for a round's end. The store knows of it then, if it
        can be told."""
        wait([self._told], JOB_S)
        if (error := self._written.exception(JOB_S)) is not None:
            raise error

    def wait(self) -> None:
        """Returns when nothing is being sent from this process any more."""
        wait([self._told], JOB_S)
        if self._sender is not None:
            self._sender.wait()

    def _snapshot(self, learner: Learner, adapters: bool) -> Snapshot:
        return learner.adapters(self._buffer) if adapters else learner.weights(self._buffer)

    def _is_writing(self) -> bool:
        """Whether a version is being written on any rank; the same on all."""
        writing = torch.tensor([not self._written.done()], dtype=torch.int32, device=self._device)
        dist.all_reduce(writing, dist.ReduceOp.MAX)
        return bool(writing.item())

    def _publish(self, version: "_Version", snapshot: Snapshot) -> None:
        """Writes the version, in several attempts, makes it known, and then tells the store and sends it."""
        retrying = Retrying(
            stop=stop_after_attempt(ATTEMPTS),
            wait=wait_incrementing(PAUSE_S, PAUSE_S),
            before_sleep=lambda state: self._background.report(Stored(troubles=(_failed(version, state),))),
            reraise=True,
        )
        try:
            sent = retrying(self._write, version, snapshot)
        except Exception:
            self._background.report(Stored(unwritten=(version.number,)))
            raise
        del snapshot
        if dist.get_rank():
            return
        self._background.report(Stored(published=(version.number,)))
        self._told.cancel()  # of an older version, if that has not begun
        self._told = self._tellers.submit(self._tell, version, sent)

    def _tell(self, version: "_Version", sent: bool) -> None:
        """Tells the store and sends the version; in a thread of its own, as checkpoints do not wait for a store."""
        try:
            tell(self._store, version.new.id, TELL_S)
            if sent:
                self._send(version.new)
        except (PublishError, RayError) as error:
            logger.warning("training goes on: %s", error)
            self._background.report(Stored(troubles=(str(error),)))

    def _write(self, version: "_Version", snapshot: Snapshot) -> bool:
        """One attempt, which fails on all ranks if it does on one. Returns whether the version is to be sent."""
        first = dist.get_rank() == 0
        together = self._background.together
        draft = together(lambda: self._begin(version) if first else None)[0]
        if draft is None:  # complete already: ranks that went back make it again
            return False
        try:
            written = together(lambda: _own_files(draft, snapshot, version, self._background))
            files = sorted((file for each in written for file in each), key=lambda file: file.name)
            assert len(files) == len(snapshot.files)
            return together(lambda: self._complete(version, draft, files) if first else False)[0]
        except Exception:
            if first:
                draft.discard()
            raise

    def _complete(self, version: "_Version", draft: Draft, files: list[WrittenFile]) -> bool:
        sent = version.lora is None and offer(self._sender, self._store, version.new.id, EXCHANGE_ANSWER_S)
        version.complete(draft, files)
        return sent

    def _begin(self, version: "_Version") -> Draft | None:
        if not self._cleared:
            clear_incomplete(version.new.versions.url)
            self._cleared = True
        return begin_version(version.new.folder)

    def _send(self, new: NewVersion) -> None:
        """Sends the version as the store has it, unless that has a newer one."""
        weights = ray.get(self._store.wait.remote(None, 0.0, "training"), timeout=EXCHANGE_ANSWER_S)
        if self._sender is not None and weights is not None and weights.id == new.id:
            self._sender.send(weights.id, weights.buckets)


@dataclasses.dataclass(frozen=True)
class _Version:
    """A version that is to be published; `lora`: of adapters alone."""

    spec: RoundSpec
    metrics: StepMetrics
    last: bool
    lora: LoraConfig | None

    @property
    def number(self) -> int:
        return self.metrics.version

    @property
    def new(self) -> NewVersion:
        spec, metrics = self.spec, self.metrics
        info = VersionInfo(version=metrics.version, round=spec.round, step=metrics.step)
        return NewVersion(spec.run, spec.place.at("versions"), info)

    def complete(self, draft: Draft, files: list[WrittenFile]) -> None:
        spec, metrics = self.spec, self.metrics
        entries = {
            "version": metrics.version,
            "round": spec.round,
            "step": metrics.step,
            "parent": spec.start_version,
            "labels": labels_of(spec.round, metrics.step, self.last, spec.config.rounds.count),
            **dataclasses.asdict(lineage(spec.config, read_manifest(spec.place).data.fingerprint)),
            "metrics": metrics.numbers,
            "created": int(time.time()),
            **({"adapters": adapters_info(self.lora, spec.start_version)} if self.lora else {}),
        }
        info = VersionInfo.model_validate(entries)
        if self.lora:
            complete_adapters(draft, self.lora, info, files[0])
        else:
            complete_version(draft, version_folder(self.new.versions.url, 0), info, files)


def _own_files(draft: Draft, snapshot: Snapshot, version: _Version, background: Background) -> list[WrittenFile]:
    """Writes this rank's files. Takes part in all exchanges of the snapshot, also after an error, which it raises."""
    written, error, count = list[WrittenFile](), None, len(snapshot.files)
    for index, tensors in snapshot.own_files(background.group):
        if error is not None:
            continue
        try:
            name = ADAPTERS_FILE if version.lora else file_of_weights(index, count)
            written.append(write_weights(draft, name, tensors))
        except Exception as failure:  # of storage, mostly: raised when the others need nothing of this rank any more
            error = failure
    if error is not None:
        raise error
    return written


def _failed(version: _Version, state: RetryCallState) -> str:
    error = state.outcome.exception() if state.outcome else None
    assert error is not None
    return (
        f"version {version.number} could not be written ({described(error)}); training goes on, and it is tried again "
        f"({state.attempt_number} of {ATTEMPTS} attempts failed)"
    )


def export(spec: RoundSpec, learner: Learner) -> str | None:
    """Exports the round's model from the fp32 masters. Returns why it cannot be in `run.export_dtype`, if so: the
    step is stored all the same, and the run, resumed with another, exports it."""
    masters: Iterator[tuple[str, torch.Tensor]] = learner.masters(
        getattr(torch, spec.config.run.export_dtype or "bfloat16")
    )
    step, folder = learner.step, export_folder(spec.place, spec.round).url
    info = VersionInfo(version=spec.start_version + step, round=spec.round, step=step)
    try:
        if not learner.rank:
            write_version(folder, masters, version_folder(spec.place.at("versions").url, 0), info)
        else:
            drain(masters)
    except OverflowingWeightsError as error:  # on all ranks, once all have been given out
        return str(error)
    return None
