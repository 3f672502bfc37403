"""The judge learns what is easy to learn, and counts right and wrong images exactly."""

import gzip
import json
from pathlib import Path

import lightning
import pytest
import torch
from diffusers import DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler
from judge import ClassifierModule, class_agreement, judge_teacher
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from foreseer.integration.pipelines.pixel_pipeline import PixelDiTPipeline


def tiny_pipeline(cls=PixelDiTPipeline) -> PixelDiTPipeline:
    transformer = DiTTransformer2DModel(
        num_attention_heads=1,
        attention_head_dim=64,
        in_channels=1,
        num_layers=1,
        sample_size=32,
        patch_size=16,
        num_embeds_ada_norm=10,
    )
    return cls(transformer.eval(), FlowMatchEulerDiscreteScheduler())


class LabelPainter(PixelDiTPipeline):
    """Paints label / 10 everywhere, but draws every second t-shirt and all bags as coats."""

    def __call__(self, class_labels, generator, **_):
        painted = []
        for label, source in zip(class_labels, generator, strict=True):
            coat = label == 8 or (label == 0 and source.initial_seed() % 2)
            painted.append(torch.full((1, 32, 32), (4 if coat else label) / 10))
        return (torch.stack(painted),)


class LabelReader(nn.Module):
    """Reads the label back from the brightness of an image in [-1, 1]."""

    def forward(self, images):
        labels = (10 * (images.mean((1, 2, 3)) + 1) / 2).round().long()
        return nn.functional.one_hot(labels, 10).float()


def test_the_classifier_learns_to_tell_dark_from_bright(tmp_path):
    torch.manual_seed(0)
    labels = torch.arange(128) % 2
    images = (2.0 * labels - 1)[:, None, None, None] + 0.1 * torch.randn(128, 1, 32, 32)
    loader = DataLoader(TensorDataset(images, labels), 16)
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=5,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(ClassifierModule(num_classes=2, width=4), loader, loader)
    assert trainer.callback_metrics["test/accuracy"] == 1.0


@pytest.mark.parametrize("batch_size", [7, 40])
def test_the_share_of_right_images_is_counted_by_class(batch_size):
    found = class_agreement(tiny_pipeline(LabelPainter), LabelReader(), 40, 3.0, 5, batch_size)
    per_class = dict(found["per_class"])
    assert per_class.pop("t-shirt") == 0.5
    assert per_class.pop("bag") == 0.0
    assert len(per_class) == 8 and set(per_class.values()) == {1.0}
    assert found["overall"] == pytest.approx((40 - 2 - 4) / 40)


@pytest.mark.parametrize("num_images", [0, 15])
def test_a_number_of_images_that_does_not_split_evenly_is_refused(num_images):
    with pytest.raises(ValueError, match="positive multiple of 10"):
        class_agreement(tiny_pipeline(LabelPainter), LabelReader(), num_images, 3.0, 5, 10)


def write_test_split(folder: Path, labels: list[int]) -> None:
    sizes = len(labels).to_bytes(4) + (28).to_bytes(4) * 2
    images = b"\0\0\x08\x03" + sizes + bytes(len(labels) * 28 * 28)
    (folder / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(images))
    names = b"\0\0\x08\x01" + len(labels).to_bytes(4) + bytes(labels)
    (folder / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(names))


def test_the_verdict_is_written_beside_the_real_accuracy(tmp_path, capsys):
    tiny_pipeline().save_pretrained(tmp_path / "pipe")
    write_test_split(tmp_path, [*range(10), 6, 6])
    classifier = ClassifierModule(width=2)
    nn.init.zeros_(classifier.network[-1].weight)
    classifier.network[-1].bias.data = torch.eye(10)[6]  # calls everything a shirt
    checkpoint = {"state_dict": classifier.state_dict(), "hyper_parameters": {"width": 2}}
    torch.save(checkpoint, tmp_path / "judge.ckpt")
    result = judge_teacher(
        str(tmp_path / "pipe"),
        str(tmp_path / "judge.ckpt"),
        num_images=20,
        num_inference_steps=1,
        folder=str(tmp_path),
        out=str(tmp_path / "verdict.json"),
    )
    assert json.loads((tmp_path / "verdict.json").read_text()) == result
    assert result["generated"]["overall"] == pytest.approx(0.1)
    assert result["real_test"]["overall"] == pytest.approx(3 / 12)
    assert result["real_test"]["per_class"]["shirt"] == 1.0
    assert result["real_test"]["per_class"]["pullover"] == 0.0
    assert "| shirt | 100.0 % | 100.0 % |" in capsys.readouterr().out
