"""Turn a teacher's Lightning checkpoint into the folder that is shipped."""

import json
import platform
import shutil
from importlib.metadata import version
from pathlib import Path

import numpy as np
import teacher_card
import text_card
import torch
import video_card
import yaml
from dit_teacher import TeacherModule
from grid_teacher import GridTeacherModule
from PIL import Image
from text_teacher import TextTeacherModule
from torch import Tensor
from unet_teacher import UNetTeacherModule
from video_teacher import VideoTeacherModule

from foreseer import __version__

KINDS = {
    each.__name__: each
    for each in (
        TeacherModule,
        TextTeacherModule,
        GridTeacherModule,
        UNetTeacherModule,
        VideoTeacherModule,
    )
}
CARDS = {
    "TeacherModule": teacher_card.write_card,
    "TextTeacherModule": text_card.write_card,
    "GridTeacherModule": text_card.write_card,
    "VideoTeacherModule": video_card.write_card,
}
LOSS_WINDOW = 50  # logged values in the running mean of the loss
MAX_WEIGHT_BYTES = 24_000_000


def export_teacher(checkpoint: str, out: str, told: str = "") -> None:
    """Write a diffusers pipeline folder with the averaged weights, their recipe and a model card.

    The folder holds `model_index.json`, `transformer/` (bfloat16), `vae/` of a video model,
    `scheduler/`, `recipe.yaml`, `training.json`, `loss_curve.png`, `samples.png` and `README.md`.
    The configuration and the TensorBoard events are read from the checkpoint's folder.

    Args:
        checkpoint: Lightning checkpoint of a `TeacherModule`, a `TextTeacherModule` or a
            `VideoTeacherModule` trained with `EMAWeightAveraging`.
        out: folder to write; a `judge.json` already there goes into the card.
        told: a sentence for the card, of what the recipe does not say about the training.

    Raises:
        FileNotFoundError: the configuration or the events are missing beside the checkpoint.
        ValueError: the checkpoint holds no averaged weights, or the weights are over 24 MB.
    """
    run, folder = Path(checkpoint).parent, Path(out)
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    recipe = run / "config.yaml"
    if not recipe.exists():
        raise FileNotFoundError(f"no config.yaml in {run}; export from the folder of the run.")
    steps, losses = read_loss(run, state["global_step"])
    held_out = read_loss(run, state["global_step"], "val/loss", needed=False)
    asked = yaml.safe_load(recipe.read_text())
    kind = asked["model"]["class_path"].rpartition(".")[2]
    module = save_weights(state, folder, kind)
    shutil.copyfile(recipe, folder / "recipe.yaml")
    facts = training_facts(state, asked, steps, losses)
    facts |= {"told": told} if told else {}
    facts |= {"held_out_loss": dict(zip(*held_out, strict=True))} if held_out[0] else {}
    (folder / "training.json").write_text(json.dumps(facts, indent=2) + "\n")
    plot_loss(steps, losses, folder / "loss_curve.png", held_out)
    grid = module.float().sample_grid(columns=8, num_inference_steps=50, guidance_scale=3.0)
    save_image(grid, folder / "samples.png", scale=2)
    if kind in CARDS:
        CARDS[kind](folder)


def save_weights(
    state: dict, folder: Path, kind: str = "TeacherModule"
) -> TeacherModule | TextTeacherModule | UNetTeacherModule | VideoTeacherModule:
    """Save the averaged weights of a checkpoint as a bfloat16 pipeline.

    Lightning's `WeightAveraging` puts the averaged weights under `state_dict` and the current ones
    under `current_model_state`.

    Args:
        state: the loaded checkpoint.
        folder: pipeline folder to write.
        kind: name of its class.

    Returns:
        The module, with the weights that were written.

    Raises:
        ValueError: the checkpoint holds no averaged weights, or the weights are over 24 MB.
    """
    if "averaging_state" not in state:
        raise ValueError(
            "the checkpoint holds no averaged weights; train with the EMAWeightAveraging callback."
        )
    arguments = {k: v for k, v in state["hyper_parameters"].items() if not k.startswith("_")}
    module = KINDS[kind](**arguments)
    module.setup("export")
    module.load_state_dict(state["state_dict"])
    module.to(torch.bfloat16).eval()
    module.pipeline().save_pretrained(folder, safe_serialization=True)
    size = sum(file.stat().st_size for file in folder.glob("*/*.safetensors"))
    if size > MAX_WEIGHT_BYTES:
        raise ValueError(
            f"the weights take {size} bytes, expected at most {MAX_WEIGHT_BYTES}; "
            "ship a smaller transformer."
        )
    return module


def read_loss(
    run: Path, last_step: int, tag: str = "train/loss", needed: bool = True
) -> tuple[list[int], list[float]]:
    """Steps and values of a loss up to `last_step` in a folder of TensorBoard events.

    Args:
        run: the folder.
        last_step: the last one that is of interest.
        tag: name of the loss.
        needed: raise where there is none, rather than return nothing.

    Raises:
        FileNotFoundError: the folder holds no such events.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    if tag not in events.Tags()["scalars"]:
        if not needed:
            return [], []
        raise FileNotFoundError(f"no TensorBoard events with {tag} in {run}.")
    points = [point for point in events.Scalars(tag) if point.step <= last_step]
    return [point.step for point in points], [point.value for point in points]


def training_facts(state: dict, recipe: dict, steps: list[int], losses: list[float]) -> dict:
    """What `training.json` holds: counts, time, final loss and versions.

    Args:
        state: the loaded checkpoint.
        recipe: the run's resolved configuration.
        steps: steps of the logged losses.
        losses: logged losses.
    """
    window_steps = steps[-1] - steps[-1 - min(LOSS_WINDOW, len(steps) - 1)]
    versions = {name: version(name) for name in ("torch", "lightning", "diffusers")}
    return {
        "steps": state["global_step"],
        "samples_seen": state["global_step"] * recipe["data"]["init_args"]["batch_size"],
        "minutes": round(state["callbacks"]["ClockCosine"]["elapsed_s"] / 60, 1),
        "final_loss": float(np.mean(losses[-LOSS_WINDOW:])),
        "loss_window_steps": window_steps,
        "parameters": sum(tensor.numel() for tensor in state["state_dict"].values()),
        "weights": "exponential moving average",
        "versions": {"foreseer": __version__, "python": platform.python_version(), **versions},
    }


def plot_loss(
    steps: list[int], losses: list[float], path: Path, held_out: tuple[list[int], list[float]]
) -> None:
    """Draw the logged losses, their running mean and those held out, on a logarithmic axis."""
    from matplotlib.figure import Figure

    smooth = [np.mean(losses[max(0, end - LOSS_WINDOW) : end]) for end in range(1, len(steps) + 1)]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.semilogy(steps, losses, color="0.8", linewidth=0.7, label="logged batches")
    axes.semilogy(steps, smooth, color="C0", label=f"mean of the last {LOSS_WINDOW}")
    if held_out[0]:
        axes.semilogy(*held_out, "o-", color="C1", markersize=3, label="held out, averaged weights")
    axes.set(xlabel="step", ylabel="mean squared error of v")
    axes.grid(which="both", alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def save_image(image: Tensor, path: Path, scale: int) -> None:
    """Save an image `(C, H, W)` in [0, 1] as PNG, every pixel repeated `scale` times."""
    pixels = (255 * image.clamp(0, 1)).round().byte().permute(1, 2, 0).numpy()
    pixels = pixels.repeat(scale, axis=0).repeat(scale, axis=1)
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(path)


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(export_teacher, as_positional=False)
