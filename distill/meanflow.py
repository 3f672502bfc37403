"""What an average velocity is regressed to: MeanFlow, exact or by a difference, and its rivals.

Shapes: B batch; x_t, v and u share one shape (B, ...).
Convention: x_t = (1 - t) x_0 + t eps, v = dx/dt = eps - x_0; a step goes from t down to r.
Source: MeanFlow, arXiv 2505.13447: (t - r) u(x_t, r, t) = int_r^t v dtau, so that
u = v - (t - r) du/dt with du/dt = (d_x u) v + d_t u.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from foreseer.distill.guidance import Points

AverageVelocity = Callable[[Tensor, Tensor, Tensor], Tensor]  # u(x, r, t)


class Target:
    """What u(x_t, r, t) is regressed to; called without gradients.

    Attributes:
        needs_runs: whether it needs points on recorded runs.
    """

    needs_runs = False

    def __call__(
        self, u: AverageVelocity, points: Points, tangent_weight: float = 1.0
    ) -> Float[Tensor, " B *shape"]:
        """The target.

        Args:
            u: the student at these points' conditions.
            points: where.
            tangent_weight: w in v - w (t - r) du/dt, rises to 1 in a warm-up.
        """
        raise NotImplementedError


class VelocityTarget(Target):
    """y = v: guidance distillation where t = r, and an idle r elsewhere."""

    def __call__(
        self, u: AverageVelocity, points: Points, tangent_weight: float = 1.0
    ) -> Float[Tensor, " B *shape"]:
        """The velocity of the teacher."""
        return points.v


class MeanFlowTarget(Target):
    """y = v - w (t - r) du/dt, by an exact Jacobian-vector product or by a finite difference.

    Args:
        step: None for the exact product; else h of the difference, in flow time. In float32
            5e-3 to 1e-2 is best: smaller ones drown in rounding.

    Raises:
        ValueError: the step is not in (0, 0.5).
    """

    def __init__(self, step: float | None = None) -> None:
        if step is not None and not 0 < step < 0.5:
            raise ValueError(f"step is {step}, expected None or a difference in (0, 0.5).")
        self.step = step

    def __call__(
        self, u: AverageVelocity, points: Points, tangent_weight: float = 1.0
    ) -> Float[Tensor, " B *shape"]:
        """The MeanFlow target, see the module's docstring."""
        x_t, r, t, v = points.x_t, points.r, points.t, points.v
        change = (
            exact_derivative(u, x_t, r, t, v)
            if self.step is None
            else difference(u, x_t, r, t, v, self.step)
        )
        return v - tangent_weight * expand(t - r, v) * change


class AlphaFlowTarget(Target):
    """y = alpha v + (1 - alpha) u(x_s, r, s), s = t - alpha (t - r), x_s = x_t - (t - s) v.

    AlphaFlow, arXiv 2510.20771: needs no derivative; MeanFlow's gradient in the limit alpha -> 0.
    Its loss is divided by alpha there, which Adam does not see.

    Args:
        alpha: constant share, in (0, 1].

    Raises:
        ValueError: alpha is out of range.
    """

    def __init__(self, alpha: float = 0.05) -> None:
        if not 0 < alpha <= 1:
            raise ValueError(f"alpha is {alpha}, expected a share in (0, 1].")
        self.alpha = alpha

    def __call__(
        self, u: AverageVelocity, points: Points, tangent_weight: float = 1.0
    ) -> Float[Tensor, " B *shape"]:
        """The AlphaFlow target; `tangent_weight` does not apply."""
        s = points.t - self.alpha * (points.t - points.r)
        x_s = points.x_t - expand(points.t - s, points.v) * points.v
        return self.alpha * points.v + (1 - self.alpha) * u(x_s, points.r, s)


class ChordTarget(Target):
    """y = (x_t - x_r) / (t - r) of the teacher's run through x_t: the average velocity itself.

    Ours: nothing is differentiated and nothing rests on the student. On recorded runs the chord is
    known; elsewhere the midpoint rule stands for it, y = v(x_t - (t - m) v(x_t, t), m) with
    m = (t + r) / 2, at the price of a second call of the teacher.
    """

    needs_runs = True

    def __call__(
        self, u: AverageVelocity, points: Points, tangent_weight: float = 1.0
    ) -> Float[Tensor, " B *shape"]:
        """The chord; `tangent_weight` does not apply.

        Raises:
            ValueError: the points lie on no recorded run and come without a teacher.
        """
        if points.chord is not None:
            return points.chord
        if points.teacher is None:
            raise ValueError("the chord needs recorded runs or a teacher; take TeacherRuns.")
        middle = (points.t + points.r) / 2
        halfway = points.x_t - expand(points.t - middle, points.v) * points.v
        return points.teacher(halfway, middle)


def exact_derivative(
    u: AverageVelocity,
    x_t: Float[Tensor, " B *shape"],
    r: Float[Tensor, " B"],
    t: Float[Tensor, " B"],
    v: Float[Tensor, " B *shape"],
) -> Float[Tensor, " B *shape"]:
    """du/dt = (d_x u) v + d_t u at fixed r: one forward-mode product with tangents (v, 0, 1).

    Attention runs in its plain form, the fused kernels have no forward mode.
    """
    primals = (x_t.contiguous(), r.contiguous(), t.contiguous())
    tangents = (v.contiguous(), torch.zeros_like(r), torch.ones_like(t))
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        change: Tensor = torch.func.jvp(u, primals, tangents)[1]
    return change.detach()


def difference(
    u: AverageVelocity,
    x_t: Float[Tensor, " B *shape"],
    r: Float[Tensor, " B"],
    t: Float[Tensor, " B"],
    v: Float[Tensor, " B *shape"],
    step: float,
) -> Float[Tensor, " B *shape"]:
    """The same by [u(x + h v, r, t + h) - u(x - h' v, r, t - h')] / (h + h').

    h and h' are `step`, cut so that t + h <= 1 and t - h' >= r: one-sided at the ends. Where both
    are 0, at t = r = 1, the derivative counts for nothing and 0 is returned. Of use where a host
    has no forward mode, or under data parallelism, whose wrapper cannot be differentiated so.
    """
    after, before = (t + step).clamp(max=1.0), torch.maximum(t - step, r)
    with torch.no_grad():
        high = u(x_t + expand(after - t, v) * v, r, after).double()
        low = u(x_t + expand(before - t, v) * v, r, before).double()
    width = expand(after - before, v).double()
    change = torch.where(width > 0, (high - low) / width.clamp(min=1e-12), 0.0)
    return change.to(v.dtype)


def expand(values: Float[Tensor, " B"], like: Float[Tensor, " B *shape"]) -> Tensor:
    """One value per sample, with axes to multiply it with data."""
    return values.to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))
