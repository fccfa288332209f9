"""Whether the storage of a run directory can be used from here, found out before anything is started."""

import contextlib
from collections.abc import Iterator

import fsspec

from sampo_ray.errors import ConfigError

PACKAGES = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "abfs": "adlfs",
    "abfss": "adlfs",
    "az": "adlfs",
}
CLIENTS = ("botocore", "aiobotocore", "aiohttp", "google", "gcsfs", "azure")
"""Whose errors are not Python's own."""


def check_reach(url: str) -> None:
    """Lists a run directory behind a URL, which need not be there. ConfigError with what its storage lacks or refuses:
    the package for it, credentials, the bucket, an answer."""
    if "://" not in url:
        return
    with explained(url):
        fs, path = fsspec.url_to_fs(url)
        try:
            fs.ls(path, detail=False)
        except FileNotFoundError as error:
            if error.__cause__ is not None:  # the storage has no such bucket, while a new folder is simply not there
                raise


@contextlib.contextmanager
def explained(url: str) -> Iterator[None]:
    """ConfigError for errors of storage, with what to do."""
    named, scheme = f"run.dir={url!r}", url.partition("://")[0]
    try:
        yield
    except ImportError as error:
        package = PACKAGES.get(scheme)
        fix = f"install {package} on all machines" if package else str(error)
        raise ConfigError(f"{named}: a package for {scheme}:// is missing; {fix}") from None
    except FileNotFoundError as error:
        raise ConfigError(f"{named}: there is no such bucket ({error}); create it, or name another") from None
    except PermissionError as error:
        raise ConfigError(
            f"{named}: the storage refuses this ({error}); use credentials with the rights to list, read, write and "
            "delete there"
        ) from None
    except Exception as error:
        if "Credentials" in type(error).__name__:
            raise ConfigError(
                f"{named}: there are no credentials for it ({error}); set them in the environment, as "
                "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY for S3, or in a profile, or give the machine a role"
            ) from None
        if isinstance(error, ValueError) and "Protocol not known" in str(error):
            raise ConfigError(
                f"{named}: no storage is known by {scheme}://; use a local path, or s3://, gs:// or abfs://"
            ) from None
        if isinstance(error, OSError) or type(error).__module__.startswith(CLIENTS):
            raise ConfigError(
                f"{named}: the storage does not answer ({error or type(error).__name__}); look at the network and at "
                "the address, which for S3 is AWS_ENDPOINT_URL if that is set"
            ) from None
        raise
