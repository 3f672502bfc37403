"""Upload a checkpoint to the Hugging Face hub."""

from collections.abc import Sequence
from pathlib import Path

from foreseer.checkpoints.budgets import budget_files, read_budgets
from foreseer.checkpoints.card import with_pictures
from foreseer.checkpoints.config import CheckpointError
from foreseer.checkpoints.folder import (
    CARD_FILE,
    GRAMS_FILE,
    OWN,
    PICTURES,
    SEGMENTS_FILE,
    replace_file,
)
from foreseer.checkpoints.format import AGAIN, load_predictor
from foreseer.checkpoints.hub import upload
from foreseer.checkpoints.strict import MalformedFile, read_header


def push_predictor(folder: str | Path, repo_id: str, private: bool = False) -> str:
    """Upload a checkpoint, its sums and pictures to a hub repository made when missing.

    The card shows the pictures.

    Args:
        folder: a folder that `save_predictor` wrote; it is loaded first, so that only a sound
            checkpoint leaves this machine.
        repo_id: `owner/name`.
        private: make a new repository private.

    Returns:
        Address of the upload.

    Raises:
        CheckpointError: the folder holds no sound checkpoint, or the hub refused.
    """
    folder = Path(folder)
    budgets = read_budgets(folder)
    if budgets is not None:
        for budget in budgets:
            load_predictor(folder / str(budget))
        names = budget_files(folder, budgets)
        check_plain(folder, names)
        return upload(folder, repo_id, private, names)
    load_predictor(folder)
    pictures = sorted(each.name for each in folder.iterdir() if each.suffix in PICTURES)
    names = [*OWN, *pictures]
    check_plain(folder, names)
    card = folder / CARD_FILE
    replace_file(card, with_pictures(card.read_text() if card.exists() else "", pictures).encode())
    return upload(folder, repo_id, private, names)


def check_plain(folder: Path, names: Sequence[str]) -> None:
    """Raise unless the files to publish are files of the folder itself, and the sums are tensors.

    Raises:
        CheckpointError: a link, which could publish any file of this machine, or no sums.
    """
    for path in (folder / name for name in names):
        if path.is_symlink():
            raise CheckpointError(
                f"{path} is a link, expected a plain file: publishing it would publish the file it "
                "leads to. Copy that file here if that is what you want."
            )
    for sums in (folder / name for name in names if name.endswith((GRAMS_FILE, SEGMENTS_FILE))):
        try:
            if sums.exists():
                read_header(sums)
        except MalformedFile as error:
            raise CheckpointError(f"{sums}: {error}; {AGAIN}") from error
