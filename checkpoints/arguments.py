"""What a file may give a predictor's constructor: checked before anything is built or allocated.

The limits keep what is built, and what replaying a golden pair takes, in proportion to the file.
"""

import math
from typing import Any

from foreseer.checkpoints.config import (
    MAX_BRANCHES,
    MAX_STEPS,
    Rule,
    check_values,
    is_int,
    is_list,
    is_name,
    is_number,
)

MAX_STAGES = 16
MAX_PARTS = 256
MAX_SOLVERS = 64
MAX_CHANNELS = 65_536
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


OF_PARTITIONS = {"edges", "grid", "transform", "labels"}
BOOLEAN: Rule = (lambda v: isinstance(v, bool), "true or false")
NAME: Rule = (is_name, "a name")

ARGUMENT_RULES: dict[str, Rule] = {
    "anchors": _wholes(1, MAX_STEPS, 0, MAX_STEPS - 1),
    "bias": BOOLEAN,
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
    "max_steps": _whole(2, 65_536),
    "min_steps": _whole(2, 65_536),
    "modulation_width": _whole(1, MAX_CHANNELS),
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
    "patch": _whole(1, MAX_CHANNELS),
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
