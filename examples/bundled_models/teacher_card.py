"""The model card of an exported teacher, written from the files in its folder."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from fashion_mnist import CLASS_NAMES

CARD = """---
license: apache-2.0
library_name: diffusers
tags:
- diffusers
- rectified-flow
- class-conditional
- fashion-mnist
- foreseer
---

# Fashion-MNIST DiT, the teacher bundled with foreseer

A class-conditional `DiTTransformer2DModel` ({num_layers} blocks, width {width}, patch
{patch_size}, {parameters:.1f} M parameters) that draws {sample_size}x{sample_size} grey images of
garments by rectified flow in pixel space. It is small enough to be trained and sampled on a CPU,
and is meant for recording, fitting and testing feature-caching predictors.

![samples](samples.png)

One row per class, guidance 3, 50 Euler steps, seed 0. Rows: {class_names}.

## Use

```python
import torch
from foreseer.integration.pipelines.pixel_pipeline import PixelDiTPipeline

pipe = PixelDiTPipeline.from_pretrained(folder, dtype=torch.float32)  # folder: this one
images = pipe([5, 8], generator=torch.Generator().manual_seed(0)).images  # a sandal and a bag
```

The weights are stored in bfloat16; loading without `dtype` gives float32 too. Time runs from
sigma = 1 (noise) to 0 with x_t = (1 - sigma) x_0 + sigma eps; the network predicts v = eps - x_0
and takes 1000 sigma as its timestep. The null class of guidance is index {num_classes}.

## Training

{samples_seen:,} images in {steps:,} steps of {batch_size} ({minutes:.0f} minutes, precision
{precision}), on the 60,000 training images of Fashion-MNIST (MIT licence) padded to 32x32. AdamW at
{learning_rate:g} with a cosine over the time budget, logit-normal sigma, label dropout
{label_dropout:g}. The weights here are the exponential moving average. Mean loss over the last
{loss_window_steps} steps: {final_loss:.4f}. The whole configuration is in `recipe.yaml`, counts and
versions are in `training.json`.

![loss](loss_curve.png)

## Class agreement

{judgement}

## Limits

- It knows ten garment classes at 32x32 pixels and nothing else.
- No FID is given: its network was not available where this model was made. The table above says
  that images show their class, not that they are as varied as the data.
- Keep the transformer in `eval()`: in training mode diffusers drops labels inside every block,
  and the probability is not part of the saved configuration.
"""


def exported(
    folder: Path, judge_table: Callable[[dict], str], judge: str
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """What every card tells of an exported teacher: its recipe, its config, and numbers by name.

    Args:
        folder: of the export.
        judge_table: makes a table of what the judge has written.
        judge: the script that does.

    Raises:
        FileNotFoundError: a file is missing, so the folder is not an exported teacher.
    """
    training = json.loads((folder / "training.json").read_text())
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    config = json.loads((folder / "transformer" / "config.json").read_text())
    path = folder / "judge.json"
    judgement = (
        judge_table(json.loads(path.read_text()))
        if path.exists()
        else f"Not measured yet; `python examples/bundled_models/{judge}` fills this in."
    )
    names = ("steps", "samples_seen", "minutes", "final_loss", "loss_window_steps")
    told = {name: training[name] for name in names} | {
        "num_layers": config["num_layers"],
        "width": config["num_attention_heads"] * config["attention_head_dim"],
        "parameters": training["parameters"] / 1e6,
        "batch_size": recipe["data"]["init_args"]["batch_size"],
        "learning_rate": recipe["model"]["init_args"]["learning_rate"],
        "judgement": judgement,
        "precision": recipe["trainer"]["precision"] or "32-true",
        "schedule": schedule(recipe),
        "optimizer": optimizer(recipe["model"]),
        "told": f"{training['told']} " if "told" in training else "",
    }
    return recipe, config, told


def schedule(recipe: dict[str, Any]) -> str:
    """How the rate went, in words."""
    clock: dict[str, Any] = next(
        each["init_args"]
        for each in recipe["trainer"]["callbacks"]
        if each["class_path"].endswith("ClockCosine")
    )
    if clock.get("decay_minutes") is None:
        return "with a cosine over the time budget"
    return f"held, and a cosine over the last {clock['decay_minutes']:g} minutes"


def optimizer(model: dict[str, Any]) -> str:
    """What trained a network, in words."""
    always = model["class_path"].endswith("VideoTeacherModule")
    if always or model["init_args"].get("muon"):
        return "Muon in the blocks and AdamW elsewhere"
    return "AdamW"


def write_card(folder: Path) -> None:
    """Write `README.md` from the recipe, the counts, the config and, if it is there, `judge.json`.

    Args:
        folder: an exported teacher.

    Raises:
        FileNotFoundError: one of the files is missing, so the folder is not an exported teacher.
    """
    recipe, config, told = exported(folder, judge_table, "judge.py")
    model = recipe["model"]["init_args"]
    card = CARD.format(
        **told,
        patch_size=config["patch_size"],
        sample_size=config["sample_size"],
        num_classes=config["num_embeds_ada_norm"],
        class_names=", ".join(CLASS_NAMES),
        label_dropout=model["label_dropout"],
    )
    (folder / "README.md").write_text(card)


def judge_table(result: dict) -> str:
    """Markdown table of what `judge_teacher` returns, a class per row, in percent."""
    drawn, real = result["generated"], result["real_test"]
    lines = [
        "How often a classifier trained on the real training images names the right class, on",
        f"{result['num_images']} drawn images (guidance {result['guidance_scale']:g}, "
        f"{result['num_inference_steps']} steps of {result['scheduler']}) and on the",
        "real test images:",
        "",
        "| class | drawn images | real test images |",
        "|---|---|---|",
    ]
    for name, share in drawn["per_class"].items():
        lines.append(f"| {name} | {100 * share:.1f} % | {100 * real['per_class'][name]:.1f} % |")
    lines.append(f"| all | {100 * drawn['overall']:.1f} % | {100 * real['overall']:.1f} % |")
    return "\n".join(lines)
