"""Groups of channels that move alike, and the best solver for each: the fit of HyCa.

The descriptor of a channel follows HyCa (arXiv 2510.04188: differences, energy, jerk and curvature
ratios, spectral flatness); its exact weights are not published, so here every entry is a logarithm
scaled to unit variance.
Shapes: b branches, S sampling steps, N tokens, D channels.
"""

import random
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from foreseer.predictors.partition import ChannelGroups
from foreseer.predictors.per_part import POOL, HyCa
from foreseer.training.recorded import spec_of, stack_part_grams
from foreseer.trajectories.gram import squared_errors
from foreseer.trajectories.recording import Recording

MOST_GROUPS = 6
TINY = 1e-30  # keeps the logarithm of a channel that never moves finite


def fit_hyca(
    recording: Recording,
    anchors: Sequence[int],
    tap: str = "hidden",
    num_groups: int | None = None,
    items: Sequence[int] | None = None,
    seed: int = 0,
) -> HyCa:
    """Cluster the channels of a tap and choose the solver of least forecast error for each.

    Args:
        recording: a recording with `features: full` (or `tokens`, for the clusters only, where the
            Grams of the same groups were recorded).
        anchors: steps at which the network runs, starting with 0.
        tap: recorded tap.
        num_groups: number of groups; None takes that of the best silhouette from 2 to 6.
        items: trajectories to fit on; None takes all.
        seed: seed of the clustering.

    Returns:
        The predictor with its `spec`.

    Raises:
        ValueError: the recording lacks the features, or there are fewer channels than groups.
    """
    chosen = recording.items if items is None else list(items)
    groups = ChannelGroups(cluster_channels(recording, tap, num_groups, chosen, seed))
    solvers = best_solvers(recording, tap, groups, anchors, chosen)
    predictor = HyCa(groups.labels, solvers)
    spec = spec_of(recording.header, tap, anchors, len(chosen))
    predictor.spec = spec
    return predictor


def best_solvers(
    recording: Recording,
    tap: str,
    groups: ChannelGroups,
    anchors: Sequence[int],
    items: Sequence[int] | None = None,
) -> list[str]:
    """The name in `POOL` of the solver with the least summed squared error, per group.

    Errors are those of forecasts from recorded anchors, over all forecast steps.
    """
    grams = stack_part_grams(recording, tap, groups, items)
    total = grams.sum((0, 1))[None, None]  # the error is linear in the Gram
    errors = []
    for rule in POOL.values():
        rows = rule.rows(anchors, recording.header.sigmas)
        errors.append(squared_errors(total, rows).sum((0, 1, 3)))
    names = list(POOL)
    return [names[choice] for choice in torch.stack(errors).argmin(0).tolist()]


def cluster_channels(
    recording: Recording,
    tap: str,
    num_groups: int | None = None,
    items: Sequence[int] | None = None,
    seed: int = 0,
) -> list[int]:
    """Group the channels of a tap by how they move from step to step, with k-means.

    Args:
        recording: a recording with features.
        tap: recorded tap.
        num_groups: number of groups; None takes that of the best silhouette from 2 to 6.
        items: trajectories to look at; None takes all.
        seed: seed of k-means.

    Returns:
        The group of every channel; group 0 is that of channel 0, and so on.

    Raises:
        ValueError: there are no features, or fewer channels than groups.
    """
    from sklearn.cluster import KMeans
    from sklearn.metrics import silhouette_score

    described = channel_descriptors(recording, tap, items).numpy()
    num_channels = len(described)
    counts = range(2, MOST_GROUPS + 1) if num_groups is None else [num_groups]
    if not 1 <= counts[-1] < num_channels:
        raise ValueError(
            f"the tap {tap!r} has {num_channels} channels, expected more than {counts[-1]} groups, "
            "and at least one group."
        )
    best: tuple[float, list[int]] | None = None
    for count in counts:
        found = KMeans(count, n_init=10, random_state=seed).fit_predict(described)
        score = silhouette_score(described, found) if len(counts) > 1 else 0.0
        if best is None or score > best[0]:
            best = (float(score), found.tolist())
    assert best is not None  # there is a count at least
    return renumbered(best[1])


def channel_descriptors(
    recording: Recording, tap: str, items: Sequence[int] | None = None
) -> Float[Tensor, "D 6"]:
    """How every channel moves over the run, averaged over trajectories, branches and tokens.

    Logarithms of the first and second difference relative to the channel, its energy, third over
    first difference (jerk), second over first difference (curvature), and the geometric over the
    arithmetic mean of the power spectrum over steps (flatness); zero mean, unit variance.

    Raises:
        ValueError: the recording has no features of this tap.
    """
    name = f"feature/{tap}"
    chosen = recording.items if items is None else list(items)
    if recording.header.features == "none" or name not in recording.names(chosen[0]):
        raise ValueError(
            f"{recording.folder} holds no features of {tap!r}; record with features: full."
        )
    total: dict[str, Tensor] = {}
    for item in chosen:
        for key, value in channel_powers(recording.load(item, [name])[name]).items():
            total[key] = total[key] + value if key in total else value
    log = {key: (value / len(chosen) + TINY).log() for key, value in total.items()}
    spectrum = total["spectrum"] / len(chosen) + TINY  # (frequencies, D)
    described = torch.stack(
        [
            log["first"] - log["energy"],
            log["second"] - log["energy"],
            log["energy"],
            log["third"] - log["first"],
            log["second"] - log["first"],
            spectrum.log().mean(0) - spectrum.mean(0).log(),
        ],
        -1,
    )
    spread = described.std(0, correction=0).clamp_min(1e-12)
    return (described - described.mean(0)) / spread


def channel_powers(features: Float[Tensor, "b S *shape"]) -> dict[str, Float[Tensor, "*lead D"]]:
    """Mean squares per channel of a trajectory, its differences over steps, and its spectrum."""
    axis = -1 if features.ndim == 4 else 2  # tokens (b, S, N, D) or maps (b, S, C, H, W)
    wide = features.double().movedim(axis, -1).flatten(2, -2)  # (b, S, N, D)
    powers = {"energy": wide.square().mean((0, 1, 2))}
    change = wide
    for name in ("first", "second", "third"):
        change = change.diff(dim=1)
        powers[name] = change.square().mean((0, 1, 2))
    spectrum = torch.fft.rfft(wide - wide.mean(1, keepdim=True), dim=1)[:, 1:]
    powers["spectrum"] = spectrum.abs().square().mean((0, 2))
    return powers


def random_groups(num_channels: int, num_groups: int, seed: int = 0) -> list[int]:
    """Groups of nearly equal size drawn at random: the control of every clustering."""
    labels = [channel % num_groups for channel in range(num_channels)]
    random.Random(seed).shuffle(labels)
    return renumbered(labels)


def renumbered(labels: Sequence[int]) -> list[int]:
    """The same groups, numbered in the order in which they first occur."""
    order = {label: place for place, label in enumerate(dict.fromkeys(labels))}
    return [order[label] for label in labels]
