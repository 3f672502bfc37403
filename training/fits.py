"""The steps of `foreseer.fit`: what it is not given is chosen, then a module is fitted."""

import dataclasses
import functools
import importlib
import inspect
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning
import torch
import yaml
from huggingface_hub import try_to_load_from_cache
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities.seed import isolate_rng

from foreseer.checkpoints.budgets import check_free_of_others, write_budgets
from foreseer.errors import meant
from foreseer.evaluation.offline import (
    FORECAST_TAPS,
    MAX_TRAJECTORIES,
    TapGrams,
    best_row,
    compared,
)
from foreseer.integration.pipelines.load import HUB_NAME, INDEX_FILE
from foreseer.integration.schedule import check_anchors
from foreseer.predictors.base import Predictor
from foreseer.training.export import export_predictor, validation_errors
from foreseer.training.plumbing.progress import Progress, quiet
from foreseer.training.verdict_callbacks import CHECKPOINT_KEY
from foreseer.trajectories.prompts import can_repeat
from foreseer.trajectories.recording import Recording

METHODS = {
    "readout": "readout",
    "lstsq": "l2p_lstsq",
    "closed_loop": "l2p",
    "adam": "l2p_adam",
    "gram": "l2p_gram",
    "continuous": "l2p_continuous",
    "bands": "l2p_bands",
    "groups": "l2p_groups",
    "lesa": "lesa",
    "disca": "disca",
}
"""The shipped configuration of every method, a file of `configs/fit`."""

SEVERAL = "continuous"  # the method that is fitted on several recordings
OF_DATA = {"batch_size"}  # options of the data module
OF_TRAINER = {"max_epochs"}
OWN = ("accelerator", "devices", "log_every_n_steps", "logger", "callbacks")  # not the recipe's
RECIPES = Path(__file__).parent.parent / "configs" / "fit"


class Recipe:
    """A method's module, data and trainer, with the arguments its configuration gives them.

    Args:
        method: a key of `METHODS`.
        options: arguments of the module by name, `batch_size` of the data, `max_epochs` of the
            trainer.

    Raises:
        ValueError: there is no such method or option.
    """

    def __init__(self, method: str, options: Mapping[str, Any]) -> None:
        if method not in METHODS:
            expected = f"{', '.join(METHODS)}{meant(method, METHODS)}"
            raise ValueError(f"no method {method!r}, expected one of {expected}")
        content = yaml.safe_load((RECIPES / f"{METHODS[method]}.yaml").read_text())
        self.method = method
        self.model: dict[str, Any] = content["model"]["init_args"]
        self.data: dict[str, Any] = content["data"]["init_args"]
        self.trainer: dict[str, Any] = content["trainer"]
        self.kind = class_of(content["model"]["class_path"])
        self.data_kind = class_of(content["data"]["class_path"])
        self.takes = inspect.signature(self.kind).parameters
        given = {"recording", "recordings", "anchors", "tap", "pipeline"}
        known = sorted((self.takes.keys() - given) | OF_DATA | OF_TRAINER)
        for name in options:
            if name not in known:
                raise ValueError(
                    f"the method {method!r} has no option {name!r}, expected one of "
                    f"{', '.join(known)}{meant(name, known)}"
                )
        self.options = dict(options)

    @property
    def tap(self) -> str:
        """The tap of the configuration."""
        return str(self.model.get("tap", getattr(self.kind, "tap", "output")))

    @property
    def runs_pipeline(self) -> bool:
        """Whether the fit runs the recorded pipeline."""
        return "pipeline" in self.takes

    @property
    def keeps_best(self) -> bool:
        """Whether the epoch of least held-out error is the one to keep."""
        return any("monitor" in each["init_args"] for each in self.trainer["callbacks"])

    def module(self, given: Mapping[str, Any]) -> Any:
        """The module.

        Args:
            given: recordings, anchors, tap and pipeline; what it does not take is left out.
        """
        return self.kind(**self._arguments(given))

    def _arguments(self, given: Mapping[str, Any]) -> dict[str, Any]:
        own = {name: _made(value) for name, value in self.model.items()}
        return own | {n: v for n, v in {**given, **self.options}.items() if n in self.takes}

    def datamodule(
        self, recordings: Sequence[str], tap: str, validation_fraction: float, seed: int
    ) -> lightning.LightningDataModule:
        """The data module on other recordings, another tap and another split."""
        own = dict(self.data)
        own |= {"folders": list(recordings)} if "folders" in own else {"folder": recordings[0]}
        own |= {"validation_fraction": validation_fraction, "seed": seed}
        if "tap" in own:
            own["tap"] = own["tap"].replace(self.tap, tap)  # that of parts is `<tap>/<parts>`
        if "names" in own:
            own["names"] = [name.replace(f"/{self.tap}", f"/{tap}") for name in own["names"]]
        takes = inspect.signature(self.data_kind).parameters
        own |= {n: v for n, v in self.options.items() if n in OF_DATA and n in takes}
        made: lightning.LightningDataModule = self.data_kind(**own)
        return made

    def trainer_arguments(self) -> dict[str, Any]:
        """Arguments of the trainer, whose epochs are those of all phases of the module."""
        given = {name: value for name, value in self.trainer.items() if name not in OWN}
        defaults = {name: parameter.default for name, parameter in self.takes.items()}
        own = {**defaults, **self.model, **self.options}
        phases = sum(own[name] for name in self.takes if name.endswith("_epochs"))
        return given | {"max_epochs": self.options.get("max_epochs", phases or given["max_epochs"])}


def class_of(path: str) -> Any:
    """The class at a dotted path of a shipped configuration."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def _made(value: Any) -> Any:
    """A value of a configuration; a class with some of its arguments is what makes the object."""
    if isinstance(value, dict) and "class_path" in value:
        return functools.partial(class_of(value["class_path"]), **value.get("init_args", {}))
    return value


class Choice(NamedTuple):
    """A tap and a list of anchors; `str(choice)` says where they are from."""

    tap: str
    anchors: list[int]
    num_steps: int
    told: str

    def __str__(self) -> str:
        """One line for a person."""
        listed = " ".join(map(str, self.anchors))
        return (
            f"{len(self.anchors)} of {self.num_steps} steps evaluated, tap {self.tap}, anchors "
            f"{listed} ({self.told})"
        )


def choose(
    recording: Recording,
    evaluations: int | None,
    anchors: Sequence[int] | None,
    taps: Sequence[str],
    items: Sequence[int],
    by_rows: bool = True,
) -> Choice:
    """The anchors given, or those that suit learned rows or a formula best by some items' Grams.

    The search is that of `foreseer inspect`: a beam search for every formula, the warped lists and
    the published one, all tried with least-squares rows (of a single trajectory, with formulas).

    Args:
        recording: where the Grams are.
        evaluations: network evaluations per trajectory; None where the anchors are given.
        anchors: steps at which the network runs; None searches.
        taps: the first one that is recorded is taken with anchors that are given; else the best.
        items: trajectories to search on.
        by_rows: whether least-squares rows choose among the lists; else the best formula does.

    Raises:
        ValueError: neither evaluations nor anchors are given, or they contradict each other or the
            recording.
    """
    header = recording.header
    num_steps, least = header.num_steps, len(header.expert_steps)
    recorded = [tap for tap in taps if tap in header.taps]
    if not recorded:
        raise ValueError(
            f"{recording.folder} has the taps {', '.join(header.taps)}, the fit needs "
            f"{' or '.join(taps)}; record it: --taps '[{taps[0]}]'."
        )
    if anchors is not None:
        if evaluations not in (None, len(anchors)):
            raise ValueError(
                f"evaluations is {evaluations}, and {len(anchors)} anchors are given; leave one "
                "of the two out."
            )
        return Choice(recorded[0], list(check_anchors(anchors, num_steps)), num_steps, "as given")
    if evaluations is None:
        raise ValueError(
            f"give the number of network evaluations in place of {num_steps}, as in evaluations=8, "
            "or the steps themselves: anchors=[0, ...]."
        )
    if not least <= evaluations < num_steps:
        raise ValueError(
            f"evaluations is {evaluations}, expected {least} to {num_steps - 1}: the runs of "
            f"{recording.folder} have {num_steps} steps."
        )
    some = list(items)[:: -(-len(items) // MAX_TRAJECTORIES)]
    grams = [
        TapGrams(tap, recording.stack(f"gram/{tap}", some), header.sigmas, header.expert_steps)
        for tap in recorded
    ]
    best = best_row(compared(grams, [evaluations]), learned=by_rows and grams[0].can_learn)
    told = f"searched on the Grams of {len(some)} trajectories"
    return Choice(best.tap, list(best.anchors), num_steps, told)


def choose_method(recording: Recording, has_pipeline: bool) -> tuple[str, str]:
    """The method of a fit that names none, and why.

    Args:
        recording: what it is fitted on.
        has_pipeline: whether a pipeline is given.
    """
    if has_pipeline:
        return "readout", "the default fit"
    reason = against_runs(recording)
    if reason is None:
        return "readout", f"on {recording.header.pipeline}, which the recording names"
    return "lstsq", f"not the default fit, a readout, since {reason}"


def against_runs(recording: Recording) -> str | None:
    """Why a fit cannot run the recorded pipeline by itself; None if it can."""
    header = recording.header
    if not header.states:
        return "the recording has no states"
    if not can_repeat(recording):
        return "the recording is of pictures or large tensors, of which it holds only a digest"
    if not header.pipeline:
        return "the recording does not name its pipeline and none is given"
    if not is_here(header.pipeline):
        return f"the recorded pipeline, {header.pipeline}, is not on this machine; give yours"
    return None


def is_here(name: str) -> bool:
    """Whether a pipeline can be loaded without a download."""
    if name.startswith("zoo:") or Path(name, INDEX_FILE).is_file():
        return True
    return bool(HUB_NAME.fullmatch(name)) and isinstance(
        try_to_load_from_cache(name, INDEX_FILE), str
    )


def recorded_pipeline(recording: Recording, method: str) -> str:
    """The name of the pipeline of a recording, for a method that runs it.

    Raises:
        ValueError: the recording does not name it, or it is not here.
    """
    reason = against_runs(recording)
    if reason is not None:
        raise ValueError(
            f"the method {method!r} runs the pipeline, and {reason}: pipeline=, or --pipeline. "
            "method='lstsq' needs no pipeline."
        )
    return recording.header.pipeline


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
    # rows fitted along a run start at a formula, and its list suits them better (LOG.md)
    return choose(recording, evaluations, anchors, taps, items, by_rows=recipe.method != "readout")


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
