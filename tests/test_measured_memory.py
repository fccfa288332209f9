"""Planned memory is what ranks take, in each setting."""

from pathlib import Path

import pytest

from tests.measured_memory import SETTINGS, Setting, measured, write_models


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_models(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_two_ranks_take_what_is_planned(models: Path, setting: Setting) -> None:
    assert 0.85 < measured(models, 2, setting).ratio < 1.15
