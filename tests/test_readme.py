"""The README code runs as printed: its first example on the bundled model, the other on a Flux."""

import hashlib
import re
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)

README = Path(__file__).parents[1] / "README.md"
if not README.exists():
    pytest.skip("the wheel holds no README.md", allow_module_level=True)
BUNDLED, FLUX, FLUX_IMPORTS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


def code_lines(example: str) -> int:
    return sum(bool(line) for line in example.splitlines())


def test_the_examples_are_as_short_as_promised():
    assert code_lines(BUNDLED) <= 12
    assert code_lines(FLUX) <= 15


def test_the_first_example_draws_an_image_per_class_with_few_evaluations(capsys):
    names: dict = {}
    exec(compile(BUNDLED, "README.md", "exec"), names)
    assert len(names["images"]) == 10
    report = names["run"].report()
    assert len(report.anchors) + len(report.forecasts) == 50
    assert len(report.anchors) == len(names["predictor"].spec.anchors) < 50
    assert f"{len(report.anchors)} network evaluations" in capsys.readouterr().out


class TinyFlux(FluxPipeline):
    """Flux with random weights that turns a prompt into noise seeded by it."""

    def encode_prompt(self, prompt, num_images_per_prompt=1, **kwargs):
        prompts = [prompt] if isinstance(prompt, str) else prompt
        seeds = [int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) for text in prompts]
        noise = [torch.Generator().manual_seed(seed) for seed in seeds]
        embeds = torch.stack([torch.randn(8, 32, generator=g) for g in noise]).bfloat16()
        pooled = torch.stack([torch.randn(32, generator=g) for g in noise]).bfloat16()
        return embeds, pooled, torch.zeros(8, 3).bfloat16()

    def to(self, *args, **kwargs):
        """Stay on the CPU."""
        return self


def tiny_flux() -> TinyFlux:
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8],
        guidance_embeds=True,
    )
    vae = AutoencoderKL(
        block_out_channels=(4,),
        latent_channels=1,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.1,
        scaling_factor=1.5,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    models = (vae.bfloat16(), None, None, None, None, transformer.bfloat16())
    pipe = TinyFlux(scheduler, *models)
    pipe.set_progress_bar_config(disable=True)
    pipe.default_sample_size = 16  # pixels, with this autoencoder
    return pipe


def test_the_flux_example_records_fits_exports_and_forecasts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(FluxPipeline, "from_pretrained", lambda name, dtype: tiny_flux())
    Path("prompts.txt").write_text("\n".join(f"prompt {i}" for i in range(6)))
    names: dict = {}
    exec(compile(FLUX_IMPORTS, "README.md", "exec"), names)
    exec(compile(FLUX, "README.md", "exec"), names)
    assert names["image"].size == (16, 16)
    report = names["run"].report()
    assert report.anchors == [0, 1, 2, 4, 6, 9, 14, 23, 30, 37, 44]
    assert report.num_steps == 50
    assert Path("runs/flux_11/config.json").exists()
