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
from typing import Any, TypeAlias

import torch
from torch import Tensor

from foreseer.checkpoints.config import is_number
from foreseer.checkpoints.format import CLASSES, save_predictor
from foreseer.checkpoints.spec import PredictorSpec
from foreseer.predictors.any_anchors import L2PGram
from foreseer.predictors.base import Predictor
from foreseer.predictors.continuous import L2PContinuous
from foreseer.predictors.kan import with_pykan, without_pykan
from foreseer.predictors.linear import L2P
from foreseer.predictors.neural import DiscaPredictor
from foreseer.predictors.readout import Readout
from foreseer.training.any_anchors import L2PGramModule
from foreseer.training.continuous import L2PContinuousModule
from foreseer.training.disca.disca_fit import DiscaModule
from foreseer.training.l2p import L2PModule, rows_predictor, spec_of
from foreseer.training.lesa.lesa_fit import LesaModule
from foreseer.training.parts import L2PPartsLeastSquares, recorded_partition
from foreseer.training.readout.readout_fit import SUMS, ReadoutFit
from foreseer.training.readout.shipped_sums import write_segments
from foreseer.training.shipped import sums_of, write_sums
from foreseer.training.verdict_callbacks import CHECKPOINT_KEY
from foreseer.trajectories.files.header import Header
from foreseer.trajectories.files.storage import exists
from foreseer.trajectories.recording import Recording

HYPER_PARAMETERS = ("recording", "anchors", "tap", "fit")
WHOLE: dict[str, type[Predictor]] = {
    DiscaModule.fit_name: DiscaPredictor,
    ReadoutFit.fit_name: Readout,
}
"""The fits whose checkpoints hold the predictor as it is deployed."""
STATE = {"gram": "gram", "continuous": "theta", "disca": "out.weight"}
"""The tensor a fit learns; `weight` for the fits that are not named here."""
Fitted: TypeAlias = (
    L2PModule
    | L2PPartsLeastSquares
    | L2PGramModule
    | L2PContinuousModule
    | LesaModule
    | DiscaModule
    | ReadoutFit
)


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
    recordings = [open_recorded(checkpoint, name) for name in recording_names(settings)]
    headers = [recording.header for recording in recordings]
    predictor: Predictor
    if settings["fit"] == LesaModule.fit_name:
        predictor = trained_lesa(settings, state, checkpoint)
    elif settings["fit"] in WHOLE:
        predictor = WHOLE[settings["fit"]](**settings["arguments"])
        load_predictor_state(predictor, state, checkpoint)
    else:
        predictor = fitted_l2p(settings, headers, state, checkpoint)
    digest = "+".join(header.recipe_hash for header in headers)
    count = int(state["num_trajectories"])
    spec = spec_of(headers[0], settings["tap"], settings["anchors"], count, digest, headers[1:])
    errors = validation_errors(state, checkpoint) | content.get(CHECKPOINT_KEY, {})
    partition, segments = settings.get("partition"), content.get(SUMS)
    _save(predictor, spec, recordings, out, errors, partition, segments)
    total = sum(len(recording) for recording in recordings)
    folders = ", ".join(str(recording.folder) for recording in recordings)
    print(f"{out}: {settings['fit']} fit on {total} trajectories of {folders}")


def trained_lesa(settings: dict[str, Any], state: dict[str, Tensor], where: str) -> Predictor:
    """The predictor of a LESA fit, without pykan.

    Args:
        settings: hyper-parameters of the fit.
        state: of its module.
        where: what to call the checkpoint in an error.

    Raises:
        ValueError: the state is not that of the predictor.
    """
    plain: Any = CLASSES[settings["class"]](**settings["arguments"])
    trained = with_pykan(plain, 0) if settings["pykan"] else plain
    load_predictor_state(trained, state, where)
    return without_pykan(trained) if settings["pykan"] else trained


def load_predictor_state(predictor: Predictor, state: dict[str, Tensor], where: str) -> None:
    """Load the predictor's part of a module's state.

    Raises:
        ValueError: the state is not that of the predictor.
    """
    prefix = "predictor."
    mine = {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
    try:
        predictor.load_state_dict(mine, strict=True)
    except RuntimeError as error:
        raise ValueError(
            f"{where} does not hold the predictor it describes ({error}); fit again."
        ) from error


def fitted_l2p(
    settings: dict[str, Any], headers: Sequence[Header], state: dict[str, Tensor], where: str
) -> Predictor:
    """The predictor of an L2P fit with what it learned.

    Args:
        settings: hyper-parameters of the fit.
        headers: of its recordings.
        state: of its module.
        where: what to call the checkpoint in an error.

    Raises:
        ValueError: the recording was replaced by another one.
    """
    predictor = predictor_of(settings, headers)
    name = STATE.get(settings["fit"], "weight")
    fitted, mine = state[f"predictor.{name}"], getattr(predictor, name)
    if fitted.shape != mine.shape:
        raise ValueError(
            f"{where} has rows of shape {tuple(fitted.shape)}, but its recording "
            f"{settings['recording']} asks for {tuple(mine.shape)}; the recording was replaced. "
            "Fit again."
        )
    mine.copy_(fitted)
    return predictor


def recording_names(settings: dict[str, Any]) -> list[str]:
    """Folders of the recordings of a fit, from its hyper-parameters."""
    return list(settings.get("recordings", [settings["recording"]]))


def open_recorded(checkpoint: str, folder: str) -> Recording:
    """A recording that a checkpoint was fitted on.

    Raises:
        ValueError: it is gone.
    """
    if not exists(folder):
        raise ValueError(
            f"{checkpoint} was fitted on the recording {folder}, which is not there; its header "
            "holds what a predictor must know. Restore it, or run export where `foreseer fit` ran "
            "if the path is relative."
        )
    return Recording(folder)


def predictor_of(settings: dict[str, Any], headers: Sequence[Header]) -> Predictor:
    """The predictor of a fit before anything was learned.

    Args:
        settings: hyper-parameters of the fit.
        headers: of its recordings.
    """
    header = headers[0]
    num_steps, num_branches = len(header.sigmas), header.num_branches
    if settings["fit"] == "gram":
        return L2PGram(num_steps, num_branches, settings["ridge"], settings["window"])
    if settings["fit"] == "continuous":
        grids = [header.sigmas for header in headers]
        return L2PContinuous(grids, num_branches, **settings["arguments"])
    if (name := settings.get("partition")) is not None:
        partition = recorded_partition(header, settings["tap"], name)
        return L2P(num_steps, settings["anchors"], num_branches, partition=partition)
    return rows_predictor(header, settings["anchors"])


def export_predictor(
    module: Fitted,
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
    recordings = [module.recording]
    if isinstance(module, L2PContinuousModule):
        recordings = module.recordings
    partition = module.hparams.get("partition")
    predictor = (
        module.deployed() if isinstance(module, LesaModule | ReadoutFit) else module.predictor
    )
    segments = module.sums if isinstance(module, ReadoutFit) else None
    return _save(predictor, module.spec(), recordings, out, metrics, partition, segments)


# What torch.load and the zip and pickle readers below it raise on damaged bytes.
READERS_ERRORS = pickle.UnpicklingError, RuntimeError, EOFError, struct.error
DAMAGED = (*READERS_ERRORS, LookupError, ValueError, TypeError, AttributeError)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A Lightning checkpoint of an L2P, LESA or DisCa fit, read with `weights_only`.

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
    learned = f"predictor.{STATE.get(str(told.get('fit', '')), 'weight')}"
    if missing or learned not in state:
        raise ValueError(
            f"{path} lacks the hyper-parameters {missing} or the tensor {learned}; expected "
            "a checkpoint of an L2P, LESA or DisCa fit."
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
