"""The bundled student passes its gate, and the bundled DisCa predictor is nearer than reuse."""

import pytest
import torch

from foreseer.checkpoints.format import load_predictor
from foreseer.evaluation.metrics import psnr
from foreseer.evaluation.solvers import sampling_with, solver_scheduler
from foreseer.integration.forecasting import forecasting
from foreseer.integration.pipelines.load import load_pipeline
from foreseer.predictors.rules import Reuse

pytestmark = pytest.mark.slow
LABELS = [0, 2, 3, 5, 6, 8]
SEEDS = range(20_000, 20_000 + len(LABELS))  # of no training, recording or benchmark


def draw(pipe, num_inference_steps: int) -> torch.Tensor:
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    options = {"guidance_scale": 3.0, "generator": generators, "output_type": "pt"}
    return pipe(LABELS, num_inference_steps=num_inference_steps, **options).images


# T15b
def test_ten_steps_of_the_student_beat_ten_of_euler():
    teacher = load_pipeline("zoo:fashion_dit")
    full = draw(teacher, 50)
    uniform = [1 - i / 10 for i in range(10)]
    with sampling_with(teacher, solver_scheduler("euler", uniform)):
        euler = psnr(draw(teacher, 10), full).mean()
    student = psnr(draw(load_pipeline("zoo:fashion_dit_student"), 10), full).mean()
    assert float(student) > float(euler) + 0.5


# T25, T19
def test_disca_is_nearer_to_the_students_own_run_than_reuse():
    pipe = load_pipeline("zoo:fashion_dit_student")
    predictor = load_predictor("zoo:fashion_dit_student_disca")
    full = draw(pipe, 20)
    with forecasting(pipe, predictor) as run:
        ours = psnr(draw(pipe, 20), full).mean()
    assert run.report().anchors == list(predictor.spec.anchors)
    with forecasting(pipe, Reuse(), anchors=predictor.spec.anchors, tap="hidden"):
        reuse = psnr(draw(pipe, 20), full).mean()
    assert float(ours) > float(reuse)
