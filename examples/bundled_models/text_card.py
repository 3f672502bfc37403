"""The model card of an exported text-to-image teacher, written from the files in its folder."""

from pathlib import Path

from teacher_card import exported

CARD = """---
license: apache-2.0
library_name: diffusers
tags:
- diffusers
- rectified-flow
- text-to-image
- emoji
- foreseer
---

# Emoji Flux, the text-to-image model bundled with foreseer

A `FluxTransformer2DModel` ({num_layers} double-stream and {num_single_layers} single-stream
blocks, width {width}, patch {patch_size}, {parameters:.1f} M parameters) that draws
{sample_size}x{sample_size} emoji of prompts by rectified flow in pixel space. Its text is the last
hidden state of the sentence encoder all-MiniLM-L6-v2, 16 tokens. It is small enough to be trained
and sampled on a CPU, and is meant for recording, fitting and testing feature-caching predictors on
a text-to-image host.

![samples](samples.png)

Guidance 3, 50 Euler steps, seed 0, row by row: {prompts}.

## Use

```python
import torch
from foreseer.integration.pipelines import load_pipeline

pipe = load_pipeline(folder)  # folder: this one
image = pipe("slice of pizza", generator=torch.Generator().manual_seed(0)).images[0]
```

The prompts above are stored with the model. Any other needs the encoder:
`pip install "foreseer[text]"`. The weights are stored in bfloat16. Time runs from sigma = 1 (noise)
to 0 with x_t = (1 - sigma) x_0 + sigma eps; the network predicts v = eps - x_0. Latents are packed
as in diffusers' `FluxPipeline`; the empty prompt is the second branch of guidance.

## Training

{samples_seen:,} captions in {steps:,} steps of {batch_size} ({minutes:.0f} minutes on CPU cores
shared with other work, {precision}): Noto emoji, with their names and short names as captions. 96
of the 1,911 pictures were kept from training, with both their names. {optimizer} at
{learning_rate:g}, {schedule}, logit-normal sigma, caption dropout {text_dropout:g}. {told}The
weights here are the exponential moving average. Mean loss over the last {loss_window_steps} steps:
{final_loss:.4f}. The whole configuration is in `recipe.yaml`, counts and versions are in
`training.json`.

![loss](loss_curve.png)

## Does a picture show its prompt?

{judgement}

## Limits

- It was trained about {passes:.0f} times on every caption. It is a host to forecast on, not a model
  to draw with.
- Prompts far from the names of emoji give shapes and colours, no more.
- The pictures are Noto emoji (Apache 2.0), from the npm package emoji-datasource-google 16.0.0.
"""


def write_card(folder: Path) -> None:
    """Write `README.md` from the recipe, the counts, the config and, if it is there, `judge.json`.

    Args:
        folder: an exported text teacher.

    Raises:
        FileNotFoundError: one of the files is missing, so the folder is not an exported teacher.
    """
    recipe, config, told = exported(folder, judge_table, "text_judge.py")
    model = recipe["model"]["init_args"]
    card = CARD.format(
        **told,
        num_single_layers=config["num_single_layers"],
        patch_size=model["patch_size"],
        sample_size=model["sample_size"],
        prompts=", ".join(model["prompts"]),
        passes=told["samples_seen"] / NUM_CAPTIONS,
        text_dropout=model["text_dropout"],
    )
    (folder / "README.md").write_text(card)


NUM_CAPTIONS = 2 * 1815  # two names of every picture trained on


def judge_table(result: dict) -> str:
    """Markdown table of what `judge_text_teacher` returns, in percent."""
    lines = [
        f"How often the real emoji, of {result['num_pictures']}, that is nearest to a drawn one",
        "(cosine of EfficientNet-Lite0 features) has a word of the prompt in one of its names, and",
        f"how often it is the very picture of that name; guidance {result['guidance_scale']:g},",
        f"{result['num_inference_steps']} steps. Chance: with a picture picked at random. Real:",
        "with the prompt's own picture in place of the drawn one, and left out of the choice.",
        "",
        "| prompts | shares a word | chance | real | the very picture | chance |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in result["splits"].items():
        shares = [row[key] for key in ("shares_a_word", "chance", "real", "exact", "exact_chance")]
        cells = " | ".join(f"{100 * share:.1f} %" for share in shares)
        lines.append(f"| {row['count']} {name.replace('_', ' ')} | {cells} |")
    return "\n".join(lines)
