"""What an operator may ask for, and what that makes of the state of what is served."""

import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass

from sampo_ray.errors import VersionError
from sampo_ray.run import serving
from sampo_ray.run.serving import Done, Serving
from sampo_ray.run.versions import VersionInfo, find, is_version_number, listed

DONE_KEPT = 100
"""Commands that are remembered."""
COMMAND_ID = re.compile(r"[A-Za-z0-9._:+/=@-]{1,100}")


@dataclass(frozen=True)
class Promote:
    """Makes a version live and holds it there; `latest` follows training again."""

    version: str


@dataclass(frozen=True)
class Rollback:
    """Makes the version live again that was live before, and holds it there."""


@dataclass(frozen=True)
class Pin:
    """Serves a version beside the live one."""

    version: str


@dataclass(frozen=True)
class Unpin:
    version: str


@dataclass(frozen=True)
class Label:
    """Gives a version a label."""

    version: str
    label: str


Command = Promote | Rollback | Pin | Unpin | Label
"""What an operator may ask for. A version is named by its number or a label."""


def new_id() -> str:
    """An id for a command. Who sends the command again, not knowing whether it was carried out, sends the same id."""
    return uuid.uuid4().hex


def done_before(state: Serving, id: str, command: Command) -> Done | None:
    """The record of the command of that id if it has been carried out; VersionError if it was another command."""
    for done in state.done:
        if done.id == id:
            if done.command != str(command):
                raise VersionError(f"the id {id} is that of another command, {done.command}; each needs its own")
            return done
    return None


def apply_once(state: Serving, infos: Mapping[int, VersionInfo], id: str, command: Command) -> Serving:
    """The state after a command, which is the same if the command of that id has been carried out."""
    if done_before(state, id, command):
        return state
    after = apply(state, infos, command)
    done = Done(id=id, command=str(command), live=after.live)
    return after.model_copy(update={"done": [*state.done, done][-DONE_KEPT:]})


def apply(state: Serving, infos: Mapping[int, VersionInfo], command: Command) -> Serving:
    """The state after a command; `infos` are the versions on disk. VersionError when it cannot be carried out."""
    labels = serving.all_labels(state, infos)
    match command:
        case Rollback():
            after = serving.rollback(state)
            if after.live in labels:
                return after
            raise VersionError(f"version {after.live}, which was live before, is not kept; there is {listed(labels)}")
        case Promote("latest"):
            if (newest := serving.newest_passed(state, labels)) is not None:
                return serving.release(state, newest)
            raise VersionError(
                f"no version has passed its checks yet (follow={state.follow}); promote one by its number"
            )
        case Promote(name):
            return serving.promote(state, find(name, labels))
        case Pin(name):
            version = find(name, labels)
            adapters = infos[version].adapters
            return serving.pin_adapters(state, version, adapters) if adapters else serving.pin(state, version)
        case Unpin(name):
            return serving.unpin(state, int(name) if is_version_number(name) else find(name, labels))
        case Label(name, new):
            return serving.label(state, find(name, labels), new)
