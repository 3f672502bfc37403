"""Find a checkpoint by name, on the disk, among the bundled ones or on the Hugging Face hub."""

import re
from collections.abc import Sequence
from pathlib import Path

from foreseer.checkpoints.config import CheckpointError
from foreseer.checkpoints.zoo import resolve

MAX_DOWNLOAD_BYTES = 2**30 + 2**21
"""A model file, a configuration and a card at their limits."""

REPO_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


def locate(name: str | Path, revision: str | None, files: Sequence[str]) -> Path:
    """The folder of a checkpoint, downloaded if need be.

    Args:
        name: a folder, `zoo:<name>` or a hub repository `owner/name`; a folder of that name wins.
        revision: branch, tag or commit of a hub repository.
        files: names of the files to download.

    Raises:
        CheckpointError: there is no such folder or repository.
    """
    if Path(name).is_file():
        raise CheckpointError(
            f"{name} is a file, expected the folder of a predictor checkpoint; turn a training "
            "checkpoint into one with `foreseer export`."
        )
    if is_remote(name):
        return download(str(name), revision, files)
    if revision is not None:
        raise CheckpointError(
            f"revision is {revision!r}, but {name} is a folder, which has none; leave it out."
        )
    try:
        return resolve(str(name))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{error} Expected a folder, zoo:<name>, or owner/name on the hub."
        ) from error


def is_remote(name: str | Path) -> bool:
    """Whether a name is that of a hub repository; a folder of that name wins."""
    named = isinstance(name, str) and REPO_ID.fullmatch(name) is not None
    return named and not Path(name).is_dir()


def download(
    repo_id: str, revision: str | None, files: Sequence[str], limit: int = MAX_DOWNLOAD_BYTES
) -> Path:
    """Fetch the named files of a hub repository, and no other, into the cache.

    Args:
        repo_id: `owner/name`.
        revision: branch, tag or commit.
        files: their names.
        limit: bytes that may be fetched in all.

    Raises:
        CheckpointError: the hub cannot be reached and the cache lacks them, they do not exist, or
            are over the limit.
    """
    from huggingface_hub import constants, snapshot_download

    try:
        _check_sizes(repo_id, revision, files, limit)
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=list(files)))
    except CheckpointError:
        raise
    except (OSError, ValueError) as error:
        offline = "on" if constants.HF_HUB_OFFLINE else "off"
        raise CheckpointError(
            f"no folder {repo_id} here, and revision {revision or 'main'} of {repo_id} could not "
            f"be had from the hub ({_first_line(error)}) nor from its cache in "
            f"{constants.HF_HUB_CACHE}. HF_HUB_OFFLINE is {offline}; check the name, the revision "
            "and the network, or give a folder."
        ) from error


def _check_sizes(repo_id: str, revision: str | None, files: Sequence[str], limit: int) -> None:
    """Raise before anything is fetched, if it is too much; without a hub nothing will be fetched.

    Raises:
        CheckpointError: the files are over the limit.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import DryRunError

    try:
        found = snapshot_download(
            repo_id, revision=revision, allow_patterns=list(files), dry_run=True
        )
    except DryRunError:  # not reachable: the cache has the files, or fetching says what is wrong
        return
    size = sum(file.file_size or 0 for file in found if file.will_download)
    if size > limit:
        raise CheckpointError(
            f"{repo_id} has {size} bytes to fetch, the limit is {limit}; it is no predictor's."
        )


def upload(folder: Path, repo_id: str, private: bool, files: Sequence[str]) -> str:
    """Upload the named files of a folder to a hub repository, made when missing; its address.

    Raises:
        CheckpointError: the hub refused or cannot be reached.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            allow_patterns=list(files),
            commit_message="Predictor for foreseer",
        )
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"could not upload {folder} to {repo_id} ({_first_line(error)}); log in with "
            "`hf auth login`, check the name, and unset HF_HUB_OFFLINE."
        ) from error
    return str(commit)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
