"""Scratch folders: those in use stay, those of processes that were killed go. Copies are made once a machine."""

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from sampo_ray.run.scratch import scratch_folder, shared_folder

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


SHARES = """
import sys, tempfile, time
from pathlib import Path
from sampo_ray.run.scratch import shared_folder
tempfile.tempdir = sys.argv[1]
def fill(folder):
    assert not (folder / "weights").exists()
    (folder / "weights").write_bytes(b"x")
    if sys.argv[2] == "dies":
        print("filling", flush=True)
        time.sleep(600)
    time.sleep(0.5)
    (folder / "filled").write_text("")
    print("filled", flush=True)
with shared_folder("copy", fill) as folder:
    assert (folder / "filled").exists()
    print("has it", flush=True)
    if sys.argv[2] != "dies":
        sys.stdin.readline()
"""


def sharing(folder: Path, how: str = "lives") -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SHARES, str(folder), how]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_processes_share_a_folder_that_one_fills_and_the_last_removes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when the one that began to fill it was killed, and one that used it."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    dies = sharing(tmp_path, "dies")
    assert line(dies) == "filling"
    others = [sharing(tmp_path) for _ in range(4)]
    dies.kill()
    said = [line(process) for process in others]
    assert sorted(said) == ["filled", "has it", "has it", "has it"], "one has filled it"
    assert line(others[said.index("filled")]) == "has it"
    others[0].kill()
    others[0].wait()
    for process in others[1:]:
        assert len(list(tmp_path.iterdir())) == 1
        with scratch_folder():
            pass  # sweeps
        process.communicate("go\n")
        assert process.returncode == 0
    assert not list(tmp_path.iterdir())
    dies.communicate()


def test_what_a_killed_user_of_a_shared_folder_left_is_removed_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with sharing(tmp_path) as process:
        assert [line(process), line(process)] == ["filled", "has it"]
        process.kill()
    assert len(list(tmp_path.iterdir())) == 1
    with scratch_folder() as mine:
        assert list(tmp_path.iterdir()) == [mine]


def test_a_folder_that_could_not_be_filled_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def fails(folder: Path) -> None:
        (folder / "part").touch()
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"), shared_folder("copy", fails):
        pass
    assert not list(tmp_path.iterdir())
