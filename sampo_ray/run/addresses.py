"""Where the endpoints of a run answer, for other commands: `endpoints/<name>.json` in its directory.

An address is written when its endpoint answers and removed when it is taken down. What was killed leaves one, and a
fleet may have gone on to another run: whoever reads an address asks it which run it serves.
"""

import json

from sampo_ray.run.storage import Place

FOLDER = "endpoints"


def write_address(run: Place, name: str, url: str) -> None:
    run.at(FOLDER, f"{name}.json").write(json.dumps({"url": url}).encode())


def remove_address(run: Place, name: str) -> None:
    run.at(FOLDER, f"{name}.json").remove()


def read_addresses(run: Place) -> list[str]:
    """URLs to which `/v1/...` is appended; some may not answer any more."""
    folder = run.at(FOLDER)
    return [str(json.loads(folder.at(name).read())["url"]) for name in folder.names() if name.endswith(".json")]
