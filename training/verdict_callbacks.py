"""The callbacks that end every fit with its verdict; the fits bring them themselves.

A module names its own in `configure_callbacks`, so that no YAML and no Trainer has to.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import lightning
import torch
from jaxtyping import Float
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from foreseer.evaluation.measure import References, closed_loop_errors, predictor_errors
from foreseer.evaluation.metrics import Paired, paired
from foreseer.evaluation.offline import MAX_TRAJECTORIES
from foreseer.evaluation.pairing import recorded_prompts
from foreseer.evaluation.verdict import (
    Estimate,
    Rival,
    closed_loop_line,
    estimate,
    kept,
    open_loop_line,
    rivals_on,
)
from foreseer.integration.schedule import uniform
from foreseer.trajectories.gram import GramBatches, sum_grams

BUDGETS = (11, 8, 6)  # at which a predictor for any anchors is judged, beside its own list
CHECKPOINT_KEY = "verdict"
SAMPLES_KEY = "verdict_samples"  # what pairing needs of every trajectory
NUM_RUN = 3  # formulas that are run, beside Adams-Bashforth-2
MAX_JUDGED = 32  # held-out trajectories that they, and the fit, are run on
ERROR = "test_error_db"  # what checkpoints and cards call the error that a verdict is by
NO_HELD_OUT = "verdict: none, no trajectory is held out; raise validation_fraction."


class Verdict(Callback):
    """Say what came of a fit when it ends: on the console, and in TensorBoard as text.

    Every fit brings its own (`configure_callbacks`).
    """

    def on_fit_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Say it, from one process."""
        if not trainer.is_global_zero:
            return
        line = self.line(trainer, pl_module) if held_out(trainer) else NO_HELD_OUT
        print(line)
        if isinstance(pl_module.logger, TensorBoardLogger):
            pl_module.logger.experiment.add_text("verdict", line, trainer.global_step)

    def line(self, trainer: lightning.Trainer, module: Any) -> str:
        """The verdict, where some trajectories are held out."""
        raise NotImplementedError


class OpenLoopVerdict(Verdict):
    """The verdict of a fit on Grams; its checkpoints keep the numbers, for the card."""

    def __init__(self) -> None:
        self.rivals: dict[int, list[Rival]] = {}  # by network evaluations: searched once

    def line(self, trainer: lightning.Trainer, module: Any) -> str:
        """On the fit's own list and, where the predictor takes any, on uniform ones too."""
        return open_loop_line(self.estimates(trainer, module))

    def on_save_checkpoint(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        checkpoint: dict[str, Any],
    ) -> None:
        """Keep the estimate of the rows that the checkpoint holds."""
        if trainer.is_global_zero and held_out(trainer):
            own = self.estimates(trainer, pl_module, budgets=())[0]
            checkpoint[CHECKPOINT_KEY] = own.metrics()

    def estimates(
        self, trainer: lightning.Trainer, module: Any, budgets: Sequence[int] = BUDGETS
    ) -> list[Estimate]:
        """One per list of anchors, on the held-out trajectories of the fit's first recording."""
        header, spec = module.recording.header, module.spec()
        num_steps = len(header.sigmas)
        lists = [spec.anchors]
        if module.predictor.any_anchors:
            others = [n for n in budgets if n != len(spec.anchors) and n < num_steps]
            lists += [tuple(uniform(n, num_steps)) for n in others]
        parts = module.hparams.get("partition")
        name = f"gram/{spec.tap}/{parts}" if parts else f"gram/{spec.tap}"
        held = held_out(trainer)
        batches, prompts = GramBatches(module.recording, name, held), prompts_in(module, held)
        found = []
        for anchors in lists:
            rows = module.predictor.rows(anchors, header.sigmas)
            grams = (batch["gram"] for batch in batches)
            chunks = ((gram if parts else gram.unsqueeze(2), rows) for gram in grams)
            if len(anchors) not in self.rivals:
                self.rivals[len(anchors)] = searched_rivals(trainer, module, name, anchors)
            rivals = self.rivals[len(anchors)]
            found.append(estimate(chunks, rivals, len(anchors), header.sigmas, prompts))
        return sorted(found, key=lambda each: -each.num_anchors)


class Ran(NamedTuple):
    """A formula that was run: its list of anchors, and the error in dB of every sample."""

    anchors: list[int]
    errors: Float[Tensor, " n"]


class RivalsVerdict(Verdict):
    """The verdict of a fit that runs the network, against formulas that are run once for it.

    They are the best by Grams and Adams-Bashforth-2, each on its own list of anchors. All are
    measured on trajectories that nothing was chosen on; checkpoints keep the numbers.
    """

    def __init__(self) -> None:
        self.rivals: dict[str, Ran] = {}

    def line(self, trainer: lightning.Trainer, module: Any) -> str:
        """By the errors of the best epoch that a checkpoint was kept of, else of the newest."""
        errors = self.kept_errors(trainer)
        if errors is None:
            errors = self.errors(trainer, module)
        best, gap = self.against(trainer, module, errors)
        return closed_loop_line(len(anchors_of(module)), gap, best, self.rivals[best].anchors)

    def against(
        self, trainer: lightning.Trainer, module: Any, errors: Float[Tensor, " n"]
    ) -> tuple[str, Paired]:
        """The best rival, and what the fit is ahead of it by."""
        rivals = self.measured(trainer, module)
        best = min(rivals, key=lambda name: float(rivals[name].errors.mean()))
        prompts = prompts_in(module, judged(trainer))
        return best, paired(-errors, -rivals[best].errors, prompts)

    def kept_errors(self, trainer: lightning.Trainer) -> Float[Tensor, " n"] | None:
        """What the checkpoint of the best epoch says, where one is kept."""
        for kept_by in trainer.checkpoint_callbacks:
            if isinstance(kept_by, ModelCheckpoint) and kept_by.monitor == "val/error_db":
                if path := kept_by.best_model_path:
                    told = torch.load(path, map_location="cpu", weights_only=True)
                    if SAMPLES_KEY in told:
                        return torch.tensor(told[SAMPLES_KEY]["own"], dtype=torch.float64)
        return None

    def errors(self, trainer: lightning.Trainer, module: Any) -> Float[Tensor, " n"]:
        """Errors in dB of the final latents under the module's predictor as it is now."""
        references = References(module.recording, judged(trainer), batch_of(trainer, module))
        return predictor_errors(
            module.pipe,
            module.deployed(),
            module.tap,
            anchors_of(module),
            references.batches,
            references.finals,
            module.token_groups,
            **references.settings,
        )

    def measured(self, trainer: lightning.Trainer, module: Any) -> dict[str, Ran]:
        """Errors in dB of the final latents under each formula that is run."""
        if not self.rivals:
            header, name = module.recording.header, f"gram/{module.tap}"
            references = References(module.recording, judged(trainer), batch_of(trainer, module))
            for rival in to_run(searched_rivals(trainer, module, name, anchors_of(module))):
                errors = closed_loop_errors(
                    module.pipe,
                    rival.table.repeat(header.num_branches, 1, 1),
                    rival.anchors,
                    module.tap,
                    references.batches,
                    references.finals,
                    **references.settings,
                )
                if bool(errors.isfinite().all()):
                    self.rivals[rival.name] = Ran(list(rival.anchors), errors)
        return self.rivals

    def on_save_checkpoint(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        checkpoint: dict[str, Any],
    ) -> None:
        """Keep the errors, for the card and for a resumed training."""
        if trainer.is_global_zero and held_out(trainer):
            errors = self.errors(trainer, pl_module)
            _, gap = self.against(trainer, pl_module, errors)
            told = {
                f"{ERROR}_{name}": float(ran.errors.mean()) for name, ran in self.rivals.items()
            }
            checkpoint[CHECKPOINT_KEY] = {ERROR: float(errors.mean())} | told | kept(gap)
            rivals = {
                n: {"anchors": r.anchors, "errors": r.errors.tolist()}
                for n, r in self.rivals.items()
            }
            checkpoint[SAMPLES_KEY] = {"own": errors.tolist(), "rivals": rivals}

    def on_load_checkpoint(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        checkpoint: dict[str, Any],
    ) -> None:
        """Go on with the formulas' errors; a checkpoint of an older version has none."""
        told = checkpoint.get(SAMPLES_KEY, {}).get("rivals", {})
        self.rivals = {
            name: Ran(ran["anchors"], torch.tensor(ran["errors"])) for name, ran in told.items()
        }


class BestRowsVerdict(RivalsVerdict):
    """The verdict of `L2PClosedLoop`, whose best rows are run once as long as they are the best."""

    def __init__(self) -> None:
        super().__init__()
        self.known: tuple[float, Tensor] = (math.nan, torch.empty(0))

    def errors(self, trainer: lightning.Trainer, module: Any) -> Float[Tensor, " n"]:
        """Errors of the best rows."""
        best = float(module.best_error)
        if self.known[0] != best:
            self.known = (best, super().errors(trainer, module))
        return self.known[1]


def searched_rivals(
    trainer: lightning.Trainer, module: Any, name: str, anchors: Sequence[int]
) -> list[Rival]:
    """Every formula on its own list, found on Grams that the fit was fitted on, the best first.

    Args:
        trainer: of the fit.
        module: the fit.
        name: of the Grams, of the whole feature or of its parts.
        anchors: of the fit, which are tried too.
    """
    header, data = module.recording.header, trainer.datamodule  # type: ignore[attr-defined]
    items = list(getattr(data, "parts", [data])[0].train_items)[:MAX_TRAJECTORIES]
    mean = sum_grams(module.recording, [name], items)[name] / len(items)
    whole = mean.sum(1) if mean.ndim == 4 else mean
    return rivals_on(whole, len(anchors), header.sigmas, header.expert_steps, [anchors])


def to_run(rivals: Sequence[Rival]) -> list[Rival]:
    """The best `NUM_RUN` of different weights, and Adams-Bashforth-2 where it is not among them."""
    unique: dict[bytes, Rival] = {}
    for rival in rivals:
        unique.setdefault(rival.table.double().round(decimals=12).numpy().tobytes(), rival)
    best = list(unique.values())[:NUM_RUN]
    names = [rival.name for rival in best]
    return best + [rival for rival in rivals if rival.name == "ab2" and "ab2" not in names]


def prompts_in(module: Any, items: Sequence[int]) -> list[int]:
    """A number of the prompt of every trajectory of a fit's recording."""
    return recorded_prompts([(module.recording, item) for item in items])


def anchors_of(module: Any) -> Sequence[int]:
    """Steps at which the network runs for a fit."""
    return module.anchors


def batch_of(trainer: lightning.Trainer, module: Any) -> int:
    """Trajectories per pipeline call of a fit."""
    data = trainer.datamodule  # type: ignore[attr-defined]
    return int(getattr(module, "batch_size", data.batch_size))


def judged(trainer: lightning.Trainer) -> list[int]:
    """Held-out trajectories that the network is run on for a verdict."""
    return held_out(trainer)[:MAX_JUDGED]


def held_out(trainer: lightning.Trainer) -> list[int]:
    """Trajectories that a fit is judged on, of its data module's first recording.

    Nothing is fitted on them, and nothing chosen: where a training chooses its best epoch or step
    on some, those are others.
    """
    data = trainer.datamodule  # type: ignore[attr-defined]
    first = getattr(data, "parts", [data])[0]
    return list(getattr(first, "test_items", first.val_items))
