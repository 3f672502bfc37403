"""Find a checkpoint by name, on the disk, among the bundled ones or on the Hugging Face hub."""

import re
from collections.abc import Sequence
from pathlib import Path

from .config import CheckpointError
from .zoo import resolve

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
    remote = isinstance(name, str) and REPO_ID.fullmatch(name) and not Path(name).is_dir()
    if remote:
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


def download(repo_id: str, revision: str | None, files: Sequence[str]) -> Path:
    """Fetch the named files of a hub repository into the cache.

    Raises:
        CheckpointError: the hub cannot be reached and the cache lacks them, or they do not exist.
    """
    from huggingface_hub import constants, snapshot_download

    try:
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=list(files)))
    except (OSError, ValueError) as error:
        offline = "on" if constants.HF_HUB_OFFLINE else "off"
        raise CheckpointError(
            f"no folder {repo_id} here, and revision {revision or 'main'} of {repo_id} could not "
            f"be had from the hub ({_first_line(error)}) nor from its cache in "
            f"{constants.HF_HUB_CACHE}. HF_HUB_OFFLINE is {offline}; check the name, the revision "
            "and the network, or give a folder."
        ) from error


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
