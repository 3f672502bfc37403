"""A student of a closed-form flow: the smallest place where a law of times or a target shows.

Shapes: B batch.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from flow_fields import Mixture
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from foreseer.distill.guidance import Conditions, Points
from foreseer.distill.meanflow import MeanFlowTarget, Target, expand
from foreseer.distill.times import RestrictedTimes, Times

NUM_WAVES = 4
WEIGHT_FLOOR = 1e-3  # c of the adaptive weight


@dataclass(frozen=True)
class Recipe:
    """How a student of a flow in the plane is trained.

    Args:
        target: what it is regressed to.
        times: law of the intervals.
        adaptive_power: p of the weight 1 / (error + c)^p.
        teacher_velocity: take the flow's velocity; False takes the pair's eps - x_0.
        num_steps: Adam steps.
        batch_size: points per step.
        learning_rate: first rate of a cosine to zero.
        width: width of the network.
    """

    target: Target = field(default_factory=MeanFlowTarget)
    times: Times = field(default_factory=RestrictedTimes)
    adaptive_power: float = 0.0
    teacher_velocity: bool = True
    num_steps: int = 1500
    batch_size: int = 256
    learning_rate: float = 2e-3
    width: int = 128


class PlaneStudent(nn.Module):
    """u(x, r, t) of a flow in the plane: a perceptron on x and waves of t and t - r.

    Args:
        width: width of its hidden layers.
    """

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        num_inputs = 2 + 2 * (1 + 2 * NUM_WAVES)
        self.layers = nn.Sequential(
            nn.Linear(num_inputs, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, 2),
        )

    def forward(
        self, x: Float[Tensor, "B 2"], r: Float[Tensor, " B"], t: Float[Tensor, " B"]
    ) -> Float[Tensor, "B 2"]:
        """The average velocity."""
        return self.layers(torch.cat([x, _waves(t), _waves(t - r)], dim=1))


def train_on(flow: Mixture, recipe: Recipe, seed: int = 0) -> PlaneStudent:
    """A student of a flow; the exponential average of its weights (decay 0.99).

    Args:
        flow: the teacher.
        recipe: how.
        seed: seed of the initial weights and of all draws.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student = PlaneStudent(recipe.width)
        average = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(0.99))
        optimizer = torch.optim.Adam(student.parameters(), recipe.learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.num_steps)
        for _ in range(recipe.num_steps):
            points = draw_points(flow, recipe)
            with torch.no_grad():
                y = recipe.target(student, points)
            errors = (student(points.x_t, points.r, points.t) - y).square().mean(1)
            weights = (errors.detach() + WEIGHT_FLOOR) ** -recipe.adaptive_power
            optimizer.zero_grad()
            (weights * errors).mean().backward()
            optimizer.step()
            schedule.step()
            average.update_parameters(student)
    trained: Any = average.module
    return trained


def draw_points(flow: Mixture, recipe: Recipe) -> Points:
    """Points on straight lines between data and noise."""
    generator = torch.default_generator
    x_0 = flow.sample(recipe.batch_size, generator)
    eps = torch.randn(x_0.shape, generator=generator)
    r, t = recipe.times.draw(recipe.batch_size)
    x_t = x_0 + expand(t, x_0) * (eps - x_0)
    v = flow.velocity(x_t, t) if recipe.teacher_velocity else eps - x_0
    return Points(x_t, r, t, v, Conditions({}))


@torch.no_grad()
def interval_error(
    flow: Mixture, student: nn.Module, shortest: float, longest: float, size: int = 4000
) -> float:
    """RMS(u - u*) / RMS(u*) over intervals of some lengths that fit before t.

    Args:
        flow: the teacher.
        student: u(x, r, t).
        shortest: shortest interval.
        longest: longest one.
        size: number of points.
    """
    generator = torch.Generator().manual_seed(1)
    interval = shortest + (longest - shortest) * torch.rand(size, generator=generator)
    t = interval + (1 - interval) * torch.rand(size, generator=generator)
    x_0, eps = flow.sample(size, generator), torch.randn(size, 2, generator=generator)
    x_t = x_0 + expand(t, x_0) * (eps - x_0)
    exact = flow.average_velocity(x_t, t - interval, t)
    return float((student(x_t, t - interval, t) - exact).norm() / exact.norm())


def _waves(time: Float[Tensor, " B"]) -> Float[Tensor, "B features"]:
    angles = time[:, None] * torch.pi * torch.arange(1, NUM_WAVES + 1)
    return torch.cat([time[:, None], angles.sin(), angles.cos()], dim=1)
