"""Upload a checkpoint to the Hugging Face hub, with a page that says what it is worth."""

from collections.abc import Sequence
from pathlib import Path

from foreseer.checkpoints.budgets import BUDGETS_FILE, read_budgets
from foreseer.checkpoints.card import model_card
from foreseer.checkpoints.config import CheckpointError
from foreseer.checkpoints.format import AGAIN, load_predictor
from foreseer.checkpoints.hub import (
    CARD_FILE,
    GRAMS_FILE,
    OWN,
    PICTURES,
    SEGMENTS_FILE,
    collect,
    upload,
)
from foreseer.checkpoints.page import (
    Benchmark,
    base_model_of,
    with_benchmark,
    with_licence,
    with_pictures,
)
from foreseer.checkpoints.spec import PredictorSpec
from foreseer.checkpoints.strict import MalformedFile, read_header

SHEET = "contact_sheet.png"


def push_predictor(
    folder: str | Path,
    repo_id: str,
    private: bool = False,
    licence: str | None = None,
    collection: bool = False,
    benchmark: Benchmark | None = None,
) -> str:
    """Upload a checkpoint, its sums and pictures to a hub repository made when missing.

    The card shows the pictures; the folder stays as it is.

    Args:
        folder: a folder that `save_predictor` wrote; it is loaded first, so that only a sound
            checkpoint leaves this machine.
        repo_id: `owner/name`.
        private: make a new repository private.
        licence: of the predictor, as the hub calls it; None leaves what the card says.
        collection: put it into the owner's collection of the base model's predictors, too.
        benchmark: one that this predictor was measured in; its rows and contact sheet are shown.

    Returns:
        Address of the upload.

    Raises:
        CheckpointError: the folder holds no sound checkpoint, the benchmark has no row of it, no
            base model is known to name the collection by, or the hub refused.
    """
    folder = Path(folder)
    budgets = read_budgets(folder)
    files: dict[str, Path | bytes] = {}
    if budgets is None:
        specs = [_part(folder, "", files, licence, benchmark)]
    else:
        files[BUDGETS_FILE] = folder / BUDGETS_FILE
        specs = [_part(folder, f"{n}/", files, licence, benchmark) for n in budgets]
        _card(folder, "", specs, files, licence, benchmark)
    check_plain([each for each in files.values() if isinstance(each, Path)])
    card = files[CARD_FILE]
    assert isinstance(card, bytes)  # of `_card`
    base_model = base_model_of(card.decode())
    if collection and base_model is None:
        raise CheckpointError(
            f"{folder} does not say which hub model it was fitted on, by which a collection is "
            "named; fit it on a recording of a pipeline that was loaded by its hub name, add "
            f"base_model to the head of {CARD_FILE}, or leave collection out. Nothing was uploaded."
        )
    address = upload(repo_id, files, "Predictor for foreseer", private)
    if collection and base_model is not None:
        collect(repo_id, base_model, private)
    return address


def _part(
    folder: Path,
    part: str,
    files: dict[str, Path | bytes],
    licence: str | None,
    benchmark: Benchmark | None,
) -> PredictorSpec:
    """Add the files of one predictor to those of an upload; its spec."""
    predictor = load_predictor(folder / part)
    spec = predictor.spec
    assert spec is not None  # of a file
    own = folder / part
    pictures = sorted(each.name for each in own.iterdir() if each.suffix in PICTURES)
    files |= {f"{part}{name}": own / name for name in (*OWN, *pictures) if (own / name).exists()}
    if not (own / CARD_FILE).exists():
        files[f"{part}{CARD_FILE}"] = model_card(predictor, spec).encode()
    _card(folder, part, [spec], files, licence, benchmark)
    return spec


def _card(
    folder: Path,
    part: str,
    specs: Sequence[PredictorSpec],
    files: dict[str, Path | bytes],
    licence: str | None,
    benchmark: Benchmark | None,
) -> None:
    """Put the page of a folder into the files of an upload."""
    name = f"{part}{CARD_FILE}"
    content = files.get(name, folder / name)
    if isinstance(content, Path):
        check_plain([content])
        content = content.read_bytes()
    card = content.decode()
    if licence is not None:
        card = with_licence(card, licence)
    if benchmark is not None:
        card = with_benchmark(card, specs, benchmark)
        if benchmark.picture is not None:
            files[f"{part}{SHEET}"] = benchmark.picture
    pictures = [each[len(part) :] for each in files if each.startswith(part)]
    shown = [each for each in pictures if Path(each).suffix in PICTURES]
    files[name] = with_pictures(card, shown).encode()


def check_plain(paths: Sequence[Path]) -> None:
    """Raise unless the files to publish are plain files, and the sums are tensors.

    Raises:
        CheckpointError: a link, which could publish any file of this machine, or no sums.
    """
    for path in paths:
        if path.is_symlink():
            raise CheckpointError(
                f"{path} is a link, expected a plain file: publishing it would publish the file it "
                "leads to. Copy that file here if that is what you want."
            )
    for sums in (path for path in paths if path.name in (GRAMS_FILE, SEGMENTS_FILE)):
        try:
            read_header(sums)
        except MalformedFile as error:
            raise CheckpointError(f"{sums}: {error}; {AGAIN}") from error
