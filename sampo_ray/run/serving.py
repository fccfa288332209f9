"""Which version of a policy is live, and why: a small state, pure functions that change it, and its file.

`serving.json` in the run directory is the only truth about what is live, pinned or refused. The weight store changes it
when a version is published; the command line and the admin routes change it on request (`sampo_ray/run/commands.py`).
The process that serves the run follows the file.
"""

import functools
import json
import logging
import re
from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Literal

import filelock
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from sampo_ray.config.serving import ServeConfig
from sampo_ray.errors import VersionError
from sampo_ray.run.report import PinName, PinState
from sampo_ray.run.storage import Place
from sampo_ray.run.versions import NAME, AdaptersInfo, VersionInfo, is_version_number

logger = logging.getLogger(__name__)

Follow = Literal["latest", "round", "manual"]
ServedAs = Literal["live", "pinned", "starting", "failing", "refused", "candidate", "kept"]
"""A candidate has not been checked yet. Versions that are starting or failing are pinned, but do not answer yet."""
HISTORY = 50
LOCK_SECONDS = 30.0
RESERVED = frozenset({"base", "final", "latest", "live", "policy", "training"})
"""Names of versions when they are published, of the live policy and of channels."""


class Adapter(BaseModel):
    """A LoRA adapter in `adapters/<content>/`, or a version of adapters alone, served by replicas of `base`."""

    base: int
    rank: int
    content: str = Field("", pattern=r"^([0-9a-f]{32})?$")
    """A checksum of its weights; "" for a version of adapters alone."""


class VersionEntry(VersionInfo):
    """A version in a list of those on disk; its `labels` begin with those of users."""

    state: ServedAs
    reason: str | None
    """Why it was refused, or why it fails."""

    def listed(self) -> dict[str, object]:
        """For JSON, without the files' checksums."""
        return self.model_dump(exclude_unset=True, exclude={"files"})


class Done(BaseModel):
    """A command that was carried out: its id, what it was, and which version was live then."""

    model_config = ConfigDict(frozen=True)

    id: str
    command: str
    live: int | None


class Serving(BaseModel):
    """What the live policy serves."""

    follow: Follow = "latest"
    held: bool = False
    """An operator promoted or rolled back: new versions do not go live until `latest` is promoted."""
    live: int | None = None
    sequence: int = 0
    """Counts changes of `live`: it orders answers of several replicas also when a rollback lowers the version."""
    previous: list[int] = Field(default_factory=list)
    """Earlier live versions, oldest first; a rollback goes to the last."""
    pinned: list[int] = Field(default_factory=list)
    labels: dict[str, int] = Field(default_factory=dict)
    """Labels that users gave; those of rounds and steps are in each version's version.json."""
    adapters: dict[str, Adapter] = Field(default_factory=dict)
    """By name; a pinned version of adapters alone is here by its number."""
    refused: dict[int, str] = Field(default_factory=dict)
    """Versions that failed a check, with the reason."""
    passed: list[int] = Field(default_factory=list)
    """Versions that passed their checks, in that order."""
    checking: int | None = None
    """The version whose checks are being made."""
    done: list[Done] = Field(default_factory=list)
    """The last commands, so that one that is sent again is not carried out again."""

    @field_validator("adapters", mode="before")
    @classmethod
    def _only_safe_names(cls, adapters: Any) -> Any:
        """Leaves out adapters that another program, or an older version of this one, named like a path."""
        if not isinstance(adapters, dict):
            return adapters
        for name in adapters:
            if not _is_adapter_name(name):
                _warn_of_name(str(name))
        return {name: adapter for name, adapter in adapters.items() if _is_adapter_name(name)}

    def kept(self) -> set[int]:
        """Versions that retention must leave on disk."""
        needed = {version for version in (self.live, self.checking) if version is not None}
        return {*needed, *self.all_pinned, *self.labels.values(), *self.previous[-1:]}

    @property
    def pinned_adapters(self) -> set[int]:
        return {int(name) for name in self.adapters if is_version_number(name)}

    @property
    def all_pinned(self) -> list[int]:
        """Versions served beside the live one: pinned themselves, whole or as adapters, or for their adapters."""
        bases = {adapter.base for adapter in self.adapters.values()}
        return sorted({*self.pinned, *self.pinned_adapters, *bases})

    @property
    def named_adapters(self) -> dict[str, Adapter]:
        return {name: adapter for name, adapter in self.adapters.items() if not is_version_number(name)}


def _is_adapter_name(name: object) -> bool:
    return isinstance(name, str) and bool(NAME.fullmatch(name) or is_version_number(name))


@functools.cache
def _warn_of_name(name: str) -> None:
    logger.warning("serving.json: the adapter %r is not served, for its name is none; add it under another one", name)


def is_followed(follow: Follow, labels: Sequence[str]) -> bool:
    """Whether a version with these labels goes live without an operator."""
    ends_round = any(label == "base" or re.fullmatch(r"round-\d+", label) for label in labels)
    return follow == "latest" or (follow == "round" and ends_round)


def accept(state: Serving, version: int, labels: Sequence[str]) -> Serving:
    """A version has passed its checks: it goes live if the live policy follows such versions and it is newer. One that
    was refused stays so."""
    if version in state.refused:
        return state
    new = state.model_copy(update={"passed": [*(v for v in state.passed if v != version), version]})
    follows = state.live is None or (not state.held and version > state.live and is_followed(state.follow, labels))
    return _live(new, version) if follows else new


def accept_all(state: Serving, labels: Mapping[int, Sequence[str]]) -> Serving:
    """Versions have passed their checks at the same time: the last of those that are followed goes live."""
    after = functools.reduce(lambda now, version: accept(now, version, labels[version]), sorted(labels), state)
    if after.live is None or after.live == state.live:
        return after
    return _live(state, after.live).model_copy(update={"passed": after.passed})


def resume(state: Serving, labels: Mapping[int, Sequence[str]], checked: bool) -> Serving:
    """The state when a store starts on a run: a version whose publisher was killed before it could go live does so now
    (where versions are `checked`, only the base), and a live version that is gone from disk gives way to the newest
    that passed."""
    if state.live not in labels:
        state, newest = state.model_copy(update={"live": None}), newest_passed(state, labels)
        state = state if newest is None else _live(state, newest)
    unknown = [v for v in sorted(labels) if v not in state.passed and v not in state.refused]
    return accept_all(state, {v: labels[v] for v in unknown if not checked or v == min(labels)})


def after(state: Serving, sequence: int) -> Serving:
    """The state as the next one for readers who know `sequence`."""
    return state.model_copy(update={"sequence": sequence + 1})


def trim(state: Serving, on_disk: Container[int]) -> Serving:
    """The state without what it says of the checks of versions that are gone, except the newest few."""
    lately = {*sorted(state.refused)[-HISTORY:], *state.passed[-HISTORY:]}
    refused = {v: reason for v, reason in state.refused.items() if v in lately or v in on_disk}
    passed = [v for v in state.passed if v in lately or v in on_disk]
    return state.model_copy(update={"refused": refused, "passed": passed})


def refuse(state: Serving, version: int, reason: str) -> Serving:
    """A version failed a check: it is listed with the reason, and the live version stays."""
    return state.model_copy(update={"refused": {**state.refused, version: reason}})


def fall_back(state: Serving, to: int, refused: Mapping[int, str]) -> Serving:
    """A run ends with version `to` as its final one: those that it tried after that are refused, and not live."""
    update = {
        "refused": {**state.refused, **refused},
        "passed": [version for version in state.passed if version not in refused],
        "labels": {**state.labels, "final": to},
    }
    return _live(state.model_copy(update=update), to) if state.live in refused else state.model_copy(update=update)


def promote(state: Serving, version: int) -> Serving:
    """Makes a version live and holds it there. VersionError when a check refused it."""
    if version in state.refused:
        raise VersionError(f"version {version} was refused: {state.refused[version]}; promote another one")
    return _live(state, version).model_copy(update={"held": True})


def release(state: Serving, latest: int) -> Serving:
    """Follows training again, beginning with `latest`, the newest version that may be live."""
    return _live(state, latest).model_copy(update={"held": False})


def rollback(state: Serving) -> Serving:
    """Makes the version live again that was live before. VersionError when there is none."""
    if not state.previous:
        raise VersionError("there is no earlier live version to roll back to; promote one by its number")
    *before, target = state.previous
    return state.model_copy(update={"live": target, "sequence": state.sequence + 1, "previous": before, "held": True})


def pin(state: Serving, version: int) -> Serving:
    """Serves a version beside the live one, as `policy@N`, and keeps it on disk."""
    return state.model_copy(update={"pinned": sorted({*state.pinned, version})})


def pin_adapters(state: Serving, version: int, adapters: AdaptersInfo) -> Serving:
    """Serves a version of adapters alone beside the live one, on its base, which is pinned with it."""
    served = Adapter(base=adapters.base, rank=adapters.rank)
    return state.model_copy(update={"adapters": {**state.adapters, str(version): served}})


def unpin(state: Serving, version: int) -> Serving:
    if version in state.pinned_adapters:
        return _without_adapter(state, str(version))
    if on_it := adapters_on(state, version):
        raise VersionError(f"version {version} carries adapters ({', '.join(on_it)}); unpin or remove them first")
    if version not in state.pinned:
        pinned = ", ".join(map(str, state.all_pinned)) or "none"
        raise VersionError(f"version {version} is not pinned (pinned: {pinned})")
    return state.model_copy(update={"pinned": [v for v in state.pinned if v != version]})


def adapters_on(state: Serving, version: int) -> dict[str, Adapter]:
    return {name: adapter for name, adapter in state.adapters.items() if adapter.base == version}


def add_adapter(state: Serving, name: str, adapter: Adapter) -> Serving:
    """Serves an adapter as `policy@NAME` on its base version, which is pinned with it."""
    check_adapter_name(state, name)
    return state.model_copy(update={"adapters": {**state.adapters, name: adapter}})


def check_adapter_name(state: Serving, name: str) -> None:
    """VersionError for a name that an adapter cannot have, since something else is served under it or may be."""
    _check_label(name)
    if name in state.labels or name in state.adapters:
        raise VersionError(f"the name {name!r} is taken; choose another, or remove what has it")


def remove_adapter(state: Serving, name: str) -> Serving:
    """Serves a user's adapter no longer. A version of adapters alone is none: it is unpinned."""
    if name not in state.named_adapters:
        raise VersionError(f"there is no adapter {name!r}; there is {', '.join(state.named_adapters) or 'none'}")
    return _without_adapter(state, name)


def _without_adapter(state: Serving, name: str) -> Serving:
    return state.model_copy(update={"adapters": {n: a for n, a in state.adapters.items() if n != name}})


def label(state: Serving, version: int, name: str) -> Serving:
    """Gives a version a label of the user's; the label moves if another version had it."""
    _check_label(name)
    if name in state.adapters:
        raise VersionError(f"the name {name!r} is an adapter's; choose another")
    return state.model_copy(update={"labels": {**state.labels, name: version}})


def _check_label(name: str) -> None:
    if not NAME.fullmatch(name) or name in RESERVED or name.startswith("round-"):
        raise VersionError(
            f"label {name[:80]!r}: use up to 64 lower-case letters, digits, '.', '_' and '-', a letter first, and none "
            f"of the names that something else has ({', '.join(sorted(RESERVED))}, round-...)"
        )


def _live(state: Serving, version: int) -> Serving:
    if state.live == version:
        return state
    before = state.previous if state.live is None else [*state.previous, state.live][-HISTORY:]
    return state.model_copy(update={"live": version, "sequence": state.sequence + 1, "previous": before})


def newest_passed(state: Serving, labels: Mapping[int, Sequence[str]]) -> int | None:
    """The newest version on disk that passed its checks and that the live policy follows; None when there is none."""
    follow: Follow = "latest" if state.follow == "manual" else state.follow
    fit = [v for v, names in labels.items() if v in state.passed and is_followed(follow, names)]
    return max(fit, default=None)


def listing(
    state: Serving, infos: Mapping[int, VersionInfo], pins: Mapping[PinName, PinState] | None = None
) -> list[VersionEntry]:
    """The versions on disk, newest first; `pins` are what is known of applications of pinned versions."""
    labels, entries = all_labels(state, infos), []
    for version in sorted(infos, reverse=True):
        served_as, reason = state_of(state, version, pins or {})
        served = {"labels": labels[version], "state": served_as, "reason": reason}
        entries.append(VersionEntry.model_validate({**infos[version].model_dump(exclude_unset=True), **served}))
    return entries


def state_of(state: Serving, version: int, pins: Mapping[PinName, PinState]) -> tuple[ServedAs, str | None]:
    """How a version is served and, if it was refused or fails, why."""
    if version == state.live:
        return "live", None
    if version in state.all_pinned:
        pin = pins.get(version, PinState(state="pinned"))
        return pin.state, pin.reason
    if version in state.refused:
        return "refused", state.refused[version]
    return "kept" if version in state.passed or version == 0 else "candidate", None


def all_labels(state: Serving, infos: Mapping[int, VersionInfo]) -> dict[int, list[str]]:
    """Labels by version, those of users first."""
    return {
        version: [
            *(n for n, v in state.labels.items() if v == version),
            *(n for n in (info.labels if version else ("base",)) if n not in state.labels),
        ]
        for version, info in infos.items()
    }


def read_serve_config(run: Place) -> ServeConfig:
    """How a run's versions go live (`follow`, `swap`, `gates`); the defaults if the run has no configuration."""
    file = run.at("config.yaml")
    tree = yaml.safe_load(file.read()).get("serve", {}) if file.exists() else {}
    return ServeConfig(api_keys=(), **{key: tree[key] for key in ("follow", "swap", "gates") if key in tree})


def read_serving(run: Place, follow: Follow = "latest") -> Serving:
    """The state now; `follow` is that of a run that has none yet. VersionError when the file is no such state."""
    try:
        return Serving.model_validate_json(run.at("serving.json").read())
    except FileNotFoundError:
        return Serving(follow=follow)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = "".join(f" ({part})" for part in first["loc"])
        raise VersionError(
            f"serving.json of the run cannot be read{where}: {first['msg']}; restore it, or remove it to serve the "
            "newest version again"
        ) from None


def edit_serving(
    run: Place, change: Callable[[Serving], Serving], follow: Follow = "latest", wait_s: float = LOCK_SECONDS
) -> Serving:
    """Changes the state; one process at a time on a local run directory, elsewhere the last writer wins. VersionError
    when another process holds the file for longer than `wait_s`."""
    file = run.at("serving.json")
    lock = filelock.FileLock(run.at("serving.lock").path, timeout=wait_s) if run.local else nullcontext()
    try:
        with lock:
            before = read_serving(run, follow)
            after = change(before)
            if after != before or not file.exists():
                file.write(json.dumps(after.model_dump(mode="json"), indent=1).encode())
            return after
    except filelock.Timeout:
        raise VersionError(f"another process has held serving.lock for {wait_s:.0f} s; try again") from None
