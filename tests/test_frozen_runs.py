"""A run that forecasts can be differentiated in the predictor, the network standing still."""

from typing import Any

import pytest
import torch
from tiny_hosts import items, pipeline, settings

from foreseer.evaluation.measure import log_error
from foreseer.predictors.lesa import LesaPredictor
from foreseer.predictors.rules import Taylor
from foreseer.training.disca.replayed_runs import final_latents
from foreseer.training.lesa.lesa_samples import collect

STEPS = 8
SIGMAS = [1 - step / STEPS for step in range(STEPS)]


def small_lesa(**changes: Any) -> LesaPredictor:
    """One that forecasts unlike reuse."""
    options = {"boundaries": (0.6,), "taps": (2, 3), "hidden": (4,), "grid_size": 3} | changes
    predictor = LesaPredictor(SIGMAS, 2, **options)
    with torch.no_grad():
        predictor.weight.normal_(std=0.2)
    return predictor


def run(pipe: Any, predictor: Any, anchors: tuple[int, ...]) -> torch.Tensor:
    call = settings("dit_guided", STEPS)
    return final_latents(pipe, predictor, "hidden", anchors, items("dit_guided", 2), **call)


@pytest.mark.parametrize("feedback", [True, False])
def test_the_latents_are_those_of_a_deployed_run(feedback):
    pipe, predictor, anchors = pipeline("dit_guided"), small_lesa(feedback=feedback), (0, 1, 4)
    found = run(pipe, predictor, anchors)
    call, batch = settings("dit_guided", STEPS), items("dit_guided", 2)
    deployed = collect(pipe, predictor, "hidden", anchors, batch, **call).final
    torch.testing.assert_close(found.detach(), deployed, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("feedback", [True, False])
def test_without_anchors_after_forecasts_the_gradient_is_the_whole_one(feedback):
    pipe, predictor, anchors = pipeline("dit_guided"), small_lesa(feedback=feedback), (0, 1, 2)
    pipe.transformer.double()
    target = torch.zeros_like(run(pipe, predictor, anchors))

    def error() -> torch.Tensor:
        return log_error(run(pipe, predictor, anchors), target).mean()

    error().backward()
    for number in range(3):
        weight = predictor.weight
        slope, place = float(weight.grad[0, 1, number]), (0, 1, number)
        sides = []
        for sign in (1, -1):
            with torch.no_grad():
                weight[place] += sign * 1e-2
            sides.append(float(error().detach()))
            with torch.no_grad():
                weight[place] -= sign * 1e-2
        assert slope == pytest.approx((sides[0] - sides[1]) / 2e-2, rel=2e-2, abs=1e-4)
        assert slope != 0


def test_shared_rows_change_no_gradient():
    pipe, predictor = pipeline("dit_guided"), small_lesa()
    gradients = []
    for shared in (False, True):
        predictor.zero_grad()
        if shared:
            with predictor.shared_rows():
                run(pipe, predictor, (0, 1, 4)).square().mean().backward()
        else:
            run(pipe, predictor, (0, 1, 4)).square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in predictor.parameters()])
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-7)
    assert predictor.shared is None


def test_the_network_gets_no_gradient_and_stays_trainable():
    pipe = pipeline("dit_guided")
    frozen = next(pipe.transformer.parameters()).requires_grad_(False)
    run(pipe, small_lesa(), (0, 1, 4)).sum().backward()
    assert all(parameter.grad is None for parameter in pipe.transformer.parameters())
    trainable = [p for p in pipe.transformer.parameters() if p.requires_grad]
    assert not frozen.requires_grad
    assert len(trainable) == len(list(pipe.transformer.parameters())) - 1


def test_a_predictor_without_parameters_is_refused():
    with pytest.raises(ValueError, match="do not depend on the predictor"):
        run(pipeline("dit_guided"), Taylor(1), (0, 1, 4))


def test_a_scheduler_that_cuts_the_graph_is_refused():
    pipe = pipeline("dit_guided")
    pipe.scheduler.step = torch.no_grad()(pipe.scheduler.step)
    with pytest.raises(ValueError, match="FlowMatchEulerDiscreteScheduler works without gradients"):
        run(pipe, small_lesa(), (0, 1, 4))
