"""Run directories on object storage: what a run does with files, on S3's semantics."""

import itertools
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest

from sampo_ray.errors import WeightsError
from sampo_ray.run import remote_files
from sampo_ray.run.checksums import checksum
from sampo_ray.run.node_copies import version_on_disk
from sampo_ray.run.storage import Place
from sampo_ray.run.versions import VersionInfo, version_folder


@pytest.fixture
def folder(s3: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Place:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return Place(s3).at("runs", "one")


def test_names_and_removal_know_folders_from_others_that_begin_alike(folder: Place) -> None:
    for name in ("rounds/1/a", "rounds/1/b/c", "rounds/10/a"):
        folder.at(name).write(b"x")
    fsspec.filesystem("s3").pipe_file(f"{folder.path}/rounds/", b"")  # as consoles make folders
    assert folder.at("rounds").names() == ["1", "10"] and folder.at("rounds", "1").names() == ["a", "b"]
    folder.at("rounds", "1").remove()
    assert folder.at("rounds").names() == ["10"] and not folder.at("rounds", "1").exists()
    folder.at("rounds", "1").remove()
    assert folder.at("none").names() == []


def test_what_another_process_writes_and_removes_is_seen_at_once(folder: Place) -> None:
    folder.at("a").write(b"1")
    assert folder.names() == ["a"]
    fsspec.filesystem("s3", use_listings_cache=True).pipe_file(f"{folder.path}/b", b"2")
    assert folder.names() == ["a", "b"] and folder.at("b").exists()
    fsspec.filesystem("s3", use_listings_cache=True).rm(f"{folder.path}/a")
    assert folder.names() == ["b"] and not folder.at("a").exists()


def test_of_all_that_create_a_file_one_does(folder: Place) -> None:
    file = folder.at("claim")
    assert file.create(b"mine") and not file.create(b"theirs") and file.read() == b"mine"
    assert file.create(b"mine"), "a request that came again, since its answer was lost"
    assert file.modified() is not None


@pytest.mark.parametrize("lost", [False, True])
def test_files_move_whole_in_pieces_with_attempts(
    folder: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: bool
) -> None:
    monkeypatch.setattr(remote_files, "PIECE_BYTES", 1000)
    files = {"a": os.urandom(12_345), "deep/b": b"", "c": os.urandom(1000)}
    here = tmp_path / "here"
    for name, content in files.items():
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_bytes(content)
    if lost:
        fail_each_second_time(monkeypatch, "cat_file", "put_file")
    folder.at("state").take(here)
    assert not [path for path in here.rglob("*") if path.is_file()], "it takes no room any more"
    with folder.at("state").on_disk() as copy:
        assert {name: (copy / name).read_bytes() for name in files} == files
        assert copy.name == "state"
    with folder.at("state").on_disk(["c"]) as copy:
        assert [path.name for path in copy.rglob("*")] == ["c"]
    (here / "d").write_bytes(b"d")
    folder.at("state").take_file(here / "d")
    assert folder.at("state").names() == ["a", "c", "d", "deep"]
    assert [path.name for path in tmp_path.iterdir()] == ["here"], "no copy is left"


def fail_each_second_time(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """As where a connection ends, before or after what was asked for has been done."""
    kind, calls = type(fsspec.filesystem("s3")), itertools.count()

    def unsteady(does: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            number = next(calls)
            done = None if number % 4 == 0 else does(*args, **kwargs)
            if number % 2 == 0:
                raise OSError("the connection was reset")
            return done

        return call

    for name in names:
        monkeypatch.setattr(kind, name, unsteady(getattr(kind, name)))
    monkeypatch.setattr(remote_files.wait_exponential, "__call__", lambda *_: 0.0)


@pytest.mark.parametrize("names", [None, ["a", "b"]])
def test_what_is_not_there_is_not_downloaded(folder: Place, names: list[str] | None) -> None:
    if names:
        folder.at("state", "a").write(b"x")
    with pytest.raises(FileNotFoundError, match="nothing|b"), folder.at("state").on_disk(names):
        pass


def test_a_large_file_is_written_in_parts(folder: Place, tmp_path: Path) -> None:
    content = os.urandom(1 << 20) * 101  # from 100 MiB on
    (tmp_path / "large").write_bytes(content)
    folder.take_file(tmp_path / "large")
    with folder.on_disk(["large"]) as copy:
        assert (copy / "large").read_bytes() == content
    assert "-" in fsspec.filesystem("s3").info(f"{folder.path}/large")["ETag"], "it came in parts"


def a_version(folder: Place, number: int = 0, content: bytes = b"weights" * 100) -> str:
    place = Place(version_folder(folder.at("versions").url, number))
    files = {"config.json": b"{}", "model.safetensors": content}
    for name, each in files.items():
        place.at(name).write(each)
    info = VersionInfo(version=number, round=0, step=0, files={name: checksum(each) for name, each in files.items()})
    place.at("version.json").write(info.model_dump_json().encode())
    return place.url


def test_a_version_is_downloaded_once_for_all_of_a_machine_that_use_it_at_a_time(
    folder: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, got = a_version(folder), list[str]()
    download = Place.download
    monkeypatch.setattr(Place, "download", lambda place, *rest: got.append(place.url) or download(place, *rest))
    with version_on_disk(url) as first, ThreadPoolExecutor(8) as pool:

        def use(_: int) -> Path:
            with version_on_disk(url) as copy:
                assert (copy / "model.safetensors").read_bytes() == b"weights" * 100
                return copy

        assert {first} == set(pool.map(use, range(8))) and first.exists()
    assert got == [url] and not list(tmp_path.iterdir())
    with version_on_disk(url):
        assert len(got) == 2


@pytest.mark.parametrize("always", [False, True])
def test_a_copy_of_a_version_is_verified(
    folder: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, always: bool
) -> None:
    url, download, damaged = a_version(folder), Place.download, list[str]()

    def damages(place: Place, target: Path, names: list[str] | None = None) -> None:
        download(place, target, names)
        if always or not damaged:
            damaged.append(place.url)
            (target / "model.safetensors").write_bytes(b"wrong")

    monkeypatch.setattr(Place, "download", damages)
    if always:
        with pytest.raises(WeightsError, match="model.safetensors: its checksum"), version_on_disk(url):
            pass
    else:
        with version_on_disk(url) as copy:
            assert (copy / "model.safetensors").read_bytes() == b"weights" * 100
    assert not list(tmp_path.iterdir())
