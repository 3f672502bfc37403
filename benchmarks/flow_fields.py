"""Flows with a known velocity and average velocity: what targets and students are checked on.

Shapes: B batch, K Gaussians, d dimensions.
Convention: x_t = (1 - t) x_0 + t eps, v = eps - x_0; a step goes from t down to r.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Gaussian:
    """x_0 ~ N(mean, diag(deviation^2)), for which everything is closed.

    With m_t = (1 - t) mean and s_t^2 = (1 - t)^2 deviation^2 + t^2:
    v = -mean + (t - (1 - t) deviation^2) / s_t^2 (x - m_t), x_r = m_r + (s_r / s_t) (x_t - m_t).

    Args:
        mean: mean of the data.
        deviation: standard deviation per dimension.
    """

    mean: Float[Tensor, " d"]
    deviation: Float[Tensor, " d"]

    def _moments(self, t: Float[Tensor, " B"]) -> tuple[Tensor, Tensor]:
        t = t[:, None]
        return (1 - t) * self.mean, ((1 - t) ** 2 * self.deviation**2 + t**2).sqrt()

    def velocity(self, x: Float[Tensor, "B d"], t: Float[Tensor, " B"]) -> Float[Tensor, "B d"]:
        """v(x, t)."""
        m, s = self._moments(t)
        slope = (t[:, None] - (1 - t[:, None]) * self.deviation**2) / s**2
        return -self.mean + slope * (x - m)

    def move(
        self, x: Float[Tensor, "B d"], r: Float[Tensor, " B"], t: Float[Tensor, " B"]
    ) -> Float[Tensor, "B d"]:
        """x_r of the flow through x at time t."""
        (m_t, s_t), (m_r, s_r) = self._moments(t), self._moments(r)
        return m_r + s_r / s_t * (x - m_t)

    def average_velocity(
        self, x: Float[Tensor, "B d"], r: Float[Tensor, " B"], t: Float[Tensor, " B"]
    ) -> Float[Tensor, "B d"]:
        """u(x, r, t) = (x_t - x_r) / (t - r), and v where r = t."""
        width = (t - r)[:, None]
        chord = (x - self.move(x, r, t)) / torch.where(width == 0, 1.0, width)
        return torch.where(width == 0, self.velocity(x, t), chord)

    def guided(self, null: "Gaussian", guidance_scale: float) -> "Gaussian":
        """The flow of v_0 + g (v_c - v_0): again a Gaussian's, if both deviations are the same.

        Args:
            null: the unconditional Gaussian, of the same deviation.
            guidance_scale: g.
        """
        return Gaussian(null.mean + guidance_scale * (self.mean - null.mean), self.deviation)


@dataclass(frozen=True)
class Mixture:
    """Equally likely Gaussians of one isotropic deviation; the flow is integrated by RK4.

    Args:
        means: their means.
        deviation: their standard deviation.
    """

    means: Float[Tensor, "K d"]
    deviation: float

    def velocity(self, x: Float[Tensor, "B d"], t: Float[Tensor, " B"]) -> Float[Tensor, "B d"]:
        """v(x, t): the components' velocities, weighted by their posteriors."""
        t = t[:, None, None]
        variance = (1 - t) ** 2 * self.deviation**2 + t**2  # (B, 1, 1)
        offsets = x[:, None] - (1 - t) * self.means  # (B, K, d)
        posterior = (-offsets.square().sum(-1, keepdim=True) / (2 * variance)).softmax(1)
        slope = (t - (1 - t) * self.deviation**2) / variance
        return (posterior * (slope * offsets - self.means)).sum(1)

    def move(
        self,
        x: Float[Tensor, "B d"],
        r: Float[Tensor, " B"],
        t: Float[Tensor, " B"],
        num_steps: int = 100,
    ) -> Float[Tensor, "B d"]:
        """x_r of the flow through x at time t, by the classical Runge-Kutta method."""
        h = (r - t)[:, None] / num_steps
        now = t
        for _ in range(num_steps):
            half = now + h[:, 0] / 2
            k1 = self.velocity(x, now)
            k2 = self.velocity(x + h / 2 * k1, half)
            k3 = self.velocity(x + h / 2 * k2, half)
            k4 = self.velocity(x + h * k3, now + h[:, 0])
            x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
            now = now + h[:, 0]
        return x

    def average_velocity(
        self, x: Float[Tensor, "B d"], r: Float[Tensor, " B"], t: Float[Tensor, " B"]
    ) -> Float[Tensor, "B d"]:
        """u(x, r, t) = (x_t - x_r) / (t - r), and v where both are (nearly) the same."""
        width = (t - r)[:, None]
        chord = (x - self.move(x, r, t)) / width.clamp(min=1e-6)
        return torch.where(width > 1e-6, chord, self.velocity(x, t))

    def sample(self, size: int, generator: torch.Generator) -> Float[Tensor, "size d"]:
        """Draw x_0."""
        chosen = torch.randint(len(self.means), (size,), generator=generator)
        noise = torch.randn(size, self.means.shape[1], generator=generator)
        return self.means[chosen] + self.deviation * noise.to(self.means)


def ring(radius: float = 2.0, deviation: float = 0.3, num_modes: int = 8) -> Mixture:
    """Gaussians evenly spaced on a circle."""
    angles = 2 * math.pi * torch.arange(num_modes) / num_modes
    return Mixture(radius * torch.stack([angles.cos(), angles.sin()], 1), deviation)
