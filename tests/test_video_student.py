"""A distilled student of a text-to-video pipeline, tiny: drawn, saved, forecast and trained."""

from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import save_file
from student_cases import RANGE, awake
from tiny_hosts import seeded
from tiny_text import PROMPTS, tiny_text_pipeline
from tiny_video import tiny_video_pipeline

import foreseer
from foreseer.distill.guidance import Conditions, guided
from foreseer.distill.meanflow import MeanFlowTarget
from foreseer.distill.module import DistillModule
from foreseer.distill.student_export import export_student
from foreseer.distill.teacher_runs import TeacherRuns
from foreseer.distill.times import RestrictedTimes
from foreseer.errors import UnsupportedHost
from foreseer.integration.forecasting import forecasting
from foreseer.integration.pipelines.average_velocity import conditioner_for
from foreseer.integration.pipelines.load import load_pipeline
from foreseer.integration.pipelines.student_pipeline import StudentWanPipeline, student_of
from foreseer.predictors.neural import DiscaPredictor
from foreseer.predictors.rules import Reuse
from foreseer.trajectories.prompts import Item
from foreseer.trajectories.recorder import record

ASKED = list(PROMPTS[:2])
STEPS = 12
SHAPE = (4, 2, 4, 4)  # of a latent


def student(embed_guidance: bool = True) -> Any:
    """A student around the tiny Wan, whose conditioner is not zero."""
    pipe = tiny_video_pipeline()
    conditioner = conditioner_for(pipe.transformer, **RANGE, embed_guidance=embed_guidance)
    made = student_of(pipe, awake(conditioner))
    made.set_progress_bar_config(disable=True)
    return made


def draw(pipe: Any, **changes: Any) -> torch.Tensor:
    options = {"generator": seeded(), "output_type": "latent", "num_inference_steps": STEPS}
    return pipe(ASKED, **(options | changes)).frames


def conditions_of(pipe: Any, null: bool) -> Conditions:
    own, nothing = (
        {"encoder_hidden_states": pipe.text_encoder(each)[0]} for each in (ASKED, ["", ""])
    )
    return Conditions(own, nothing if null else {})


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_a_fresh_student_is_its_teacher_bit_for_bit(guidance_scale):
    pipe = tiny_video_pipeline()
    expected = draw(pipe, guidance_scale=guidance_scale)
    conditioner = conditioner_for(pipe.transformer, **RANGE, embed_guidance=False)
    assert torch.equal(draw(student_of(pipe, conditioner), guidance_scale=guidance_scale), expected)


@pytest.mark.parametrize("embed_guidance", [True, False])
def test_wans_own_loop_takes_average_velocities_over_its_own_intervals(embed_guidance):
    pipe = student(embed_guidance)
    x = torch.randn(2, *SHAPE, generator=seeded())
    found = draw(pipe, latents=x, guidance_scale=2.5)
    times = pipe.scheduler.sigmas
    assert float((times[:-1] - times[1:]).diff().abs().min()) > 1e-3  # no two are of one length
    scale = torch.full((2,), 2.5)
    conditions = conditions_of(pipe, not embed_guidance)
    with torch.no_grad():
        for t, r in zip(times[:-1], times[1:], strict=True):
            branch = None if embed_guidance else scale
            told = (scale,) if embed_guidance else ()
            with pipe.conditioning.at((t - r).expand(2), *told, same=True):
                u = guided(pipe.transformer, x, t.expand(2), conditions, branch)
            x = x - (t - r) * u
    torch.testing.assert_close(found, x, rtol=1e-5, atol=1e-5)


def test_what_was_not_trained_is_refused():
    pipe = student()
    with pytest.raises(ValueError, match="intervals up to R = 0.25"):
        draw(pipe, num_inference_steps=6)
    with pytest.raises(ValueError, match="trained on 1 to 4"):
        draw(pipe, guidance_scale=5.0)
    pipe.scheduler = type("Other", (type(pipe.scheduler),), {"step": None}).from_config(
        pipe.scheduler.config
    )
    with pytest.raises(ValueError, match="average velocities"):
        draw(pipe)


def test_a_student_of_another_pipeline_is_refused():
    pipe = tiny_text_pipeline()
    with pytest.raises(UnsupportedHost, match="found a PixelFluxPipeline"):
        student_of(pipe, conditioner_for(pipe.transformer, **RANGE))


def test_a_student_is_saved_loaded_and_forecast(tmp_path):
    pipe = student()
    full = draw(pipe)
    pipe.save_pretrained(tmp_path)
    again = load_pipeline(str(tmp_path))
    assert type(again) is StudentWanPipeline and torch.equal(draw(again), full)
    with forecasting(again, Reuse(), anchors=range(STEPS), tap="hidden"):
        assert torch.equal(draw(again), full)
    with forecasting(again, Reuse(), anchors=range(0, STEPS, 2), tap="hidden") as run:
        assert not torch.equal(draw(again), full)
    assert run.report().anchors == list(range(0, STEPS, 2))
    assert torch.equal(draw(again), full)


def test_disca_is_fitted_on_a_recorded_student(tmp_path):
    pipe = student()
    items = [Item(i, i, {"prompt": PROMPTS[i % len(PROMPTS)]}) for i in range(6)]
    called = {"num_inference_steps": STEPS, "guidance_scale": 3.0}
    record(pipe, items, tmp_path / "runs", features="full", batch_size=3, **called)
    fitted = foreseer.fit(
        str(tmp_path / "runs"),
        method="disca",
        pipeline=pipe,
        anchors=[0, 1, 2, 4, 6, 8, 10, 11],
        out=str(tmp_path / "out"),
        num_heads=2,
    )
    assert isinstance(fitted, DiscaPredictor)
    full = draw(pipe)
    with forecasting(pipe, fitted):
        assert not torch.equal(draw(pipe), full) and draw(pipe).isfinite().all()


def test_restricted_meanflow_trains_and_exports_a_video_student(tmp_path):
    teacher = tiny_video_pipeline()
    teacher.save_pretrained(tmp_path / "teacher")
    own = teacher.text_encoder(list(PROMPTS[:3]))[0]
    null = teacher.text_encoder([""])[0]
    given = {"own.encoder_hidden_states": own, "null.encoder_hidden_states": null}
    save_file({name: each.contiguous() for name, each in given.items()}, tmp_path / "conditions")
    data = TeacherRuns(
        str(tmp_path / "runs"),
        str(tmp_path / "teacher"),
        num_runs=6,
        num_validation=2,
        num_inference_steps=10,
        conditions=str(tmp_path / "conditions"),
        shape=list(SHAPE),
        runs_per_file=4,
        batch_size=3,
    )
    target = MeanFlowTarget(step=0.02)
    module = DistillModule(
        target, RestrictedTimes(0.25, 0.5), str(tmp_path / "teacher"), None, 0.25
    )
    keep = ModelCheckpoint(tmp_path, "step", save_last=True, every_n_train_steps=1)
    trainer = lightning.Trainer(
        max_steps=2, logger=False, callbacks=[keep], enable_progress_bar=False, accelerator="cpu"
    )
    trainer.fit(module, data)
    large = tmp_path / "student" / "vae" / "as_large_as_wans_own.safetensors"
    large.parent.mkdir(parents=True)
    with large.open("wb") as file:
        file.truncate(500_000_000)
    export_student(str(tmp_path / "last.ckpt"), str(tmp_path / "student"), "float32")
    large.unlink()
    made = load_pipeline(str(tmp_path / "student"))
    assert type(made) is StudentWanPipeline and made.conditioner.takes_guidance
    assert float(made.conditioner.outer.weight.abs().max()) > 0
    assert draw(made).isfinite().all()
    assert "WanTransformer3DModel" in Path(tmp_path / "student" / "README.md").read_text()
