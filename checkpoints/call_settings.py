"""What a pipeline call sets that changes the function its network computes, as numbers by name.

A name is that of an argument, with the place of an entry in brackets: `true_cfg_scale`,
`attention_kwargs[scale]`, `control_guidance_start[0]`. None stands for nothing given.
"""

from collections.abc import Mapping
from typing import Any

Value = float | None
Setting = float | tuple[float | None, ...] | None
"""A number, None, or one of them for each step of a run that changes it on its way."""

TOLERANCE = 1e-6
LORA = "lora_scale"
"""Strengths of LoRAs. Weights are compared by their digest; this tells of changes in mid-run."""


def as_settings(values: Mapping[str, Any]) -> dict[str, Setting]:
    """Settings as a file or a run gives them, in one form."""
    return {
        name: tuple(map(_number, value)) if isinstance(value, list | tuple) else _number(value)
        for name, value in values.items()
    }


def _number(value: Any) -> Value:
    return None if value is None else float(value)


def argument_of(name: str) -> str:
    """The argument that a setting is an entry of."""
    return name.partition("[")[0]


def first_difference(
    one: Mapping[str, Setting], other: Mapping[str, Setting], index: int | None = None
) -> str | None:
    """Name of the first setting that differs; None where they agree.

    An argument that either side does not tell of is not compared: files before version 3 tell of
    a few only, and other pipelines around the same network take other arguments.

    Args:
        one: settings.
        other: settings.
        index: the step to compare; None for all.
    """
    told = set(map(argument_of, one)) & set(map(argument_of, other))
    for name in sorted(one.keys() | other.keys()):
        pair = one.get(name), other.get(name)
        if argument_of(name) in told and not _equal(*pair, index):
            return name
    return None


def of_weights(values: Mapping[str, Setting]) -> dict[str, Setting]:
    """The settings that are part of the weights: strengths of LoRAs."""
    return {name: value for name, value in values.items() if argument_of(name) == LORA}


def with_weights_of(
    values: Mapping[str, Setting], other: Mapping[str, Setting]
) -> dict[str, Setting]:
    """Settings whose strengths of LoRAs are another's, where they tell of any."""
    own = of_weights(values)
    rest = {name: value for name, value in values.items() if name not in own}
    return rest | (of_weights(other) if own else {})


def at_step(setting: Setting, index: int) -> Value:
    """A setting at a step; None beyond the steps that it was recorded at."""
    if not isinstance(setting, tuple):
        return setting
    return setting[index] if index < len(setting) else None


def readable_setting(value: Value) -> str:
    """A value for a person."""
    return "none" if value is None else f"{value:g}"


def _equal(one: Setting, other: Setting, index: int | None) -> bool:
    sizes = [len(each) for each in (one, other) if isinstance(each, tuple)]
    if index is None and len(set(sizes)) > 1:
        return False
    steps = range(max([1, *sizes])) if index is None else [index]
    return all(_same(at_step(one, step), at_step(other, step)) for step in steps)


def _same(one: Value, other: Value) -> bool:
    if one is None or other is None:
        return one is other
    return abs(one - other) <= TOLERANCE * max(1.0, abs(one))
