"""The few-step solvers run in the real pipeline classes, however those set their timesteps."""

import pytest
import torch
from families import FAMILIES, MORE, call

from foreseer.evaluation.solvers import SOLVERS, sampling_with, solver_scheduler
from foreseer.integration.host.clock import Clock
from foreseer.trajectories.prompts import Item, digest

EVERY = FAMILIES | MORE
HOSTS = (
    "auraflow",
    "chroma",
    "easyanimate",
    "ernie_image",
    "flux",
    "flux2",
    "flux_cfg",
    "flux_controlnet",
    "hunyuan_image",
    "hunyuan_video",
    "hunyuan_video15",
    "kandinsky5",
    "krea2",
    "ltx",
    "lumina",
    "lumina2",
    "ovis_image",
    "qwenimage",
    "sana",
    "sd3",
    "skyreels_v2",
    "wan",
    "wan22",
    "zimage",
)


def clocked(family, pipe, **changes):
    """Final latents, and the flow times of the run."""
    clock = Clock(pipe.scheduler, lambda sigmas: None, lambda *step: None)
    try:
        return call(family, pipe, **changes), clock.sigmas
    finally:
        clock.detach()


@pytest.mark.parametrize("name", HOSTS)
def test_every_solver_takes_the_steps_it_was_given_and_euler_at_all_is_the_run(name):
    family, pipe = EVERY[name], EVERY[name].build()
    full, sigmas = clocked(family, pipe)
    few = [sigmas[0], sigmas[len(sigmas) // 3], sigmas[2 * len(sigmas) // 3]]
    for solver in SOLVERS:
        with sampling_with(pipe, solver_scheduler(solver, few)):
            latents, found = clocked(family, pipe, num_inference_steps=len(few))
        assert latents.isfinite().all() and found == pytest.approx(few, abs=2e-6)
    if type(pipe.scheduler).__name__ == "FlowMatchEulerDiscreteScheduler":
        with sampling_with(pipe, solver_scheduler("euler", sigmas)):
            again = call(family, pipe)
        assert (again - full).norm() < 1e-4 * full.norm()


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_pipeline_with_times_of_its_own_is_refused(solver):
    family, pipe = EVERY["cogview4"], EVERY["cogview4"].build()
    with sampling_with(pipe, solver_scheduler(solver, [1.0, 0.5])):
        with pytest.raises(ValueError, match="sets timesteps apart from its sigmas.*`methods`"):
            call(family, pipe, num_inference_steps=2)


@pytest.mark.parametrize("name", HOSTS)
def test_a_digest_tells_what_is_asked_for(name):
    first, second = (EVERY[name].inputs(seed) for seed in (0, 1))
    told = [digest([Item(0, 0, given)], {}) for given in (first, second, EVERY[name].inputs(0))]
    assert told[0] == told[2] != told[1]


def test_the_digest_of_a_list_of_embeddings_is_of_their_values():
    lists = ([torch.zeros(2, 3), last] for last in (torch.zeros(1, 3), torch.ones(1, 3)))
    told = {digest([Item(0, 0, {"prompt_embeds": each})], {}) for each in lists}
    assert len(told) == 2
