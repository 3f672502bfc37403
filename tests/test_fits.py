"""The fits solve what they say they solve, and never end below where they began."""

import copy
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from foreseer.training.refinement import (
    SegmentRows,
    closed_loop_errors,
    feature_bases,
    generate,
    log_error,
)
from lightning.pytorch.loggers import CSVLogger
from tiny_hosts import LinearInTime, items, pipeline, seeded, tiny_dit

from foreseer.integration.clock import flow_sigmas
from foreseer.integration.sampler import NonAffineScheduler
from foreseer.predictors.base import History, Step
from foreseer.predictors.linear import L2P, fold, tabulate
from foreseer.predictors.polynomial import Newton, Reuse
from foreseer.training.closed_loop import L2PClosedLoop
from foreseer.training.l2p import L2PAdam, L2PLeastSquares, open_loop_errors
from foreseer.training.rows import (
    RULES,
    adams_bashforth_rows,
    analytic_rows,
    least_squares_rows,
    published_loss,
    reuse_weight,
)
from foreseer.training.tracking import guidance_weights, track
from foreseer.trajectories.datamodule import GramDataModule, RecordingDataModule
from foreseer.trajectories.gram import gram, open_loop_error, projection_fidelity
from foreseer.trajectories.prompts import generate_batch
from foreseer.trajectories.recorder import record
from foreseer.trajectories.recording import Recording

ANCHORS = (0, 1, 3, 6)
STEPS = 10
CALL = {"num_inference_steps": STEPS, "guidance_scale": 3.0}
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
SCHEDULERS = {
    "euler": lambda: FlowMatchEulerDiscreteScheduler(),
    "ddim": lambda: DDIMScheduler(clip_sample=False),
    "dpm": lambda: DPMSolverMultistepScheduler(**FLOW),
    "unipc": lambda: UniPCMultistepScheduler(**FLOW),
}


def smooth_features(trajectories: int = 3, branches: int = 2, elements: int = 40) -> torch.Tensor:
    """Features that turn slowly, `(n, branches, S, M)`."""
    t = torch.linspace(0, 1, STEPS, dtype=torch.float64)[:, None]
    shape = (trajectories, branches, 1, elements)
    a, b, c = torch.randn(3, *shape, dtype=torch.float64, generator=seeded())
    return (
        a
        + b * t
        + c * torch.sin(2 * t)
        + 0.01
        * torch.randn(
            trajectories, branches, STEPS, elements, dtype=torch.float64, generator=seeded(1)
        )
    )


# ------------------------------------------------------------------------------ rows from Grams


def test_least_squares_on_one_trajectory_leaves_the_residual_of_its_projection():
    grams = gram(smooth_features(trajectories=1))
    rows = least_squares_rows(grams, ANCHORS, ridge=0.0)
    fidelity = projection_fidelity(grams, ANCHORS)
    errors = open_loop_errors(grams, rows)
    torch.testing.assert_close(errors[..., 1:], 1 - fidelity[..., 1:], atol=1e-7, rtol=0)


def test_least_squares_is_what_lstsq_finds_on_the_features_of_all_trajectories():
    features = smooth_features()
    rows = least_squares_rows(gram(features), ANCHORS, ridge=0.0)
    for t in (2, 5, 9):
        history = [a for a in ANCHORS if a < t]
        for b in range(2):
            basis = features[:, b, history].transpose(0, 1).flatten(1).T  # (n * M, K)
            target = features[:, b, t].flatten()[:, None]
            expected = torch.linalg.lstsq(basis, target).solution[:, 0]
            torch.testing.assert_close(rows[b, t, history], expected, atol=1e-6, rtol=1e-6)


def test_an_endless_ridge_is_reuse_and_rows_lie_on_anchors():
    grams = gram(smooth_features())
    reuse = tabulate(Reuse(), ANCHORS, [1.0] * STEPS)
    rows = least_squares_rows(grams, ANCHORS, ridge=1e9)
    torch.testing.assert_close(rows, reuse.repeat(2, 1, 1), atol=1e-8, rtol=0)
    rows = least_squares_rows(grams, ANCHORS)
    assert not rows[..., [s for s in range(STEPS) if s not in ANCHORS]].any()
    with pytest.raises(ValueError, match="found 0 trajectories"):
        least_squares_rows(grams[:0], ANCHORS)
    with pytest.raises(ValueError, match="ridge -1"):
        least_squares_rows(grams, ANCHORS, ridge=-1.0)


def test_the_published_loss_and_its_gradient_are_those_of_explicit_features():
    features = smooth_features()
    n, branches, _, elements = features.shape
    weight = (torch.randn(branches, STEPS, STEPS, generator=seeded(5)) / 5).double()
    on_grams = weight.clone().requires_grad_()
    loss = published_loss(on_grams, gram(features).sum(0) / (n * elements))
    loss.backward()
    explicit = weight.clone().requires_grad_()
    forecast = torch.einsum("bts,nbsm->nbtm", explicit.tril(-1), features)
    mse = (forecast - features)[:, :, 1:].square().mean()
    mse.backward()
    torch.testing.assert_close(loss, mse, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(on_grams.grad, explicit.grad, atol=1e-12, rtol=1e-10)


def test_open_loop_errors_are_those_of_single_steps():
    grams = gram(smooth_features())
    rows = analytic_rows(ANCHORS, [1 - s / STEPS for s in range(STEPS)])["taylor_2"].repeat(2, 1, 1)
    errors = open_loop_errors(grams, rows)
    for t in range(STEPS):
        torch.testing.assert_close(errors[..., t], open_loop_error(grams, rows[:, t], t))
    assert not errors[..., list(ANCHORS)].any()


@pytest.mark.parametrize("sigmas", [[1 - s / STEPS for s in range(STEPS)], None])
def test_adams_bashforth_rows_sum_to_the_multistep_update(sigmas):
    if sigmas is None:
        sigmas = [(1 - s / STEPS) ** 1.7 for s in range(STEPS)]
    grid = torch.tensor([*sigmas, 0.0], dtype=torch.float64)
    rows = adams_bashforth_rows(ANCHORS, sigmas)
    v = torch.randn(STEPS, 5, dtype=torch.float64, generator=seeded())
    euler = (grid.diff()[:, None] * (rows @ v)).cumsum(0)  # every step with its row's forecast
    x = torch.zeros(5, dtype=torch.float64)
    for k, (a, end) in enumerate(zip(ANCHORS, (*ANCHORS[1:], STEPS), strict=True)):
        span = grid[end] - grid[a]
        if k and end > a + 1:
            ratio = span / (grid[a] - grid[ANCHORS[k - 1]])
            x = x + span * ((1 + ratio / 2) * v[a] - ratio / 2 * v[ANCHORS[k - 1]])
        else:  # no earlier anchor, or a segment of one step, which is Euler's
            x = x + span * v[a]
        torch.testing.assert_close(euler[end - 1], x, atol=1e-12, rtol=1e-12)


def test_analytic_rows_are_the_formulas():
    sigmas = [(1 - s / STEPS) ** 1.5 for s in range(STEPS)]
    table = analytic_rows(ANCHORS, sigmas)
    assert table.keys() == RULES.keys() | {"ab2"}
    features = torch.randn(STEPS, 3, dtype=torch.float64, generator=seeded())
    history = History()
    for a in (0, 1, 3):
        history.push(Step(a, sigmas[a], STEPS), features[a])
    forecast = (table["newton_2"] @ features)[5]
    torch.testing.assert_close(forecast, Newton(2)(history, Step(5, sigmas[5], STEPS)))


# ------------------------------------------------------------------------------ corrected rows


def prepared(z: float = 0.0) -> tuple[SegmentRows, torch.Tensor]:
    base = torch.randn(2, STEPS, STEPS, dtype=torch.float64, generator=seeded())
    rows = SegmentRows(STEPS, ANCHORS, num_branches=2)
    bases = [
        torch.randn(2 * (k + 1), 2 * (k + 1), dtype=torch.float64, generator=seeded(k))
        for k in range(len(ANCHORS))
    ]
    rows.prepare(base, bases)
    with torch.no_grad():
        rows.z.fill_(z)
    return rows, base


def test_segment_rows_without_correction_are_their_base_bit_for_bit():
    rows, base = prepared()
    assert torch.equal(rows(), base)


def test_a_correction_moves_the_rows_of_forecast_steps_on_known_anchors_only():
    rows, base = prepared(z=1.0)
    moved = (rows() != base).nonzero().tolist()
    expected = [
        [b, t, a]
        for b in (0, 1)
        for t in range(STEPS)
        for a in ANCHORS
        if t not in ANCHORS and a < t
    ]
    assert moved == expected
    delta = (rows() - base)[1, [7, 8, 9]][:, list(ANCHORS)]
    torch.testing.assert_close(delta[0], delta[1])
    torch.testing.assert_close(delta[0], (rows.bases[3] @ rows.z[3])[4:8])


def test_gradients_reach_every_coordinate_that_moves_a_row():
    rows, _ = prepared()
    (rows() * torch.randn(2, STEPS, STEPS, generator=seeded(9))).sum().backward()
    used = [(rows.z.grad[k, : 2 * (k + 1)] != 0).all() for k in range(len(ANCHORS))]
    assert used == [False, True, True, True]  # between anchors 0 and 1 nothing is forecast


def test_a_basis_of_the_features_moves_the_forecast_by_one_percent():
    grams = gram(smooth_features())
    bases = feature_bases(grams, ANCHORS, num_elements=1)
    mean = grams.mean(0)
    for k, (anchor, basis) in enumerate(zip(ANCHORS, bases, strict=True)):
        known = list(ANCHORS[: k + 1])
        blocks = torch.block_diag(*(mean[b][known][:, known] for b in (0, 1)))
        size = (basis.T @ blocks @ basis).diagonal()
        branch = (basis[: k + 1] != 0).any(0)  # which branch a column is of
        expected = torch.where(branch, mean[0, anchor, anchor], mean[1, anchor, anchor])
        torch.testing.assert_close(size, expected)


# ------------------------------------------------------------------------------------- tracking


@pytest.mark.parametrize("guidance", [1.5, 3.0, 7.0])
def test_the_weights_of_guidance_are_found_from_one_step(guidance):
    cond, uncond = torch.randn(2, 4, 1, 4, 4, generator=seeded())
    v = uncond + guidance * (cond - uncond)
    found = guidance_weights(torch.stack([cond, uncond]), v)
    torch.testing.assert_close(
        found, torch.tensor([guidance, 1 - guidance]).double(), atol=1e-4, rtol=0
    )


def test_guidance_that_rescales_samples_is_refused():
    cond, uncond = torch.randn(2, 4, 1, 4, 4, generator=seeded())
    v = uncond + 3 * (cond - uncond)
    v = v / v.flatten(1).norm(dim=1)[:, None, None, None]
    with pytest.raises(ValueError, match="not a fixed combination of its branches"):
        guidance_weights(torch.stack([cond, uncond]), v)


class Reference:
    """Full runs of a pipeline: the states to track and the samples to reach."""

    def __init__(self, pipe: Any, host: str = "dit_guided", num_items: int = 6) -> None:
        self.pipe = pipe
        everything = items(host, num_items)
        self.batches = [everything[:4], everything[4:]]
        self.states = self.run()
        scheduler = copy.deepcopy(pipe.scheduler)
        scheduler.set_timesteps(STEPS)
        self.formulas = analytic_rows(ANCHORS, flow_sigmas(scheduler))

    def run(self) -> torch.Tensor:
        scheduler = self.pipe.scheduler
        step, states = scheduler.step, []

        def watching(v, timestep, x, **kwargs):
            result = step(v, timestep, x, **kwargs)
            states.append((x, result[0]))
            return result

        scheduler.step = watching
        found = []
        for batch in self.batches:
            states.clear()
            generate_batch(self.pipe, batch, output_type="latent", **CALL)
            found.append(torch.stack([*(x for x, _ in states), states[-1][1]], dim=1))
        del scheduler.step
        return torch.cat(found)

    def error(self, rows: torch.Tensor) -> float:
        finals = self.states[:, -1]
        errors = closed_loop_errors(
            self.pipe, rows, ANCHORS, "output", self.batches, finals, **CALL
        )
        return float(errors.mean())


@pytest.mark.parametrize("name", SCHEDULERS)
def test_tracking_reaches_a_target_that_rows_can_represent(name):
    pipe = pipeline("dit", SCHEDULERS[name]())
    pipe.transformer = tiny_dit(LinearInTime)
    reference = Reference(pipe)
    start = reference.formulas["reuse"].repeat(2, 1, 1)
    rows, _ = track(pipe, reference.batches, reference.states, ANCHORS, start, ridge=1e-9, **CALL)
    size = float(10 * reference.states[:, -1].square().mean().log10())
    assert reference.error(rows) < reference.error(start) - 20
    assert reference.error(rows) < size - 70  # float32 sampling


@pytest.mark.parametrize("name", SCHEDULERS)
def test_tracking_improves_on_its_start_on_a_random_model(name):
    reference = Reference(pipeline("dit_guided", SCHEDULERS[name]()))
    start = reference.formulas["reuse"].repeat(2, 1, 1)
    before = start.clone()
    rows, bases = track(
        reference.pipe, reference.batches, reference.states, ANCHORS, start, ridge=1e-3, **CALL
    )
    assert reference.error(rows) < reference.error(start) - 3
    assert torch.equal(start, before)
    assert [basis.shape[0] for basis in bases] == [2, 4, 6, 8]
    assert bases[0].shape[1] == 0  # nothing is forecast between anchors 0 and 1
    assert "forward" not in vars(reference.pipe.transformer)
    assert not rows[..., [s for s in range(STEPS) if s not in ANCHORS]].any()


def test_tracking_refuses_a_sampler_that_is_no_linear_map_and_detaches():
    pipe = pipeline("dit_guided", SCHEDULERS["euler"]())
    reference = Reference(pipe)
    pipe.scheduler = DDIMScheduler(clip_sample=True)
    start = reference.formulas["reuse"].repeat(2, 1, 1)
    with pytest.raises(NonAffineScheduler):
        track(pipe, reference.batches, reference.states, ANCHORS, start, **CALL)
    assert "forward" not in vars(pipe.transformer) and "step" not in vars(pipe.scheduler)


def test_generating_with_gradients_gives_the_same_sample_and_a_finite_gradient():
    pipe = pipeline("dit_guided")
    batch = items("dit_guided", 2)
    plain = generate(pipe, L2P(STEPS, ANCHORS, 2), "output", batch, **CALL)
    predictor = L2P(STEPS, ANCHORS, 2)
    predictor.weight = predictor.weight.clone().requires_grad_()
    sample = generate(pipe, predictor, "output", batch, gradients=True, **CALL)
    torch.testing.assert_close(sample.detach(), plain)
    log_error(sample, torch.zeros_like(sample)).mean().backward()
    gradient = predictor.weight.grad
    assert gradient.isfinite().all()
    assert gradient[:, 5, 3].all() and not gradient[:, 3].any()


# ------------------------------------------------------------------------------------ Lightning


@pytest.fixture(scope="module")
def recording(tmp_path_factory) -> tuple[str, str]:
    """Folders of a small recording and of the pipeline it is of."""
    folder = tmp_path_factory.mktemp("fits")
    torch.manual_seed(0)
    pipe = pipeline("dit_guided")
    pipe.save_pretrained(folder / "pipe")
    record(pipe, items("dit_guided", 12), folder / "recording", batch_size=6, **CALL)
    return str(folder / "recording"), str(folder / "pipe")


def fit(module: Any, data: Any, folder: Path, epochs: int) -> None:
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=CSVLogger(folder),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )
    trainer.fit(module, data)


@pytest.mark.parametrize("tap", ["output", "hidden"])
def test_the_published_recipe_fits_and_folds_its_parameters(recording, tap, tmp_path):
    module = L2PAdam(recording[0], ANCHORS, tap)
    data = GramDataModule(recording[0], tap, validation_fraction=0.4)
    fit(module, data, tmp_path, epochs=5)
    expected = fold(module.rows.detach().double().tril(-1), ANCHORS)
    assert torch.equal(module.predictor.weight, expected)
    grams = data.train[0]["gram"]
    mean = grams.mean(0) / grams.diagonal(dim1=-2, dim2=-1).mean()
    start = published_loss(reuse_weight(2, STEPS), mean)
    assert published_loss(module.rows.detach(), mean) < start
    assert module.spec().anchors == ANCHORS and module.spec().tap == tap


def test_the_first_step_of_the_published_recipe_is_adams(recording, tmp_path):
    module = L2PAdam(recording[0], ANCHORS, learning_rate=0.01)
    fit(module, GramDataModule(recording[0], validation_fraction=0.4), tmp_path, epochs=1)
    change = module.rows.detach() - reuse_weight(2, STEPS)
    causal = torch.ones(STEPS, STEPS).tril(-1).bool()
    torch.testing.assert_close(
        change[:, causal].abs(), torch.full_like(change[:, causal], 0.01), rtol=1e-3, atol=0
    )
    assert not change[:, ~causal].any()


def test_the_closed_form_beats_every_formula_on_what_it_was_fitted_on(recording, tmp_path):
    module = L2PLeastSquares(recording[0], ANCHORS, ridge=0.0)
    data = GramDataModule(recording[0], validation_fraction=0.4)
    fit(module, data, tmp_path, epochs=1)
    grams = data.train[0]["gram"]
    norms = grams.diagonal(dim1=-2, dim2=-1)

    def squared(rows):
        return (open_loop_errors(grams, rows).square() * norms).sum((0, 1))

    found = squared(module.predictor.weight)
    for name, rows in analytic_rows(ANCHORS, module.spec().sigmas).items():
        if name != "ab2":
            assert (found <= squared(rows.repeat(2, 1, 1)) * (1 + 1e-9) + 1e-9).all(), name


def test_a_fit_refuses_a_tap_that_was_not_recorded(recording):
    with pytest.raises(ValueError, match=r"has the taps \['hidden', 'output'\], not 'residual'"):
        L2PAdam(recording[0], ANCHORS, tap="residual")


@pytest.mark.parametrize("tap", ["output", "hidden"])
def test_the_closed_loop_never_ends_below_its_start(recording, tap, tmp_path):
    module = L2PClosedLoop(*recording, ANCHORS, tap, num_probe=4)
    data = RecordingDataModule(
        recording[0], ["final"], batch_size=4, validation_fraction=0.4, seed=0
    )
    fit(module, data, tmp_path, epochs=2)
    assert module.start_name in RULES.keys() | {"ab2"}
    assert module.best_error <= module.start_error
    header = Recording(recording[0]).header
    start = analytic_rows(ANCHORS, header.sigmas)[module.start_name].repeat(2, 1, 1)
    batches, finals = module._references(data.val_items)
    errors = [
        float(closed_loop_errors(module.pipe, rows, ANCHORS, tap, batches, finals, **CALL).mean())
        for rows in (module.predictor.weight, start)
    ]
    assert errors[0] <= errors[1]
    assert errors[0] == pytest.approx(float(module.best_error), abs=1e-6)
    assert errors[1] == pytest.approx(float(module.start_error), abs=1e-6)
