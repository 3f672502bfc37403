"""DisCa: a neural predictor in three phases: on recorded features, against a discriminator, closed.

Source: DisCa, arXiv 2602.05449, whose training code is not public: mean squared error of the
velocity, then the same with a hinge GAN. The third phase, on the finished sample, is ours.
Shapes: B batch, S sampling steps.
"""

import math
import random
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from foreseer.checkpoints.format import load_predictor
from foreseer.evaluation.measure import References, generate, item_of, log_error, opened_for
from foreseer.integration.host.trunk import modulation_width
from foreseer.integration.schedule import check_anchors
from foreseer.predictors.corrected_rows import CorrectedRows
from foreseer.predictors.linear import L2P
from foreseer.predictors.neural import DiscaPredictor
from foreseer.training.disca.gan import Adversary
from foreseer.training.disca.replayed_runs import (
    Forced,
    draw_anchors,
    final_latents,
    longest_gap,
    replayed,
    velocity_error,
)
from foreseer.training.fit_figures import StepMeans, log_figures
from foreseer.training.lesa.lesa_samples import open_features
from foreseer.training.lesa.lesa_start import rate_factor
from foreseer.training.plumbing.progress import watched
from foreseer.training.predictor_fit import Descent
from foreseer.training.recorded import spec_of

PHASES = ("mse", "gan", "closed")


class DiscaModule(Descent):
    """Train a `DiscaPredictor` on recorded runs of a frozen pipeline, student or not.

    Anchors of the first two phases are drawn anew for every batch, with gaps in sigma up to
    `max_gap`, so the predictor serves any such list; the third phase and the validation use
    `anchors`. With `rows` it is a `CorrectedRows`, and all phases use `anchors`, whose rows they
    are. Set `max_epochs` to the epochs of all phases.

    Args:
        recording: folder of the recording, with all features of `hidden` and `output`.
        pipeline: the recorded pipeline, a folder or `zoo:<name>`.
        anchors: steps at which the network runs when deployed, starting with 0.
        width_mult: width of the predictor over the host's.
        num_heads: attention heads of a block.
        depth: blocks.
        residual: start at a formula instead of from nothing.
        order: that formula: 0 for reuse, 1 for linear extrapolation.
        max_gap: longest distance in sigma to the newest anchor; where `anchors` leave a longer
            one, that.
        rows: an exported `L2P` on `hidden` for these anchors, a folder or `zoo:<name>`: the network
            learns what it leaves. None for a formula.
        mse_epochs: epochs of the first phase.
        gan_epochs: epochs of the second phase.
        closed_epochs: epochs of the third phase.
        learning_rate: AdamW's first rate; every phase decays it by a cosine to a hundredth.
        gan_rate: the same in the second phase.
        closed_rate: the same in the third phase.
        discriminator_rate: Adam's rate for the discriminator.
        adversarial_weight: lambda.
        gradient_clip: largest norm of the gradient.
        device: where to put a pipeline that is loaded; None takes this process's GPU, if any.
        dtype: dtype to load it in; None takes that of the recording.

    Raises:
        ValueError: the recording lacks features, or an argument is out of range.
    """

    fit_name = "disca"
    tap = "hidden"

    def __init__(
        self,
        recording: str,
        pipeline: Any,
        anchors: Sequence[int],
        width_mult: float = 1.0,
        num_heads: int = 3,
        depth: int = 2,
        residual: bool = True,
        order: int = 0,
        max_gap: float = 0.2,
        rows: str | None = None,
        mse_epochs: int = 8,
        gan_epochs: int = 0,
        closed_epochs: int = 0,
        learning_rate: float = 5e-4,
        gan_rate: float = 1e-4,
        closed_rate: float = 1e-4,
        discriminator_rate: float = 1e-2,
        adversarial_weight: float = 1.0,
        gradient_clip: float = 1.0,
        device: str | None = None,
        dtype: str | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.recordings = [open_features(recording, self.tap)]
        header = self.recording.header
        self.anchors = check_anchors(anchors, header.num_steps)
        self.pipe = opened_for(self.recording, pipeline, dtype, device)
        self.pipe.transformer.eval().requires_grad_(False)
        if hasattr(self.pipe, "conditioner"):
            self.pipe.conditioner.eval().requires_grad_(False)
        self.epochs = {"mse": mse_epochs, "gan": gan_epochs, "closed": closed_epochs}
        self.rates = {"mse": learning_rate, "gan": gan_rate, "closed": closed_rate}
        self.max_gap = max(max_gap, longest_gap(header.sigmas, self.anchors))
        self.adversarial_weight = adversarial_weight
        self.discriminator_rate = discriminator_rate
        self.gradient_clip = gradient_clip
        width = _width(self.recording, self.tap)
        network: dict[str, Any] = {
            "width": width,
            "modulation_width": modulation_width(self.pipe.transformer),
            "num_heads": num_heads,
            "depth": depth,
            "width_mult": width_mult,
        }
        base: dict[str, Any] = {"residual": residual, "order": order, "max_gap": self.max_gap}
        self.predictor = (
            DiscaPredictor(**network, **base)
            if rows is None
            else CorrectedRows.over(self._fitted(rows, residual, order), **network)
        )
        self.adversary = Adversary(self.pipe, width) if gan_epochs else None
        self.save_hyperparameters(self.told(type(self.predictor), self.predictor.arguments()))
        self.add_measures()
        self.errors: list[Tensor] = []
        self.step_errors = StepMeans()

    def _fitted(self, name: str, residual: bool, order: int) -> L2P:
        """The rows that are corrected.

        Raises:
            ValueError: they are none of this host, tap, anchors and recording's steps, or a formula
                is asked for beside them.
        """
        rows, recorded = load_predictor(name), spec_of(self.recording.header, self.tap, (), 0)
        if type(rows) is not L2P or rows.partition is not None or rows.spec.tap != self.tap:
            raise ValueError(
                f"{name} is a {type(rows).__name__} on {rows.spec.tap!r}, expected an L2P of one "
                f"part on {self.tap!r}: foreseer fit l2p_lstsq --model.tap {self.tap}, then export."
            )
        if list(rows.anchors) != list(self.anchors):
            raise ValueError(
                f"the rows of {name} are for the anchors {list(rows.anchors)}, found "
                f"{list(self.anchors)}; give the same."
            )
        for told in ("host", "sigmas", "num_branches", "guidance_scale"):
            theirs, ours = getattr(rows.spec, told), getattr(recorded, told)
            if told == "host":
                theirs, ours = (each["weights_sha256"] for each in (theirs, ours))
            if theirs != ours:
                raise ValueError(
                    f"the rows of {name} were fitted on another {told} than this recording's: "
                    f"{theirs}, expected {ours}."
                )
        if order or not residual:
            raise ValueError("with rows there is no other base; leave out residual and order.")
        if rows.first_time is not None and (self.epochs["mse"] or self.epochs["gan"]):
            raise ValueError(
                f"the network is told {rows.first_time:g} at step 0 of these rows, which was not "
                "recorded; set mse_epochs and gan_epochs to 0 and train in closed loop."
            )
        return rows

    @property
    def phase(self) -> str:
        """Name of the phase of this epoch."""
        ends, names = 0, []
        for name in PHASES:
            ends += self.epochs[name]
            names.append((ends, name))
        return next((name for end, name in names if self.current_epoch < end), PHASES[-1])

    @property
    def settings(self) -> dict[str, Any]:
        """Keyword arguments of the recorded pipeline call."""
        return References(self.recording, []).settings

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """AdamW without weight decay for the predictor, Adam (0, 0.99) for the discriminator."""
        mine = torch.optim.AdamW(self.predictor.parameters(), self.rates["mse"], weight_decay=0.0)
        if self.adversary is None:
            return [mine]
        theirs = self.adversary.parameters()
        return [mine, torch.optim.Adam(theirs, self.discriminator_rate, betas=(0.0, 0.99))]

    def on_fit_start(self) -> None:
        """Measure the start on the validation split."""
        self.follow(self.pipe)
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        self.num_trajectories.fill_(len(data.train_items))
        if not math.isfinite(float(self.start_error)) and data.val_items:
            errors = [
                self.closed_errors(batch) for batch in watched(data.val_dataloader(), "start")
            ]
            self.start_error.fill_(torch.cat(errors).mean())

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """One update on all forecasts of a batch of runs."""
        batch = self.at_home(batch)
        phase = self.phase
        self.set_rate(phase, batch_idx)
        if phase == "closed":
            latents = final_latents(
                self.pipe,
                self.predictor,
                self.tap,
                self.anchors,
                self.items(batch),
                **self.settings,
            )
            loss = log_error(latents, batch["final"]).mean()
            self.log("train/closed_loop_db", loss.detach(), prog_bar=True, batch_size=1)
            self.update(loss)
            return
        anchors = self.anchors
        if self.predictor.any_anchors:
            seed = random.Random(f"{self.current_epoch} {batch_idx}")
            anchors = draw_anchors(self.recording.header.sigmas, self.max_gap, seed)
        forced = self.forced(batch, anchors)
        error = velocity_error(forced)
        self.log("train/velocity_mse", error.detach(), prog_bar=True, batch_size=1)
        if phase == "mse":
            self.update(error)
        else:
            self.adversarial_update(forced, error)

    def update(self, loss: Float[Tensor, ""]) -> None:
        """One step of the predictor's optimiser."""
        optimizer = self._optimizer(0)
        optimizer.zero_grad()
        self.manual_backward(loss)
        nn.utils.clip_grad_norm_(self.predictor.parameters(), self.gradient_clip)
        optimizer.step()

    def adversarial_update(self, forced: Sequence[Forced], error: Float[Tensor, ""]) -> None:
        """One step of the discriminator, then one of the predictor."""
        assert self.adversary is not None  # made where there is a second phase
        optimizer = self._optimizer(1)
        seen = self.adversary.look(forced)
        optimizer.zero_grad()
        self.manual_backward(self.adversary.discriminator_loss(seen))
        optimizer.step()
        for name, value in self.adversary.monitors(seen).items():
            self.log(f"train/discriminator_{name}", value, batch_size=1)
        weight = self.adversarial_weight if self.adversary.separates else 0.0
        loss = error + weight * self.adversary.predictor_loss(seen) if weight else error
        self.update(loss)

    def forced(self, batch: dict[str, Any], anchors: Sequence[int]) -> list[Forced]:
        """Forecasts of a batch of recorded runs, made from true features."""
        hidden, outputs = batch[f"feature/{self.tap}"].float(), batch["feature/output"].float()
        return replayed(
            self.pipe,
            self.predictor,
            self.tap,
            anchors,
            self.items(batch),
            hidden,
            outputs,
            **self.settings,
        )

    def set_rate(self, phase: str, batch_idx: int) -> None:
        """Set the learning rate of an update."""
        before = sum(self.epochs[name] for name in PHASES[: PHASES.index(phase)])
        num_batches = int(self.trainer.num_training_batches)
        done = (self.current_epoch - before) * num_batches + batch_idx
        factor = rate_factor("cosine", done / (max(self.epochs[phase], 1) * num_batches), done)
        for group in self._optimizer(0).param_groups:
            group["lr"] = factor * self.rates[phase]

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Held-out error of the finished samples, and of single forecasts on recorded features."""
        batch = self.at_home(batch)
        self.errors.append(self.closed_errors(batch))
        with torch.no_grad():
            forced = self.forced(batch, self.anchors)
            error = velocity_error(forced)
        self.step_errors.add(
            (each.step, (each.forecast - each.target).norm() / each.target.norm())
            for each in forced
        )
        self.log("val/velocity_mse", error, batch_size=len(batch["item"]))

    def on_validation_epoch_end(self) -> None:
        """Keep the closed-loop error; draw the error per step and the anchors."""
        error = torch.cat(self.errors).mean()
        log_figures(
            self, self.anchors, {"output, on recorded features": self.step_errors.by_step()}
        )
        self.errors, self.step_errors = [], StepMeans()
        self.log("val/error_db", error, prog_bar=True)
        self.log("val/gain_over_start_db", self.start_error.to(error) - error)
        if not self.trainer.sanity_checking:
            self.val_error.fill_(error)

    @torch.no_grad()
    def closed_errors(self, batch: dict[str, Any]) -> Float[Tensor, " B"]:
        """Error in dB of every sample generated while forecasting."""
        latents = generate(
            self.pipe, self.predictor, self.tap, self.items(batch), self.anchors, **self.settings
        )
        return log_error(latents, batch["final"])

    def items(self, batch: dict[str, Any]) -> list[Any]:
        """The items of a batch."""
        return [item_of(self.recording, int(item)) for item in batch["item"]]

    def _optimizer(self, number: int) -> Any:
        found: Any = self.optimizers()
        return found[number] if isinstance(found, list) else found


def _width(recording: Any, tap: str) -> int:
    """Channels of a recorded feature."""
    item = recording.items[0]
    return int(recording.load(item, [f"feature/{tap}"])[f"feature/{tap}"].shape[-1])
