"""The callbacks that end every fit with its verdict; the fits bring them themselves.

A module names its own in `configure_callbacks`, so that no YAML and no Trainer has to.
"""

import math
from collections.abc import Sequence
from typing import Any

import lightning
import torch
from jaxtyping import Float
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from foreseer.evaluation.measure import References, closed_loop_errors, predictor_errors
from foreseer.evaluation.rows import adams_bashforth_rows, analytic_rows
from foreseer.evaluation.verdict import Estimate, closed_loop_line, estimate, open_loop_line
from foreseer.integration.schedule import uniform
from foreseer.predictors.rules import RULES, RUN
from foreseer.trajectories.gram import GramBatches

BUDGETS = (11, 8, 6)  # at which a predictor for any anchors is judged, beside its own list
CHECKPOINT_KEY = "verdict"
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
        batches = GramBatches(module.recording, name, held_out(trainer))
        found = []
        for anchors in lists:
            rows = module.predictor.rows(anchors, header.sigmas)
            grams = (batch["gram"] for batch in batches)
            chunks = ((gram if parts else gram.unsqueeze(2), rows) for gram in grams)
            found.append(estimate(chunks, anchors, header.sigmas, header.expert_steps))
        return sorted(found, key=lambda each: -each.num_anchors)


class RivalsVerdict(Verdict):
    """The verdict of a fit that runs the network, against formulas that are run once for it.

    All are measured on the trajectories that nothing was chosen on; checkpoints keep the numbers.
    """

    def __init__(self) -> None:
        self.rivals: dict[str, float] = {}

    def line(self, trainer: lightning.Trainer, module: Any) -> str:
        """By the error of the best epoch that a checkpoint was kept of, else of the newest."""
        error = self.kept_error(trainer)
        if error is None:
            error = self.error(trainer, module)
        rivals = self.measured(trainer, module)
        return closed_loop_line(len(anchors_of(module)), error, rivals, len(held_out(trainer)))

    def kept_error(self, trainer: lightning.Trainer) -> float | None:
        """What the checkpoint of the best epoch says, where one is kept."""
        for kept in trainer.checkpoint_callbacks:
            if isinstance(kept, ModelCheckpoint) and kept.monitor == "val/error_db":
                if path := kept.best_model_path:
                    told = torch.load(path, map_location="cpu", weights_only=True)
                    return told.get(CHECKPOINT_KEY, {}).get(ERROR)
        return None

    def error(self, trainer: lightning.Trainer, module: Any) -> float:
        """Error in dB of the final latents under the module's predictor as it is now."""
        predictor = module.deployed()
        references = References(module.recording, held_out(trainer), batch_of(trainer, module))
        errors = predictor_errors(
            module.pipe,
            predictor,
            module.tap,
            anchors_of(module),
            references.batches,
            references.finals,
            **references.settings,
        )
        return float(errors.mean())

    def tables(self, module: Any) -> dict[str, Float[Tensor, "S S"]]:
        """The rows of the formulas: each of `RUN`, and Adams-Bashforth-2."""
        anchors, sigmas = anchors_of(module), module.recording.header.sigmas
        tables = {name: RULES[name].rows(anchors, sigmas)[0, 0] for name in RUN}
        return tables | {"ab2": adams_bashforth_rows(anchors, sigmas)}

    def measured(self, trainer: lightning.Trainer, module: Any) -> dict[str, float]:
        """Error in dB of the final latents under each formula."""
        if not self.rivals:
            header = module.recording.header
            references = References(module.recording, held_out(trainer), batch_of(trainer, module))
            for name, table in self.tables(module).items():
                errors = closed_loop_errors(
                    module.pipe,
                    table.repeat(header.num_branches, 1, 1),
                    anchors_of(module),
                    module.tap,
                    references.batches,
                    references.finals,
                    **references.settings,
                )
                self.rivals[name] = float(errors.mean())
        return self.rivals

    def on_save_checkpoint(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        checkpoint: dict[str, Any],
    ) -> None:
        """Keep the errors, for the card and for a resumed training."""
        if trainer.is_global_zero and held_out(trainer):
            errors = self.measured(trainer, pl_module)
            told = {f"{ERROR}_{name}": error for name, error in errors.items()}
            checkpoint[CHECKPOINT_KEY] = {ERROR: self.error(trainer, pl_module)} | told

    def on_load_checkpoint(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        checkpoint: dict[str, Any],
    ) -> None:
        """Go on with the formulas' errors."""
        told, prefix = checkpoint.get(CHECKPOINT_KEY, {}), f"{ERROR}_"
        self.rivals = {
            name.removeprefix(prefix): error
            for name, error in told.items()
            if name.startswith(prefix)
        }


class StartVerdict(RivalsVerdict):
    """The verdict of `L2PClosedLoop` against its start, the best formula where it was chosen."""

    def __init__(self) -> None:
        super().__init__()
        self.known = (math.nan, math.nan)  # a best error on the validation split, and its own here

    def tables(self, module: Any) -> dict[str, Float[Tensor, "S S"]]:
        """The rows of the start."""
        formulas = analytic_rows(anchors_of(module), module.recording.header.sigmas)
        return {module.start_name: formulas[module.start_name]}

    def error(self, trainer: lightning.Trainer, module: Any) -> float:
        """Error of the best rows, run once as long as they are the best."""
        best = float(module.best_error)
        if self.known[0] != best:
            self.known = (best, super().error(trainer, module))
        return self.known[1]


def anchors_of(module: Any) -> Sequence[int]:
    """Steps at which the network runs for a fit."""
    return module.anchors


def batch_of(trainer: lightning.Trainer, module: Any) -> int:
    """Trajectories per pipeline call of a fit."""
    data = trainer.datamodule  # type: ignore[attr-defined]
    return int(getattr(module, "batch_size", data.batch_size))


def held_out(trainer: lightning.Trainer) -> list[int]:
    """Trajectories that a fit is judged on, of its data module's first recording.

    Nothing is fitted on them, and nothing chosen: where a training chooses its best epoch or step
    on some, those are others.
    """
    data = trainer.datamodule  # type: ignore[attr-defined]
    first = getattr(data, "parts", [data])[0]
    return list(getattr(first, "test_items", first.val_items))
