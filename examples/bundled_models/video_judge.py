"""Does a video teacher draw what the prompt says, and does it move? A test against real clips.

Shapes: n clips, q queries, F frames, H height, W width.

    python examples/bundled_models/video_judge.py --pipeline DIR --clips clips.npz
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from clips import pixels, read_clips, split
from diffusers import AutoencoderKLWan
from jaxtyping import Float
from PIL import Image
from text_judge import features, load_features, retrieval
from torch import Tensor, nn
from tqdm.auto import tqdm
from video_card import judge_table, write_card
from video_teacher import strip

from foreseer.checkpoints.zoo import resolve
from foreseer.evaluation.generate import draw_whole, picture
from foreseer.integration.pipelines.load import load_pipeline

BATCH = 16
LOOKED_AT = 3  # frames of a clip whose features are compared, evenly spread
SHOWN = 12  # clips on the sheet
ENLARGED = 3
FRAME_MS = 120


def judge_video_teacher(
    pipeline: str,
    clips: str = "clips.npz",
    guidance_scale: float = 3.0,
    num_inference_steps: int = 50,
) -> None:
    """Draw the held-out captions and as many trained ones, and look up their nearest real clips.

    Writes `judge.json` into the pipeline's folder and its table into the card there, a sheet of
    some of the drawn clips beside the real ones, frame by frame (`judge.png`), and the same in
    motion (`judge.webp`).

    Args:
        pipeline: folder of an exported video teacher, or a bundled one.
        clips: file of `write_clips`.
        guidance_scale: classifier-free guidance scale.
        num_inference_steps: sampler steps.

    Raises:
        FileNotFoundError: there are no clips.
        MissingExtra: the judge or the sentence encoder is not installed.
    """
    pipe, folder = load_pipeline(pipeline), resolve(pipeline)
    result = judged(pipe, clips, guidance_scale, num_inference_steps, folder)
    (folder / "judge.json").write_text(json.dumps(result, indent=2) + "\n")
    write_card(folder)
    print(judge_table(result))


def judged(
    pipe: Any, clips: str, guidance_scale: float, num_inference_steps: int, folder: Path
) -> dict[str, Any]:
    """Retrieval and motion of both splits, as in `judge.json`; the sheets go into a folder."""
    everything = read_clips(clips)
    trained, kept = split(everything)
    chosen = {
        "captions_kept_from_training": kept,
        "captions_trained_on": trained[:: len(trained) // len(kept)][: len(kept)],
    }
    place_of = {id(clip): place for place, clip in enumerate(everything)}
    network, real = load_features(), [pixels(clip.frames) for clip in everything]
    known = looks(network, through(pipe.vae, real))
    settings = {"guidance_scale": guidance_scale, "num_inference_steps": num_inference_steps}
    result: dict[str, Any] = {"num_clips": len(everything), **settings, "splits": {}}
    for name, asked in chosen.items():
        drawn = draw_all(pipe, [clip.captions[0] for clip in asked], settings)
        places = [place_of[id(clip)] for clip in asked]
        own = torch.stack([real[place] for place in places]).transpose(1, 2) / 2 + 0.5
        result["splits"][name] = retrieval(looks(network, drawn), known, places, everything) | {
            "motion": motion(drawn),
            "motion_real": motion(own),
        }
        write_sheet(drawn[:SHOWN], own[:SHOWN], folder / f"judge_{name.split('_')[1]}")
    return result


def draw_all(
    pipe: Any, captions: Sequence[str], settings: dict[str, Any]
) -> Float[Tensor, "q F 3 H W"]:
    """One video in [0, 1] of every caption; caption i has seed i."""
    videos = []
    for start in tqdm(range(0, len(captions), BATCH), desc="draw", unit="batch"):
        asked = [{"prompt": caption} for caption in captions[start : start + BATCH]]
        videos.append(draw_whole(pipe, asked, start, **settings))
    return torch.cat(videos)


@torch.no_grad()
def through(
    vae: AutoencoderKLWan, clips: Sequence[Float[Tensor, "3 F H W"]]
) -> Float[Tensor, "n F 3 H W"]:
    """Clips in [0, 1] after the autoencoder, which a drawn one has gone through too."""
    found = []
    for start in tqdm(range(0, len(clips), BATCH), desc="decode", unit="batch"):
        latents = vae.encode(torch.stack(list(clips[start : start + BATCH]))).latent_dist.mode()
        found.append(vae.decode(latents).sample / 2 + 0.5)
    return torch.cat(found).transpose(1, 2)


def looks(network: nn.Module, videos: Float[Tensor, "n F 3 H W"]) -> Float[Tensor, "n features"]:
    """Unit vectors of the mean features of a few frames of each video in [0, 1]."""
    places = torch.linspace(0, videos.shape[1] - 1, LOOKED_AT).round().long()
    frames = 2 * videos[:, places] - 1
    found = features(network, frames.flatten(0, 1)).unflatten(0, (-1, LOOKED_AT))
    return nn.functional.normalize(found.mean(1), dim=1)


def motion(videos: Float[Tensor, "n F 3 H W"]) -> float:
    """Mean absolute difference of neighbouring frames, of videos in [0, 1], in [0, 255]."""
    return 255 * float((videos[:, 1:] - videos[:, :-1]).abs().mean())


def write_sheet(
    drawn: Float[Tensor, "n F 3 H W"], real: Float[Tensor, "n F 3 H W"], path: Path
) -> None:
    """Drawn clips over the real ones of their captions: a PNG strip, and an animated WebP.

    Args:
        drawn: videos in [0, 1].
        real: as many.
        path: without its ending.
    """
    pairs = torch.stack([drawn, real], 1).flatten(0, 1).clamp(0, 1)
    _enlarged(strip(pairs, 9)).save(path.with_suffix(".png"))
    rows = torch.stack([drawn, real]).clamp(0, 1)  # (2, n, F, 3, H, W)
    frames = rows.permute(2, 3, 0, 4, 1, 5).flatten(4, 5).flatten(2, 3)
    first, *others = [_enlarged(frame) for frame in frames]
    first.save(
        path.with_suffix(".webp"),
        save_all=True,
        append_images=others,
        duration=FRAME_MS,
        loop=0,
        lossless=True,
    )


def _enlarged(pixels: Float[Tensor, "3 H W"]) -> Image.Image:
    shown = picture(pixels)
    size = (ENLARGED * shown.width, ENLARGED * shown.height)
    return shown.resize(size, Image.Resampling.NEAREST)


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(judge_video_teacher, as_positional=False)
