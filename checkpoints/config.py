"""`config.json` of a predictor checkpoint: what is in it, and the checks it must pass."""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from .spec import PredictorSpec
from .strict import unique_keys

SCHEMA_VERSION = 1
CONFIG_FILE = "config.json"
MAX_CONFIG_BYTES = 1_000_000
MAX_STEPS = 4096


class CheckpointError(ValueError):
    """A predictor checkpoint that cannot be trusted: what was found, expected, and what to do."""


@dataclass(frozen=True)
class Config:
    """Everything in `config.json`.

    Args:
        predictor_class: name of the predictor's class.
        arguments: its constructor's arguments, plain JSON values.
        spec: what it was fitted on.
        versions: version of each library it was written with.
        model_sha256: SHA-256 of `model.safetensors`, in hexadecimal.
        schema_version: version of this layout.
    """

    predictor_class: str
    arguments: dict[str, Any]
    spec: PredictorSpec
    versions: dict[str, str]
    model_sha256: str
    schema_version: int = SCHEMA_VERSION


def encode_config(config: Config) -> str:
    """The text of `config.json`.

    Raises:
        CheckpointError: a value is NaN, infinite, or nothing JSON can hold.
    """
    try:
        return json.dumps(asdict(config), indent=1, sort_keys=True, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"the predictor's spec cannot be stored ({error}); expected finite numbers, strings, "
            "lists and dicts only."
        ) from error


def read_config(folder: Path) -> Config:
    """Read and check the `config.json` of a folder.

    Raises:
        CheckpointError: it is missing, too large, malformed, of a newer schema, or contradicts
            itself.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise CheckpointError(
            f"{folder} has no {CONFIG_FILE}; expected a folder that `foreseer export` wrote."
        )
    if (found := path.stat().st_size) > MAX_CONFIG_BYTES:
        raise CheckpointError(
            f"{path} has {found} bytes, the limit is {MAX_CONFIG_BYTES}; it is no predictor's."
        )
    return decode_config(path.read_bytes(), str(path))


def decode_config(text: str | bytes, where: str) -> Config:
    """The configuration in a text.

    Args:
        text: content of `config.json`.
        where: what to call it in an error.

    Raises:
        CheckpointError: see `read_config`.
    """
    try:
        values = json.loads(text, object_pairs_hook=unique_keys, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{where} is not JSON ({error}); download or export the predictor again."
        ) from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{where} holds {_short(values)}, expected a JSON object.")
    version = values.get("schema_version")
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise CheckpointError(
            f"{where} has schema_version {version}, this release reads {SCHEMA_VERSION}; upgrade "
            "foreseer."
        )
    _check_keys(values, {field.name for field in fields(Config)}, where)
    _check_values(values, CONFIG_RULES, where)
    spec = values["spec"]
    spec = LATER_FIELDS | spec
    _check_keys(spec, {field.name for field in fields(PredictorSpec)}, f"{where}, spec")
    _check_values(spec, SPEC_RULES, f"{where}, spec")
    spec = spec | {
        "anchors": tuple(spec["anchors"]),
        "sigmas": tuple(float(sigma) for sigma in spec["sigmas"]),
        "metrics": {name: float(value) for name, value in spec["metrics"].items()},
        "guidance": {name: float(value) for name, value in spec["guidance"].items()},
        "latent_shapes": tuple(map(tuple, spec["latent_shapes"])),
        "branch_steps": tuple(spec["branch_steps"]),
        "expert_steps": tuple(spec["expert_steps"]),
    }
    config = Config(**values | {"spec": PredictorSpec(**spec)})
    _check_agreement(config, where)
    return config


def _check_agreement(config: Config, where: str) -> None:
    """Where an argument repeats the spec, both must say the same."""
    expected = {
        "num_steps": len(config.spec.sigmas),
        "anchors": list(config.spec.anchors),
        "num_branches": config.spec.num_branches,
        "sigmas": list(config.spec.sigmas),
        "expert_steps": list(config.spec.expert_steps),
    }
    for name, value in expected.items():
        found = config.arguments.get(name, value)
        if json.dumps(found) != json.dumps(value):  # 1, 1.0 and true are different arguments
            raise CheckpointError(
                f"{where} contradicts itself: argument {name} is {_short(found)}, but "
                f"its spec says {_short(value)}; export the predictor again."
            )


def _check_keys(values: dict[str, Any], expected: set[str], where: str) -> None:
    unknown, missing = sorted(values.keys() - expected), sorted(expected - values.keys())
    if unknown or missing:
        raise CheckpointError(
            f"{where} has the unknown keys {unknown} and lacks {missing}; expected "
            f"{sorted(expected)}. Export the predictor again with this release."
        )


def _check_values(
    values: dict[str, Any], rules: dict[str, tuple[Callable[[Any], bool], str]], where: str
) -> None:
    for name, (holds, expected) in rules.items():
        if not holds(values[name]):
            raise CheckpointError(
                f"{where}: {name} is {_short(values[name])}, expected {expected}; export the "
                "predictor again."
            )


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return _is_int(value) and abs(value) < 2**63


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _is_list(value: Any, of: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and 1 <= len(value) <= MAX_STEPS and all(map(of, value))


def _is_dict(value: Any, of: Callable[[Any], bool]) -> bool:
    return isinstance(value, dict) and all(map(of, value.values()))


CONFIG_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "schema_version": (lambda v: _is_int(v) and v == SCHEMA_VERSION, str(SCHEMA_VERSION)),
    "predictor_class": (_is_name, "the name of a class"),
    "arguments": (lambda v: isinstance(v, dict), "an object"),
    "spec": (lambda v: isinstance(v, dict), "an object"),
    "versions": (lambda v: _is_dict(v, _is_name), "an object of strings"),
    "model_sha256": (_is_name, "64 hexadecimal digits"),
}
SPEC_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "tap": (lambda v: v in ("output", "hidden", "residual"), "'output', 'hidden' or 'residual'"),
    "anchors": (lambda v: _is_list(v, _is_int), f"a list of 1 to {MAX_STEPS} steps"),
    "sigmas": (lambda v: _is_list(v, _is_number), f"a list of 1 to {MAX_STEPS} numbers"),
    "host": (
        lambda v: _is_dict(v, lambda entry: isinstance(entry, str) or _is_number(entry)),
        "an object of strings and numbers",
    ),
    "scheduler": (_is_name, "the name of a class"),
    "num_branches": (lambda v: _is_int(v) and 1 <= v <= 16, "a whole number from 1 to 16"),
    "guidance_scale": (_is_number, "a number"),
    "dtype": (_is_name, "a name such as 'float32'"),
    "recording_digest": (lambda v: isinstance(v, str), "a string"),
    "num_trajectories": (lambda v: _is_int(v) and v >= 0, "a whole number >= 0"),
    "metrics": (lambda v: _is_dict(v, _is_number), "an object of numbers"),
    "guidance": (lambda v: _is_dict(v, _is_number), "an object of numbers"),
    "latent_shapes": (
        lambda v: v == [] or _is_list(v, lambda shape: _is_list(shape, _is_int)),
        "a list of shapes",
    ),
    "branch_steps": (lambda v: v == [] or _is_list(v, _is_int), "a list of numbers of steps"),
    "expert_steps": (
        lambda v: _is_list(v, _is_int) and v[0] == 0 and v == sorted(set(v)),
        "rising steps starting with 0",
    ),
}
LATER_FIELDS: dict[str, Any] = {
    "guidance": {},
    "latent_shapes": [],
    "branch_steps": [],
    "expert_steps": [0],
}
"""What checkpoints of earlier releases, which lack these, stand for."""
