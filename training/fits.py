"""The steps of `foreseer.fit`: what it is not given is chosen, then a module is fitted."""

import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities.seed import isolate_rng

from foreseer.checkpoints.budgets import check_free_of_others, write_budgets
from foreseer.evaluation.offline import FORECAST_TAPS
from foreseer.predictors.base import Predictor
from foreseer.training.choosing import Choice, choose
from foreseer.training.export import export_predictor, validation_errors
from foreseer.training.plumbing.progress import Progress, quiet
from foreseer.training.recipes import Recipe
from foreseer.training.verdict_callbacks import CHECKPOINT_KEY
from foreseer.trajectories.recording import Recording

ANY_TAP = ("lstsq", "gram")  # methods that take the tap of least error
ERROR = "val/error_db"  # by which the kept epoch of a training is chosen


def fit_each(
    fit: Callable[..., Predictor],
    evaluations: Sequence[int],
    anchors: Sequence[int] | None,
    out: str | None,
) -> dict[int, Predictor]:
    """A fit for each of several evaluations, in one folder.

    Args:
        fit: makes one, given `evaluations` and `out`.
        evaluations: different numbers of network evaluations.
        anchors: as given; there may be none, since they are searched for each.
        out: folder of all; None writes nothing.

    Raises:
        ValueError: numbers repeat, there are none, or anchors are given.
    """
    budgets = sorted(set(evaluations))
    if anchors is not None or len(budgets) != len(evaluations) or not budgets:
        raise ValueError(
            f"evaluations are {list(evaluations)} and anchors {anchors}; expected different "
            "numbers and no anchors, which are searched for each."
        )
    if out is not None:
        check_free_of_others(out, budgets)
    found = {n: fit(evaluations=n, out=None if out is None else f"{out}/{n}") for n in budgets}
    if out is not None:
        write_budgets(out, {n: each.spec for n, each in found.items()})
    return found


def fitted(
    recipe: Recipe, module: Any, data: lightning.LightningDataModule, seed: int, out: str | None
) -> Predictor:
    """Fit a module and write what it came to; the predictor, with its spec.

    Args:
        recipe: of the method.
        module: made by it.
        data: made by it.
        seed: of what is drawn.
        out: folder of the predictor; None writes nothing.
    """
    metrics = train(recipe, module, data, seed)
    if out is not None:
        print(f"wrote {export_predictor(module, out, metrics)}", flush=True)
    predictor: Predictor = module.deployed()
    predictor.spec = dataclasses.replace(module.spec(), metrics=metrics)
    return predictor


def chosen(
    recipe: Recipe,
    recording: Recording,
    evaluations: int | None,
    anchors: Sequence[int] | None,
    tap: str | None,
    items: Sequence[int],
) -> Choice:
    """Tap and anchors of a method: those given, else by the trajectories it is fitted on.

    Raises:
        ValueError: the method does not forecast this tap, or see `choose`.
    """
    own, recorded = recipe.tap, [t for t in FORECAST_TAPS if t in recording.header.taps]
    if tap is not None and tap != own and "tap" not in recipe.takes:
        raise ValueError(f"the method {recipe.method!r} forecasts the tap {own!r}, not {tap!r}.")
    taps = [own] if tap is None else [tap]
    if tap is None and recipe.method in ANY_TAP:
        taps = recorded or taps
    elif tap is None and recipe.method == "closed_loop":
        taps = [own, "output"] if own in recorded else ["output"]
    return choose(recording, evaluations, anchors, taps, items)


def train(
    recipe: Recipe, module: Any, data: lightning.LightningDataModule, seed: int
) -> dict[str, float]:
    """Fit a module, quietly and leaving no files; of a training the best epoch is kept.

    Returns:
        The errors measured on the way, by name.
    """
    with quiet(), isolate_rng(), tempfile.TemporaryDirectory(prefix="foreseer_fit_") as folder:
        lightning.seed_everything(seed, verbose=False)
        best = ModelCheckpoint(folder, monitor=ERROR, enable_version_counter=False)
        callbacks: list[Callback] = [Progress(), *([best] if recipe.keeps_best else [])]
        trainer = lightning.Trainer(
            accelerator="cpu",
            devices=1,
            logger=False,
            enable_checkpointing=recipe.keeps_best,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=callbacks,
            **recipe.trainer_arguments(),
        )
        trainer.fit(module, datamodule=data)
        if recipe.keeps_best and best.best_model_path:
            kept = torch.load(Path(best.best_model_path), weights_only=True)
            module.load_state_dict(kept["state_dict"])
        return measured(trainer, module, recipe.method)


def measured(trainer: lightning.Trainer, module: Any, method: str) -> dict[str, float]:
    """What the fit and its verdict measured, as its checkpoint would say it."""
    told: dict[str, Any] = {}
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if not isinstance(callback, ModelCheckpoint):
            callback.on_save_checkpoint(trainer, module, told)
    errors = validation_errors(module.state_dict(), f"the {method} fit")
    return errors | told.get(CHECKPOINT_KEY, {})
