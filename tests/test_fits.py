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
from lightning.pytorch.loggers import CSVLogger
from row_cases import errors_of, rows_fitted, tabulate
from tiny_hosts import LinearInTime, items, pipeline, seeded, tiny_dit

from foreseer.evaluation.measure import References, closed_loop_errors, generate, log_error
from foreseer.evaluation.rows import (
    SECOND_ORDER,
    adams_bashforth_rows,
    analytic_rows,
    published_loss,
    reuse_weight,
)
from foreseer.integration.host.clock import flow_sigmas
from foreseer.integration.linear_sampler import NonAffineScheduler
from foreseer.predictors.base import History, Step
from foreseer.predictors.linear import L2P, fold
from foreseer.predictors.rules import RULES, Newton, Reuse
from foreseer.training.closed_loop import L2PClosedLoop
from foreseer.training.gauss_newton import UNIT, Quadratics, directions, feature_bases, linearise
from foreseer.training.l2p import L2PAdam, L2PLeastSquares
from foreseer.training.tracking import guidance_weights, track
from foreseer.trajectories.datamodule import GramDataModule, RecordingDataModule
from foreseer.trajectories.gram import gram, projection_fidelity
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
    rows = rows_fitted(grams, ANCHORS, ridge=0.0)
    fidelity = projection_fidelity(grams, ANCHORS)
    errors = errors_of(grams, rows)
    torch.testing.assert_close(errors[..., 1:], 1 - fidelity[..., 1:], atol=1e-7, rtol=0)


def test_least_squares_is_what_lstsq_finds_on_the_features_of_all_trajectories():
    features = smooth_features()
    rows = rows_fitted(gram(features), ANCHORS, ridge=0.0)
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
    rows = rows_fitted(grams, ANCHORS, ridge=1e9)
    torch.testing.assert_close(rows, reuse.repeat(2, 1, 1), atol=1e-8, rtol=0)
    rows = rows_fitted(grams, ANCHORS)
    assert not rows[..., [s for s in range(STEPS) if s not in ANCHORS]].any()
    with pytest.raises(ValueError, match="ridge -1"):
        rows_fitted(grams, ANCHORS, ridge=-1.0)


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


def test_relative_errors_are_those_of_the_features():
    features = smooth_features()
    grams = gram(features)
    rows = analytic_rows(ANCHORS, [1 - s / STEPS for s in range(STEPS)])["taylor_2"].repeat(2, 1, 1)
    errors = errors_of(grams, rows)
    for t in range(STEPS):
        forecast = torch.einsum("bs,nbsm->nbm", rows[:, t], features)
        direct = (features[:, :, t] - forecast).norm(dim=-1) / features[:, :, t].norm(dim=-1)
        torch.testing.assert_close(errors[..., t], direct, atol=1e-9, rtol=1e-9)
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
    assert table.keys() == RULES.keys() - {"newton_1"} | {
        "ab2",
        *SECOND_ORDER,
    }  # newton_1 is taylor_1
    features = torch.randn(STEPS, 3, dtype=torch.float64, generator=seeded())
    history = History()
    for a in (0, 1, 3):
        history.push(Step(a, sigmas[a], STEPS), features[a])
    forecast = (table["newton_2"] @ features)[5]
    torch.testing.assert_close(forecast, Newton(2)(history, Step(5, sigmas[5], STEPS)))


# -------------------------------------------------------------------------- directions of the rows


def test_a_direction_moves_the_forecast_steps_of_one_segment_on_known_anchors():
    bases = [torch.randn(2 * (k + 1), 2, generator=seeded(k)).double() for k in range(4)]
    like = torch.zeros(2, STEPS, STEPS, dtype=torch.float64)
    found = directions(ANCHORS, bases, like)
    assert [move.segment for move in found] == [1, 1, 2, 2, 3, 3]  # none between anchors 0 and 1
    forecast = {1: [2], 2: [4, 5], 3: [7, 8, 9]}
    for i, move in enumerate(found):
        k, column = move.segment, bases[move.segment].T[i % 2]
        expected = like.clone()
        for b in range(2):
            for t in forecast[k]:
                for j in range(k + 1):
                    expected[b, t, ANCHORS[j]] = UNIT * column[b * (k + 1) + j]
        torch.testing.assert_close(move.rows, expected)


def test_a_basis_of_the_features_moves_the_forecast_by_its_own_size():
    grams = gram(smooth_features())
    mean = grams.mean(0)
    for k, basis in enumerate(feature_bases(grams, ANCHORS, cutoff=1e-9)):
        known = list(ANCHORS[: k + 1])
        blocks = torch.block_diag(*(mean[b][known][:, known] for b in (0, 1)))
        size = (basis.T @ blocks @ basis).diagonal()
        first = (basis[: k + 1] != 0).any(0)  # columns of branch 0
        newest = mean[:, ANCHORS[k], ANCHORS[k]]
        torch.testing.assert_close(size, torch.where(first, newest[0], newest[1]))


# -------------------------------------------------------------------------------- Gauss-Newton


def quadratics(noise: float, num: int = 5) -> tuple[Quadratics, torch.Tensor]:
    """Squared errors of linear models that agree on one solution, up to noise."""
    jacobian = torch.randn(num, 30, 3, dtype=torch.float64, generator=seeded())
    solution = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    error = -jacobian @ solution
    error = error + noise * torch.randn(num, 30, dtype=torch.float64, generator=seeded(1))
    found = Quadratics(
        error.square().mean(1),
        torch.einsum("nm,nmp->np", error, jacobian) / 30,
        torch.einsum("nmp,nmq->npq", jacobian, jacobian) / 30,
    )
    return found, solution


def test_a_quadratic_is_the_squared_error_it_stands_for():
    found, solution = quadratics(noise=1.0)
    assert torch.equal(found.at(torch.zeros(3).double()), found.constant)
    jacobian = torch.randn(5, 30, 3, dtype=torch.float64, generator=seeded())
    noise = torch.randn(5, 30, dtype=torch.float64, generator=seeded(1))
    z = solution + 0.3
    direct = (noise + jacobian @ (z - solution)).square().mean(1)
    torch.testing.assert_close(found.at(z), direct)


def test_the_step_reaches_a_solution_that_exists():
    found, solution = quadratics(noise=0.0)
    torch.testing.assert_close(found.solve(strength=1e-12), solution, atol=1e-6, rtol=0)


def test_the_step_is_a_minimum_of_the_mean_logarithm():
    found, _ = quadratics(noise=1.0)
    z = found.solve(strength=1e-12)
    best = float(found.at(z).log().sum())
    for seed in range(20):
        near = z + 0.05 * torch.randn(3, dtype=torch.float64, generator=seeded(seed))
        assert float(found.at(near).log().sum()) > best


def test_an_endless_ridge_stays_and_batches_join():
    found, _ = quadratics(noise=1.0)
    torch.testing.assert_close(
        found.solve(strength=1e9), torch.zeros(3).double(), atol=1e-6, rtol=0
    )
    halves = [
        Quadratics(found.constant[s], found.linear[s], found.curvature[s])
        for s in (slice(0, 2), slice(2, 5))
    ]
    assert torch.equal(Quadratics.join(halves).solve(0.1), found.solve(0.1))


def with_rows(rows: torch.Tensor) -> L2P:
    predictor = L2P(STEPS, ANCHORS, 2)
    predictor.set_rows(rows)
    return predictor


@pytest.mark.parametrize("tap", ["output", "hidden"])
def test_replayed_runs_are_the_runs_that_moved_rows_really_make(recording, tap):
    source = Recording(recording[0])
    references = References(source, source.items[:3])
    pipe = pipeline("dit_guided")
    formulas = analytic_rows(ANCHORS, source.header.sigmas)
    rows = formulas["taylor_1"].repeat(2, 1, 1)
    moves = directions(ANCHORS, feature_bases(source.stack(f"gram/{tap}"), ANCHORS), rows)[::3]
    found = linearise(
        pipe, with_rows(rows), moves, tap, references.batches[0], references.finals, **CALL
    )

    def run(moved: torch.Tensor) -> torch.Tensor:
        predictor = with_rows(moved)
        batch = references.batches[0]
        return generate(pipe, predictor, tap, batch, predictor.anchors, **CALL).flatten(1).double()

    base = run(rows)
    error = base - references.finals.flatten(1).double()
    jacobian = torch.stack([4 * (run(rows + 0.25 * m.rows) - base) for m in moves], -1)
    torch.testing.assert_close(found.constant, error.square().mean(1))
    linear = torch.einsum("nm,nmp->np", error, jacobian) / error.shape[1]
    torch.testing.assert_close(found.linear, linear)
    curvature = torch.einsum("nmp,nmq->npq", jacobian, jacobian) / error.shape[1]
    torch.testing.assert_close(found.curvature, curvature)
    assert found.linear.abs().max() > 0
    assert "forward" not in vars(pipe.transformer) and "step" not in vars(pipe.scheduler)


def test_one_step_suffices_where_the_sample_is_linear_in_the_rows(recording):
    pipe = pipeline("dit")
    pipe.transformer = tiny_dit(LinearInTime)
    reference = Reference(pipe)
    rows = reference.formulas["reuse"].repeat(2, 1, 1)
    grams = Recording(recording[0]).stack("gram/output")
    moves = directions(ANCHORS, feature_bases(grams, ANCHORS), rows)
    finals = reference.states[:, -1].split([4, 2])
    parts = [
        linearise(pipe, with_rows(rows), moves, "output", batch, final, **CALL)
        for batch, final in zip(reference.batches, finals, strict=True)
    ]
    z = Quadratics.join(parts).solve(strength=1e-6)
    moved = rows + sum(float(c) * move.rows for c, move in zip(z, moves, strict=True))
    assert reference.error(moved) < reference.error(rows) - 30


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


def test_the_error_in_decibel_is_that_of_the_sample():
    reference = torch.zeros(2, 1, 4, 4)
    latents = torch.stack([torch.full((1, 4, 4), 0.1), torch.full((1, 4, 4), 1.0)])
    assert log_error(latents, reference).tolist() == pytest.approx([-20.0, 0.0], abs=1e-5)


# ------------------------------------------------------------------------------------ Lightning


@pytest.fixture(scope="module")
def recording(tmp_path_factory) -> tuple[str, str]:
    """Folders of a small recording and of the pipeline it is of."""
    folder = tmp_path_factory.mktemp("fits")
    torch.manual_seed(0)
    pipe = pipeline("dit_guided")
    pipe.save_pretrained(folder / "pipe")
    record(pipe, items("dit_guided", 8), folder / "recording", batch_size=6, **CALL)
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
    assert module.spec().num_trajectories == len(data.train_items)


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
        return (errors_of(grams, rows).square() * norms).sum((0, 1))

    found = squared(module.predictor.weight)
    for name, rows in analytic_rows(ANCHORS, module.spec().sigmas).items():
        if name not in ("ab2", *SECOND_ORDER):
            assert (found <= squared(rows.repeat(2, 1, 1)) * (1 + 1e-9) + 1e-9).all(), name


def test_a_fit_refuses_a_tap_that_was_not_recorded(recording):
    with pytest.raises(ValueError, match=r"has the taps \['hidden', 'output'\], not 'residual'"):
        L2PAdam(recording[0], ANCHORS, tap="residual")


@pytest.mark.parametrize("tap", ["output", "hidden"])
def test_the_closed_loop_never_ends_below_its_start(recording, tap, tmp_path):
    anchors = (0, 1, 4)
    module = L2PClosedLoop(*recording, anchors, tap, num_probe=2)
    data = RecordingDataModule(
        recording[0], ["final"], batch_size=4, validation_fraction=0.4, seed=0
    )
    fit(module, data, tmp_path, epochs=2)
    assert module.start_name in RULES.keys() | {"ab2", *SECOND_ORDER}
    assert module.best_error <= module.start_error
    header = Recording(recording[0]).header
    start = analytic_rows(anchors, header.sigmas)[module.start_name].repeat(2, 1, 1)
    held_out = References(Recording(recording[0]), data.val_items)
    found = [
        closed_loop_errors(
            module.pipe, rows, anchors, tap, held_out.batches, held_out.finals, **CALL
        )
        for rows in (module.predictor.weight, start)
    ]
    errors = [float(each.mean()) for each in found]
    assert errors[0] <= errors[1]
    assert errors[0] == pytest.approx(float(module.best_error), abs=1e-6)
    assert errors[1] == pytest.approx(float(module.start_error), abs=1e-6)
