"""The README code runs as printed: its first example on the bundled model, the other on a Flux."""

import hashlib
import json
import re
from pathlib import Path

import numpy as np
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
BUNDLED, FLUX = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


PLAIN = """
import torch
from diffusers import FluxPipeline
pipe = FluxPipeline.from_pretrained(name, dtype=torch.bfloat16).to("cuda")
image = pipe("a lighthouse in fog", **settings).images[0]
"""
SOMEBODY_ELSES = """
import torch
from diffusers import FluxPipeline
import foreseer as fs
pipe = FluxPipeline.from_pretrained(name, dtype=torch.bfloat16).to("cuda")
with fs.forecasting(pipe, predictor):
    image = pipe("a lighthouse in fog", **settings).images[0]
"""


def code_lines(example: str) -> int:
    return sum(bool(line) for line in example.splitlines())


def test_the_examples_are_as_short_as_promised():
    assert code_lines(BUNDLED) <= 7
    assert code_lines(FLUX) <= 10  # imports included
    assert code_lines(SOMEBODY_ELSES) == code_lines(PLAIN) + 2


def test_the_first_example_draws_an_image_per_class_with_few_evaluations(capsys):
    names: dict = {}
    exec(compile(BUNDLED, "README.md", "exec"), names)
    assert len(names["images"]) == 10
    report = names["run"].report()
    assert len(report.anchors) + len(report.forecasts) == 50
    assert len(report.anchors) == 8
    printed = capsys.readouterr().out
    assert re.match(r"42 of 50 steps forecast: 6\.2 x fewer evaluations, \d\.\d x faster", printed)


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


def test_the_flux_example_records_fits_and_forecasts_also_for_somebody_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(FluxPipeline, "from_pretrained", lambda name, dtype: tiny_flux())
    Path("prompts.txt").write_text("\n".join(f"prompt {i}" for i in range(6)))
    names: dict = {}
    exec(compile(FLUX, "README.md", "exec"), names)
    assert names["image"].size == (16, 16)
    spec = names["predictor"].spec
    assert (spec.anchors[0], len(spec.anchors), len(spec.sigmas)) == (0, 8, 50)
    theirs = {"name": "a/b", "predictor": "runs/flux_8", "settings": names["settings"]}
    exec(compile(SOMEBODY_ELSES, "theirs", "exec"), theirs)
    assert np.array_equal(theirs["image"], names["image"])
    plain = {"name": "a/b", "settings": names["settings"]}
    exec(compile(PLAIN, "plain", "exec"), plain)
    assert not np.array_equal(plain["image"], names["image"])


def test_its_first_numbers_are_those_of_the_results(monkeypatch):
    monkeypatch.syspath_prepend(str(README.parent / "benchmarks"))
    monkeypatch.chdir(README.parent)
    import first_picture
    import readout_page

    text = README.read_text()
    measured = (readout_page.RESULT, readout_page.VIDEO)
    rows = [row for path in measured for row in json.loads(path.read_text())]
    assert f"<!-- table -->\n{readout_page.readme_table(rows)}\n<!-- /table -->" in text
    assert f"<!-- first -->\n{first_picture.sentence()}\n<!-- /first -->" in text
    shown = re.search(r"then ([\d.]+), ([\d.]+) and ([\d.]+) times faster\]\(", text)
    assert re.findall(r"\*\*([\d.]+) times faster", first_picture.sentence()) == list(
        shown.groups()
    )


def test_the_numbers_of_other_hosts_are_those_of_their_pages():
    table = README.read_text().partition("<!-- beyond -->")[2].partition("<!-- /beyond -->")[0]
    rows = table.strip().splitlines()[2:]
    assert len(rows) == 4
    for row in rows:
        name, _, worth = row.strip("| ").split(" | ")
        page = (README.parent / re.search(r"\((docs/\w+\.md)\)", name)[1]).read_text()
        numbers = re.findall(r"\d+\.\d+", worth)
        assert numbers and not [number for number in numbers if number not in page], name


def test_there_are_two_commands_to_set_it_up():
    assert re.findall(r"^    (make \w+)", README.read_text(), flags=re.M) == [
        "make demo",
        "make test",
    ]
