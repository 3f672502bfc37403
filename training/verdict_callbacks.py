"""The callbacks that end every fit with its verdict; the fits bring them themselves.

A module names its own in `configure_callbacks`, so that no YAML and no Trainer has to.
"""

from collections.abc import Sequence
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger

from ..integration.schedule import uniform
from ..trajectories.gram_sums import GramBatches
from .measure import References, closed_loop_errors
from .rows import RULES, adams_bashforth_rows, formula_rows
from .verdict import Estimate, closed_loop_line, estimate, open_loop_line, row_table

BUDGETS = (11, 8, 6)  # at which a predictor for any anchors is judged, beside its own list
RIVALS = ("reuse", "taylor_1", "taylor_2")  # run, with ab2, for fits that choose among no formulas
CHECKPOINT_KEY = "verdict"
NO_HELD_OUT = (
    "verdict: none, no trajectory is held out; raise validation_fraction, change the seed of the "
    "data, or record more (seed 0 and fraction 0.25 hold out none of the first 12)."
)


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
            rows = row_table(module.predictor, anchors, header.sigmas)
            grams = (batch["gram"] for batch in batches)
            chunks = ((gram if parts else gram.unsqueeze(2), rows) for gram in grams)
            found.append(estimate(chunks, anchors, header.sigmas, header.expert_steps))
        return sorted(found, key=lambda each: -each.num_anchors)


class StartVerdict(Verdict):
    """The verdict of `L2PClosedLoop` against its start, which is the best of all formulas."""

    def line(self, trainer: lightning.Trainer, module: Any) -> str:
        """By the errors the fit has measured."""
        rivals = {module.start_name: float(module.start_error)}
        num_anchors = len(module.predictor.anchors)
        error = float(module.best_error)
        return closed_loop_line(num_anchors, error, rivals, len(held_out(trainer)))


class RivalsVerdict(Verdict):
    """The verdict of a training by descent, against formulas that are run once for it."""

    def __init__(self) -> None:
        self.rivals: dict[str, float] = {}

    def line(self, trainer: lightning.Trainer, module: Any) -> str:
        """By the error of the best epoch that a checkpoint was kept of, else of the newest."""
        errors = [float(module.val_error)]
        for kept in trainer.checkpoint_callbacks:
            if isinstance(kept, ModelCheckpoint) and kept.monitor == "val/error_db":
                errors += [] if kept.best_model_score is None else [float(kept.best_model_score)]
        rivals = self.measured(trainer, module)
        return closed_loop_line(len(module.anchors), min(errors), rivals, len(held_out(trainer)))

    def measured(self, trainer: lightning.Trainer, module: Any) -> dict[str, float]:
        """Error in dB of the final latents under each of `RIVALS` and Adams-Bashforth-2."""
        if not self.rivals:
            header, data = module.recording.header, trainer.datamodule  # type: ignore[attr-defined]
            references = References(module.recording, held_out(trainer), data.batch_size)
            anchors, sigmas = module.anchors, header.sigmas
            tables = {name: formula_rows(RULES[name], anchors, sigmas) for name in RIVALS}
            tables["ab2"] = adams_bashforth_rows(anchors, sigmas)
            for name, table in tables.items():
                errors = closed_loop_errors(
                    module.pipe,
                    table.repeat(header.num_branches, 1, 1),
                    anchors,
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
        """Keep the formulas' errors, for the card and for a resumed training."""
        if trainer.is_global_zero and held_out(trainer):
            errors = self.measured(trainer, pl_module)
            checkpoint[CHECKPOINT_KEY] = {f"val_error_db_{n}": e for n, e in errors.items()}

    def on_load_checkpoint(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        checkpoint: dict[str, Any],
    ) -> None:
        """Go on with them."""
        told = checkpoint.get(CHECKPOINT_KEY, {})
        self.rivals = {name.removeprefix("val_error_db_"): error for name, error in told.items()}


def held_out(trainer: lightning.Trainer) -> list[int]:
    """Held-out trajectories of the fit's data module, of its first recording."""
    data = trainer.datamodule  # type: ignore[attr-defined]
    return list(getattr(data, "parts", [data])[0].val_items)
