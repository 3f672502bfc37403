"""The fit of `L2PContinuous`: least squares over several recordings and many anchor lists.

Shapes: n trajectories, S sampling steps, K history length, M corrections.
"""

import random
from collections.abc import Iterator, Sequence
from typing import Any

import lightning
import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from foreseer.checkpoints.spec import PredictorSpec
from foreseer.integration.schedule import check_anchors
from foreseer.predictors import solve
from foreseer.predictors.continuous import L2PContinuous
from foreseer.predictors.ladder import with_end
from foreseer.training.gram_fit import ClosedGramFit, Sum
from foreseer.training.recorded import open_recording, spec_of
from foreseer.training.shipped import EXPERTS, STEPS, differences
from foreseer.trajectories.datamodule import GramDataModule
from foreseer.trajectories.gram import relative_errors

FEWEST, MOST = 5, 12  # anchors of the lists fitted on
VALIDATION_LISTS = 4

Equations = dict[int, tuple[Tensor, Tensor]]
"""Normal matrix (branches, M, M) and right side (branches, M), by the number of differences."""


class L2PContinuousModule(ClosedGramFit):
    """Fit the corrections on all recordings together, in closed form (set `max_epochs: 1`).

    Args:
        recordings: folders, one per grid; must be those of the data module.
        anchors: the list the predictor takes when a run gives none, for the first recording's grid.
        tap: recorded tap to forecast: `output` or `hidden`.
        order: highest difference used.
        degree: of the basis.
        ridge: shrinkage toward the analytic start, relative to each column's squared norm.
        num_lists: anchor lists drawn per recording.
        min_steps: fewest steps of a run to serve; None takes the shortest recorded one.
        max_steps: most steps of a run to serve; None takes the longest recorded one.
        sigma_margin: how far off the recorded grids a run's sigmas may be.
        seed: of the anchor lists.

    Raises:
        ValueError: a recording lacks the tap or differs in host or guidance, or the anchors do not
            fit the first one.
    """

    fit_name = "continuous"
    errors_label = "held out, drawn anchors"

    def __init__(
        self,
        recordings: Sequence[str],
        anchors: Sequence[int],
        tap: str = "output",
        order: int = 1,
        degree: int = 1,
        ridge: float = 1e-3,
        num_lists: int = 100,
        min_steps: int | None = None,
        max_steps: int | None = None,
        sigma_margin: float = 0.01,
        seed: int = 0,
    ) -> None:
        opened = [open_recording(folder, tap) for folder in recordings]
        first, *_ = headers = [recording.header for recording in opened]
        for header in headers:
            check_alike(spec_of(first, tap, anchors, 0), spec_of(header, tap, anchors, 0))
        grids = [header.sigmas for header in headers]
        lengths = [len(grid) for grid in grids]
        predictor = L2PContinuous(
            grids,
            first.num_branches,
            order,
            degree,
            min(lengths) if min_steps is None else min_steps,
            max(lengths) if max_steps is None else max_steps,
            sigma_margin,
        )
        super().__init__(opened, check_anchors(anchors, lengths[0]), tap, predictor)
        self.ridge = ridge
        self.num_lists = num_lists
        self.seed = seed

    def solve(self, sums: Sequence[Sum]) -> None:
        """Solve for the corrections."""
        means = [total[:, 0] / count for total, count in sums]
        fit_continuous(self.predictor, means, self.num_lists, self.ridge, self.seed)

    def open_loop_errors(
        self, grams: Float[Tensor, "n branches *parts S S"], place: int = 0
    ) -> Float[Tensor, "n branches S"]:
        """Relative error of every step, averaged over a few drawn anchor lists.

        Args:
            grams: of trajectories of one recording.
            place: which recording.
        """
        sigmas = self.recordings[place].header.sigmas
        errors = []
        for anchors in anchor_lists(len(sigmas), VALIDATION_LISTS, self.seed + 1):
            rows = self.predictor.rows(anchors, sigmas)
            errors.append(relative_errors(self.with_parts(grams), rows))
        return torch.stack(errors).mean(0)


class HeldOutOfSeveral(IterableDataset[dict[str, Any]]):
    """Batches of each recording in turn: `gram` (n, branches, S, S) and `recording`, its place.

    Args:
        parts: the recordings, set up.
    """

    def __init__(self, parts: Sequence[GramDataModule]) -> None:
        self.parts = parts

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The batches."""
        for place, part in enumerate(self.parts):
            for batch in part.val_grams:
                yield {"gram": batch["gram"], "recording": place}


class SeveralGrams(lightning.LightningDataModule):
    """The Grams of one tap of several recordings: their sums, and those held out.

    Args:
        folders: recording folders.
        tap: recorded tap.
        validation_fraction: share of trajectories held out of each, in [0, 1).
        seed: seed of the splits.
    """

    def __init__(
        self,
        folders: Sequence[str],
        tap: str = "output",
        validation_fraction: float = 0.25,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.folders = list(folders)
        self.parts = [GramDataModule(f, tap, validation_fraction, seed) for f in folders]

    def setup(self, stage: str | None = None) -> None:
        """Split and sum each recording, see `GramDataModule.setup`."""
        for part in self.parts:
            part.setup(stage)

    def train_dataloader(self) -> DataLoader:
        """One batch: `grams`, a list of sums (1, branches, S, S), and `counts`, of how many."""
        sums = [part.train[0] for part in self.parts]
        batch = {"grams": [s["gram"] for s in sums], "counts": [s["count"] for s in sums]}
        return DataLoader([batch], batch_size=None)  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        """Batches of held-out trajectories of one recording each, if every one has some."""
        if not all(part.val_items for part in self.parts):
            return []
        return DataLoader(HeldOutOfSeveral(self.parts), batch_size=None)


def fit_continuous(
    predictor: L2PContinuous,
    mean_grams: Sequence[Tensor],
    num_lists: int,
    ridge: float,
    seed: int,
) -> None:
    """Set the corrections that minimise sum_t h_t^2 ||F_t - F_hat_t||^2 over all grids and lists.

    h_t is the step's length in sigma, times the root of the number of steps so that every grid
    counts alike: an error matters as much as it moves the sample.

    Args:
        predictor: its `grids` are those of the Grams.
        mean_grams: one mean Gram per grid, (branches, S, S).
        num_lists: anchor lists drawn per grid.
        ridge: shrinkage toward the analytic start, relative to each column's squared norm, >= 0.
        seed: of the anchor lists.
    """
    equations: Equations = {}
    for gram, sigmas in zip(mean_grams, predictor.grids, strict=True):
        for anchors in anchor_lists(len(sigmas), num_lists, seed):
            add_equations(equations, predictor, gram, sigmas, anchors)
    for order, (normal, right) in equations.items():
        found = solve.ridge(normal, right[..., None], ridge)
        predictor.set_correction(order, found[..., 0])


def add_equations(
    equations: Equations,
    predictor: L2PContinuous,
    gram: Float[Tensor, "branches S S"],
    sigmas: Sequence[float],
    anchors: Sequence[int],
) -> None:
    """Add the normal equations of every forecast step on one anchor list."""
    ends = with_end(sigmas)[1:]
    for t, sigma in enumerate(sigmas):
        known = [a for a in anchors if a < t][-(predictor.order + 1) :]
        if t in anchors or len(known) < 2:
            continue
        start, columns = predictor.design([sigmas[a] for a in known], sigma)
        weight = len(sigmas) * (sigma - ends[t]) ** 2
        inner = gram[:, known][:, :, known]
        normal = weight * (columns @ inner @ columns.mT)
        right = weight * ((gram[:, known, t] - inner @ start) @ columns.mT)
        before = equations.get(len(known) - 1, (0.0, 0.0))
        equations[len(known) - 1] = (before[0] + normal, before[1] + right)


def anchor_lists(num_steps: int, num_lists: int, seed: int) -> list[list[int]]:
    """Schedules to fit on: two of three warped with some jitter, the others drawn freely.

    Args:
        num_steps: steps of the run.
        num_lists: how many.
        seed: the same seed draws the same lists.
    """
    draw = random.Random(seed)
    lists = []
    most = max(2, min(MOST, num_steps // 2))
    for index in range(num_lists):
        count = draw.randint(min(FEWEST, most), most)
        if index % 3 == 2:
            steps = draw.sample(range(1, num_steps), count - 1)
        else:
            gamma = draw.uniform(0.9, 1.7)
            exact = [num_steps * (i / count) ** gamma for i in range(1, count)]
            steps = [round(step) + draw.choice((-1, 0, 0, 1)) for step in exact]
        lists.append(sorted({0, *(min(max(step, 0), num_steps - 1) for step in steps)}))
    return lists


def check_alike(first: PredictorSpec, other: PredictorSpec) -> None:
    """Raise unless two recordings differ in nothing but their grid.

    Raises:
        ValueError: names what differs.
    """
    for name, (here, there) in differences(first, other, STEPS, EXPERTS).items():
        raise ValueError(
            f"the recordings differ in {name}: {here} and {there}, expected only other steps "
            "or shifts; record them with the same model and guidance."
        )
