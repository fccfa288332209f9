"""A run as a job on an existing Ray cluster: package, submit, follow the logs, report how it ended.

The cluster needs this package's dependencies but not the package itself, which travels with the job. Everything else
that the recipe names must be reachable from the cluster: hub names, URLs, or absolute paths on its shared storage.
"""

import asyncio
import math
import os
import secrets
import shlex
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from pathlib import Path

import aiohttp
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient
from rich.console import Console

import sampo_ray
from sampo_ray.config.run import RunConfig, load_config
from sampo_ray.errors import ConfigError, SubmitError
from sampo_ray.internals.ray import LimitedJobClient
from sampo_ray.sources.records import is_here

REQUEST_SECONDS = 30.0
"""Limit of one call to the cluster's job server."""
SETTLE_SECONDS = 120.0
"""How long an answer that would come by itself is waited for: a new cluster's agent, a lost connection, a job's end."""
RETRY_SECONDS = 2.0


def submit(recipe: Path, overrides: Sequence[str], address: str, console: Console) -> int:
    """Runs `recipe` as a job on the cluster whose dashboard is at `address` (http://HOST:8265) and follows its log.

    Returns the exit status to end with: 0 when the job succeeded, its own status (or 1) when it failed or was stopped,
    130 when the user stopped following (the job goes on). Raises ConfigError, before anything is sent, for a recipe
    that cannot run there, and SubmitError when the cluster does not take the job.
    """
    config = load_config(recipe, list(overrides))
    config.serve.check_keyed()
    check_reachable(config)
    if config.serve.api_keys:
        console.print(
            "SAMPO_API_KEYS of this machine stays here; the job takes that of the cluster's head", markup=False
        )
    with tempfile.TemporaryDirectory(prefix="sampo-submit-") as folder:
        stage_files(recipe, config, Path(folder))
        return submit_entrypoint(entrypoint(recipe, overrides), Path(folder), address, console)


def entrypoint(recipe: Path, overrides: Sequence[str]) -> str:
    """The shell command that the cluster runs, in a working directory that holds the recipe."""
    return shlex.join(["python", "-m", "sampo_ray", "train", recipe.name, *overrides])


def check_reachable(config: RunConfig) -> None:
    """Raises ConfigError for what only this machine could open, and for keys, which all users of the cluster could
    read, and which would be gone when the run is resumed.
    """
    if config.serve.api_keys and "api_keys" in config.serve.model_fields_set:
        raise ConfigError(
            "serve.api_keys: whoever uses the cluster can read the recipe and the overrides of a job; use "
            "serve.keys_file (`sampo keys add`) on storage that the whole cluster shares, or SAMPO_API_KEYS in the "
            "environment of the cluster's head"
        )
    if "://" not in config.run.dir and not os.path.isabs(config.run.dir):
        raise ConfigError(
            f"run.dir={config.run.dir!r} is relative, and a job's working directory is thrown away; "
            "use a URL or an absolute path on storage that the whole cluster shares"
        )
    named = [
        ("model.path", config.model.path),
        *(("data.train", name) for name in config.data.names(online=False)),
        *(("data.prompts", name) for name in config.data.names(online=True)),
        *(("reward.model", part.model) for part in config.reward.parts),
        *(("reward.judge.cache", part.judge and part.judge.cache) for part in config.reward.parts),
        ("evaluate.prompts", config.evaluate.prompts),
        ("serve.keys_file", config.serve.keys_file),
    ]
    for field, value in named:
        if value and "://" not in value and not os.path.isabs(value) and is_here(value):
            raise ConfigError(
                f"{field}={value!r} is a relative path on this machine, which the cluster does not see; "
                "use a hub name, a URL or an absolute path on storage that the whole cluster shares"
            )


def stage_files(recipe: Path, config: RunConfig, folder: Path) -> None:
    """Copies into `folder` what travels with the job: the recipe, and the files of reward functions given by path."""
    (folder / recipe.name).write_bytes(recipe.read_bytes())
    for part in config.reward.parts:
        source, _, _ = (part.function or "").rpartition(":")
        if not source.endswith(".py") or os.path.isabs(source):
            continue
        target = (folder / source).resolve()
        if not target.is_relative_to(folder.resolve()):
            raise ConfigError(f"reward.function={part.function!r} lies outside this folder; run submit beside it")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(Path(source).read_bytes())


def submit_entrypoint(command: str, folder: Path, address: str, console: Console) -> int:
    """Submits `command` to run in a copy of `folder`, with this package importable; follows it as `submit` says."""
    client = _connect(address)
    packages: dict[str, object] = {"working_dir": str(folder), "py_modules": [str(Path(sampo_ray.__file__).parent)]}
    job = _submitted(client, command, packages, address)
    say = partial(console.print, markup=False, highlight=False, soft_wrap=True)
    say(f"job {job} submitted to {address}")
    try:
        asyncio.run(_follow(client, job, console, say))
        details = _ended(client, job, say)
    except KeyboardInterrupt:
        by_hand = f"--address {shlex.quote(address)} {job}"
        say(f"\njob {job} goes on.  follow: ray job logs --follow {by_hand}")
        say(f"stop, once it has started: ray job stop {by_hand}")
        return 130
    seconds = ((details.end_time or 0) - (details.start_time or 0)) / 1000
    outcome = f"job {job} {details.status.value.lower()} after {seconds:.0f} s"
    say(outcome if details.status == JobStatus.SUCCEEDED else f"{outcome}: {details.message}")
    return 0 if details.status == JobStatus.SUCCEEDED else details.driver_exit_code or 1


def _connect(address: str) -> JobSubmissionClient:
    if not address.startswith(("http://", "https://")):
        raise SubmitError(f"--address {address}: give the URL of the cluster's dashboard, such as http://HOST:8265")
    for variable in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
        if os.environ.get(variable, address) != address:
            raise SubmitError(f"--address {address}: {variable} is set and Ray would use that instead; unset it")
    try:
        return LimitedJobClient(address, REQUEST_SECONDS)
    except (ConnectionError, requests.RequestException) as error:
        raise SubmitError(
            f"--address {address}: no Ray job server answers there within {REQUEST_SECONDS:.0f} s "
            "(is it the dashboard's address, and does the cluster run ray[default]?)"
        ) from error
    except AuthenticationError as error:
        raise SubmitError(f"--address {address}: {_what_token()}") from error
    except (RuntimeError, ValueError, KeyError) as error:
        raise SubmitError(f"--address {address}: {error}") from error


def _what_token() -> str:
    if os.environ.get("RAY_AUTH_MODE", "").lower() != "token":
        return (
            "the cluster asks for its token, which Ray sends only if RAY_AUTH_MODE=token is set; set it, and "
            "RAY_AUTH_TOKEN unless the token is in ~/.ray/auth_token"
        )
    return "the cluster has another token; set RAY_AUTH_TOKEN to what `ray get-auth-token` prints on its head"


def _submitted(client: JobSubmissionClient, command: str, packages: dict[str, object], address: str) -> str:
    """The job's id. It is chosen here, so that a job whose taking was not heard of is not started a second time.

    Tries again after a lost answer, and while a cluster that has just started has no agent to take jobs.
    """
    job, deadline = f"sampo_{secrets.token_hex(8)}", time.monotonic() + SETTLE_SECONDS
    while True:
        try:
            return client.submit_job(entrypoint=command, runtime_env=packages, submission_id=job)
        except SubmitError:
            raise
        except (RuntimeError, requests.RequestException) as error:
            if f"{job} already exists" in str(error):
                return job
            passing = isinstance(error, requests.RequestException) or "No available agent" in str(error)
            if not passing or time.monotonic() > deadline:
                raise SubmitError(f"{address}: the job was not taken: {_last_line(error)}") from error
            time.sleep(RETRY_SECONDS)


def _last_line(error: Exception) -> str:
    """An error of the job server without the server's stack: what was raised there is its last line."""
    lines = str(error).strip(". \n").splitlines()
    return lines[-1] if lines else type(error).__name__


async def _follow(client: JobSubmissionClient, job: str, console: Console, say: Callable[[str], None]) -> None:
    """Copies the job's log as it grows. After a lost connection it continues where the log stopped."""
    shown, lost = 0, 0.0
    while True:
        try:
            await _started(client, job, say)
            seen = 0
            async for text in _log(client, job):
                # A new connection starts the log from its beginning.
                fresh = text[max(0, shown - seen) :]
                seen += len(text)
                if fresh or not text:
                    shown, lost = max(shown, seen), 0.0
                console.print(fresh, end="", markup=False, highlight=False, soft_wrap=True)
            return
        except SubmitError:
            raise
        except (RuntimeError, aiohttp.ClientError, OSError) as error:  # requests' errors are OSErrors
            lost = lost or time.monotonic()
            if time.monotonic() - lost > SETTLE_SECONDS:
                say(f"job {job}: its log is lost since {SETTLE_SECONDS:.0f} s: {_last_line(error)}")
                return
            await asyncio.sleep(1)


async def _started(client: JobSubmissionClient, job: str, say: Callable[[str], None]) -> None:
    """Returns once the job has started, and says what it waits for if that takes long."""
    told = time.monotonic() + REQUEST_SECONDS
    while (details := _details(client, job)).status == JobStatus.PENDING:
        if time.monotonic() > told:
            told = math.inf
            say(
                f"job {job} is pending: {details.message} Ray cannot stop it before it has started, and gives it up "
                "after 15 minutes, or the RAY_JOB_START_TIMEOUT_SECONDS of the cluster's head"
            )
        await asyncio.sleep(1)


async def _log(client: JobSubmissionClient, job: str) -> AsyncIterator[str]:
    """The job's log in pieces, from its beginning; an empty piece whenever it is silent and the job still runs."""
    stream = client.tail_job_logs(job)
    piece = asyncio.ensure_future(anext(stream, None))
    try:
        while True:
            await asyncio.wait({piece}, timeout=REQUEST_SECONDS)
            if piece.done():
                if (text := piece.result()) is None:
                    return
                yield text
                piece = asyncio.ensure_future(anext(stream, None))
            elif _details(client, job).status.is_terminal():
                return
            else:
                yield ""
    finally:
        piece.cancel()
        await asyncio.wait({piece})
        await stream.aclose()


def _ended(client: JobSubmissionClient, job: str, say: Callable[[str], None]) -> JobDetails:
    """The job's details once it has ended: a moment after its log has, or later if the log could not be read on."""
    told = time.monotonic() + SETTLE_SECONDS
    while True:
        try:
            details = _details(client, job)
        except SubmitError:
            raise
        except (RuntimeError, requests.RequestException) as error:
            raise SubmitError(f"job {job}: how it ended is not known: {_last_line(error)}") from error
        if details.status.is_terminal():
            return details
        if time.monotonic() > told:
            told = math.inf
            say(f"job {job}: there is no more of its log, and it still is {details.status.value}; waiting for its end")
        time.sleep(1)


def _details(client: JobSubmissionClient, job: str) -> JobDetails:
    """What the cluster knows of the job; SubmitError if that is nothing any more."""
    try:
        return client.get_job_info(job)
    except RuntimeError as error:
        if "does not exist" not in str(error):
            raise
        raise SubmitError(
            f"job {job}: the cluster does not know it any more, so its head was restarted and the job ended; "
            "continue the run on the cluster with `sampo train --resume`"
        ) from error
