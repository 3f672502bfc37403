"""Learned resampling as a plain function: an extended Gram of two recordings, a solve, a predictor.

The Gram is of the coarse anchors under every up-sampling operator and of all fine steps:
A J + S rows, kilobytes whatever the features.
Shapes: A coarse anchors, J operators, S fine steps, M = A J + S, B branches.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from foreseer.predictors.resampled import Resampled
from foreseer.predictors.solve import ridge
from foreseer.training.recorded import check_tap, spec_of
from foreseer.trajectories.recording import Recording


def fit_resampled(
    coarse: Recording,
    fine: Recording,
    anchors: Sequence[int],
    before: Sequence[int],
    tap: str = "hidden",
    strength: float = 1e-2,
    innovation: bool = True,
    items: Sequence[int] | None = None,
) -> Resampled:
    """Rows over the features of the stage before and of this one, of least summed squared error.

    With G the Gram of all sources and p the rows of reuse (of copies, where no fine step was
    computed), (G + strength diag G) (w - p) = G_t - G p. Up to the first fine anchor b they are
    over coarse features, from the second on over fine ones. Between them, with `innovation`, the
    fine anchor only corrects what the coarse ones said of it:

        F_hat_t = C_t + rho_t (F_b - C_b),   C_t = sum_a sum_j W[t, a, j] U_j F_a

    with rho fitted in the same way; without, all weights are fitted together.

    Args:
        coarse: recording of the stage before, with full features.
        fine: of this stage, with full features of the same items.
        anchors: steps of this stage at which the network runs.
        before: anchors of the stage before to forecast from.
        tap: `hidden` or `residual`, whose tokens are the grid's.
        strength: of the ridge, >= 0.
        innovation: see above.
        items: trajectories to fit on; None takes all that both recordings have.

    Raises:
        ValueError: a recording lacks the tap or its features, or their grids do not go together.
    """
    if tap not in ("hidden", "residual"):
        raise ValueError(f"tap is {tap!r}, expected 'hidden' or 'residual', which are per token.")
    headers = [check_tap(each, tap).header for each in (coarse, fine)]
    for each, header in zip((coarse, fine), headers, strict=True):
        if header.features != "full":
            raise ValueError(f"{each.folder} has no full features; record with features: full.")
    chosen = _shared(coarse, fine, items)
    side = round(fine.load(chosen[0])[f"feature/{tap}"].shape[2] ** 0.5)
    predictor = Resampled(
        headers[1].num_steps,
        anchors,
        before,
        headers[0].sigmas,
        (side, side),
        headers[1].num_branches,
    )
    total = sum(extended_gram(predictor, coarse, fine, item, tap) for item in chosen)
    assert isinstance(total, Tensor)  # there is an item at least
    set_rows(predictor, total, strength, innovation)
    predictor.spec = spec_of(headers[1], tap, anchors, len(chosen))
    return predictor


def _shared(coarse: Recording, fine: Recording, items: Sequence[int] | None) -> list[int]:
    """The trajectories to fit on, which both recordings have.

    Raises:
        ValueError: one of them lacks some, or there are none.
    """
    shared = sorted(set(coarse.items) & set(fine.items))
    chosen = shared if items is None else list(items)
    if not chosen or not set(chosen) <= set(shared):
        raise ValueError(
            f"the recordings share {len(shared)} items, asked for {len(chosen)}; record both "
            "stages on the same items."
        )
    return chosen


def extended_gram(
    predictor: Resampled, coarse: Recording, fine: Recording, item: int, tap: str
) -> Float[Tensor, "B M M"]:
    """The Gram of one trajectory: U_j F_a of all a and j, then all fine steps.

    Raises:
        ValueError: the coarse grid is not half of the fine one.
    """
    name = f"feature/{tap}"
    below = coarse.load(item, [name])[name][:, list(predictor.before)]  # (B, A, n, D)
    above = fine.load(item, [name])[name].double()  # (B, S, N, D)
    if 4 * below.shape[2] != above.shape[2] or below.shape[0] != above.shape[0]:
        raise ValueError(
            f"item {item} has {below.shape[2]} tokens and {below.shape[0]} branches in "
            f"{coarse.folder}, {above.shape[2]} and {above.shape[0]} in {fine.folder}; expected "
            "four times the tokens and the same guidance."
        )
    half = [size // 2 for size in predictor.grid]
    grid = below.double().unflatten(2, half)
    copied = grid.repeat_interleave(2, 2).repeat_interleave(2, 3).flatten(2, 3)  # (B, A, N, D)
    lifted = torch.stack([copied[:, :, places] for places in predictor.places()], 2)
    rows = torch.cat([lifted.flatten(1, 2), above], 1).flatten(2)
    return rows @ rows.mT


def set_rows(
    predictor: Resampled, gram: Float[Tensor, "B M M"], strength: float, innovation: bool
) -> None:
    """Solve for all rows of a predictor, see `fit_resampled`."""
    pairs = predictor.weight.shape[2] * predictor.weight.shape[3]
    coarse, copies = list(range(pairs)), pairs - predictor.weight.shape[3]  # the newest's copy
    for t in range(predictor.num_steps):
        own = [pairs + anchor for anchor in predictor.anchors if anchor < t]
        if len(own) > 1:
            row = shrunk_row(gram, own, own[-1], pairs + t, strength)
        elif own and not innovation:
            row = shrunk_row(gram, [*coarse, *own], own[-1], pairs + t, strength)
        else:
            row = shrunk_row(gram, coarse, copies, pairs + t, strength)
        if len(own) == 1 and innovation:
            there = shrunk_row(gram, coarse, copies, own[0], strength)
            row = _corrected(gram, row, there, own[0], pairs + t, strength)
        predictor.weight[:, t] = row[:, :pairs].unflatten(1, predictor.weight.shape[2:])
        predictor.own[:, t] = row[:, pairs:]


def shrunk_row(
    gram: Float[Tensor, "B M M"], sources: list[int], prior: int, target: int, strength: float
) -> Float[Tensor, "B M"]:
    """Weights of some rows of a Gram for another, shrunk toward one of them."""
    place, own = sources.index(prior), gram[:, sources][:, :, sources]
    missing = gram[:, sources, target] - own[:, :, place]
    found = torch.zeros(gram.shape[:2], dtype=gram.dtype)
    found[:, sources] = ridge(own, missing[..., None], strength)[..., 0]
    found[:, prior] += 1
    return found


def _corrected(
    gram: Float[Tensor, "B M M"],
    row: Float[Tensor, "B M"],
    there: Float[Tensor, "B M"],
    anchor: int,
    target: int,
    strength: float,
) -> Float[Tensor, "B M"]:
    """C_t + rho (F_b - C_b), rho shrunk toward 1.

    Args:
        gram: see above.
        row: C_t over all sources.
        there: C_b.
        anchor: place of F_b among the sources.
        target: place of F_t.
        strength: of the ridge.
    """
    unit = torch.eye(gram.shape[-1], dtype=gram.dtype)
    difference, missing = unit[anchor] - there, unit[target] - row - unit[anchor] + there  # (B, M)
    along = gram @ difference[..., None]
    square = difference[:, None] @ along
    rho = 1 + ridge(square, missing[:, None] @ along, strength)[..., 0]
    return row + rho * difference
