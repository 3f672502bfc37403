"""Where a checkpoint is found by name, and the folder that one may be written to."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from foreseer.checkpoints.config import CONFIG_FILE, CheckpointError
from foreseer.checkpoints.strict import REPO_ID
from foreseer.checkpoints.zoo import resolve

MODEL_FILE = "model.safetensors"
CARD_FILE = "README.md"
GRAMS_FILE = "grams.safetensors"
SEGMENTS_FILE = "segments.safetensors"  # the normal equations of a readout
OWN = (MODEL_FILE, CONFIG_FILE, CARD_FILE, GRAMS_FILE, SEGMENTS_FILE)
PICTURES = (".png", ".jpg", ".webp")
"""Endings of what a card may show."""


def check_free(folder: str | Path) -> None:
    """Raise unless a folder is new, empty or an older predictor's.

    Hidden files, and pictures for the card, may lie in it.

    Raises:
        CheckpointError: it holds anything else, such as a recording, or is a file.
    """
    check_holds(Path(folder), OWN)


def check_holds(folder: Path, names: Sequence[str]) -> None:
    """Raise unless a folder is new, or holds nothing but these, hidden files and pictures.

    Raises:
        CheckpointError: it holds anything else, or is a file.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is a file, expected a folder for the predictor.")
    foreign = sorted(
        each.name
        for each in folder.iterdir()
        if each.name not in names and not each.name.startswith(".") and each.suffix not in PICTURES
    )
    if foreign:
        named = ", ".join(foreign[:4]) + (", ..." if len(foreign) > 4 else "")
        raise CheckpointError(
            f"{folder} holds {named}, expected an empty folder, or that of a predictor, whose "
            "files are replaced; give the predictor a folder of its own."
        )


def replace_file(path: Path, content: bytes) -> None:
    """Write a file in one go; a reader sees the old one or the new one."""
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)
    with open(partial, "xb") as file:  # never through a link that lies there
        file.write(content)
    os.replace(partial, path)


MAX_DOWNLOAD_BYTES = 2**30 + 2**21
"""A model file, a configuration and a card at their limits."""

MAX_TITLE, MAX_ABOUT = 59, 150
"""Characters that the hub takes of a collection's title and description."""


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


def upload(
    repo_id: str,
    files: Mapping[str, Path | bytes],
    message: str,
    private: bool = False,
    repo_type: str = "model",
) -> str:
    """Upload files to a hub repository, made when missing, in one commit.

    Args:
        repo_id: `owner/name`.
        files: file, or content, by the name it gets there.
        message: of the commit.
        private: make a new repository private.
        repo_type: `model` or `dataset`.

    Returns:
        Address of the commit.

    Raises:
        CheckpointError: the hub refused or cannot be reached.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    try:
        operations = [CommitOperationAdd(name, content) for name, content in files.items()]
        api.create_repo(repo_id, private=private, repo_type=repo_type, exist_ok=True)
        commit = api.create_commit(repo_id, operations, commit_message=message, repo_type=repo_type)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"could not upload to {repo_id} ({_first_line(error)}); log in with `hf auth login`, "
            "check the name, and unset HF_HUB_OFFLINE."
        ) from error
    return str(commit)


def collect(repo_id: str, base_model: str, private: bool = False) -> str:
    """Put a repository into its owner's collection of a base model's predictors.

    Args:
        repo_id: `owner/name` of a model.
        base_model: `owner/name` of what it was fitted on, which the collection is named by.
        private: make a new collection private.

    Returns:
        Address of the collection, which is made when missing.

    Raises:
        CheckpointError: the hub refused or cannot be reached.
    """
    from huggingface_hub import HfApi

    api, title = HfApi(), f"foreseer: {base_model}"
    if len(title) > MAX_TITLE:
        title = f"foreseer: {base_model.rpartition('/')[2]}"
    try:
        collection = api.create_collection(
            title,
            namespace=repo_id.split("/")[0],
            description=f"Learned feature caching for {base_model.rpartition('/')[2]}"[:MAX_ABOUT],
            private=private,
            exists_ok=True,
        )
        api.add_collection_item(collection.slug, repo_id, "model", exists_ok=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{repo_id} is uploaded, but could not be put into the collection {title!r} "
            f"({_first_line(error)}); log in with a token that may write collections, or leave "
            "collection out."
        ) from error
    return collection.url


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
