"""Trajectory tracking: rows that keep an accelerated run near the recorded one.

Shapes: n trajectories, S sampling steps, B batch. Segments are the stretches from an anchor to the
next, or to the end of the run.
"""

import functools
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from foreseer.integration.histories import Kept
from foreseer.integration.host.module_host import ModuleHost
from foreseer.integration.linear_sampler import SamplerMap, pristine, probe, probe_loop
from foreseer.integration.observers import Source, StepRecord
from foreseer.integration.policy import Anchors
from foreseer.integration.session import Session
from foreseer.predictors import solve
from foreseer.predictors.base import Step
from foreseer.predictors.weighted import combine
from foreseer.trajectories.files.header import Header
from foreseer.trajectories.prompts import Item, generate_batch


class _Stop(Exception):
    """Ends a pipeline call once the wanted anchor has been evaluated."""


class Tracker(Source):
    """Put visited anchors back, forecast by the rows found so far, evaluate one new anchor.

    Args:
        anchors: steps at which the network runs.
        rows: rows of every branch, `(branches, S, S)`, anchor rows unit rows; changed in place.
        scheduler: the pipeline's.
    """

    schedule: Anchors
    tap = "output"
    taps = frozenset({"output"})

    def __init__(
        self, anchors: Sequence[int], rows: Float[Tensor, "branches S S"], scheduler: Any
    ) -> None:
        self.anchors = list(anchors)
        self.rows = rows
        self.schedule = Anchors([])  # the new anchor alone
        self.outputs: list[Kept] = []  # of every batch
        self.guidance: Tensor | None = None
        self.scheduler = scheduler
        self.sampler: SamplerMap | None = None
        self.batch = 0
        self.stop_at = 0

    def open(self, sigmas: list[float]) -> None:
        """Read the sampler's map off the first run."""
        if len(sigmas) != self.rows.shape[-1]:
            raise ValueError(
                f"the run has {len(sigmas)} steps, the rows are for {self.rows.shape[-1]}."
            )
        if self.sampler is None:
            self.sampler = probe(pristine(self.scheduler))

    def knows(self, step: Step, slot: Hashable = None) -> bool:
        """Whether an anchor of the call was visited."""
        return bool(self.outputs[self.batch].steps(step))

    def forecast(self, step: Step, slot: Hashable = None) -> Tensor:
        """A stored anchor's output, or the forecast of the rows found so far."""
        kept = self.outputs[self.batch]
        visited = kept.steps(step)
        if step.index in visited:
            return kept.at(step)
        features = [kept.at(step, anchor) for anchor in visited]
        rows = self.rows[list(step.branches), step.index][:, visited]
        return combine(rows.mT, features)

    def on_step(self, record: StepRecord) -> None:
        """Keep the new anchor's outputs and the state there, and end the call."""
        if record.index != self.stop_at:
            return
        kept = self.outputs[self.batch]
        for call in record.calls:
            if call.taps is not None:
                kept.keep(call.step, call.taps["output"])
        found = guidance_weights(kept.by_branch(record.index), record.v)
        if self.guidance is None:
            self.guidance = found
        check_guidance(self.guidance, found, record.index, record.v.dtype)
        self.states.append(record.before.detach().cpu().double())
        raise _Stop

    def visit(
        self, pipe: Any, batches: Sequence[Sequence[Item]], anchor: int, settings: dict
    ) -> Tensor:
        """Evaluate one anchor on every batch; returns the states there, `(n, *shape)`."""
        self.stop_at, self.schedule.anchors = anchor, [anchor]
        self.states: list[Tensor] = []
        for self.batch, batch in enumerate(batches):
            if len(self.outputs) <= self.batch:
                self.outputs.append(Kept())
            try:
                generate_batch(pipe, batch, output_type="latent", **settings)
            except _Stop:
                continue
            raise ValueError(f"the run ended before step {anchor}; expected it among its steps.")
        return torch.cat(self.states)

    def features(self, anchor: int) -> Float[Tensor, "branches n M"]:
        """All outputs at one anchor, flattened, float64."""
        outputs = [kept.by_branch(anchor) for kept in self.outputs]
        return torch.cat(outputs, dim=1).flatten(2).cpu().double()


def sampler_of_loop(
    pipe: Any, items: Sequence[Item], settings: dict[str, Any]
) -> SamplerMap | None:
    """The sampler's map of a host whose loop is its own; None where a scheduler tells it.

    Args:
        pipe: a pipeline or host, with nothing attached.
        items: of a run.
        settings: keyword arguments of every call.

    Raises:
        NonAffineScheduler: see `probe_loop`.
    """
    if not (isinstance(pipe, ModuleHost) and pipe.in_loop):
        return None
    return probe_loop(pipe, functools.partial(generate_batch, pipe, items, **settings))


def guidance_tolerance(dtype: torch.dtype) -> float:
    """Relative deviation of one step's guidance put down to rounding; bfloat16 rounds to 2^-9."""
    return max(1e-3, torch.finfo(dtype).eps / 2)


def guidance_weights(
    outputs: Float[Tensor, "branches B *shape"], v: Float[Tensor, " B *shape"]
) -> Float[Tensor, " branches"]:
    """The weights with which a pipeline combines its branches, found from one step.

    Raises:
        ValueError: no weights do (as with guidance that rescales norms).
    """
    flat = outputs.flatten(1).cpu().double()
    target = v.detach().flatten().cpu().double()
    weights = torch.linalg.lstsq(flat.T, target[:, None]).solution[:, 0]
    error = float((weights @ flat - target).norm() / target.norm())
    if not error <= guidance_tolerance(v.dtype):
        raise ValueError(
            f"the pipeline's guidance is not a fixed combination of its branches (relative error "
            f"{error:.1e}); tracking cannot be solved for it. Refine from an analytic start "
            "instead."
        )
    return weights


def check_guidance(
    before: Float[Tensor, " branches"],
    found: Float[Tensor, " others"],
    index: int,
    dtype: torch.dtype,
) -> None:
    """Raise where a pipeline combines its branches otherwise than at an earlier step.

    Args:
        before: weights of an earlier step.
        found: those of this one.
        index: this step.
        dtype: of the network's outputs.

    Raises:
        ValueError: they differ by more than rounding.
    """
    gap = float((found - before).norm()) if len(found) == len(before) else torch.inf
    if not gap <= guidance_tolerance(dtype) * float(before.norm()):
        raise ValueError(
            f"guidance combines the branches by {found.tolist()} at step {index} and by "
            f"{before.tolist()} before; the fit is for one combination that holds for the whole "
            "run. Switch off what changes it, or use a fit on Grams (L2PLeastSquares, L2PAdam)."
        )


def check_branches(header: Header, recording: str) -> None:
    """Raise unless all guidance branches of a recording last to the end of its runs.

    Raises:
        ValueError: some end in mid-run.
    """
    if header.branch_steps:
        raise ValueError(
            f"the guidance branches of {recording} last {list(header.branch_steps)} steps; this "
            "fit is for guidance that holds for the whole run. Record without truncated guidance, "
            "or use a fit on Grams (L2PLeastSquares, L2PAdam)."
        )


def track(
    pipe: Any,
    batches: Sequence[Sequence[Item]],
    states: Float[Tensor, "n states *shape"],
    anchors: Sequence[int],
    start: Float[Tensor, "branches S S"],
    ridge: float = 1e-2,
    **settings: Any,
) -> tuple[Float[Tensor, "branches S S"], list[Tensor]]:
    """Rows that keep an accelerated run near the recorded one, and a basis to refine them in.

    Within a segment every step's row moves by the same amount delta, the ridge solution of
    min sum_n || x_ref(next) - x(next; start rows) - sum_{b,a} rho_b F_{b,a} delta_{b,a} ||^2,
    rho_b the summed response of the next state to the segment's forecasts. It costs one network
    evaluation per anchor and trajectory.

    Args:
        pipe: the pipeline.
        batches: items in the order of `states`, cut into pipeline calls.
        states: the recorded states of the full run, at every step and the end.
        anchors: steps at which the network runs.
        start: analytic rows to shrink toward.
        ridge: strength relative to each regressor's squared norm.
        settings: keyword arguments of every pipeline call.

    Returns:
        The rows, and per segment a matrix `(branches * (k + 1), r)` whose unit vectors each move
        the next state by a root mean square of one.

    Raises:
        NonAffineScheduler: the sampler is not a fixed linear map.
    """
    rows = start.double().clone()
    tracker = Tracker(anchors, rows, pipe.scheduler)
    tracker.sampler = sampler_of_loop(pipe, batches[0][:1], settings)
    session = Session(pipe, tracker, repeats=True)
    bases: list[Tensor] = []
    num_steps = rows.shape[-1]
    try:
        ends = [*anchors[1:], num_steps]
        segments = list(zip(anchors, ends, strict=True))
        for k, (anchor, end) in enumerate(tqdm(segments, desc="track", unit="anchor")):
            reached = tracker.visit(pipe, batches, anchor, settings).flatten(1)
            known = list(anchors[: k + 1])
            features = torch.stack(
                [tracker.features(a) for a in known], dim=1
            )  # (branches, K, n, M)
            delta, basis = _solve(tracker, reached, states.flatten(2), features, known, end, ridge)
            for a, column in zip(known, delta.unbind(1), strict=True):
                rows[:, anchor + 1 : end, a] += column[:, None]
            bases.append(basis)
    finally:
        session.detach()
    return rows, bases


def _solve(
    tracker: Tracker,
    reached: Float[Tensor, "n M"],
    states: Float[Tensor, "n states M"],
    features: Float[Tensor, "branches K n M"],
    known: list[int],
    end: int,
    ridge: float,
) -> tuple[Float[Tensor, "branches K"], Tensor]:
    sampler, guidance, rows = tracker.sampler, tracker.guidance, tracker.rows
    assert sampler is not None and guidance is not None
    branches, num_known = features.shape[:2]
    anchor = known[-1]
    change = sampler.response[end] - sampler.response[anchor]  # per model output
    weights = guidance[:, None] * torch.einsum("s,bsk->bk", change, rows[:, :, known])
    noise = states[:, 0].double() * (sampler.start[end] - sampler.start[anchor]) / sampler.start[0]
    landed = reached + noise + torch.einsum("bk,bknm->nm", weights, features)
    error = states[:, end].double() - landed
    rho = guidance * sampler.response[end, anchor + 1 : end].sum()
    regressors = (features * rho[:, None, None, None]).flatten(0, 1)  # (branches * K, n, M)
    normal = torch.einsum("pnm,qnm->pq", regressors, regressors) / error.numel()
    if end == anchor + 1 or not bool((normal.diagonal() > 0).all()):
        empty = torch.zeros(branches * num_known, 0, dtype=torch.float64)
        return torch.zeros(branches, num_known, dtype=torch.float64), empty
    right = torch.einsum("pnm,nm->p", regressors, error) / error.numel()
    delta = solve.ridge(normal, right[:, None], ridge)
    return delta.view(branches, num_known), whitening(normal)


def whitening(normal: Float[Tensor, "P P"], cutoff: float = 1e-4) -> Float[Tensor, "P r"]:
    """A matrix L with L^T normal L = 1 on the directions above `cutoff` of the largest."""
    values, vectors = torch.linalg.eigh(normal)
    keep = values > cutoff * values[-1]
    return vectors[:, keep] / values[keep].sqrt()
