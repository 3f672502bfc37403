"""Any fit by one call: method, tap and anchors are chosen where they are not given."""

import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities.seed import isolate_rng

from foreseer.checkpoints.budgets import check_free_of_others, write_budgets
from foreseer.checkpoints.folder import check_free
from foreseer.evaluation.measure import opened_for
from foreseer.evaluation.offline import FORECAST_TAPS
from foreseer.predictors.base import Predictor
from foreseer.training.choosing import Choice, choose, choose_method, recorded_pipeline
from foreseer.training.export import export_predictor, validation_errors
from foreseer.training.plumbing.progress import Progress, quiet
from foreseer.training.recipes import SEVERAL, Recipe
from foreseer.training.verdict_callbacks import CHECKPOINT_KEY
from foreseer.trajectories.recording import Recording, split

ANY_TAP = ("lstsq", "gram")  # methods that take the tap of least error
ERROR = "val/error_db"  # by which the kept epoch of a training is chosen


def fit_budgets(
    recordings: Sequence[str],
    evaluations: int | Sequence[int] | None,
    method: str | None,
    anchors: Sequence[int] | None,
    tap: str | None,
    pipeline: Any,
    out: str | None,
    *options: Any,
) -> Predictor | dict[int, Predictor]:
    """A fit, or one for each of several evaluations; see `fit_predictor`.

    Raises:
        ValueError: several evaluations are asked for and one list of anchors is given, or see
            `fit_predictor`.
    """
    if evaluations is None or isinstance(evaluations, int):
        given = recordings, evaluations, method, anchors, tap, pipeline, out
        return fit_predictor(*given, *options)
    budgets = sorted(set(evaluations))
    if anchors is not None or len(budgets) != len(evaluations) or not budgets:
        raise ValueError(
            f"evaluations are {list(evaluations)} and anchors {anchors}; expected different "
            "numbers and no anchors, which are searched for each."
        )
    if out is not None:
        check_free_of_others(out, budgets)
    found: dict[int, Predictor] = {}
    for budget in budgets:
        folder = None if out is None else f"{out}/{budget}"
        given = recordings, budget, method, None, tap, pipeline, folder
        found[budget] = fit_predictor(*given, *options)
    if out is not None:
        write_budgets(out, {budget: each.spec for budget, each in found.items()})
    return found


def fit_predictor(
    recordings: Sequence[str],
    evaluations: int | None,
    method: str | None,
    anchors: Sequence[int] | None,
    tap: str | None,
    pipeline: Any,
    out: str | None,
    validation_fraction: float,
    seed: int,
    options: Mapping[str, Any],
) -> Predictor:
    """One fit; `foreseer.fit_commands.fit` tells of the arguments.

    Raises:
        ValueError: an argument is wrong, or the recording lacks what the method needs.
        PredictorMismatch: the pipeline is not the recorded one.
    """
    if out is not None:
        check_free(out)  # before the fit, not after it
    recording = Recording(recordings[0])
    why = "as asked for"
    if method is None:
        method, why = choose_method(recording, pipeline is not None)
    recipe = Recipe(method, options)
    if recipe.runs_pipeline and "batch_size" in recipe.takes:
        recipe.options.setdefault("batch_size", recording.header.recipe.get("batch_size", 1))
    if len(recordings) > 1 and method != SEVERAL:
        raise ValueError(
            f"the method {method!r} is fitted on one recording, {len(recordings)} were given; join "
            f"them with `foreseer merge`, or fit {SEVERAL!r}."
        )
    given: dict[str, Any] = {"recording": recordings[0], "recordings": list(recordings)}
    if recipe.runs_pipeline:
        name = recorded_pipeline(recording, method) if pipeline is None else pipeline
        given["pipeline"] = opened_for(recording, name)
    fitted_on = split(recording.items, (1 - validation_fraction, validation_fraction), seed)[0]
    choice = chosen(recipe, recording, evaluations, anchors, tap, fitted_on)
    print(f"{method} ({why}): {choice}", flush=True)
    module = recipe.module(given | {"anchors": choice.anchors, "tap": choice.tap})
    data = recipe.datamodule(recordings, choice.tap, validation_fraction, seed)
    metrics = train(recipe, module, data, seed)
    if out is not None:
        print(f"wrote {export_predictor(module, out, metrics)}", flush=True)
    predictor: Predictor = module.deployed() if hasattr(module, "deployed") else module.predictor
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
