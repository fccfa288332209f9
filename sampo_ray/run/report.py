"""What a weight store says of the run it serves, for those who cannot ask it: the state of pins, and what fails.

Each store keeps `stores/<its name>.json` in the run directory. `sampo versions` reads them.
"""

import time
from collections.abc import Iterable, Mapping
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sampo_ray.run.storage import Place

REFRESH_S = 60.0
"""A store that is not content writes its report at least so often."""
CURRENT_S = 3 * REFRESH_S


PinName = Annotated[int | str, Field(union_mode="left_to_right")]
"""A pinned version's number, or the name of an adapter."""


class PinState(BaseModel):
    """How far the application of what is pinned is. A `pinned` one answers, from zero replicas if need be."""

    model_config = ConfigDict(frozen=True)

    state: Literal["pinned", "starting", "failing"]
    reason: str | None = None
    """Why it fails, or failed before."""


class Trouble(BaseModel):
    """Something that a store has tried `tries` times since `since`, last at `last` (Unix times), in vain."""

    model_config = ConfigDict(frozen=True)

    what: str
    reason: str
    since: float
    last: float
    tries: int


class Report(BaseModel):
    """What a store says, at the Unix time `at`: its pins, and what fails."""

    model_config = ConfigDict(frozen=True)

    at: float
    pins: Mapping[PinName, PinState] = {}
    troubles: tuple[Trouble, ...] = ()

    @property
    def is_content(self) -> bool:
        return not self.troubles and all(pin.state == "pinned" for pin in self.pins.values())

    def says_the_same(self, other: "Report") -> bool:
        return (self.pins, self.troubles) == (other.pins, other.troubles)


def report_place(run: Place, store: str) -> Place:
    return run.at("stores", f"{store}.json")


def read_reports(run: Place) -> list[Report]:
    """The reports of the stores that serve the run. One that is not content, and has not said so again, is of a store
    that no longer runs."""
    folder, found = run.at("stores"), list[Report]()
    for name in folder.names():
        try:
            report = Report.model_validate_json(folder.at(name).read())
        except (ValidationError, FileNotFoundError):  # it is for people to look at: nothing depends on it
            continue
        if report.is_content or time.time() - report.at < CURRENT_S:
            found.append(report)
    return found


def worst(reports: Iterable[Report]) -> dict[PinName, PinState]:
    """The pins of several stores; of each the state that is furthest from answering."""
    order = ("pinned", "starting", "failing")
    pins = dict[PinName, PinState]()
    for report in reports:
        for name, pin in report.pins.items():
            if name not in pins or order.index(pin.state) > order.index(pins[name].state):
                pins[name] = pin
    return pins
