"""Predictor checkpoints: a folder with `model.safetensors`, `config.json` and a model card.

`model.safetensors` holds the predictor's state under `predictor.` and a golden pair: random
features at the anchors and the forecasts made from them, which loading replays. There is no pickle
anywhere.
"""

import hashlib
import inspect
import io
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load as parse_tensors
from safetensors.torch import save as lay_out_tensors
from torch import Tensor

from foreseer import __version__
from foreseer.checkpoints.budgets import BUDGETS_FILE, budget_folder, read_budgets
from foreseer.checkpoints.card import model_card
from foreseer.checkpoints.config import CONFIG_FILE as CONFIG_FILE
from foreseer.checkpoints.config import (
    REFUSALS,
    Config,
    check_arguments,
    decode_config,
    encode_config,
    read_config,
)
from foreseer.checkpoints.config import CheckpointError as CheckpointError
from foreseer.checkpoints.golden import check_golden, golden_pair
from foreseer.checkpoints.hub import CARD_FILE as CARD_FILE
from foreseer.checkpoints.hub import GRAMS_FILE as GRAMS_FILE
from foreseer.checkpoints.hub import MODEL_FILE as MODEL_FILE
from foreseer.checkpoints.hub import SEGMENTS_FILE as SEGMENTS_FILE
from foreseer.checkpoints.hub import check_free, locate, replace_file
from foreseer.checkpoints.spec import PredictorSpec, check_evaluations
from foreseer.checkpoints.strict import (
    DTYPE_CODES,
    MalformedFile,
    check_header,
    read_plain,
    refused_by_library,
)
from foreseer.predictors import LEARNED
from foreseer.predictors.base import Predictor

CLASSES: dict[str, type[Predictor]] = {kind.__name__: kind for kind in LEARNED}
"""The predictors a checkpoint may hold."""

MAX_MODEL_BYTES = 2**30
STATE_PREFIX = "predictor."
GOLDEN_NAMES = ("golden.features", "golden.forecasts")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
AGAIN = "download or export the predictor again."


def save_predictor(
    predictor: Predictor, spec: PredictorSpec, folder: str | Path, card: str | None = None
) -> Path:
    """Write a predictor checkpoint; files of an older one in the folder are replaced.

    Args:
        predictor: a predictor of one of `CLASSES`.
        spec: what it was fitted on.
        folder: where to; made when missing.
        card: text of `README.md`; None writes `model_card(predictor, spec)`.

    Returns:
        The folder.

    Raises:
        CheckpointError: the class is not in `CLASSES`, the state or spec could not be loaded again,
            or the folder holds something else.
    """
    folder = Path(folder)
    check_free(folder)
    name = type(predictor).__name__
    if CLASSES.get(name) is not type(predictor):
        raise CheckpointError(f"cannot save a {name}; expected one of {sorted(CLASSES)}.")
    arguments = predictor.arguments()
    state = {STATE_PREFIX + n: t.detach().cpu() for n, t in predictor.state_dict().items()}
    check_entries(_entries(state), _expected_state(name, arguments, str(folder)), str(folder))
    check_finite(state, str(folder))
    pair = dict(zip(GOLDEN_NAMES, golden_pair(predictor, spec), strict=True))
    check_finite(pair, str(folder))
    content = lay_out_tensors({n: t.contiguous() for n, t in (state | pair).items()})
    versions = {
        "foreseer": __version__,
        "safetensors": safetensors.__version__,
        "torch": str(torch.__version__),
    }
    digest = hashlib.sha256(content).hexdigest()
    config = encode_config(Config(name, arguments, spec, versions, digest))
    if decode_config(config, str(folder)).spec != spec:
        raise CheckpointError(
            f"{folder}: JSON changes the spec; expected plain numbers and strings, found {spec}."
        )
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / MODEL_FILE, content)
    replace_file(folder / CONFIG_FILE, config.encode())
    replace_file(folder / CARD_FILE, (card or model_card(predictor, spec)).encode())
    return folder


def load_predictor(
    name: str | Path, revision: str | None = None, evaluations: int | None = None
) -> Predictor:
    """Load a predictor checkpoint, with `.spec` set; bit for bit what was saved, or an error.

    Args:
        name: a folder, `zoo:<name>` for a bundled one, or a hub repository `owner/name`.
        revision: branch, tag or commit of a hub repository; None takes its main branch.
        evaluations: network evaluations, where there are predictors for several numbers of them.

    Raises:
        CheckpointError: the message says what was found, what was expected and what to do.
    """
    files = MODEL_FILE, CONFIG_FILE, CARD_FILE, BUDGETS_FILE
    folder = budget_folder(locate(name, revision, files), name, revision, evaluations)
    _refuse_pickles(folder)
    config = read_config(folder)
    where = str(folder / MODEL_FILE)
    if config.predictor_class not in CLASSES:
        raise CheckpointError(
            f"{folder / CONFIG_FILE}: predictor_class is {config.predictor_class!r}, expected one "
            f"of {sorted(CLASSES)}; upgrade foreseer if the class is newer."
        )
    expected = _expected_state(config.predictor_class, config.arguments, str(folder / CONFIG_FILE))
    tensors = _read_model(folder / MODEL_FILE, config.model_sha256, expected)
    predictor = CLASSES[config.predictor_class](**config.arguments)
    golden = [tensors.pop(name) for name in GOLDEN_NAMES]
    state = {n.removeprefix(STATE_PREFIX): tensor for n, tensor in tensors.items()}
    predictor.load_state_dict(state, strict=True)
    check_golden(predictor, config.spec, golden[0], golden[1], where)
    predictor.spec = config.spec
    check_evaluations(predictor, evaluations)
    return predictor


def load_predictors(name: str | Path, revision: str | None = None) -> dict[int, Predictor]:
    """All predictors of a name, by their network evaluations; where there is one, that one.

    Args:
        name: see `load_predictor`.
        revision: see `load_predictor`.

    Raises:
        CheckpointError: see `load_predictor`.
    """
    budgets = read_budgets(
        locate(name, revision, (MODEL_FILE, CONFIG_FILE, CARD_FILE, BUDGETS_FILE))
    )
    if budgets is None:
        predictor = load_predictor(name, revision)
        return {len(predictor.spec.anchors): predictor}
    return {budget: load_predictor(name, revision, budget) for budget in budgets}


def argument_names(name: str) -> list[str]:
    """Names of the constructor's arguments of a class in `CLASSES`."""
    return [n for n in inspect.signature(CLASSES[name].__init__).parameters if n != "self"]


def check_entries(
    found: dict[str, tuple[str, list[int]]], expected: dict[str, tuple[str, list[int]]], where: str
) -> None:
    """Raise unless exactly the expected tensors are there, with their dtypes and shapes.

    Args:
        found: safetensors dtype code and shape by name; golden tensors are left out.
        expected: the same of the class.
        where: what to call the file in an error.

    Raises:
        CheckpointError: tensors are missing, extra, or of another dtype or shape; all are named.
    """
    problems = [f"{n} is missing" for n in sorted(expected.keys() - found.keys())]
    problems += [f"{n} is not part of the class" for n in sorted(found.keys() - expected.keys())]
    for name in sorted(found.keys() & expected.keys()):
        if found[name] != expected[name]:
            here, there = ("{} {}".format(*entry) for entry in (found[name], expected[name]))
            problems.append(f"{name} is {here}, expected {there}")
    if problems:
        raise CheckpointError(f"{where}: tensor {'; '.join(problems)}. Nothing was loaded; {AGAIN}")


def check_finite(tensors: dict[str, Tensor], where: str) -> None:
    """Raise if a tensor holds NaN or Inf.

    Raises:
        CheckpointError: names the tensors.
    """
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise CheckpointError(
            f"{where}: NaN or Inf in {broken}, expected finite numbers; fit the predictor again."
        )


def _expected_state(
    name: str, arguments: dict[str, Any], where: str
) -> dict[str, tuple[str, list[int]]]:
    """Dtype and shape of the state, read off an instance without memory: a file may ask for any."""
    names = argument_names(name)
    if sorted(arguments) != sorted(names):
        raise CheckpointError(
            f"{where}: arguments are {sorted(arguments)}, {name} takes {sorted(names)}; export the "
            "predictor again with this release."
        )
    check_arguments(arguments, where)
    try:
        with torch.device("meta"):
            empty = CLASSES[name](**arguments)
    except REFUSALS as error:
        raise CheckpointError(
            f"{where}: {name} refuses its arguments: {str(error)[:500]}; export again."
        ) from error
    return _entries({STATE_PREFIX + n: tensor for n, tensor in empty.state_dict().items()})


def _entries(tensors: dict[str, Tensor]) -> dict[str, tuple[str, list[int]]]:
    codes = {n: DTYPE_CODES.get(t.dtype, str(t.dtype)) for n, t in tensors.items()}
    return {n: (codes[n], list(t.shape)) for n, t in tensors.items()}


def _read_model(
    path: Path, sha256: str, expected: dict[str, tuple[str, list[int]]]
) -> dict[str, Tensor]:
    """The tensors of a file, its limits, hash, names, shapes, dtypes and values checked."""
    try:
        content = read_plain(path, MAX_MODEL_BYTES)
        check_header(io.BytesIO(content), len(content))
        with refused_by_library():
            tensors = parse_tensors(content)
        if (found := hashlib.sha256(content).hexdigest()) != sha256:
            raise MalformedFile(f"SHA-256 is {found}, {CONFIG_FILE} says {sha256} (flipped bits)")
    except MalformedFile as error:
        raise CheckpointError(f"{path}: {error}; {AGAIN}") from error
    state = _entries(tensors)
    golden = {name: ("F32", state.get(name, ("F32", []))[1]) for name in GOLDEN_NAMES}
    check_entries(state, expected | golden, str(path))
    check_finite(tensors, str(path))
    return tensors


def _refuse_pickles(folder: Path) -> None:
    if (folder / MODEL_FILE).exists():
        return
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES)
    if pickles:
        raise CheckpointError(
            f"{folder} holds {pickles}, expected {MODEL_FILE}: a pickle can run code and is never "
            "opened. Turn your own training checkpoint into a predictor with `foreseer export`."
        )
