"""LESA starts at reuse, folds its fed-back forecasts onto anchors, and knows steps and stages."""

import pickle

import pytest
import torch
from lesa_cases import SIGMAS, STEPS, feature_at, history_on, lesa, lesa_values, step_at
from tiny_hosts import pipeline, run, spec_for

from foreseer.checkpoints.config import CheckpointError
from foreseer.checkpoints.format import load_predictor, save_predictor
from foreseer.checkpoints.spec import PredictorMismatch
from foreseer.integration.forecasting import forecasting
from foreseer.predictors.base import History, Step
from foreseer.predictors.gates import build_gate
from foreseer.predictors.kan import with_pykan
from foreseer.predictors.lesa import LesaPredictor
from foreseer.predictors.lesa_values import LesaValues
from foreseer.predictors.rules import Reuse

GATES = ["kan", "mlp", "table"]
ANCHORS = (0, 1, 4, 7)


# ------------------------------------------------------------------------------------- start


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("kind", ["feedback", "anchors", "values", "pykan"])
def test_it_starts_at_reuse_bit_for_bit(kind, gate, dtype):
    if kind == "values":
        predictor = lesa_values(None, gate=gate)
    else:
        predictor = lesa(None, gate=gate, feedback=kind != "anchors")
    if kind == "pykan":
        predictor = with_pykan(predictor, 0)
    for steps in ((0,), (0, 1, 4), (0, 1, 4, 7)):
        history = history_on(steps, predictor.window, dtype)
        for index in range(steps[-1] + 1, STEPS):
            for gradients in (False, True):
                with torch.set_grad_enabled(gradients):
                    found = predictor(history, step_at(index))
                assert found.dtype == dtype
                assert torch.equal(found, history.features[-1])


@pytest.mark.parametrize("kind", [lesa, lesa_values])
def test_at_the_start_every_gate_gets_a_gradient_soon(kind):
    predictor = with_pykan(kind(None), 0)
    optimizer = torch.optim.SGD(predictor.parameters(), lr=0.1)
    for _ in range(2):  # the first step moves the filter, the second the gate
        optimizer.zero_grad()
        queue = [feature_at(i) for i in range(4)]
        for index in (0, 5, 11):
            (predictor.correct(queue, step_at(index)) - feature_at(50)).square().mean().backward()
        optimizer.step()
    for name, parameter in predictor.named_parameters():
        if parameter.requires_grad and name.split(".")[-1] != "mask":
            assert parameter.grad is not None and bool(parameter.grad.any()), name


# --------------------------------------------------------------------------- padding, stages


@pytest.mark.parametrize("feedback", [True, False])
def test_the_oldest_feature_stands_for_those_missing(feedback):
    predictor = lesa(num_branches=1, feedback=feedback)
    step = step_at(1, (0,))
    total, offset = predictor.weight[0, 0, -2:].sum(), predictor.offset[0, 0]
    expected = feature_at(0) + predictor.alpha()[0, 1] * (total * feature_at(0) + offset)
    torch.testing.assert_close(predictor(history_on((0,)), step), expected)


def test_few_step_models_need_no_full_queue():
    predictor = LesaPredictor((1.0, 0.75, 0.5, 0.25))
    assert predictor.taps == (4, 8, 8)
    history = History()
    history.push(Step(0, 1.0, 4), feature_at(0))
    for index in (1, 2, 3):
        assert torch.equal(predictor(history, Step(index, 0.0, 4)), feature_at(0))


def test_stages_are_picked_by_sigma():
    predictor = lesa(None)
    sigmas = [1.0, 0.91, 0.9, 0.51, 0.5, 0.1, 0.0]
    assert [predictor.stage(sigma) for sigma in sigmas] == [0, 0, 1, 1, 2, 2, 2]
    assert lesa(None, boundaries=(), taps=(8,)).stage(0.3) == 0
    with torch.no_grad():
        predictor.weight[:, 1] = 1.0
    history = history_on((0,))
    moved = [not torch.equal(predictor(history, step_at(i)), feature_at(0)) for i in (1, 3)]
    assert moved == [False, True]


def test_the_gate_sees_the_differences_to_all_steps_and_the_end():
    predictor = lesa(num_branches=1, boundaries=(), taps=(4,))
    inputs = torch.tensor([[SIGMAS[5] - sigma for sigma in (*SIGMAS, 0.0)]])
    expected = predictor.gates[0][0](inputs)[0, 0]
    torch.testing.assert_close(predictor.alpha()[0, 5], expected)
    torch.testing.assert_close(predictor.alpha([5, 2])[0, 0], expected)


@pytest.mark.parametrize("hidden, grid_range", [((16,), 1.0), ((256, 256), 3.0)])
@pytest.mark.parametrize("gate", ["kan", "mlp"])
def test_gates_start_near_one(gate, hidden, grid_range):
    options = {"hidden": hidden, "grid_range": grid_range}
    alpha = LesaPredictor(SIGMAS, 2, gate=gate, **options).alpha().detach()
    assert float((alpha - 1).abs().max()) < 0.2


def test_the_perceptron_is_as_large_as_the_published_kan():
    kan = with_pykan(LesaPredictor(SIGMAS, boundaries=(), taps=(4,), hidden=(16, 16)), 0)
    size = sum(p.numel() for p in kan.gates.parameters() if p.requires_grad)
    perceptron = build_gate("mlp", STEPS + 1, (16, 16), 5, 3.0)
    assert 1.0 <= sum(p.numel() for p in perceptron.parameters()) / size < 1.1


def test_values_out_of_range_enter_as_its_edge():
    predictor = lesa_values(num_branches=1, bias=False)
    with torch.no_grad():
        predictor.weight.zero_()
    near, far = (predictor.correct([torch.full((1, 2), v)], step_at(5, (0,))) for v in (2.0, 9.0))
    torch.testing.assert_close(near - 2.0, far - 9.0, rtol=0, atol=1e-6)
    assert not torch.allclose(near, torch.tensor(2.0))


# -------------------------------------------------------------------------- rows kept, errors


def test_a_changed_parameter_changes_the_next_forecast():
    predictor = lesa().eval()
    history = history_on(ANCHORS)
    with torch.no_grad():
        before = predictor(history, step_at(9))
        assert torch.equal(predictor(history, step_at(9)), before)
        assert len(predictor.folded) == 1
        predictor.weight[:, 2, -1] += 1.0
        assert not torch.equal(predictor(history, step_at(9)), before)
        predictor.load_state_dict(lesa(None).state_dict())
        assert torch.equal(predictor(history, step_at(9)), history.features[-1])
        predictor.weight.data.fill_(0.3)  # which no version counter sees
        assert not torch.equal(predictor(history, step_at(9)), history.features[-1])


def test_curves_are_computed_once_per_anchor_and_stage_and_never_stale(monkeypatch):
    predictor = lesa_values().eval()
    calls = []
    whole = LesaValues._bend
    monkeypatch.setattr(
        LesaValues, "_bend", lambda self, *rest: calls.append(rest) or whole(self, *rest)
    )
    history = history_on((0, 1, 2), predictor.window)
    expected = [predictor(history, step_at(i)) for i in range(3, STEPS)]  # gradients are on
    calls.clear()
    with torch.no_grad():
        found = [predictor(history, step_at(i)) for i in range(3, STEPS)]
        assert len(calls) == 2  # stages 1 and 2
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
        other = History(4, [0, 1, 2], [], [feature + 1 for feature in history.features])
        assert not torch.equal(predictor(other, step_at(9)), found[6])
        assert len(calls) == 3
        predictor.curves[1][2].layers[0].base += 1.0
        assert not torch.equal(predictor(other, step_at(9)), predictor(history, step_at(9)))
        assert len(calls) == 5
        stale = predictor(history, step_at(9))
        predictor.curves[0][2].layers[0].base.data += 1.0
        assert not torch.equal(predictor(history, step_at(9)), stale)
    copied = pickle.loads(pickle.dumps(predictor))
    assert torch.equal(copied(history, step_at(9)), predictor(history, step_at(9)))


def test_what_it_cannot_forecast_is_refused():
    predictor = lesa()
    history = history_on((0, 2))
    for steps, step, message in [
        ((0, 2), step_at(5, (2,)), "branch 2"),
        ((0, 2), Step(5, 0.5, 13), "run of 13 steps"),
        ((2, 4), step_at(5), "from step 0 on"),
        ((0, 5), step_at(5), "earlier ones than 5"),
        ((), step_at(5), "holds the steps"),
    ]:
        with pytest.raises(ValueError, match=message):
            predictor(history_on(steps), step)
    assert lesa(feedback=False)(history_on((2, 4)), step_at(5)).shape == history.features[0].shape
    with pytest.raises(ValueError, match="queue is empty"):
        predictor.correct([], step_at(5))
    with pytest.raises(ValueError, match="queue is empty"):
        lesa_values().correct([], step_at(5))
    with pytest.raises(ValueError, match="holds the steps"):
        lesa_values()(History(), step_at(5))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"boundaries": (0.5, 0.9)}, "falling"),
        ({"boundaries": (0.5,)}, "one number of taps"),
        ({"taps": (4, 0, 8)}, "one number of taps"),
        ({"sigmas": ()}, "0 sigmas"),
        ({"num_branches": 0}, "0 branches"),
        ({"gate": "attention"}, "a gate of"),
        ({"gate": "mlp", "hidden": ()}, "at least one for the gate 'mlp'"),
        ({"grid_size": 0}, "0 intervals"),
        ({"grid_range": 0.0}, "positive range"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        lesa(None, **arguments)


def test_a_range_of_values_is_positive():
    with pytest.raises(ValueError, match="above 0"):
        lesa_values().set_value_range(torch.tensor([1.0, 0.0]))


# -------------------------------------------------------------------------- saved, attached


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("kind", [LesaPredictor, LesaValues])
def test_a_saved_predictor_loads_bit_for_bit(kind, gate, tmp_path):
    predictor = (lesa if kind is LesaPredictor else lesa_values)(gate=gate)
    spec = spec_for(pipeline("dit_guided"), sigmas=SIGMAS, anchors=ANCHORS)
    save_predictor(predictor, spec, tmp_path)
    loaded = load_predictor(tmp_path)
    assert type(loaded) is kind
    for name, tensor in predictor.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    history = history_on(ANCHORS, predictor.window)
    assert torch.equal(loaded(history, step_at(10)), predictor(history, step_at(10)))
    card = (tmp_path / "README.md").read_text()
    assert "\n- lesa\n" in card
    assert ("as curves of" in card) == (kind is LesaValues)


def test_a_spec_of_another_grid_is_refused(tmp_path):
    other = tuple(sigma * 0.99 for sigma in SIGMAS)
    spec = spec_for(pipeline("dit_guided"), sigmas=other, anchors=ANCHORS)
    with pytest.raises(CheckpointError, match="argument sigmas"):
        save_predictor(lesa(), spec, tmp_path)


@pytest.mark.parametrize("kind", [lesa, lesa_values])
def test_it_forecasts_in_a_pipeline(kind):
    pipe = pipeline("dit_guided")
    spec = spec_for(pipe)
    start, learned = (kind(seed, sigmas=spec.sigmas) for seed in (None, 3))
    outputs = []
    for predictor in (start, learned, learned.tabulated()):
        predictor.spec = spec
        with forecasting(pipe, predictor) as attached:
            outputs.append(run("dit_guided", pipe))
        assert tuple(attached.report().anchors) == (0, 1, 4)
    with forecasting(pipe, Reuse(), (0, 1, 4)):
        assert torch.equal(outputs[0], run("dit_guided", pipe))
    assert not torch.equal(outputs[1], outputs[0])
    torch.testing.assert_close(outputs[2], outputs[1], rtol=1e-5, atol=1e-5)
    with pytest.raises(PredictorMismatch, match="fitted for the anchors"):
        with forecasting(pipe, learned, (0, 2)):
            run("dit_guided", pipe)
