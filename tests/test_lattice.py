"""A lattice of computed tokens: JiT's interpolation and the learned past are their equations."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from test_partial import Oracle
from tiny_hosts import STEPS, items, pipeline, run, seeded, settings, spec_for
from torch import Tensor

from foreseer.checkpoints.format import load_predictor, save_predictor
from foreseer.checkpoints.spec import PredictorMismatch
from foreseer.integration.forecaster import Forecaster
from foreseer.integration.forecasting import attach, forecasting
from foreseer.integration.host.trunk import UnsupportedHost
from foreseer.predictors.innovation import Innovation, fitted_pair
from foreseer.predictors.lattice_policy import LatticePolicy, lattice
from foreseer.predictors.linear import L2P
from foreseer.predictors.pruning_policy import PruningPolicy
from foreseer.predictors.rules import Reuse, Taylor
from foreseer.predictors.token_rows import TokenRows
from foreseer.predictors.tokens import RandomPolicy, take
from foreseer.training import token_fit
from foreseer.training.token_fit import fit_tokens
from foreseer.trajectories.prompts import generate_batch

ANCHORS = (0, 1, 4)
GRIDS = [(1, 4, 4), (1, 5, 7), (2, 3, 4), (1, 1, 5)]


def laid_out(grid: tuple[int, int, int], batch: int = 2, **arguments: Any) -> LatticePolicy:
    """A policy that has met a run with this grid."""
    policy = LatticePolicy(**arguments)
    policy.lay_out(grid)
    policy.observe(torch.zeros(batch, math.prod(grid), 1))
    return policy


def interpolated(values: Tensor, share: float, grid: tuple[int, int, int]) -> Tensor:
    """The mean of the computed among the eight around, token by token."""
    inside = lattice(share, grid)
    cells, out = values.view(*grid, -1), values.clone().view(*grid, -1)
    for f in range(grid[0]):
        for y in range(grid[1]):
            for x in range(grid[2]):
                if inside[f, y, x]:
                    continue
                near = [
                    cells[f, v, u]
                    for v in range(max(0, y - 1), min(grid[1], y + 2))
                    for u in range(max(0, x - 1), min(grid[2], x + 2))
                    if inside[f, v, u]
                ]
                out[f, y, x] = torch.stack(near).mean(0)
    return out.view(values.shape)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("share", [0.25, 0.5])
def test_past_zero_and_gain_one_is_the_interpolation_token_by_token(grid, share):
    policy = laid_out(grid, share=share, past=0.0, gain=1.0)
    selected = policy.select(3)
    forecast = torch.randn(2, math.prod(grid), 4, generator=seeded(1))
    values = torch.randn(2, math.prod(grid), 4, generator=seeded(2))
    found = policy.merge(forecast, take(values, selected), selected)
    for sample in range(2):
        expected = interpolated(values[sample], share, grid)
        torch.testing.assert_close(found[sample], expected, rtol=1e-6, atol=1e-6)
    learned = laid_out(grid, share=share)
    learned.innovation.pairs = torch.tensor([[[0.0, 1.0]] * STEPS], dtype=torch.float64)
    learned.select(3)
    assert torch.equal(learned.merge(forecast, take(values, selected), selected), found)


def test_a_plane_is_interpolated_exactly_inside_and_shares_are_what_they_say():
    rows, columns = torch.meshgrid(torch.arange(9.0), torch.arange(9.0), indexing="ij")
    plane = (2 * rows - 3 * columns).flatten()[None, :, None]
    for share, count in ((0.25, 25), (0.5, 41)):
        policy = laid_out((1, 9, 9), 1, share=share, past=0.0)
        selected = policy.select(0)
        assert selected.shape[1] == count
        found = policy.merge(torch.zeros_like(plane), take(plane, selected), selected)
        inner = (slice(None), slice(1, 8), slice(1, 8))
        torch.testing.assert_close(
            found.view(1, 9, 9)[inner], plane.view(1, 9, 9)[inner], rtol=0, atol=1e-5
        )


def test_learned_past_and_gain_are_the_equation_of_their_branch_and_step():
    grid = (1, 4, 4)
    policy = laid_out(grid, share=0.5)
    policy.innovation.pairs = torch.rand(2, STEPS, 2, generator=seeded(3), dtype=torch.float64)
    selected = policy.select(6).repeat(2, 1)
    forecast = torch.randn(4, 16, 4, generator=seeded(1))
    fresh = torch.randn(4, 8, 4, generator=seeded(2))
    found = policy.merge(forecast, fresh, selected, (1, 0))
    values = forecast.clone().scatter_(1, selected[..., None].expand(-1, -1, 4), fresh)
    for row in range(4):
        past, gain = policy.innovation.pairs[1 - row // 2, 6].float()
        own, other = forecast[row], ~lattice(0.5, grid).flatten()
        change = values[row] - past * own  # at computed tokens
        expected = past * own + gain * interpolated(change, 0.5, grid)
        torch.testing.assert_close(found[row, other], expected[other], rtol=1e-5, atol=1e-6)
        assert torch.equal(found[row, ~other], values[row, ~other])


@pytest.mark.parametrize("name", ["dit", "pixart", "flux"])
def test_all_tokens_computed_with_the_true_attention_are_the_full_step_bit_for_bit(name):
    oracle = Oracle(name)
    policy = laid_out((1, 4, 4), share=1.0, past=0.3, gain=0.4)
    selected = policy.select(1)
    rough = torch.zeros_like(oracle.hidden)
    output = oracle(selected, lambda fresh: policy.merge(rough, fresh, selected))
    assert torch.equal(output, oracle.output)


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_the_lattice_alone_comes_out_as_in_the_full_step(share):
    oracle = Oracle("flux")
    policy = laid_out((1, 4, 4), share=share)
    selected, seen = policy.select(1), []
    oracle(selected, lambda fresh: seen.append(fresh) or oracle.hidden)
    # float32 sums of another number of rows may be taken in another order
    torch.testing.assert_close(seen[0], take(oracle.hidden, selected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("host", ["dit_guided", "flux_two_calls"])
def test_runs_compute_the_lattice_on_every_grid_and_repeat(host):
    pipe = pipeline(host)
    with forecasting(pipe, Taylor(1), ANCHORS, "hidden"):
        plain = run(host, pipe)
    with forecasting(pipe, Taylor(1), ANCHORS, tokens=LatticePolicy(0.5)) as attached:
        found = run(host, pipe)
        assert torch.equal(run(host, pipe), found) and not torch.equal(found, plain)
        assert attached.report().partials == [2, 3, 5, 6, 7]
        if host == "flux_two_calls":
            wide = run(host, pipe, height=48, width=80)
            assert torch.equal(run(host, pipe, height=48, width=80), wide)
    with forecasting(pipe, Taylor(1), ANCHORS, tokens=LatticePolicy(0.5, gain=0.0)):
        half = run(host, pipe)
    assert not torch.equal(half, found)


def test_a_batch_of_one_is_that_sample_of_two():
    pipe = pipeline("dit")
    noise = torch.randn(2, 1, 4, 4, generator=seeded(3))
    with forecasting(pipe, Taylor(1), ANCHORS, tokens=LatticePolicy(0.25)):
        both = run("dit", pipe, latents=noise)
        one = run("dit", pipe, latents=noise[:1], class_labels=[0])
    torch.testing.assert_close(one, both[:1], rtol=1e-5, atol=1e-5)


# -------------------------------------------------------------------------------------- the fit


def test_the_fitted_pair_is_the_best_of_a_fine_search_and_finds_what_made_the_data():
    data = torch.randn(4, 500, generator=seeded(1), dtype=torch.float64)
    y, o, n, m = data
    n, m = n + o, m + o
    exact = 0.8 * o + 0.3 * (n - 0.8 * m)
    for target, known in ((exact, (0.8, 0.3)), (exact + 0.5 * y, None), (n, (0.0, 1.0))):
        stack = torch.stack([target, o, n, m])
        past, gain = fitted_pair(stack @ stack.mT).tolist()
        if known is not None:
            assert (past, gain) == pytest.approx(known, abs=1e-6)

        def error(a, b, target=target):
            return float((target - a * o - b * (n - a * m)).square().sum())

        best = error(past, gain)
        trial = torch.linspace(-0.5, 1.5, 81).tolist()
        assert best <= min(error(a, b) for a in trial for b in trial) + 1e-6
        assert best <= min(error(1, 0), error(0, 1)) + 1e-9


def test_where_there_is_nothing_to_fit_a_number_on_the_start_stays():
    gram = torch.zeros(4, 4, dtype=torch.float64)
    assert fitted_pair(gram).tolist() == [1.0, 0.0]
    gram[0, 0] = gram[1, 1] = gram[0, 1] = gram[1, 0] = 4.0  # the forecast is the truth
    assert fitted_pair(gram).tolist() == [1.0, 0.0]


def rows_for(pipe: Any, anchors: tuple[int, ...]) -> L2P:
    rows = L2P(STEPS, anchors, 2)
    rows.spec = spec_for(pipe, anchors=anchors, tap="hidden")
    return rows


@pytest.mark.parametrize(
    ("policy", "anchors"),
    [(LatticePolicy(0.5), ANCHORS), (PruningPolicy(0.5), tuple(range(STEPS)))],
    ids=["lattice", "pruning"],
)
def test_a_fit_lowers_the_error_of_its_sums_and_its_file_gives_the_same_run(
    policy, anchors, tmp_path, monkeypatch
):
    pipe, kept = pipeline("dit_guided"), []
    solve = token_fit.PairSums.solve
    monkeypatch.setattr(
        token_fit.PairSums, "solve", lambda sums, pairs: (kept.append(sums), solve(sums, pairs))
    )
    given = items("dit_guided", 6), None, (), 2, 3
    made = fit_tokens(pipe, rows_for(pipe, anchors), policy, *given, **settings("dit_guided"))
    start = TokenRows(STEPS, anchors, 2, policy).pairs
    errors = [
        sum(
            float(v @ gram @ v)
            for branch, own in enumerate(pairs)
            for gram, (past, gain) in zip(kept[-1].grams[branch], own.tolist(), strict=True)
            for v in [torch.tensor([1.0, -past, -gain, past * gain], dtype=torch.float64)]
        )
        for pairs in (made.pairs, start)
    ]
    assert len(kept) == 2 and errors[0] < 0.95 * errors[1]
    touched = (made.pairs != start).any(-1).any(0).nonzero().flatten().tolist()
    steps = range(1, STEPS)
    assert touched == [s for s in steps if (s in anchors) == isinstance(policy, PruningPolicy)]
    save_predictor(made, made.spec, tmp_path / "fit")
    found = []
    for predictor in (made, str(tmp_path / "fit")):
        with forecasting(pipe, predictor) as attached:
            found.append(run("dit_guided", pipe))
            assert type(attached.session.runner.policy) is type(policy)
    assert torch.equal(*found)
    assert load_predictor(tmp_path / "fit").policy == policy.describe()


def test_as_much_of_the_fit_is_kept_as_leaves_the_least_error_of_other_samples():
    pipe, policy = pipeline("dit_guided"), LatticePolicy(0.5)
    given = items("dit_guided", 4)
    call = settings("dit_guided")
    whole = fit_tokens(pipe, rows_for(pipe, ANCHORS), policy, given[:2], **call)
    errors, start = {}, torch.tensor([1.0, 0.0], dtype=torch.float64)

    def final(predictor: TokenRows | None) -> Tensor:
        if predictor is None:
            return generate_batch(pipe, given[2:], output_type="latent", **call)[0]
        with forecasting(pipe, predictor):
            return generate_batch(pipe, given[2:], output_type="latent", **call)[0]

    full, other = final(None), TokenRows(STEPS, ANCHORS, 2, policy)
    other.spec = whole.spec
    for share in token_fit.SHARES:
        other.pairs.copy_(start + share * (whole.pairs - start))
        squares = (final(other) - full).double().flatten(1).square().mean(1)
        errors[share] = float(squares.log10().mean())
    best = min(errors, key=errors.get)
    made = fit_tokens(pipe, rows_for(pipe, ANCHORS), policy, given[:2], choose_on=given[2:], **call)
    assert made.spec.metrics == {"share_of_fit": best}
    torch.testing.assert_close(made.pairs, start + best * (whole.pairs - start))
    assert len(set(errors.values())) == 3


@pytest.mark.fault
def test_what_does_not_go_with_a_lattice_is_refused():
    for wrong in (0.3, 0.0, math.nan):
        with pytest.raises(ValueError, match="expected one of 0.25, 0.5, 1.0"):
            LatticePolicy(wrong)
    with pytest.raises(ValueError, match="expected finite numbers"):
        Innovation(math.inf, 1.0)
    innovation = Innovation(1.0, 1.0)
    innovation.pairs = torch.ones(1, STEPS, 2, dtype=torch.float64)
    with pytest.raises(ValueError, match="found branch 1 at step 2.*1 branch"):
        innovation.at((0, 1), 2)
    with pytest.raises(ValueError, match="class 'Other', expected one of"):
        TokenRows(STEPS, ANCHORS, 2, {"class": "Other"})
    with pytest.raises(ValueError, match="does not take"):
        TokenRows(STEPS, ANCHORS, 2, {"class": "LatticePolicy", "seed": 1})
    pipe = pipeline("flux")
    with forecasting(pipe, Reuse(), ANCHORS, tokens=LatticePolicy()) as attached:
        with pytest.raises(UnsupportedHost, match=r"lie on the grid None, expected frames"):
            _without_grid(attached, pipe)


def _without_grid(attached: Any, pipe: Any) -> Tensor:
    """A run whose layout tells no grid."""
    (expert,) = attached.session.experts.values()
    found = expert.layout
    expert.layout = lambda *args: dataclasses.replace(found(*args), grid=None)
    return run("flux", pipe)


@pytest.mark.fault
def test_a_fitted_policy_runs_on_its_own_model_and_run_only():
    pipe = pipeline("dit_guided")
    made = TokenRows(STEPS, ANCHORS, 2, LatticePolicy(0.25))
    made.spec = spec_for(pipe, anchors=ANCHORS, tap="hidden")
    with pytest.raises(PredictorMismatch, match="LatticePolicy of its own; leave tokens= out"):
        attach(pipe, made, tokens=RandomPolicy(2))
    with pytest.raises(ValueError, match="fitted with a LatticePolicy, which runs in forecasting"):
        Forecaster(made, "hidden", ANCHORS)
    with forecasting(pipe, made):
        with pytest.raises(PredictorMismatch, match="steps"):
            run("dit_guided", pipe, num_inference_steps=6)
        with pytest.raises(PredictorMismatch, match="guidance"):
            run("dit_guided", pipe, guidance_scale=2.0)
    made.spec = spec_for(pipe, anchors=ANCHORS, tap="hidden", latent_shapes=((1, 8, 8),))
    with forecasting(pipe, made), pytest.raises(PredictorMismatch, match="latents"):
        run("dit_guided", pipe)
    rows = L2P(STEPS, ANCHORS, 2)
    with pytest.raises(ValueError, match="rows without a spec"):
        fit_tokens(pipe, rows, LatticePolicy(), items("dit_guided", 2))
    rows.spec = spec_for(pipe, anchors=ANCHORS)
    with pytest.raises(ValueError, match="rows of the tap 'output'"):
        fit_tokens(pipe, rows, LatticePolicy(), items("dit_guided", 2))
