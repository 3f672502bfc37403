"""The partitions that `foreseer record` is asked for: read off the host's grid, or from a file.

Shapes: N tokens, H height, W width.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from foreseer.integration.host.denoisers import transformer_of
from foreseer.predictors.partition import ChannelGroups, Partition
from foreseer.predictors.spectrum import equal_bands
from foreseer.trajectories.estimate import first_step
from foreseer.trajectories.prompts import Item

FROM_PYTHON = (
    "record from Python instead: record(..., partitions={'hidden/bands': Bands(edges, grid)})."
)


def asked_partitions(
    pipe: Any,
    item: Item,
    taps: Sequence[str],
    bands: int | None,
    groups: str | None,
    **settings: Any,
) -> dict[str, Partition]:
    """Partitions by `<tap>/<name>`, checked on the first step of one trajectory.

    Args:
        pipe: a diffusers pipeline.
        item: what to generate.
        taps: recorded taps.
        bands: number of equal frequency bands of every tap; None makes none.
        groups: JSON file, tap to the group of every channel; None makes none.
        settings: keyword arguments of the call.

    Raises:
        ValueError: the token grid is not known, or a partition does not suit its tap.
    """
    if bands is None and groups is None:
        return {}
    recorder = first_step(pipe, item, taps, **settings)
    first = {tap: next(iter(steps[0].values())) for tap, steps in recorder.features.items()}
    assert recorder.final is not None  # the first step is over
    found: dict[str, Partition] = {}
    if bands is not None:
        if bands < 2:
            raise ValueError(f"bands is {bands}, expected at least 2; leave it out for none.")
        config: Any = transformer_of(pipe).config
        latent = recorder.final.shape[1:]
        for tap, feature in first.items():
            grid = token_grid(config, latent, feature.shape)
            found[f"{tap}/bands"] = equal_bands(bands, grid)
    if groups is not None:
        for tap, labels in read_groups(Path(groups), sorted(first)).items():
            found[f"{tap}/groups"] = ChannelGroups(labels)
    for name, partition in found.items():
        partition.check(first[name.partition("/")[0]])
    return found


def token_grid(
    config: Mapping[str, Any], latent_shape: Sequence[int], feature_shape: Sequence[int]
) -> tuple[int, ...]:
    """The grid of a tap: the map's own size, or the latent's divided by the patch size.

    Args:
        config: the transformer's configuration, asked for `patch_size` (and `patch_size_t`).
        latent_shape: (C, H, W) or (C, frames, H, W), without the batch axis.
        feature_shape: shape of one feature, with the batch axis: (B, N, D), or (B, C, H, W).

    Returns:
        (height, width) or (frames, height, width).

    Raises:
        ValueError: the tokens are not the patches of the latent, one by one.
    """
    if len(feature_shape) > 3:
        return tuple(feature_shape[2:])
    patch = config.get("patch_size")
    sizes = tuple(latent_shape[1:])
    if isinstance(patch, int):
        patch = (config.get("patch_size_t") or 1, patch, patch)
    if len(sizes) in (2, 3) and isinstance(patch, list | tuple) and len(patch) >= len(sizes):
        grid = tuple(s // p for s, p in zip(sizes, patch[-len(sizes) :], strict=True))
        if math.prod(grid) == feature_shape[1]:
            return grid
    raise ValueError(
        f"the token grid of this host is not known: a tap has {feature_shape[1]} tokens, the "
        f"latent the shape {tuple(latent_shape)} and the patch size is {patch}. With the grid you "
        f"know, {FROM_PYTHON}"
    )


def read_groups(path: Path, taps: Sequence[str]) -> dict[str, list[int]]:
    """The groups in a JSON file.

    Raises:
        ValueError: it is not an object of lists of numbers, or names another tap.
    """
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON ({error}).") from error
    labels = values.values() if isinstance(values, dict) else [None]
    whole = all(isinstance(v, list) and all(type(n) is int for n in v) for v in labels)
    if not whole or not values or not set(values) <= set(taps):
        raise ValueError(
            f"{path}: expected an object of one list of group numbers per tap, of the recorded "
            f'taps {list(taps)}, as in {{"hidden": [0, 1, 0]}}.'
        )
    return values
