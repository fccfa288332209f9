"""Scratch folders: those in use stay, those of processes that were killed go."""

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from sampo_ray.run.scratch import scratch_folder

HOLDS = """
import sys, tempfile, time
from sampo_ray.run.scratch import scratch_folder
tempfile.tempdir = sys.argv[1]
with scratch_folder() as folder:
    (folder / "weights").write_bytes(b"x")
    print(folder, flush=True)
    time.sleep(600)
"""


def test_a_scratch_folder_stays_while_its_process_lives_and_goes_when_it_was_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "sampo-scratch-file").touch()
    with subprocess.Popen([sys.executable, "-c", HOLDS, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        theirs = Path(process.stdout.readline().strip())
        with scratch_folder() as mine, scratch_folder() as another:
            assert len({mine, another, theirs}) == 3 and (theirs / "weights").exists()
        assert not mine.exists() and not another.exists() and theirs.exists()
        process.kill()
    with scratch_folder():
        assert not theirs.exists()
