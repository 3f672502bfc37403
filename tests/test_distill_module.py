"""Distillation trains students of real hosts from recorded runs or pairs, resumes, and exports."""

from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from student_cases import RANGE, STEPS, runs_for, save_flux_conditions, save_teacher
from tiny_hosts import pipeline, seeded
from torch.utils.data import DataLoader

from foreseer.distill.few_steps import few_steps, psnr_db
from foreseer.distill.guidance import (
    Conditions,
    class_conditions,
    guidance_range,
    guided_velocity,
    velocity,
)
from foreseer.distill.meanflow import ChordTarget, MeanFlowTarget, VelocityTarget
from foreseer.distill.module import DistillModule, runs_of
from foreseer.distill.student_export import export_student
from foreseer.distill.times import EqualTimes, RestrictedTimes
from foreseer.integration.pipelines.load import load_pipeline

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
    "logger": False,
}
TARGETS = {
    "guidance": (VelocityTarget(), EqualTimes()),
    "exact": (MeanFlowTarget(), RestrictedTimes(0.25)),
    "difference": (MeanFlowTarget(5e-3), RestrictedTimes(0.25)),
    "chord": (ChordTarget(), RestrictedTimes(0.25)),
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> str:
    return save_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def drawn(teacher, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    runs_for(folder, teacher).draw()
    return folder


def student_of(module: DistillModule, batch: dict[str, Any]):
    """u(x, r, t) under a batch's conditions."""
    return module.average_velocity(module.conditions_of(batch), batch["guidance_scale"])


def module_for(teacher: str, kind: str = "chord", **changes: Any) -> DistillModule:
    target, times = TARGETS[kind]
    options = {**RANGE, "num_validation_steps": 4, "learning_rate": 1e-2}
    return DistillModule(target, times, teacher, **(options | changes))


def batch_of(drawn: Path, teacher: str) -> dict[str, Any]:
    data = runs_for(drawn, teacher)
    data.setup()
    return next(iter(data.val_dataloader()))


def test_a_run_is_the_teachers_own_euler_run(teacher, drawn):
    batch = batch_of(drawn, teacher)
    runs, scale = runs_of(batch), batch["guidance_scale"]
    assert (len(runs.eps), runs.v.shape[1]) == (2, STEPS)
    transformer = load_pipeline(teacher).transformer
    conditions = class_conditions(batch["own.class_labels"], 3)
    x = runs.eps
    for sigma, following in zip(runs.sigmas[:-1], runs.sigmas[1:], strict=True):
        torch.testing.assert_close(runs.at(sigma.expand(2)), x, atol=1e-4, rtol=0)
        v = guided_velocity(transformer, x, sigma.expand(2), conditions, scale)
        # Stored in half precision.
        torch.testing.assert_close(runs.velocity(sigma.expand(2)), v, atol=3e-3, rtol=3e-3)
        x = x + (following - sigma) * runs.velocity(sigma.expand(2))


def test_drawing_is_shared_and_goes_on_after_a_stop(teacher, drawn, tmp_path):
    first, second = runs_for(tmp_path, teacher), runs_for(tmp_path, teacher)
    first.draw(rank=0, world=2)
    assert [path.name for path in sorted(tmp_path.glob("*.safetensors"))] == [
        "runs.00000.safetensors"
    ]
    second.draw()
    for path in sorted(tmp_path.glob("*.safetensors")):
        assert path.read_bytes() == (drawn / path.name).read_bytes()


def test_runs_of_other_settings_are_not_mixed(teacher, tmp_path):
    runs_for(tmp_path, teacher, num_runs=2).draw()
    with pytest.raises(ValueError, match="max_guidance"):
        runs_for(tmp_path, teacher, num_runs=8, max_guidance=2.0).draw()


def test_missing_runs_are_named(teacher, tmp_path):
    with pytest.raises(FileNotFoundError, match="runs.00000"):
        runs_for(tmp_path, teacher).setup()


def test_guidance_needs_both_branches_and_a_scale(teacher):
    transformer = load_pipeline(teacher).transformer
    x, t = torch.randn(2, 1, 4, 4), torch.full((2,), 0.5)
    labels = torch.tensor([0, 1])
    with pytest.raises(ValueError, match="both branches"):
        guided_velocity(transformer, x, t, class_conditions(labels, 3), None)
    alone = Conditions({"class_labels": labels})
    expected = velocity(transformer, x, t, alone.own)
    assert torch.equal(guided_velocity(transformer, x, t, alone, None), expected)
    one = guided_velocity(transformer, x, t, class_conditions(labels, 3), torch.ones(2))
    torch.testing.assert_close(one, expected, atol=1e-5, rtol=1e-5)


# T10, on the real module
@pytest.mark.parametrize("kind", TARGETS)
def test_a_gradient_reaches_the_student_and_not_the_teacher(kind, teacher, drawn):
    module = module_for(teacher, kind)
    loss, error = module.loss(module.points(batch_of(drawn, teacher)))
    loss.backward()
    assert float(error) == pytest.approx(float(loss.detach()))
    assert module.conditioner.outer.weight.grad.abs().sum() > 0
    assert all(p.grad is None and not p.requires_grad for p in module.teacher.parameters())


def test_pairs_ask_the_teacher_for_its_guided_velocity(teacher):
    module = module_for(teacher, "exact")
    x_0, labels = torch.randn(2, 1, 4, 4), torch.tensor([0, 2])
    points = module.points([x_0, labels], generator=seeded())
    expected = guided_velocity(
        module.teacher, points.x_t, points.t, class_conditions(labels, 3), points.guidance_scale
    )
    assert torch.equal(points.v, expected)
    assert bool(((points.guidance_scale >= 1) & (points.guidance_scale <= 4)).all())
    assert module.loss(points)[0].isfinite()


def test_a_student_of_two_branches_starts_at_the_guided_teacher(teacher, drawn):
    module = module_for(teacher, embed_guidance=False, band_limit=None)
    batch = batch_of(drawn, teacher)
    points = module.points(batch)
    expected = guided_velocity(
        module.teacher, points.x_t, points.t, points.conditions, points.guidance_scale
    )
    assert torch.equal(student_of(module, batch)(points.x_t, points.r, points.t), expected)
    module.loss(points)[0].backward()
    assert module.conditioner.outer.weight.grad.abs().sum() > 0


def test_fresh_points_lie_between_the_runs_ends_and_new_noise(teacher, drawn):
    module = module_for(teacher)
    batch = batch_of(drawn, teacher)
    fresh = module.fresh_points(batch, generator=seeded())
    eps = torch.randn(2, 1, 4, 4, generator=seeded())
    end, t = runs_of(batch).at(torch.zeros(2)), fresh.t[:, None, None, None]
    torch.testing.assert_close(fresh.x_t, (1 - t) * end + t * eps)
    middle = (fresh.t + fresh.r) / 2
    halfway = fresh.x_t - (fresh.t - middle)[:, None, None, None] * fresh.v
    expected = fresh.teacher(halfway, middle)
    assert torch.equal(ChordTarget()(student_of(module, batch), fresh), expected)


def test_pairs_train_in_a_trainer(teacher):
    module = module_for(teacher, "exact")
    pairs = torch.utils.data.TensorDataset(torch.randn(4, 1, 4, 4), torch.tensor([0, 1, 2, 0]))
    loader = DataLoader(pairs, 2)
    trainer = lightning.Trainer(max_epochs=1, enable_checkpointing=False, **QUIET)
    trainer.fit(module, loader, loader)
    assert trainer.global_step == 2 and trainer.callback_metrics["val/error"].isfinite()


def test_an_adaptive_weight_hides_the_size_of_the_error(teacher, drawn):
    module = module_for(teacher, adaptive_power=1.0)
    loss, error = module.loss(module.points(batch_of(drawn, teacher)))
    assert float(loss.detach()) == pytest.approx(1.0, abs=0.2)
    assert float(error) != pytest.approx(float(loss.detach()))


def test_a_chord_trains_a_student_nearer_to_the_runs(teacher, drawn):
    """From the unguided teacher, some updates on the validation batch itself."""
    module = module_for(teacher)
    batch = batch_of(drawn, teacher)
    runs, u = runs_of(batch), student_of(module, batch)
    end = runs.at(torch.zeros(2))

    def quality() -> float:
        sample = few_steps(u, runs.eps, 4)
        return float(psnr_db(sample, end).mean())

    before, optimizer = quality(), module.configure_optimizers()
    for _ in range(60):
        optimizer.zero_grad()
        module.loss(module.points(batch))[0].backward()
        optimizer.step()
    assert quality() > before + 3


def fit(teacher: str, drawn: Path, out: Path, max_epochs: int, **changes: Any) -> DistillModule:
    lightning.seed_everything(0, verbose=False)
    module = module_for(teacher, **changes)
    checkpoint = lightning.pytorch.callbacks.ModelCheckpoint(
        out, save_last=True, enable_version_counter=False
    )
    average = lightning.pytorch.callbacks.EMAWeightAveraging(decay=0.9)
    trainer = lightning.Trainer(max_epochs=max_epochs, callbacks=[average, checkpoint], **QUIET)
    last = out / "last.ckpt"
    trainer.fit(
        module, datamodule=runs_for(drawn, teacher), ckpt_path=last if last.exists() else None
    )
    assert "val/psnr_db" in trainer.callback_metrics
    return module


def test_a_stage_trains_resumes_starts_the_next_and_exports(teacher, drawn, tmp_path):
    fit(teacher, drawn, tmp_path / "one", 1)
    resumed = fit(teacher, drawn, tmp_path / "one", 2)
    assert resumed.trainer.global_step == 4
    state = torch.load(tmp_path / "one" / "last.ckpt", weights_only=True)["state_dict"]
    module = module_for(teacher, "exact", start=str(tmp_path / "one" / "last.ckpt"))
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, state[name])
    export_student(str(tmp_path / "one" / "last.ckpt"), str(tmp_path / "out"), "float32")
    pipe = load_pipeline(str(tmp_path / "out"))
    latents = torch.randn(2, 1, 4, 4)
    conditions = class_conditions(torch.tensor([0, 1]), 3)
    u = module.average_velocity(conditions, torch.full((2,), 2.0))
    expected = few_steps(u, latents, 5)
    found = pipe(
        [0, 1],
        guidance_scale=2.0,
        num_inference_steps=5,
        latents=latents,
        output_type="latent",
    ).images
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert str(tmp_path) not in (tmp_path / "out" / "transformer" / "config.json").read_text()
    assert str(teacher) not in (tmp_path / "out" / "transformer" / "config.json").read_text()
    assert "average velocit" in (tmp_path / "out" / "README.md").read_text()


def test_a_missing_or_foreign_start_is_refused(teacher, tmp_path):
    with pytest.raises(FileNotFoundError, match="stage before"):
        module_for(teacher, start=str(tmp_path / "none.ckpt"))
    torch.save({"state_dict": {"x": torch.zeros(1)}}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="not of this student"):
        module_for(teacher, start=str(tmp_path / "other.ckpt"))


@pytest.mark.parametrize("kind", ["guidance", "exact", "difference", "chord"])
def test_a_flux_host_is_distilled_from_embedded_prompts(kind, tmp_path, monkeypatch):
    """The real classes; a folder without text encoders is no pipeline diffusers loads."""
    for module_name in ("module", "runs"):
        monkeypatch.setattr(
            f"foreseer.distill.{module_name}.load_pipeline", lambda _: pipeline("flux")
        )
    teacher, conditions = "tiny flux", save_flux_conditions(tmp_path / "conditions.safetensors")
    data = runs_for(tmp_path / "runs", teacher, conditions=conditions, shape=[4, 16])
    data.draw()
    data.setup()
    batch = next(iter(data.train_dataloader()))
    module = module_for(teacher, kind)
    loss, _ = module.loss(module.points(batch))
    loss.backward()
    assert loss.isfinite() and module.conditioner.outer.weight.grad.abs().sum() > 0
    runs = runs_of(batch)
    sample = few_steps(student_of(module, batch), runs.eps, 4)
    assert sample.shape == runs.eps.shape and sample.isfinite().all()


def test_loaders_hand_out_whole_runs(teacher, drawn):
    data = runs_for(drawn, teacher)
    data.setup()
    assert isinstance(data.val_dataloader(), DataLoader)
    seen = sum(len(batch["eps"]) for batch in data.train_dataloader())
    assert seen == 6


@pytest.mark.parametrize("ends", [(None, 4.0), (1.0, None), (4.0, 1.0)])
def test_half_a_range_of_guidance_is_refused(ends):
    with pytest.raises(ValueError, match=f"found min_guidance {ends[0]} and max_guidance"):
        guidance_range(*ends)


def test_guidance_zero_is_zero(teacher, tmp_path):
    module = module_for(teacher, min_guidance=0.0, max_guidance=0.5)
    x_0, labels = torch.randn(3, 1, 4, 4), torch.tensor([0, 1, 2])
    points = module._on_pairs(x_0, labels, 1.0, None)
    assert 0 <= float(points.guidance_scale.min()) <= float(points.guidance_scale.max()) <= 0.5
    assert guidance_range(None, None) is None
