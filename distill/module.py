"""Distil a teacher into a student that predicts average velocities under an embedded guidance.

One module for every stage, since they differ in the law of times and in the target alone:
guidance distillation is `EqualTimes` with `VelocityTarget`, Restricted MeanFlow `RestrictedTimes`
with `MeanFlowTarget`.

Shapes: B batch.
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from foreseer.distill.few_steps import few_steps, load_student_state, psnr_db
from foreseer.distill.guidance import (
    Conditions,
    Points,
    Runs,
    class_conditions,
    guidance_range,
    guided,
    guided_velocity,
)
from foreseer.distill.meanflow import AverageVelocity, Target, expand
from foreseer.distill.teacher_runs import starting
from foreseer.distill.times import Times
from foreseer.integration.pipelines.average_velocity import (
    Conditioning,
    IntervalConditioner,
    conditioner_for,
)
from foreseer.integration.pipelines.load import load_pipeline
from foreseer.training.plumbing.resuming import Drawing

WEIGHT_FLOOR = 1e-3  # c of the adaptive weight 1 / (error + c)^p


class DistillModule(Drawing):
    """Train a student u(x_t, r, t, c, g) that starts at the conditional teacher.

    It starts exactly there without a `band_limit`, and about there with one. The loss is the mean
    of (u - y)^2 with the target y detached. Batches are recorded runs (`TeacherRuns`), or
    image-label pairs (`FashionMNIST`), for which the teacher is asked for its guided velocity.

    Args:
        pipeline: the teacher's pipeline, a folder or `zoo:<name>`.
        start: checkpoint of an earlier stage to start from; None starts at the teacher.
        target: what the student is regressed to.
        times: law of the intervals.
        max_interval: longest interval R the student answers for; samplers with longer steps are
            refused.
        min_guidance: smallest guidance scale; None for a teacher without an unconditional branch.
        max_guidance: largest one.
        embed_guidance: one branch with an embedded scale; else both branches are kept,
            u = u_0 + g (u_c - u_0), at two evaluations a step.
        band_limit: highest frequency of time the student keeps of the teacher's embedding, in
            radians per unit of flow time; None keeps all, and the derivative's noise with them.
        learning_rate: AdamW's rate before the schedule.
        adaptive_power: p of the weight 1 / (error + c)^p of every sample; 0 weighs all alike, 1 is
            MeanFlow's.
        tangent_warmup: optimiser steps over which the derivative's weight rises to 1.
        interval_warmup: optimiser steps over which the longest interval rises to R.
        num_validation_steps: sampler steps of the validation samples.
        fresh_noise: also train, with as many points, between the ends of the runs and noise drawn
            anew, where the teacher is asked; runs alone are soon known by heart.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        target: Target,
        times: Times,
        pipeline: str = "zoo:fashion_dit",
        start: str | None = None,
        max_interval: float = 0.2,
        min_guidance: float | None = 1.0,
        max_guidance: float | None = 4.0,
        embed_guidance: bool = True,
        band_limit: float | None = 100.0,
        learning_rate: float = 3e-4,
        adaptive_power: float = 0.0,
        tangent_warmup: int = 0,
        interval_warmup: int = 0,
        num_validation_steps: int = 10,
        fresh_noise: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["target", "times"])
        self.target = target
        self.times = times
        self.learning_rate = learning_rate
        self.adaptive_power = adaptive_power
        self.tangent_warmup = tangent_warmup
        self.interval_warmup = interval_warmup
        self.num_validation_steps = num_validation_steps
        self.fresh_noise = fresh_noise
        guidance_range(min_guidance, max_guidance)
        self.min_guidance = min_guidance
        self.max_guidance = max_guidance
        self._teacher = [load_pipeline(pipeline).transformer.eval().requires_grad_(False)]
        self.transformer = load_pipeline(pipeline).transformer
        self.conditioner = conditioner_of(self.transformer, dict(self.hparams))
        self.conditioning = Conditioning(self.transformer, self.conditioner)
        if start is not None:
            load_student_state(self, start)

    @property
    def teacher(self) -> Any:
        """The frozen teacher; it is no part of the module's state."""
        return self._teacher[0].to(self.device)

    def average_velocity(
        self, conditions: Conditions, guidance_scale: Float[Tensor, " B"] | None
    ) -> AverageVelocity:
        """The student u(x, r, t) under given conditions.

        Args:
            conditions: own and shared ones, and the null branch's where both branches are kept.
            guidance_scale: scale of every sample; None for a student without one.
        """
        branches = guidance_scale is not None and not self.conditioner.takes_guidance
        alone = Conditions(conditions.own, {}, conditions.shared)

        def u(x: Tensor, r: Tensor, t: Tensor) -> Tensor:
            interval = t - r
            if branches:
                with self.conditioning.at(torch.cat([interval, interval])):
                    return guided(self.transformer, x, t, conditions, guidance_scale)
            with self.conditioning.at(interval, guidance_scale):
                return guided(self.transformer, x, t, alone, None)

        return u

    def training_step(self, batch: Any, batch_idx: int) -> Float[Tensor, ""]:
        """The loss at random points of the batch.

        Args:
            batch: recorded runs, or `[x_0, labels]`.
            batch_idx: not used.
        """
        self.transformer.eval()  # no dropout: both passes of a target must see one network
        share = _ramp(self.global_step, self.interval_warmup)
        weight = _ramp(self.global_step, self.tangent_warmup)
        loss, error = self.loss(self.points(batch, share), weight)
        self.log("train/error", error, prog_bar=True)
        if self.fresh_noise:
            fresh, error = self.loss(self.fresh_points(batch, share), weight)
            self.log("train/fresh_error", error, prog_bar=True)
            loss = (loss + fresh) / 2
        return loss

    def loss(
        self, points: Points, tangent_weight: float = 1.0
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """The weighted loss, and the mean squared error without weights.

        Args:
            points: where.
            tangent_weight: weight of the target's derivative.
        """
        u = self.average_velocity(points.conditions, points.guidance_scale)
        with torch.no_grad():
            y = self.target(u, points, tangent_weight)
        errors = (u(points.x_t, points.r, points.t) - y).square().flatten(1).mean(1)  # (B,)
        weights = (errors.detach() + WEIGHT_FLOOR) ** -self.adaptive_power
        return (weights * errors).mean(), errors.detach().mean()

    def points(
        self, batch: Any, share: float = 1.0, generator: torch.Generator | None = None
    ) -> Points:
        """Points to train at.

        Args:
            batch: recorded runs, or `[x_0, labels]`.
            share: longest interval over R.
            generator: source of randomness; None takes torch's own.
        """
        if isinstance(batch, Mapping):
            return self._on_runs(batch, share, generator)
        x_0, labels = batch
        return self._on_pairs(x_0, labels, share, generator)

    def _on_runs(
        self, batch: Mapping[str, Tensor], share: float, generator: torch.Generator | None
    ) -> Points:
        runs = runs_of(batch)
        r, t = (time.to(runs.eps) for time in self.times.draw(len(runs.eps), generator, share))
        chord = runs.chord(r, t) if self.target.needs_runs else None
        conditions, scale = self.conditions_of(batch), batch.get("guidance_scale")
        return Points(runs.at(t), r, t, runs.velocity(t), conditions, scale, chord)

    def fresh_points(
        self,
        batch: Mapping[str, Tensor],
        share: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Points:
        """Points between the ends of recorded runs and noise drawn anew.

        Args:
            batch: recorded runs.
            share: longest interval over R.
            generator: source of randomness; None takes torch's own.
        """
        runs, scale = runs_of(batch), batch.get("guidance_scale")
        ends = runs.at(torch.zeros(len(runs.eps), device=runs.eps.device))
        return self._toward_noise(ends, self.conditions_of(batch), scale, share, generator)

    def conditions_of(self, batch: Mapping[str, Tensor]) -> Conditions:
        """Both branches' conditions of recorded runs."""
        named = {kind: starting(batch, f"{kind}.") for kind in ("own", "null", "shared")}
        shared = {name: value[0] for name, value in named["shared"].items()}
        if named["null"] or "guidance_scale" not in batch:
            return Conditions(named["own"], named["null"], shared)
        return class_conditions(named["own"]["class_labels"], self._num_classes)

    @property
    def _num_classes(self) -> int:
        return int(self.transformer.config.num_embeds_ada_norm)

    def _on_pairs(
        self, x_0: Tensor, labels: Tensor, share: float, generator: torch.Generator | None
    ) -> Points:
        low, high = guidance_range(self.min_guidance, self.max_guidance) or (1.0, 1.0)
        scale = low + (high - low) * torch.rand(len(x_0), generator=generator).to(x_0)
        conditions = class_conditions(labels, self._num_classes)
        return self._toward_noise(x_0, conditions, scale, share, generator)

    def _toward_noise(
        self,
        x_0: Tensor,
        conditions: Conditions,
        scale: Tensor | None,
        share: float,
        generator: torch.Generator | None,
    ) -> Points:
        eps = torch.randn(x_0.shape, generator=generator).to(x_0)
        r, t = (time.to(x_0) for time in self.times.draw(len(x_0), generator, share))
        x_t = x_0 + expand(t, x_0) * (eps - x_0)

        def teacher(x: Tensor, at: Tensor) -> Tensor:
            return guided_velocity(self.teacher, x, at, conditions, scale)

        return Points(x_t, r, t, teacher(x_t, t), conditions, scale, None, teacher)

    @torch.no_grad()
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log the error at fixed points, and on runs the PSNR of few-step samples to their ends.

        Args:
            batch: recorded runs, or `[x_0, labels]`.
            batch_idx: seed of the points.
        """
        points = self.points(batch, generator=torch.Generator().manual_seed(batch_idx))
        self.log("val/error", self.loss(points)[1])
        if not isinstance(batch, Mapping):
            return
        runs = runs_of(batch)
        u = self.average_velocity(self.conditions_of(batch), batch.get("guidance_scale"))
        sample = few_steps(u, runs.eps, self.num_validation_steps)
        end = runs.at(torch.zeros(len(runs.eps), device=runs.eps.device))
        self.log("val/psnr_db", psnr_db(sample, end).mean(), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW without weight decay; the rate follows `ClockCosine`."""
        return torch.optim.AdamW(
            self.parameters(), self.learning_rate, betas=(0.9, 0.99), weight_decay=0.0
        )


def conditioner_of(transformer: Any, settings: Mapping[str, Any]) -> IntervalConditioner:
    """A fresh conditioner with the hyper-parameters of a `DistillModule`."""
    return conditioner_for(
        transformer,
        settings["max_interval"],
        settings["min_guidance"],
        settings["max_guidance"],
        settings["embed_guidance"],
        settings["band_limit"],
    )


def runs_of(batch: Mapping[str, Tensor]) -> Runs:
    """The runs of a batch."""
    return Runs(batch["eps"], batch["v"], batch["sigmas"][0].to(batch["eps"].dtype))


def _ramp(step: int, length: int) -> float:
    return 1.0 if length <= 0 else min(1.0, (step + 1) / length)
