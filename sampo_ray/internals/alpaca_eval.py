"""alpaca_eval's private interfaces, checked with alpaca_eval 0.6.6.

Its length-controlled win rate loads `df_gamed.csv` from the hub by a function of `metrics.glm_winrate` that is named
`hf_hub_download`; here that names a local file. Importing the package reads `.env` files, and fitting sets sklearn to
route metadata; both are undone.
"""

import contextlib
import os
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_LOCK = threading.Lock()


def length_controlled_winrate(
    annotations: list[dict[str, object]], gamed: Path
) -> tuple[dict[str, float], list[float]]:
    """The package's `get_length_controlled_winrate`, with nothing downloaded and nothing written: its metrics, and the
    preference (0 to 1) of each row that its model predicts for answers of equal length.

    `annotations`: `output_1` (the baseline's), `output_2`, `generator_1`, `generator_2`, `preference` (1: the baseline
    wins, 2: the other does) in the order of the 805 instructions. Rates and standard errors are percentages.
    """
    import pandas as pd
    import sklearn

    glm, frame = _module(), pd.DataFrame(annotations)
    local = _in_place(glm, "hf_hub_download", lambda **_: str(gamed))
    with _LOCK, local, sklearn.config_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sklearn's, of arguments that will be called otherwise
        found = glm.get_length_controlled_winrate(
            frame, save_weights_dir=None, is_add_glm_preference_inplace=True, is_warn_extreme_changes=False
        )
    return {name: float(value) for name, value in found.items()}, [float(each) for each in frame["glm_preference"]]


def _module() -> Any:
    with _environment():
        import alpaca_eval.metrics.glm_winrate as glm
    return glm


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    """Importing the package adds to the environment what a `.env` file holds, keys among it."""
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in set(os.environ) - set(before):
            del os.environ[name]


@contextlib.contextmanager
def _in_place(module: Any, name: str, other: object) -> Iterator[None]:
    kept = getattr(module, name)
    setattr(module, name, other)
    try:
        yield
    finally:
        setattr(module, name, kept)
