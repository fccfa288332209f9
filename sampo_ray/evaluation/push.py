"""Uploads an exported model with its card to the Hugging Face hub: the files of a model, and no others."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx2
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from sampo_ray.errors import EvaluationError, first_line
from sampo_ray.evaluation.card import newest_export
from sampo_ray.evaluation.licences import FILES, LLAMAS, README
from sampo_ray.evaluation.records import FOLDER
from sampo_ray.run.checksums import checksum_of_file
from sampo_ray.run.storage import Place, absolute
from sampo_ray.run.versions import is_complete, read_info

INDEX = "model.safetensors.index.json"
ALLOWED = re.compile(
    r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json|([a-z_]+_)?config\.json|"
    r"tokenizer\.(json|model)|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt)|merges\.txt|spiece\.model|"
    r"chat_template\.(jinja|json)|" + "|".join(map(re.escape, (README, *FILES)))
)
"""Weights, configurations, tokenizer, card, licence."""
STAYS = ("version.json", FOLDER)
"""What the program keeps beside a model for itself; samples of benchmarks must not be published with a model."""
GITATTRIBUTES = ".gitattributes"


@dataclass(frozen=True)
class Upload:
    folder: Path
    files: tuple[tuple[str, int], ...]
    """Names and bytes."""
    stays: tuple[str, ...]

    @property
    def total(self) -> int:
        return sum(size for _, size in self.files)


def folder_of(named: str) -> Place:
    """The newest export of a run, or the exported folder itself. EvaluationError for what is neither."""
    place = Place(absolute(named))
    if place.at("manifest.json").exists():
        return newest_export(place)
    if not is_complete(place.url):
        raise EvaluationError(f"{named!r} is neither a run nor an exported model (no manifest.json, no version.json)")
    return place


def plan(folder: Path, repo: str) -> Upload:
    """What would be uploaded. EvaluationError where anything is missing, damaged, or does not belong to a model."""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise EvaluationError(f"REPO={repo!r} is no name of a repository: {first_line(error)}") from None
    names = sorted(each.name for each in folder.iterdir())
    if strange := [name for name in names if name not in STAYS and not _belongs(folder / name)]:
        raise EvaluationError(
            f"{folder}: {', '.join(strange)} would go to the hub and is no part of a model (safetensors, "
            "configurations, tokenizer, card, licence); move it elsewhere"
        )
    files = tuple((name, (folder / name).stat().st_size) for name in names if name not in STAYS)
    _check_weights(folder, [name for name, _ in files])
    _check_card(folder, repo)
    return Upload(folder, files, tuple(name for name in names if name in STAYS))


def _belongs(file: Path) -> bool:
    return ALLOWED.fullmatch(file.name) is not None and file.is_file() and not file.is_symlink()


def _check_weights(folder: Path, names: Sequence[str]) -> None:
    wanted = {"config.json"}
    if INDEX in names:
        wanted |= set(json.loads((folder / INDEX).read_text())["weight_map"].values())
    missing = sorted(wanted - set(names))
    if missing or not any(name.endswith(".safetensors") for name in names):
        raise EvaluationError(f"{folder}: {', '.join(missing) or 'a safetensors file'} is missing; name a whole export")
    sums = read_info(str(folder)).files if is_complete(str(folder)) else {}
    for name in sorted(set(names) & set(sums)):
        if checksum_of_file(folder / name) != sums[name]:
            raise EvaluationError(
                f"{folder / name}: its checksum is not that of version.json; the file is damaged or changed"
            )


def _check_card(folder: Path, repo: str) -> None:
    if not (folder / README).exists():
        raise EvaluationError(f"{folder} has no card ({README}); write one with `sampo card RUN`")
    try:
        data = ModelCard((folder / README).read_text(encoding="utf-8")).data
    except (ValueError, TypeError) as error:
        raise EvaluationError(
            f"{folder / README}: its metadata cannot be read ({first_line(error)}); mend it"
        ) from None
    llama = LLAMAS.get(str(data.get("license"))) or LLAMAS.get(str(data.get("license_name")))
    if llama is None:
        return
    if not repo.rpartition("/")[2].lower().startswith(llama.prefix.lower()):
        raise EvaluationError(f"REPO={repo!r}: the {llama.licence} asks for a name that begins with {llama.prefix}")
    lacking = [name for name in ("NOTICE", "LICENSE") if not list(folder.glob(f"{name}*"))]
    if lacking:
        raise EvaluationError(f"{folder}: the {llama.licence} asks for {' and '.join(lacking)}; put it into the folder")


def push(upload: Upload, repo: str, private: bool) -> str:
    """Uploads all files in one commit; the address of the repository. EvaluationError in one message where the hub or
    the network stands in the way; what was uploaded by then is not visible."""
    if get_token() is None:
        raise EvaluationError(
            "no token for the Hugging Face hub is there; log in with `hf auth login`, or set HF_TOKEN"
        )
    api = HfApi()
    try:
        url = api.create_repo(repo, private=private or None, exist_ok=True)
        _check_repository(api, url.repo_id, upload, private)
        api.create_commit(
            url.repo_id,
            [CommitOperationAdd(name, upload.folder / name) for name, _ in upload.files],
            commit_message="Model and card, by sampo push",
        )
    except OfflineModeIsEnabled:
        raise EvaluationError("HF_HUB_OFFLINE is set, so nothing can be pushed; unset it for this command") from None
    except HfHubHTTPError as error:
        raise EvaluationError(_refused(error, repo)) from None
    except (httpx2.HTTPError, RuntimeError, OSError) as error:
        # Threads that upload raise RuntimeError from what happened, Xet storage RuntimeError and OSError.
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
        raise EvaluationError(_interrupted(repo, first_line(cause))) from None
    except ValueError as error:
        raise EvaluationError(f"{repo}: the hub does not take the upload ({first_line(error)})") from None
    return str(url)


def _check_repository(api: HfApi, repo: str, upload: Upload, private: bool) -> None:
    """A repository that is there already may hold what this upload replaces, and nothing else: a loader would take a
    `model.safetensors` of before instead of the new files."""
    found = api.model_info(repo)
    if private and found.private is False:
        raise EvaluationError(f"{repo} is there already, and public; make it private on the hub, or name another")
    ours = {GITATTRIBUTES, *(name for name, _ in upload.files)}
    if others := sorted({each.rfilename for each in found.siblings or ()} - ours):
        shown = ", ".join(others[:5]) + (" and more" if len(others) > 5 else "")
        raise EvaluationError(
            f"{repo} is there already and holds {shown}, which this model does not replace; remove that, or name "
            "another repository"
        )


def _refused(error: HfHubHTTPError, repo: str) -> str:
    status = error.response.status_code
    said = error.server_message or first_line(error)
    if status == 401:
        return f"the Hugging Face hub does not take the token ({said}); log in with `hf auth login`, or set HF_TOKEN"
    if status in (403, 404):
        return f"the token may not write to {repo} ({said}); use one with write access, or another name"
    return _interrupted(repo, f"status {status}: {said}")


def _interrupted(repo: str, why: str) -> str:
    return (
        f"the upload to {repo} was interrupted ({why}); nothing of it is visible there. Run the command again: files "
        "that arrived are not sent twice"
    )
