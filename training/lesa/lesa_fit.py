"""LESA in two phases: guided by recorded features, then in closed loop with the network.

Source: LESA, arXiv 2602.20497. As published, both phases minimise the mean absolute error of single
forecasts and differ in what the forecasts are made from (lesa_samples.py). The second phase may
instead minimise the error of the finished sample, which is ours (replayed_runs.py). Weights and
updates are float32 and the learning rate starts anew with the second phase; neither holds in the
release.
Shapes: B batch, S sampling steps.
"""

import math
import random
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn

from foreseer.evaluation.measure import References, item_of, log_error, opened_for
from foreseer.evaluation.page.figures import gates
from foreseer.integration.schedule import check_anchors
from foreseer.predictors.kan import with_pykan, without_pykan
from foreseer.predictors.lesa import LesaPredictor
from foreseer.predictors.lesa_values import LesaValues
from foreseer.training.disca.replayed_runs import final_latents
from foreseer.training.fit_figures import StepMeans, log_figures
from foreseer.training.lesa.lesa_samples import (
    Sample,
    collect,
    largest_values,
    mean_absolute_error,
    open_features,
    recorded_samples,
    sample_errors,
    stage_errors,
)
from foreseer.training.lesa.lesa_start import LesaFactory, rate_factor, untrained
from foreseer.training.plumbing.progress import watched
from foreseer.training.predictor_fit import Descent


class LesaModule(Descent):
    """Train a `LesaPredictor` for one anchor list; set `max_epochs` to the epochs of both phases.

    An epoch of the second phase runs the pipeline once per trajectory, forecasting with the weights
    it has at the start of the batch; nothing is differentiated through the network. The released
    code updates within the run instead. With the target `feature`, forecasts enter later windows
    without a gradient; with `sample`, a batch is one update on 10 log10 of the mean squared error
    of its final latents, which PSNR averages, through all forecasts of the run.

    Args:
        recording: folder of the recording, with features of the tap; must be that of the data
            module, whose `names` must hold `feature/<tap>` and `final` (and `tokens/<tap>` where
            only some tokens were recorded).
        pipeline: the pipeline, its folder or name, or `zoo:<name>`.
        anchors: steps at which the network runs, starting with 0.
        predictor: class and arguments of the predictor but `sigmas` and `num_branches`.
        tap: `hidden` or `output`.
        find_boundaries: put the stages' boundaries where the recording says (stages.py).
        open_loop_epochs: epochs of the first phase.
        closed_loop_epochs: epochs of the second phase.
        closed_loop_target: `feature`, the full run's feature at every step, as published; `sample`,
            the full run's final latents.
        tap_rate: first learning rate of the filters.
        gate_rate: first learning rate of the gates.
        decay: `cosine` to a hundredth over each phase, or `halving` every 500 updates.
        steps_per_update: forecast steps behind one update; 1 as published.
        shuffle_steps: take a batch's steps in random order; the published order is the sampler's,
            in which the shared filters follow the latest step.
        closed_loop_rate: rates of the second phase relative to the first.
        weight_decay: of AdamW.
        gradient_clip: largest norm of the gradient.
        pykan_seed: train pykan's layers from its initialisation with this seed; None trains ours.
        device: where to put a pipeline that is loaded; None takes this process's GPU, if any.
        dtype: dtype to load it in; None takes that of the recording.

    Raises:
        ValueError: the recording lacks features of the tap, or an argument is out of range.
    """

    fit_name = "lesa"

    def __init__(
        self,
        recording: str,
        pipeline: Any,
        anchors: Sequence[int],
        predictor: LesaFactory,
        tap: str = "hidden",
        find_boundaries: bool = False,
        open_loop_epochs: int = 1,
        closed_loop_epochs: int = 2,
        closed_loop_target: Literal["feature", "sample"] = "feature",
        tap_rate: float = 1e-3,
        gate_rate: float = 1e-4,
        decay: Literal["cosine", "halving"] = "cosine",
        steps_per_update: int = 1,
        shuffle_steps: bool = False,
        closed_loop_rate: float = 1.0,
        weight_decay: float = 1e-4,
        gradient_clip: float = 1.0,
        pykan_seed: int | None = None,
        device: str | None = None,
        dtype: str | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.recordings = [open_features(recording, tap)]
        header = self.recording.header
        self.anchors = check_anchors(anchors, header.num_steps)
        self.pipeline, self.place, self.tap = pipeline, (dtype, device), tap
        self.open_loop_epochs, self.closed_loop_epochs = open_loop_epochs, closed_loop_epochs
        self.closed_loop_target = closed_loop_target
        self.tap_rate, self.gate_rate, self.decay = tap_rate, gate_rate, decay
        self.steps_per_update, self.shuffle_steps = steps_per_update, shuffle_steps
        self.closed_loop_rate = closed_loop_rate
        self.weight_decay, self.gradient_clip = weight_decay, gradient_clip
        if min(open_loop_epochs, closed_loop_epochs) < 0 or steps_per_update < 1:
            raise ValueError(
                f"found {open_loop_epochs} and {closed_loop_epochs} epochs and steps_per_update "
                f"{steps_per_update}, expected none below 0 and at least 1."
            )
        plain = untrained(self.recording, predictor, tap, self.anchors, find_boundaries)
        told = self.told(type(plain), plain.arguments()) | {"pykan": pykan_seed is not None}
        self.save_hyperparameters(told)
        self.predictor = plain if pykan_seed is None else with_pykan(plain, pykan_seed)
        self.pipe: Any = None
        self.add_measures()
        self.closed_errors: list[Tensor] = []
        self.step_errors: dict[str, StepMeans] = {}

    def deployed(self) -> LesaPredictor:
        """The predictor without pykan, as it is exported."""
        return without_pykan(self.predictor) if self.hparams["pykan"] else self.predictor

    @property
    def closed_loop(self) -> bool:
        """Whether this epoch is of the second phase."""
        return self.current_epoch >= self.open_loop_epochs

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW, with a rate for the filters and one for the gates."""
        gates: list[nn.Parameter] = []
        filters: list[nn.Parameter] = []
        for name, parameter in self.predictor.named_parameters():
            (filters if name in ("weight", "offset") else gates).append(parameter)
        groups = [
            {"params": params, "lr": rate, "first_rate": rate}
            for params, rate in ((filters, self.tap_rate), (gates, self.gate_rate))
            if params
        ]
        return torch.optim.AdamW(groups, weight_decay=self.weight_decay)

    def on_fit_start(self) -> None:
        """Load the pipeline, and measure reuse on the validation split."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(self.predictor, LesaValues) and not int(self.num_trajectories):
            largest = largest_values(self.recording, self.tap, data.train_items)
            self.predictor.set_value_range(largest)
        self.num_trajectories.fill_(len(data.train_items))
        if self.pipe is None:
            self.pipe = opened_for(self.recording, self.pipeline, *self.place)
            self.pipe.set_progress_bar_config(disable=True)
        self.follow(self.pipe)
        if not math.isfinite(float(self.start_error)) and data.val_items:
            errors = []
            for batch in watched(data.val_dataloader(), "start"):
                errors.append(self.run(batch)[1])
            self.start_error.fill_(torch.cat(errors).mean())

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Update on every forecast step of a batch, a few at a time, or once on its samples."""
        batch = self.at_home(batch)
        if self.closed_loop and self.closed_loop_target == "sample":
            self.set_rates(batch_idx, 0, 1)
            error = self.sample_error(batch)
            self.update(error)
            self.log("train/closed_loop_db", error.detach(), prog_bar=True, batch_size=1)
            return
        if self.closed_loop:
            samples, _ = self.run(batch)
        else:
            samples = recorded_samples(batch[f"feature/{self.tap}"], self.anchors, self.predictor)
        groups = list(self.groups(samples, batch_idx))
        losses = []
        for index, group in enumerate(groups):
            self.set_rates(batch_idx, index, len(groups))
            loss = mean_absolute_error(self.predictor, group)
            self.update(loss)
            losses.append(loss.detach())
        phase = "closed_loop" if self.closed_loop else "open_loop"
        self.log(f"train/{phase}_l1", torch.stack(losses).mean(), prog_bar=True, batch_size=1)

    def update(self, loss: Float[Tensor, ""]) -> None:
        """One step of the optimiser."""
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        nn.utils.clip_grad_norm_(self.predictor.parameters(), self.gradient_clip)
        optimizer.step()

    def sample_error(self, batch: dict[str, Any]) -> Float[Tensor, ""]:
        """Mean error of a batch's final latents in dB, differentiable in the predictor."""
        items = [item_of(self.recording, int(item)) for item in batch["item"]]
        settings = References(self.recording, []).settings
        with self.predictor.shared_rows():
            latents = final_latents(
                self.pipe, self.predictor, self.tap, self.anchors, items, **settings
            )
        return log_error(latents, batch["final"]).mean()

    def groups(self, samples: Sequence[Sample], batch_idx: int) -> Iterator[Sequence[Sample]]:
        """The samples behind each update; their order depends on epoch and batch alone."""
        order = list(range(len(samples)))
        if self.shuffle_steps:
            random.Random(f"{self.current_epoch} {batch_idx}").shuffle(order)
        for start in range(0, len(order), self.steps_per_update):
            yield [samples[place] for place in order[start : start + self.steps_per_update]]

    def set_rates(self, batch_idx: int, index: int, num_updates: int) -> None:
        """Set the learning rates of an update, one of so many of its batch."""
        epochs = self.closed_loop_epochs if self.closed_loop else self.open_loop_epochs
        done = self.current_epoch - (self.open_loop_epochs if self.closed_loop else 0)
        num_batches = int(self.trainer.num_training_batches)
        batches = done * num_batches + batch_idx
        progress = (batches + index / num_updates) / (max(epochs, 1) * num_batches)
        factor = rate_factor(self.decay, progress, batches * num_updates + index)
        if self.closed_loop:
            factor *= self.closed_loop_rate
        optimizer: Any = self.optimizers()
        for group in optimizer.param_groups:
            group["lr"] = factor * group["first_rate"]
        self.log("train/tap_rate", optimizer.param_groups[0]["lr"], batch_size=1)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Held-out errors per stage, guided and in closed loop, and that of the final latents."""
        batch = self.at_home(batch)
        guided = recorded_samples(batch[f"feature/{self.tap}"], self.anchors, self.predictor)
        closed, errors = self.run(batch)
        for name, samples in (("guided", guided), ("closed_loop", closed)):
            found = sample_errors(self.predictor, samples)
            self.step_errors.setdefault(name, StepMeans()).add(found)
            for stage, error in stage_errors(self.predictor, found).items():
                self.log(f"val/{name}_error_stage_{stage}", error, batch_size=len(errors))
        self.closed_errors.append(errors)

    def on_validation_epoch_end(self) -> None:
        """Keep the closed-loop error; draw errors, weights, anchors and the gates."""
        error = torch.cat(self.closed_errors).mean()
        labels = {"guided": "from recorded features", "closed_loop": "in closed loop"}
        curves = {labels[name]: means.by_step() for name, means in self.step_errors.items()}
        self.closed_errors, self.step_errors = [], {}
        self.log("val/error_db", error, prog_bar=True)
        self.log("val/gain_over_reuse_db", self.start_error.to(error) - error)
        if self.trainer.sanity_checking:
            return
        self.val_error.fill_(error)
        log_figures(self, self.anchors, curves)
        if isinstance(self.logger, TensorBoardLogger):
            sigmas, boundaries = self.predictor.sigmas, self.predictor.boundaries
            with torch.no_grad():
                chart = gates(self.predictor.alpha(), sigmas, boundaries, self.anchors)
            self.logger.experiment.add_figure("gates", chart.figure(), self.current_epoch)

    def run(self, batch: dict[str, Any]) -> tuple[list[Sample], Float[Tensor, " B"]]:
        """Generate a batch while forecasting: the samples, and the error of its latents in dB."""
        items = [item_of(self.recording, int(item)) for item in batch["item"]]
        tokens = batch.get(f"tokens/{self.tap}")
        collector = collect(
            self.pipe,
            self.predictor,
            self.tap,
            self.anchors,
            items,
            None if tokens is None else tokens[0],
            **References(self.recording, []).settings,
        )
        assert collector.final is not None  # a run has steps
        errors = log_error(collector.final, batch["final"])
        return collector.samples(batch[f"feature/{self.tap}"]), errors
