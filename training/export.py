"""Turn a fitted module, or the Lightning checkpoint of one, into a predictor checkpoint.

The Grams of the recording go with it, summed over all its trajectories, held out or not: the closed
form needs nothing else, so others can add their own prompts without the old features (`refit`).
Shapes: S sampling steps.
"""

import dataclasses
import math
import pickle
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foreseer.checkpoints.config import REFUSALS, is_number
from foreseer.checkpoints.format import CLASSES, save_predictor
from foreseer.checkpoints.spec import PredictorSpec
from foreseer.predictors.base import Predictor
from foreseer.predictors.kan import with_pykan, without_pykan
from foreseer.training.predictor_fit import PredictorFit
from foreseer.training.readout.readout_fit import SUMS
from foreseer.training.readout.shipped_sums import write_segments
from foreseer.training.recorded import spec_of
from foreseer.training.shipped import sums_of, write_sums
from foreseer.training.verdict_callbacks import CHECKPOINT_KEY
from foreseer.trajectories.files.storage import exists
from foreseer.trajectories.recording import Recording

PREFIX = "predictor."  # of its tensors in the state of a module
HYPER_PARAMETERS = ("recordings", "digests", "anchors", "tap", "fit", "class", "arguments")


def export_command(checkpoint: str, out: str) -> None:
    """Write a predictor checkpoint from the Lightning checkpoint of any fit.

    Args:
        checkpoint: the `.ckpt` file that `foreseer fit` wrote; it is read without running code.
        out: folder of the predictor.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no checkpoint of such a fit, or its recording is gone.
    """
    content = read_checkpoint(Path(checkpoint))
    settings, state = content["hyper_parameters"], content["state_dict"]
    pairs = zip(settings["recordings"], settings["digests"], strict=True)
    recordings = [open_recorded(checkpoint, *pair) for pair in pairs]
    predictor = trained(settings, state, checkpoint)
    first, *others = (recording.header for recording in recordings)
    count = int(state["num_trajectories"])
    spec = spec_of(first, settings["tap"], settings["anchors"], count, others)
    errors = validation_errors(state, checkpoint) | content.get(CHECKPOINT_KEY, {})
    partition, segments = settings.get("partition"), content.get(SUMS)
    _save(predictor, spec, recordings, out, errors, partition, segments)
    total = sum(len(recording) for recording in recordings)
    folders = ", ".join(str(recording.folder) for recording in recordings)
    print(f"{out}: {settings['fit']} fit on {total} trajectories of {folders}")


def trained(settings: dict[str, Any], state: dict[str, Tensor], where: str) -> Predictor:
    """The predictor of a fit, without what only its training needed.

    Args:
        settings: hyper-parameters of the fit.
        state: of its module.
        where: what to call the checkpoint in an error.

    Raises:
        ValueError: the class is not known, or the state is not that of the predictor.
    """
    if settings["class"] not in CLASSES or not isinstance(settings["arguments"], dict):
        raise ValueError(
            f"{where} is of a {str(settings['class'])[:80]}, expected one of {sorted(CLASSES)} "
            "with its arguments; fit again."
        )
    try:
        plain: Any = CLASSES[settings["class"]](**settings["arguments"])
    except REFUSALS as error:
        raise ValueError(
            f"{where} does not hold the predictor it describes ({error}); fit again."
        ) from error
    in_pykan = settings.get("pykan", False)
    found = with_pykan(plain, 0) if in_pykan else plain
    load_predictor_state(found, state, where)
    return without_pykan(found) if in_pykan else found


def load_predictor_state(predictor: Predictor, state: dict[str, Tensor], where: str) -> None:
    """Load the predictor's part of a module's state.

    Raises:
        ValueError: the state is not that of the predictor.
    """
    mine = {n.removeprefix(PREFIX): t for n, t in state.items() if n.startswith(PREFIX)}
    try:
        predictor.load_state_dict(mine, strict=True)
    except RuntimeError as error:
        raise ValueError(
            f"{where} does not hold the predictor it describes ({error}); fit again."
        ) from error


def open_recorded(checkpoint: str, folder: str, digest: str) -> Recording:
    """A recording that a checkpoint was fitted on.

    Args:
        checkpoint: its file.
        folder: of the recording.
        digest: `recipe_hash` of the recording that was fitted on.

    Raises:
        ValueError: it is gone, or another one is in its place.
    """
    if not exists(folder):
        raise ValueError(
            f"{checkpoint} was fitted on the recording {folder}, which is not there; its header "
            "holds what a predictor must know. Restore it, or run export where `foreseer fit` ran "
            "if the path is relative."
        )
    recording = Recording(folder)
    if recording.header.recipe_hash != digest:
        raise ValueError(
            f"{checkpoint} was fitted on a recording of the recipe {digest}, in {folder} is one of "
            f"{recording.header.recipe_hash}: it was replaced. Restore it, or fit again."
        )
    return recording


def export_predictor(
    module: PredictorFit,
    out: str | Path,
    metrics: dict[str, float],
) -> Path:
    """Write a predictor checkpoint straight from a fitted module.

    Args:
        module: the module.
        out: folder of the predictor.
        metrics: measured held-out errors, such as `psnr_db` and `psnr_db_taylor_1`.

    Returns:
        The folder.
    """
    partition, deployed = module.hparams.get("partition"), module.deployed()
    return _save(deployed, module.spec(), module.recordings, out, metrics, partition, module.sums)


# What torch.load and the zip and pickle readers below it raise on damaged bytes.
READERS_ERRORS = pickle.UnpicklingError, RuntimeError, EOFError, struct.error
DAMAGED = (*READERS_ERRORS, LookupError, ValueError, TypeError, AttributeError)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A Lightning checkpoint of a fit, read with `weights_only`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds anything but tensors and plain values, or is of another kind of fit.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; expected the .ckpt that `foreseer fit` wrote.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except DAMAGED as error:
        raise ValueError(
            f"{path} is no checkpoint that can be read without running code ({str(error)[:200]}); "
            "expected the .ckpt that `foreseer fit` wrote."
        ) from error
    values = content if isinstance(content, dict) else {}
    told, state = (values.get(name, {}) for name in ("hyper_parameters", "state_dict"))
    if not isinstance(told, dict) or not isinstance(state, dict):
        raise ValueError(
            f"{path} has hyper_parameters of type {type(told).__name__} and a state_dict of type "
            f"{type(state).__name__}, expected dicts; it is no checkpoint of a fit."
        )
    judged = values.get(CHECKPOINT_KEY, {})
    if not isinstance(judged, dict) or not all(map(is_number, judged.values())):
        raise ValueError(f"{path} has the verdict {str(judged)[:80]}, expected numbers; fit again.")
    missing = [name for name in HYPER_PARAMETERS if name not in told]
    if missing or not any(name.startswith(PREFIX) for name in state):
        raise ValueError(
            f"{path} lacks the hyper-parameters {missing} or the tensors of a predictor; expected "
            "a checkpoint of a fit that this release made."
        )
    if not bool(state.get("finished", True)):
        raise ValueError(f"{path} is from before the last segment was fitted; let the fit run on.")
    return values


def validation_errors(state: dict[str, Tensor], where: str) -> dict[str, float]:
    """The validation errors of a closed-loop fit and its start, in dB; none for the other fits.

    The start of L2P is its best formula, that of LESA reuse, that of DisCa its own base.

    Raises:
        ValueError: the fit stopped before it measured anything.
    """
    name = next((name for name in ("best_error", "val_error") if name in state), None)
    if name is None or ("finished" in state and not math.isfinite(state[name])):
        return {}  # nothing is measured, or no trajectory was held out
    best, start = float(state[name]), float(state["start_error"])
    if not math.isfinite(best) or not math.isfinite(start):
        raise ValueError(
            f"{where} was written before the fit measured its start; let `foreseer fit` run on."
        )
    return {"val_error_db": best, "val_error_db_start": start}


def _save(
    predictor: Predictor,
    spec: PredictorSpec,
    recordings: Sequence[Recording],
    out: str | Path,
    metrics: dict[str, float],
    partition: str | None,
    segments: Mapping[str, Tensor] | None = None,
) -> Path:
    names = [f"gram/{spec.tap}", *([f"gram/{spec.tap}/{partition}"] if partition else [])]
    sums = [sums_of(recording, names) for recording in recordings]
    folder = save_predictor(predictor, dataclasses.replace(spec, metrics=metrics), out)
    write_sums(folder, sums, spec.recording_digest)
    if segments:
        write_segments(folder, segments, spec.recording_digest)
    return folder
