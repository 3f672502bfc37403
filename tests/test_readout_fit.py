"""A readout fit solves what it says, walks the very runs that are deployed, and can be resumed."""

import copy
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import lightning
import pytest
import readout_training
import torch
from families import FAMILIES, MORE, call
from lightning.pytorch.callbacks import ModelCheckpoint
from readout_cases import (
    ANCHORS,
    Visits,
    deployed_states,
    fit,
    module_of,
    recorded,
    remember,
    trainer_of,
)
from test_fits import SCHEDULERS
from tiny_hosts import STEPS, items, pipeline, seeded, settings

from foreseer.checkpoints.format import load_predictor
from foreseer.checkpoints.spec import PredictorMismatch
from foreseer.evaluation.measure import References, generate, predictor_errors
from foreseer.integration.forecasting import forecasting
from foreseer.predictors.readout import STORED, Readout, neighbourhood, normalised
from foreseer.training.export import export_command, export_predictor
from foreseer.training.gauss_newton import DIFFERENCE, Quadratics, linearise, moved
from foreseer.training.gram_fit import ONE_PARAMETER
from foreseer.training.readout import segment as readout_segment
from foreseer.training.readout import segment as readout_sums
from foreseer.training.readout.part import folds_of
from foreseer.training.readout.refine import readout_moves
from foreseer.training.readout.segment import NUM_FOLDS, Part, SegmentSums, Total, fit_segment
from foreseer.trajectories.datamodule import ItemsDataModule
from foreseer.trajectories.prompts import Item
from foreseer.trajectories.recorder import record
from foreseer.trajectories.recording import Recording

HERE = Path(__file__).parent
EVERY = FAMILIES | MORE
GRID = (1, 4, 5)
WIDTH, PATCH, TRAJECTORIES = 6, 4, 10

# ----------------------------------------------------------------------------- one segment, by hand


def parts_of(reading, noise: float = 0.0, constant: float = 0.0, guided: float = 1.0):
    """Trajectories whose wanted forecast is rows, what `reading` makes of tokens, and noise."""
    tokens = GRID[0] * GRID[1] * GRID[2]
    weights = torch.tensor([0.5, -0.25, 1.5, 0.0])
    found = []
    for number in range(0, TRAJECTORIES, 2):
        draw = seeded(number)
        hidden = normalised(torch.randn(2, tokens, WIDTH, generator=draw))
        outputs = torch.randn(4, 2, tokens, PATCH, generator=draw)
        wanted = torch.einsum("q,qnmp->nmp", weights, outputs) + reading(hidden)
        wanted = wanted + guided * constant
        wanted = wanted + noise * torch.randn(wanted.shape, generator=draw)
        folds = (number % NUM_FOLDS, (number + 1) % NUM_FOLDS)
        found.append(Part(hidden, outputs, wanted, outputs[-2:].sum(0), folds))
    return found, weights


def solved(parts, grid, rank=WIDTH, guided=1.0):
    formulas = {
        "near": torch.tensor([0.4, -0.2, 1.4, 0.1]),
        "far": torch.tensor([0.0, 0.0, 1.0, 0]),
    }
    return fit_segment(lambda: iter(parts), formulas, rank, grid, lambda tensors: None, guided)


@pytest.fixture
def without_ridges(monkeypatch):
    """Nearly nothing shrinks what is found; normalised channels sum to 0, so some ridge must be."""
    monkeypatch.setattr(readout_segment, "ROWS_RIDGE", 1e-9)
    monkeypatch.setattr(readout_segment, "DIRECTIONS_RIDGE", 1e-5)
    monkeypatch.setattr(readout_sums, "STRENGTHS", (1e-9,))


def read_by(found, hidden, grid):
    """What the segment's readout, as stored, makes of tokens."""
    found = found.segment
    values = hidden @ found.inner.float().T
    near = values if grid is None else neighbourhood(values, grid)
    outer = found.outer.to(STORED).float().permute(0, 2, 3, 1).flatten(1)
    return near @ outer.T + found.constant.float()


def alone(hidden):
    kernel = torch.randn(PATCH, WIDTH, generator=seeded(70))
    return hidden @ kernel.T


def around(hidden):
    kernel = torch.randn(PATCH, 9 * WIDTH, generator=seeded(71))
    return neighbourhood(hidden, GRID) @ kernel.T


@pytest.mark.parametrize(("reading", "grid"), [(alone, None), (alone, GRID), (around, GRID)])
def test_what_is_linear_in_the_hidden_state_is_found_to_the_rounding_of_what_is_stored(
    reading, grid, without_ridges
):
    # without neighbours there are as many directions as elements, chosen without the constant
    constant = 0.0 if grid is None else 0.3
    parts, weights = parts_of(reading, constant=constant, guided=0.7)
    found = solved(parts, grid, guided=0.7)
    assert found.origin == "near" and found.strength == 1e-9 and found.gain_db > 40
    start = torch.tensor([0.4, -0.2, 1.4, 0.1])
    # the rows make up for the rounding of V, of which they know nothing
    torch.testing.assert_close(start + found.segment.delta.float(), weights, atol=2e-3, rtol=0)
    torch.testing.assert_close(
        found.segment.constant.float(), torch.full((PATCH,), constant), atol=5e-3, rtol=0
    )
    for part in parts:
        expected = reading(part.hidden) + constant
        error = (read_by(found, part.hidden, grid) - expected).norm() / expected.norm()
        assert error < 2**-7  # each of the numbers of U and V is off by 2^-9 at most


@pytest.mark.parametrize(("reading", "grid"), [(alone, None), (around, GRID)])
def test_the_ridges_take_little_of_what_is_linear(reading, grid):
    parts, _ = parts_of(reading)
    found = solved(parts, grid)
    assert found.strength == min(readout_sums.STRENGTHS)
    for part in parts:
        expected = reading(part.hidden)
        error = (read_by(found, part.hidden, grid) - expected).norm() / expected.norm()
        assert error < 0.02


def test_the_directions_are_those_that_are_read(without_ridges):
    drawn = torch.randn(WIDTH, 2, generator=seeded(9))
    two = torch.linalg.qr(drawn - drawn.mean(0))[0].T  # normalised channels sum to 0
    kernel = torch.randn(PATCH, 2, generator=seeded(10))
    parts, _ = parts_of(lambda hidden: hidden @ two.T @ kernel.T)
    found = solved(parts, None, rank=2)
    inner = found.segment.inner.float()
    basis = torch.linalg.qr((inner - inner.mean(1, keepdim=True)).T)[0]
    angles = torch.linalg.svdvals(basis.T @ two.T)
    torch.testing.assert_close(angles, torch.ones(2), atol=1e-3, rtol=0)
    power = (
        torch.cat([part.hidden @ found.segment.inner.float().T for part in parts])
        .square()
        .mean((0, 1))
    )
    torch.testing.assert_close(power, torch.ones(2), atol=0.05, rtol=0)


@pytest.mark.parametrize("grid", [None, GRID])
def test_where_nothing_can_be_predicted_nothing_is_read(grid):
    parts, _ = parts_of(lambda hidden: torch.zeros(*hidden.shape[:2], PATCH), noise=1.0)
    found = solved(parts, grid)
    assert found.strength in (max(readout_sums.STRENGTHS), float("inf"))
    assert 0 <= found.gain_db < 1e-3  # noise on the left-out folds may agree with a trace of it
    for part in parts:
        assert read_by(found, part.hidden, grid).square().mean() < 1e-3  # of noise of size 1
    if grid is not None:
        assert found.strength == float("inf")
        assert not found.segment.outer.any() and not found.segment.constant.any()


def test_every_trajectory_counts_by_its_decibels(without_ridges):
    parts, _ = parts_of(alone)
    loud = [
        Part(p.hidden, 100 * p.outputs, 100 * p.wanted, 100 * p.newest, p.folds)
        if number == 0
        else p
        for number, p in enumerate(parts)
    ]
    part = parts[1]
    expected = alone(part.hidden)
    error = (read_by(solved(loud, None), part.hidden, None) - expected).norm() / expected.norm()
    assert error < 0.8  # by squares, the loud one would rule: it asks for a hundred times as much
    first = parts[0].hidden
    wanted = 100 * alone(first)
    assert (read_by(solved(loud, None), first, None) - wanted).norm() / wanted.norm() > 0.5


# ----------------------------------------------------------------------------------------- the sums


def random_sums(numbers, width=5, outputs=3, patch=2, tokens=7):
    sums = SegmentSums.empty(width, outputs, patch)
    for number in numbers:
        draw = seeded(number)
        hidden = torch.randn(tokens, width, generator=draw, dtype=torch.float64)
        u = torch.randn(outputs + 1, tokens, patch, generator=draw, dtype=torch.float64)
        sums.add(number % NUM_FOLDS, hidden, u, 1.0 + number)
    return sums


def test_the_sums_of_two_halves_are_those_of_the_whole():
    whole, first, second = random_sums(range(6)), random_sums(range(3)), random_sums(range(3, 6))
    for all_of_it, one, other in zip(whole.tensors, first.tensors, second.tensors, strict=True):
        torch.testing.assert_close(one + other, all_of_it, atol=1e-12, rtol=1e-12)
    for tensor, other in zip(first.tensors, second.tensors, strict=True):
        tensor.add_(other)  # as processes do
    one, other = (readout_sums.solve(each, 1e-2) for each in (first, whole))
    assert one.strength == other.strength
    torch.testing.assert_close(one.readout, other.readout, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("strength", [1e-3, 0.3, 10.0])
def test_rows_and_readout_together_are_a_dense_ridge_regression(strength):
    sums, ridge = random_sums(range(6)), 0.05
    width, outputs, patch, tokens = 5, 3, 2, 7
    rows, targets = [], []
    for number in range(6):
        draw = seeded(number)
        hidden = torch.randn(tokens, width, generator=draw, dtype=torch.float64)
        u = torch.randn(outputs + 1, tokens, patch, generator=draw, dtype=torch.float64)
        for p in range(patch):
            block = torch.zeros(tokens, width, patch, dtype=torch.float64)
            block[..., p] = hidden
            known = torch.cat([u[:-1, :, p].T, block.flatten(1)], 1)
            rows.append((1.0 + number) ** 0.5 * known)
            targets.append((1.0 + number) ** 0.5 * u[-1, :, p])
    design, target = torch.cat(rows), torch.cat(targets)
    squares = design.square().sum(0)
    shrink = torch.cat([torch.full((outputs,), ridge), torch.full((width * patch,), strength)])
    extra = torch.diag((shrink.double() * squares).sqrt())
    padded = torch.cat([target, torch.zeros(len(extra), dtype=torch.float64)])
    dense = torch.linalg.lstsq(torch.cat([design, extra]), padded[:, None]).solution[:, 0]
    total = Total.of(sums, list(range(NUM_FOLDS)))
    delta, readout = total.solve(ridge, strength)
    # lstsq, which does not square the condition of the design, is good to about 1e-9 of it
    torch.testing.assert_close(delta, dense[:outputs], atol=1e-7, rtol=0)
    torch.testing.assert_close(readout.flatten(), dense[outputs:], atol=1e-7, rtol=0)
    left = float((target - design @ dense).square().sum())
    assert total.error(delta, readout) == pytest.approx(left, rel=1e-7)


def test_trajectories_of_one_prompt_are_in_one_fold():
    listed = [Item(i, i, {"prompt": f"number {i % 7}"}) for i in range(21)]
    folds = folds_of(listed)
    for item in listed:
        assert folds[item.index] == folds[item.index % 7]
    assert set(folds.values()) == set(range(NUM_FOLDS))
    few = folds_of([Item(i, i, {"class_labels": i % 2}) for i in range(10)])
    assert [few[i] for i in range(10)] == [i % NUM_FOLDS for i in range(10)]


# ------------------------------------------------------------ the walk is the run that is deployed


def agrees(module, visits) -> None:
    """The deployed runs pass through the very latents that the walk fitted the segments on."""
    references = References(module.recording, list(module.recording.items), 2)
    visited = visits.states
    segments = [anchor for anchor, _ in module.parts.segments]
    assert sorted(visited) == segments
    for number, states in enumerate(deployed_states(module.pipe, module.predictor, references)):
        for anchor in segments:
            assert torch.equal(states[anchor], visited[anchor][number]), anchor


def improves(module) -> None:
    """On the trajectories it was fitted on, the readout is better than its formulas."""
    references = References(module.recording, list(module.recording.items), 2)
    rows, both = (
        predictor_errors(
            module.pipe,
            predictor,
            "output",
            module.anchors,
            references.batches,
            references.finals,
            **references.settings,
        )
        for predictor in (module.rows, module.predictor)
    )
    assert both.mean() < rows.mean()


@pytest.mark.parametrize(
    ("name", "anchors"),
    [("euler", [0, 1, 4, 6]), ("ddim", [0, 2, 5]), ("dpm", [0, 1, 2]), ("unipc", [0, 2, 5])],
)
def test_the_walk_visits_what_a_deployed_run_passes_under_every_sampler(
    name, anchors, tmp_path, monkeypatch
):
    pipe = pipeline("dit_guided", SCHEDULERS[name]())
    recording = recorded(pipe, items("dit_guided", 6), tmp_path, settings("dit_guided"))
    visits = Visits(monkeypatch)
    module = fit(module_of(recording, pipe, anchors))
    agrees(module, visits)
    improves(module)
    assert "forward" not in vars(pipe.transformer) and "step" not in vars(pipe.scheduler)


HOSTS = {
    "flux": "embedded guidance",
    "flux_cfg": "embedded guidance and two calls",
    "sd3": "batched guidance",
    "sana": "DPM++ on flow",
    "wan": "video, two calls, UniPC on flow",
    "wan22": "two transformers",
    "ltx": "video tokens",
    "cogvideox": "video, DDIM",
    "hunyuan_video15": "a guider, no guidance_scale",
    "zimage": "text among the tokens of the head, lists of samples",
    "flux_img2img": "fewer steps than num_inference_steps",
}


QUICK = ("flux", "sd3", "wan22")


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in HOSTS]
)
def test_the_walk_visits_what_a_deployed_run_passes_on_every_kind_of_host(
    name, tmp_path, monkeypatch
):
    family, pipe = EVERY[name], EVERY[name].build()
    listed = [Item(i, i, family.inputs(i)) for i in range(6)]
    remember(listed, monkeypatch)
    recording = recorded(pipe, listed, tmp_path, family.settings)
    header = Recording(recording).header
    anchors = sorted({0, 2, 4, *header.expert_steps})
    visits = Visits(monkeypatch)
    module = fit(module_of(recording, pipe, anchors))
    agrees(module, visits)
    improves(module)
    assert module.predictor.neighbours


@pytest.mark.parametrize("name", ["sd3", "wan", "zimage"])
def test_guidance_in_bfloat16_is_a_fixed_combination_up_to_rounding(name, tmp_path, monkeypatch):
    family, pipe = EVERY[name], EVERY[name].build()
    pipe.transformer.to(torch.bfloat16)
    listed = [Item(i, i, _rounded(family.inputs(i))) for i in range(4)]
    remember(listed, monkeypatch)
    recording = recorded(pipe, listed, tmp_path, family.settings)
    visits = Visits(monkeypatch)
    module = fit(module_of(recording, pipe))
    agrees(module, visits)
    improves(module)


def _rounded(inputs):
    if isinstance(inputs, dict):
        return {name: _rounded(value) for name, value in inputs.items()}
    if isinstance(inputs, list):
        return [_rounded(value) for value in inputs]
    floating = isinstance(inputs, torch.Tensor) and inputs.is_floating_point()
    return inputs.to(torch.bfloat16) if floating else inputs


def test_what_is_wanted_lands_the_next_state_on_the_recorded_one(tmp_path, monkeypatch):
    """The state a segment ends in is the recorded one, less what its readout could not predict."""
    pipe = pipeline("dit_guided", SCHEDULERS["unipc"]())
    recording = recorded(pipe, items("dit_guided", 6), tmp_path, settings("dit_guided"))
    visits = Visits(monkeypatch)
    kept = {}
    module = module_of(recording, pipe, [0, 2, 5])
    keep = module._keep

    def keeping(found, started, anchor, end):
        keep(found, started, anchor, end)
        kept[anchor] = [
            _left(module, part, found, anchor, end) for part in module._parts(anchor, end)
        ]

    monkeypatch.setattr(module, "_keep", keeping)
    fit(module)
    layout = next(iter(module.batches[0][1].layouts.values()))
    source = Recording(recording)
    for anchor, end in ((0, 2), (2, 5)):
        response = float(module.walk.sampler.response[end, anchor + 1 : end].sum())
        for number, (batch, _) in enumerate(module.batches):
            target = torch.stack([source.load(i.index, ["states"])["states"][end] for i in batch])
            reached = visits.states[end][number]
            predicted = layout.place(response * kept[anchor][number])
            torch.testing.assert_close(target - reached, predicted, atol=2e-4, rtol=0)


def _left(module, part, found, anchor, end):
    """What the deployed rows and readout of a segment leave of what is wanted, token by token."""
    layout = next(iter(module.batches[0][1].layouts.values()))
    rows = torch.einsum("q,qnmp->nmp", (found.start + found.delta).float(), part.outputs)
    guided = float(module.parts.guidance(anchor).sum())
    outer = found.outer.to(STORED).float().permute(0, 2, 3, 1).flatten(1)
    near = neighbourhood(part.hidden @ found.inner.float().T, layout.grid)
    return part.wanted - rows - near @ outer.T - guided * found.constant.float()


def test_held_out_trajectories_gain_too(tmp_path):
    pipe = pipeline("dit_guided")
    recording = recorded(pipe, items("dit_guided", 16), tmp_path, settings("dit_guided"))
    module = fit(module_of(recording, pipe), validation_fraction=0.25)
    assert module.validation.items and bool(module.finished)
    assert module.val_error < module.start_error - 1
    assert module.spec().num_trajectories == len(module.calibration.items)


# ------------------------------------------------------------------------------------- refinement


@pytest.mark.parametrize("name", ["flux_cfg", "sd3", "wan22"])
def test_replayed_runs_are_the_runs_that_a_moved_readout_really_makes(name, tmp_path, monkeypatch):
    family, pipe = EVERY[name], EVERY[name].build()
    listed = [Item(i, i, family.inputs(i)) for i in range(6)]
    remember(listed, monkeypatch)
    recording = recorded(pipe, listed, tmp_path, family.settings)
    anchors = sorted({0, 2, 4, *Recording(recording).header.expert_steps})
    module = fit(module_of(recording, pipe, anchors))
    predictor, references = module.predictor, module.calibration
    moves = readout_moves(module.recording, predictor, references.items)
    grown = [move for move in moves if move.gain]
    assert grown and all(bool(predictor.outer[move.segment].count_nonzero()) for move in grown)
    moves = [*moves[:: max(1, len(moves) // 6)], *grown]
    batch, final = references.batches[0], references.finals[:2]
    before = {name: tensor.clone() for name, tensor in predictor.state_dict().items()}
    found = linearise(pipe, predictor, moves, "output", batch, final, **references.settings)
    after = predictor.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    fine = copy.deepcopy(predictor)
    fine.outer = fine.outer.float()  # bfloat16 does not tell of so small a growth

    def run(one: Readout) -> torch.Tensor:
        made = generate(pipe, one, "output", batch, anchors, **references.settings)
        return made.flatten(1).double()

    base, share = run(predictor), torch.tensor([DIFFERENCE], dtype=torch.float64)
    error = base - final.flatten(1).double()
    columns = [(run(moved(fine, [move], share)) - base) / DIFFERENCE for move in moves]
    linear = torch.einsum("nm,nmp->np", error, torch.stack(columns, -1)) / error.shape[1]
    torch.testing.assert_close(found.constant, error.square().mean(1))
    off = 1e-2 * float(linear.abs().max())
    torch.testing.assert_close(found.linear, linear, rtol=1e-2, atol=off)


def test_a_refinement_sees_other_trajectories_and_lowers_the_error(tmp_path):
    pipe = pipeline("dit_guided")
    recording = recorded(pipe, items("dit_guided", 32), tmp_path, settings("dit_guided"))
    module = fit(module_of(recording, pipe, refine=1), validation_fraction=0.25)
    parts = module.calibration, module.refined, module.choosing, module.validation
    assert [len(part.items) for part in parts] == [17, 3, 4, 8]
    assert len({item for part in parts for item in part.items}) == 32
    assert module.spec().num_trajectories == 24
    assert float(module.trainer.callback_metrics["train/refine_gain_db"]) > 0.1
    assert module.current_epoch == len(ANCHORS) + 1
    assert "forward" not in vars(pipe.transformer) and "step" not in vars(pipe.scheduler)


def test_a_step_that_does_worse_is_not_taken(guided, monkeypatch):
    states = []
    for size in (0.0, 1e3):
        monkeypatch.setattr(
            Quadratics, "solve", lambda self, ridge, size=size: size + 0 * self.linear.mean(0)
        )
        module = module_of(guided, pipeline("dit_guided"), refine=1)
        states.append(fit(module, validation_fraction=0.25).predictor.state_dict())
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_what_a_refinement_cannot_do_is_refused(guided):
    pipe = pipeline("dit_guided")
    with pytest.raises(ValueError, match="refine is 1 beside keep_sums, expected 0"):
        module_of(guided, pipe, refine=1, keep_sums=True)
    with pytest.raises(ValueError, match="found 4 trajectories to fit on, expected 8 at least"):
        fit(module_of(guided, pipe, refine=1), validation_fraction=0.66)
    module = module_of(guided, pipe, refine=1)
    with pytest.raises(ValueError, match=r"max_epochs is 3, .* and 1 refine them"):
        trainer_of(max_epochs=3).fit(module, datamodule=data_of(guided))


# ---------------------------------------------------------------------------------- interruptions


@pytest.fixture(scope="module")
def guided(tmp_path_factory):
    """A recording of the guided DiT."""
    folder = tmp_path_factory.mktemp("readout")
    pipe = pipeline("dit_guided")
    return recorded(pipe, items("dit_guided", 12), folder / "r", settings("dit_guided"))


class Killed(lightning.Callback):
    """Interrupts a fit when a segment starts."""

    def __init__(self, epoch: int, error: type[BaseException] = KeyboardInterrupt) -> None:
        self.epoch, self.error = epoch, error

    def on_train_batch_start(self, trainer, *arguments) -> None:
        """Interrupt."""
        if trainer.current_epoch == self.epoch:
            raise self.error


def data_of(recording: str) -> ItemsDataModule:
    return ItemsDataModule(recording, 0.25, seed=4, batch_size=2)


@pytest.mark.parametrize(("after", "refine"), [(1, 0), (2, 0), (2, 1)])
def test_a_fit_that_was_killed_goes_on_to_the_same_predictor(after, refine, guided, tmp_path):
    whole = module_of(guided, pipeline("dit_guided"), refine=refine)
    trainer_of().fit(whole, datamodule=data_of(guided))
    pipe = pipeline("dit_guided")
    module = module_of(guided, pipe, refine=refine)
    saving = ModelCheckpoint(tmp_path, "last", every_n_epochs=1, save_on_train_epoch_end=True)
    with pytest.raises(SystemExit):
        trainer_of(saving, Killed(after), enable_checkpointing=True).fit(
            module, datamodule=data_of(guided)
        )
    assert not module.finished
    with pytest.raises(ValueError, match="not all segments of the readout are fitted"):
        export_predictor(module, tmp_path / "p", {})
    with pytest.raises(ValueError, match="from before the last segment was fitted"):
        export_command(str(tmp_path / "last.ckpt"), str(tmp_path / "p"))
    resumed = module_of(guided, pipeline("dit_guided"), refine=refine)
    trainer = trainer_of()
    trainer.fit(resumed, datamodule=data_of(guided), ckpt_path=tmp_path / "last.ckpt")
    assert trainer.current_epoch == len(ANCHORS) + refine
    one, other = whole.state_dict(), resumed.state_dict()
    assert one.keys() == other.keys() and bool(one["finished"])
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def test_a_fit_that_was_killed_in_its_refinement_is_whole_and_goes_on(guided, tmp_path):
    whole = module_of(guided, pipeline("dit_guided"), refine=2)
    trainer_of().fit(whole, datamodule=data_of(guided))
    module = module_of(guided, pipeline("dit_guided"), refine=2)
    saving = ModelCheckpoint(tmp_path, "last", every_n_epochs=1, save_on_train_epoch_end=True)
    killed = trainer_of(saving, Killed(len(ANCHORS) + 1), enable_checkpointing=True)
    with pytest.raises(SystemExit):
        killed.fit(module, datamodule=data_of(guided))
    export_command(str(tmp_path / "last.ckpt"), str(tmp_path / "p"))
    assert load_predictor(tmp_path / "p").spec.anchors == tuple(ANCHORS)
    resumed = module_of(guided, pipeline("dit_guided"), refine=2)
    trainer_of().fit(resumed, datamodule=data_of(guided), ckpt_path=tmp_path / "last.ckpt")
    one, other = whole.state_dict(), resumed.state_dict()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_fit_leaves_no_hook_and_no_folder(error, guided, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    pipe = pipeline("dit_guided")
    module = module_of(guided, pipe)
    with pytest.raises((SystemExit, RuntimeError)):
        trainer_of(Killed(1, error)).fit(module, datamodule=data_of(guided))
    assert "forward" not in vars(pipe.transformer) and "step" not in vars(pipe.scheduler)
    assert not list(tmp_path.glob("foreseer_readout_*"))
    fit(module_of(guided, pipe))
    assert not list(tmp_path.glob("foreseer_readout_*"))


# ------------------------------------------------------------------------------------------ export


@pytest.fixture(scope="module")
def exported(guided, tmp_path_factory):
    """A finished fit and the checkpoint Lightning wrote of it."""
    folder = tmp_path_factory.mktemp("exported")
    module = module_of(guided, pipeline("dit_guided"))
    trainer = trainer_of()
    trainer.fit(module, datamodule=data_of(guided))
    trainer.save_checkpoint(folder / "last.ckpt")
    return module, folder / "last.ckpt"


def test_a_fit_is_exported_bit_for_bit_from_its_checkpoint_and_its_module(exported, tmp_path):
    module, checkpoint = exported
    export_command(str(checkpoint), str(tmp_path / "command"))
    export_predictor(module, tmp_path / "module", {})
    for folder in ("command", "module"):
        loaded = load_predictor(tmp_path / folder)
        assert type(loaded) is type(module.predictor)
        expected, found = module.predictor.state_dict(), loaded.state_dict()
        assert all(torch.equal(expected[name], found[name]) for name in expected)
        assert (tmp_path / folder / "grams.safetensors").is_file()
    metrics = load_predictor(tmp_path / "command").spec.metrics
    assert metrics["val_error_db"] == float(module.val_error)
    assert metrics["val_error_db_start"] == float(module.start_error)
    pipe = pipeline("dit_guided")
    with forecasting(pipe, loaded) as attached:
        pipe([0, 2], output_type="latent", **settings("dit_guided"))
        assert attached.report().anchors == ANCHORS
        with pytest.raises(PredictorMismatch, match="guidance"):
            pipe([0, 2], output_type="latent", **{**settings("dit_guided"), "guidance_scale": 2.0})


def test_a_fit_without_held_out_trajectories_is_exported_too(guided, tmp_path):
    module = module_of(guided, pipeline("dit_guided"))
    trainer = trainer_of()
    trainer.fit(module, datamodule=ItemsDataModule(guided, 0.0, batch_size=2))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    export_command(str(tmp_path / "last.ckpt"), str(tmp_path / "p"))
    assert "val_error_db" not in load_predictor(tmp_path / "p").spec.metrics


# ---------------------------------------------------------------------------------------- refusals


def test_a_recording_without_states_is_refused(tmp_path):
    pipe = pipeline("dit_guided")
    call_settings = settings("dit_guided")
    folder = record(pipe, items("dit_guided", 2), tmp_path / "r", states=False, **call_settings)
    with pytest.raises(ValueError, match="holds no states; record it again with states: true"):
        module_of(str(folder), pipe)


def test_guidance_that_ends_in_mid_run_is_refused(tmp_path):
    family, pipe = EVERY["lumina2"], EVERY["lumina2"].build()
    listed = [Item(i, i, family.inputs(i)) for i in range(2)]
    truncated = family.settings | {"cfg_trunc_ratio": 0.5}
    recording = recorded(pipe, listed, tmp_path, truncated)
    with pytest.raises(ValueError, match=r"last \[8, \d\] steps; this fit is for guidance"):
        module_of(recording, pipe)


@pytest.mark.parametrize("name", ["qwenimage", "lumina2"])
def test_guidance_that_rescales_is_refused_and_the_pipeline_is_left_alone(
    name, tmp_path, monkeypatch
):
    family, pipe = EVERY[name], EVERY[name].build()
    listed = [Item(i, i, family.inputs(i)) for i in range(4)]
    remember(listed, monkeypatch)
    recording = recorded(pipe, listed, tmp_path, family.settings)
    before = call(family, pipe)
    with pytest.raises(ValueError, match="not a fixed combination of its branches"):
        fit(module_of(recording, pipe))
    assert "forward" not in vars(pipe.transformer) and "step" not in vars(pipe.scheduler)
    assert torch.equal(call(family, pipe), before)


def test_guidance_that_changes_from_step_to_step_is_refused(tmp_path, monkeypatch):
    family, pipe = EVERY["sd3"], EVERY["sd3"].build()

    class Fading(type(pipe)):
        @property
        def guidance_scale(self):
            return self._guidance_scale if (self.scheduler.step_index or 0) < 3 else 2.0

    pipe.__class__ = Fading
    listed = [Item(i, i, family.inputs(i)) for i in range(4)]
    remember(listed, monkeypatch)
    recording = recorded(pipe, listed, tmp_path, family.settings)
    with pytest.raises(
        ValueError, match=r"guidance combines the branches by \[-(1\.0|0\.9{6}).* step 5"
    ):
        fit(module_of(recording, pipe))
    assert "forward" not in vars(pipe.transformer) and "step" not in vars(pipe.scheduler)


def test_outputs_that_are_more_than_the_sampler_is_given_are_refused(tmp_path, monkeypatch):
    family, pipe = EVERY["pixart"], EVERY["pixart"].build()
    listed = [Item(i, i, family.inputs(i)) for i in range(4)]
    remember(listed, monkeypatch)
    recording = recorded(pipe, listed, tmp_path, family.settings)
    with pytest.raises(
        ValueError, match=r"shape \(2, 8, 4, 4\), what the sampler is given \(2, 4, 4, 4\)"
    ):
        fit(module_of(recording, pipe))


def test_fewer_epochs_than_segments_are_refused(guided):
    module = module_of(guided, pipeline("dit_guided"))
    with pytest.raises(
        ValueError, match="max_epochs is 2, and each of the 3 segments takes an epoch"
    ):
        trainer_of(max_epochs=2).fit(module, datamodule=data_of(guided))


def test_a_recording_of_another_number_of_steps_is_refused(guided):
    module = module_of(guided, pipeline("dit_guided"))
    object.__setattr__(module.recording.header, "recipe", _shorter(module.recording.header.recipe))
    with pytest.raises(ValueError, match=f"the run has {STEPS - 1} steps, the recording {STEPS}"):
        fit(module)


def _shorter(recipe):
    return recipe | {"settings": recipe["settings"] | {"num_inference_steps": STEPS - 1}}


# ---------------------------------------------------------------------------------- two processes


@pytest.mark.slow
def test_two_processes_fit_what_one_fits_and_their_checkpoint_is_exported(guided, tmp_path):
    paths = os.pathsep.join([str(HERE), *(path for path in sys.path if path)])
    environment = {**os.environ, "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    readout_training.main(guided, tmp_path / "one")
    script = [str(HERE / "readout_training.py"), guided, str(tmp_path / "two")]
    command = [sys.executable, *torchrun, *script]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert result.returncode == 0, result.stderr[-4000:]
    one, first, second = (
        torch.load(tmp_path / name) for name in ("one/0.pt", "two/0.pt", "two/1.pt")
    )
    assert one.keys() == first.keys() - {ONE_PARAMETER} == second.keys() - {ONE_PARAMETER}
    for name, tensor in one.items():
        assert torch.equal(first[name], second[name]), name  # bit for bit on both ranks
        gap = (first[name].double() - tensor.double()).abs().max()
        # float32 products added up in float64, in whatever order, are rounded by 1e-16 at most
        assert gap <= 1e-6 * tensor.double().abs().max(), name
    assert float(first["val_error"]) == pytest.approx(float(one["val_error"]), abs=0.05)
    export_command(str(tmp_path / "two" / "last.ckpt"), str(tmp_path / "p"))
    assert torch.equal(load_predictor(tmp_path / "p").outer, first["predictor.outer"])
