"""What a run directory's storage lacks is one message, before anything is started."""

import sys
from pathlib import Path

import fsspec
import pytest
from botocore.exceptions import ClientError

from sampo_ray.console.session import show
from sampo_ray.errors import ConfigError
from sampo_ray.run.directory import find_run
from sampo_ray.run.lock import exclusive
from sampo_ray.run.reach import check_reach


@pytest.fixture(autouse=True)
def anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients of storage are kept by fsspec, and know the credentials of their first use."""
    monkeypatch.setattr(fsspec.get_filesystem_class("s3"), "cachable", False)


def test_what_is_local_or_not_there_yet_is_no_trouble(s3: str, tmp_path: Path) -> None:
    for url in (str(tmp_path / "new"), "memory://new/run", f"{s3}/team/new"):
        check_reach(url)


def test_a_missing_bucket_is_named_by_what_is_typed_first(s3: str, tiny_model: Path) -> None:
    recipe = {"model": {"path": str(tiny_model)}, "data": {"train": "d"}, "run": {"dir": "s3://no-such-bucket/run"}}
    for command in (
        lambda: check_reach("s3://no-such-bucket/run"),
        lambda: find_run("s3://no-such-bucket/run"),
        lambda: show(recipe, []),  # type: ignore[arg-type]
    ):
        with pytest.raises(
            ConfigError, match=r"^run.dir='s3://no-such-bucket/run': there is no such bucket .*; create"
        ):
            command()


def test_credentials_are_asked_for(s3: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(ConfigError, match=r"there are no credentials for it .*; set .*AWS_ACCESS_KEY_ID"):
        check_reach(f"{s3}/run")


def test_rights_that_are_missing_are_named_also_where_only_writing_is_refused(
    s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(*_: object, **__: object) -> None:
        raise PermissionError("Access Denied") from ClientError({}, "PutObject")

    monkeypatch.setattr(fsspec.get_filesystem_class("s3"), "pipe_file", denied)
    with pytest.raises(ConfigError, match=r"refuses this \(Access Denied\); use credentials"), exclusive(f"{s3}/run"):
        pass


def test_a_storage_that_does_not_answer_is_named(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(fsspec.get_filesystem_class("s3"), "retries", 1)
    with pytest.raises(ConfigError, match=r"the storage does not answer \(.*127.0.0.1:9.*AWS_ENDPOINT_URL"):
        check_reach(f"{s3}/run")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(
        ConfigError, match=r"^run.dir='gs://b/run': a package for gs:// is missing; install gcsfs on all"
    ):
        check_reach("gs://b/run")
    with pytest.raises(ConfigError, match=r"no storage is known by nothing://; use a local path, or s3://"):
        check_reach("nothing://b/run")
