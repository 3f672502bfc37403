"""`config.json` of a predictor checkpoint: what is in it, and the checks it must pass.

The limits keep what is built, and what replaying a golden pair takes, in proportion to the file.
"""

import json
import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from foreseer.checkpoints.spec import PredictorSpec, as_settings, is_tap
from foreseer.checkpoints.strict import MalformedFile, parse_json, read_plain
from foreseer.checkpoints.upgrade import PREDICTOR, NewerVersion, upgraded
from foreseer.errors import CheckpointError as CheckpointError

SCHEMA_VERSION = 8
CONFIG_FILE = "config.json"
MAX_CONFIG_BYTES = 1_000_000
MAX_STEPS = 4096
MAX_BRANCHES = 16
MAX_STRING = 4096
MAX_KEYS = 256
MAX_REPLAY = 2**24
"""Anchors squared times steps times branches: the numbers that replaying a golden pair may keep."""

DIGEST = re.compile(r"[0-9a-f]{64}")
Rule = tuple[Callable[[Any], bool], str]
"""A test of a JSON value, and what it expects in words."""


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
    if not path.exists():
        raise CheckpointError(
            f"{folder} has no {CONFIG_FILE}; expected a folder that `foreseer export` wrote."
        )
    try:
        text = read_plain(path, MAX_CONFIG_BYTES)
    except MalformedFile as error:
        raise CheckpointError(f"{path}: {error}; it is no predictor's.") from error
    return decode_config(text, str(path))


def decode_config(text: str | bytes, where: str) -> Config:
    """The configuration in a text.

    Args:
        text: content of `config.json`.
        where: what to call it in an error.

    Raises:
        CheckpointError: see `read_config`.
    """
    try:
        values = parse_json(text)
    except ValueError as error:
        raise CheckpointError(
            f"{where} is not JSON ({error}); download or export the predictor again."
        ) from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{where} holds {short(values)}, expected a JSON object.")
    try:
        values = upgraded(values, PREDICTOR)
    except NewerVersion as error:
        raise CheckpointError(f"{where} {error}") from error
    _check_keys(values, {field.name for field in fields(Config)}, where)
    check_values(values, CONFIG_RULES, where)
    spec = values["spec"]
    _check_keys(spec, {field.name for field in fields(PredictorSpec)}, f"{where}, spec")
    check_values(spec, SPEC_RULES, f"{where}, spec")
    spec = spec | {
        "anchors": tuple(spec["anchors"]),
        "sigmas": tuple(float(sigma) for sigma in spec["sigmas"]),
        "metrics": {name: float(value) for name, value in spec["metrics"].items()},
        "guidance": as_settings(spec["guidance"]),
        "latent_shapes": tuple(map(tuple, spec["latent_shapes"])),
        "branch_steps": tuple(spec["branch_steps"]),
        "expert_steps": tuple(spec["expert_steps"]),
    }
    config = Config(**values | {"spec": PredictorSpec(**spec)})
    _check_agreement(config, where)
    _check_schedule(config.spec, f"{where}, spec")
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
                f"{where} contradicts itself: argument {name} is {short(found)}, but "
                f"its spec says {short(value)}; export the predictor again."
            )


def _check_schedule(spec: PredictorSpec, where: str) -> None:
    """Steps must be steps of the run, and the golden pair must be replayed in bounded memory."""
    num_steps = len(spec.sigmas)
    for name, steps in {"anchors": spec.anchors, "expert_steps": spec.expert_steps}.items():
        if list(steps) != sorted(set(steps)) or not 0 <= steps[0] <= steps[-1] < num_steps:
            raise CheckpointError(
                f"{where}: {name} is {short(steps)}, expected rising steps below {num_steps}, the "
                "number of sigmas; export the predictor again."
            )
    if not all(1 <= steps <= num_steps for steps in spec.branch_steps):
        raise CheckpointError(
            f"{where}: branch_steps is {short(spec.branch_steps)}, expected numbers of steps from "
            f"1 to {num_steps}; export the predictor again."
        )
    for name, value in spec.guidance.items():
        if isinstance(value, tuple) and len(value) != num_steps:
            raise CheckpointError(
                f"{where}: guidance has {len(value)} values of {name}, expected one for each of "
                f"{num_steps} steps; export the predictor again."
            )
    size = len(spec.anchors) ** 2 * num_steps * spec.num_branches
    if size > MAX_REPLAY:
        raise CheckpointError(
            f"{where}: {len(spec.anchors)} anchors in {num_steps} steps of {spec.num_branches} "
            f"branch(es) make {size} numbers (anchors squared times steps times branches), the "
            f"limit is {MAX_REPLAY}; name fewer anchors."
        )


def _check_keys(values: dict[str, Any], expected: set[str], where: str) -> None:
    unknown, missing = sorted(values.keys() - expected), sorted(expected - values.keys())
    if unknown or missing:
        raise CheckpointError(
            f"{where} has the unknown keys {short(unknown)} and lacks {missing}; expected "
            f"{sorted(expected)}. Export the predictor again with this release."
        )


def check_values(values: dict[str, Any], rules: dict[str, Rule], where: str) -> None:
    """Raise unless every value that has a rule keeps it.

    Args:
        values: by name; there is one for every rule.
        rules: a test and what it expects, in words, by name.
        where: what to call the place in an error.

    Raises:
        CheckpointError: names the value, what was found and what was expected.
    """
    for name, (holds, expected) in rules.items():
        if not holds(values[name]):
            raise CheckpointError(
                f"{where}: {name} is {short(values[name])}, expected {expected}; export the "
                "predictor again."
            )


def short(value: Any) -> str:
    """The value as text for an error, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def is_int(value: Any) -> bool:
    """Whether a JSON value is a whole number."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether a JSON value is a number that float64 holds."""
    if isinstance(value, float):
        return math.isfinite(value)
    return is_int(value) and abs(value) < 2**63


def _is_value(value: Any) -> bool:
    return value is None or is_number(value)


def is_text(value: Any) -> bool:
    """Whether a JSON value is a string of printable characters that is not too long."""
    return isinstance(value, str) and len(value) <= MAX_STRING and value.isprintable()


def is_name(value: Any) -> bool:
    """Whether a JSON value is such a string and not empty."""
    return is_text(value) and bool(value)


def is_list(value: Any, of: Callable[[Any], bool], least: int = 1, most: int = MAX_STEPS) -> bool:
    """Whether a value is a list, or a tuple that becomes one, of so many values that pass `of`."""
    return isinstance(value, list | tuple) and least <= len(value) <= most and all(map(of, value))


def _is_dict(value: Any, of: Callable[[Any], bool]) -> bool:
    known = isinstance(value, dict) and len(value) <= MAX_KEYS and all(map(is_name, value))
    return known and all(map(of, value.values()))


CONFIG_RULES: dict[str, Rule] = {
    "schema_version": (lambda v: is_int(v) and v == SCHEMA_VERSION, str(SCHEMA_VERSION)),
    "predictor_class": (is_name, "the name of a class"),
    "arguments": (lambda v: isinstance(v, dict), "an object"),
    "spec": (lambda v: isinstance(v, dict), "an object"),
    "versions": (lambda v: _is_dict(v, is_name), "an object of strings"),
    "model_sha256": (
        lambda v: isinstance(v, str) and DIGEST.fullmatch(v) is not None,
        "64 hexadecimal digits",
    ),
}
SPEC_RULES: dict[str, Rule] = {
    "tap": (
        is_tap,
        "'output', 'hidden', 'residual', 'before_last' or 'deep.<d>'",
    ),
    "anchors": (lambda v: is_list(v, is_int), f"a list of 1 to {MAX_STEPS} steps"),
    "sigmas": (lambda v: is_list(v, is_number), f"a list of 1 to {MAX_STEPS} numbers"),
    "host": (
        lambda v: _is_dict(v, lambda entry: is_text(entry) or is_number(entry)),
        "an object of strings and numbers",
    ),
    "scheduler": (is_name, "the name of a class"),
    "num_branches": (
        lambda v: is_int(v) and 1 <= v <= MAX_BRANCHES,
        f"a whole number from 1 to {MAX_BRANCHES}",
    ),
    "guidance_scale": (is_number, "a number"),
    "dtype": (is_name, "a name such as 'float32'"),
    "recording_digest": (is_text, "a string"),
    "num_trajectories": (lambda v: is_int(v) and 0 <= v < 2**63, "a whole number >= 0"),
    "metrics": (lambda v: _is_dict(v, is_number), "an object of numbers"),
    "guidance": (
        lambda v: _is_dict(v, lambda entry: _is_value(entry) or is_list(entry, _is_value)),
        "an object of numbers, null, or a list of them for each step",
    ),
    "latent_shapes": (
        lambda v: is_list(v, lambda shape: is_list(shape, is_int, most=8), least=0),
        "a list of shapes",
    ),
    "branch_steps": (lambda v: is_list(v, is_int, least=0), "a list of numbers of steps"),
    "expert_steps": (
        lambda v: is_list(v, is_int) and v[0] == 0 and v == sorted(set(v)),
        "rising steps starting with 0",
    ),
    "first_branch": (
        lambda v: v in ("", "conditional", "unconditional"),
        "'conditional', 'unconditional' or ''",
    ),
}


MAX_STAGES = 16
MAX_PARTS = 256
MAX_SOLVERS = 64
MAX_CHANNELS = 65_536
MAX_AXES = 4
MAX_TOKENS = 2**20
MAX_GRIDS = 64
MAX_TAPS = 64
MAX_ANCHORS_READ = 8
MAX_LAYERS = 8
MAX_HIDDEN = 1024
MAX_INTERVALS = 32
MAX_DEPTH = 64

REFUSALS = (TypeError, ValueError, RuntimeError, ArithmeticError, LookupError)
"""What a predictor may raise on values that make no sense together."""


def check_arguments(arguments: dict[str, Any], where: str) -> None:
    """Raise unless every argument is of its type and within its limit.

    Args:
        arguments: of the constructor of a predictor, by name.
        where: what to call the file in an error.

    Raises:
        CheckpointError: names the argument, what was found and what was expected.
    """
    rules = {name: ARGUMENT_RULES[name] for name in arguments}
    check_values(arguments, rules, f"{where}, arguments")


def _whole(least: int, most: int) -> Rule:
    return (
        lambda v: is_int(v) and least <= v <= most,
        f"a whole number from {least} to {most}",
    )


def _number(least: int | float, most: int | float) -> Rule:
    return lambda v: is_number(v) and least <= v <= most, f"a number from {least:g} to {most:g}"


def _wholes(least_long: int, most_long: int, least: int, most: int) -> Rule:
    holds, each = _whole(least, most)
    return (
        lambda v: is_list(v, holds, least_long, most_long),
        f"a list of {least_long} to {most_long}, each {each}",
    )


def _numbers(least_long: int, most_long: int) -> Rule:
    return (
        lambda v: is_list(v, is_number, least_long, most_long),
        f"a list of {least_long} to {most_long} numbers",
    )


def _is_grid(value: Any) -> bool:
    sizes = is_list(value, _whole(1, MAX_STEPS)[0], 2, 3)
    return sizes and math.prod(value) <= MAX_TOKENS


def _is_partition(value: Any) -> bool:
    """What a partition describes itself by; which arguments go together, its class says."""
    if value is None:
        return True
    if not isinstance(value, dict) or not is_name(value.get("class")):
        return False
    own = {name: each for name, each in value.items() if name != "class"}
    return own.keys() <= OF_PARTITIONS and all(ARGUMENT_RULES[n][0](v) for n, v in own.items())


def _are_shapes(value: Any) -> bool:
    return bool(value) and _is_dict(value, _wholes(1, MAX_AXES, 1, MAX_CHANNELS)[0])


def _is_policy(value: Any) -> bool:
    """What a token policy describes itself by, likewise."""
    if not isinstance(value, dict) or not is_name(value.get("class")):
        return False
    own = {name: each for name, each in value.items() if name != "class"}
    return own.keys() <= OF_POLICIES.keys() and all(OF_POLICIES[n][0](v) for n, v in own.items())


OF_PARTITIONS = {"edges", "grid", "transform", "labels", "names"}
BOOLEAN: Rule = (lambda v: isinstance(v, bool), "true or false")
NAME: Rule = (is_name, "a name")
OF_POLICIES: dict[str, Rule] = {
    "dynamics": _number(0, 1e6),
    "every_block": BOOLEAN,
    "noise": _number(0, 1e6),
    "pattern": (lambda v: is_list(v, lambda each: isinstance(each, bool)), "a list of true, false"),
    "ratios": (lambda v: is_number(v) or is_list(v, is_number), "a number, or one for each step"),
    "seed": _whole(0, 2**31),
    "share": _number(0, 1),
}

ARGUMENT_RULES: dict[str, Rule] = {
    "anchors": _wholes(1, MAX_STEPS, 0, MAX_STEPS - 1),
    "basis": NAME,
    "before": _wholes(1, MAX_STEPS, 0, MAX_STEPS - 1),
    "before_sigmas": _numbers(1, MAX_STEPS),
    "bias": BOOLEAN,
    "block": (_are_shapes, f"the shapes of 1 to {MAX_KEYS} tensors by name"),
    "boundaries": _numbers(0, MAX_STAGES - 1),
    "degree": _whole(0, 3),
    "depth": _whole(1, MAX_DEPTH),
    "edges": _numbers(0, MAX_PARTS - 1),
    "expert_steps": _wholes(1, MAX_STAGES, 0, MAX_STEPS - 1),
    "feedback": BOOLEAN,
    "gate": NAME,
    "grid": (
        _is_grid,
        f"two or three sizes from 1 to {MAX_STEPS}, of at most {MAX_TOKENS} tokens together",
    ),
    "grid_range": _number(1e-6, 1e6),
    "grid_size": _whole(1, MAX_INTERVALS),
    "grids": (
        lambda v: is_list(v, _numbers(2, MAX_STEPS)[0], 1, MAX_GRIDS),
        f"1 to {MAX_GRIDS} lists of 2 to {MAX_STEPS} numbers",
    ),
    "hidden": _wholes(0, MAX_LAYERS, 1, MAX_HIDDEN),
    "labels": _wholes(1, MAX_CHANNELS, 0, MAX_PARTS - 1),
    "max_gap": _number(0, 1),
    "max_tokens": _whole(1, MAX_TOKENS),
    "max_steps": _whole(2, 65_536),
    "min_steps": _whole(2, 65_536),
    "modulation_width": _whole(1, MAX_CHANNELS),
    "names": (lambda v: is_list(v, is_name, 2, MAX_PARTS), f"2 to {MAX_PARTS} names"),
    "neighbours": BOOLEAN,
    "num_branches": _whole(1, MAX_BRANCHES),
    "num_heads": _whole(1, 1024),
    "num_steps": _whole(1, MAX_STEPS),
    "order": _whole(0, 3),
    "partition": (
        _is_partition,
        f"null, or a class with some of {sorted(OF_PARTITIONS)}, each as of its kind",
    ),
    "past": _whole(0, MAX_ANCHORS_READ),
    "first_time": (
        lambda v: v is None or (is_number(v) and 0 < v <= 1),
        "null or a number above 0, at most 1",
    ),
    "patch": _whole(1, MAX_CHANNELS),
    "policy": (_is_policy, f"a class with some of {sorted(OF_POLICIES)}, each as of its kind"),
    "rank": _whole(1, MAX_CHANNELS),
    "residual": BOOLEAN,
    "ridge": _number(0, 1e12),
    "sigma_margin": _number(0, 1e6),
    "sigmas": _numbers(1, MAX_STEPS),
    "solvers": (
        lambda v: is_list(v, is_name, 1, MAX_SOLVERS),
        f"1 to {MAX_SOLVERS} names",
    ),
    "taps": _wholes(1, MAX_STAGES, 1, MAX_TAPS),
    "transform": NAME,
    "value_hidden": _wholes(0, MAX_LAYERS, 1, MAX_HIDDEN),
    "width": _whole(1, MAX_CHANNELS),
    "width_mult": _number(1e-6, 1),
    "window": (
        lambda v: v is None or (is_int(v) and 1 <= v <= MAX_STEPS),
        f"null or a whole number from 1 to {MAX_STEPS}",
    ),
}
"""By name, which means the same for every class that takes it; a new argument needs a line."""
