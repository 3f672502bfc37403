"""A text-to-video pipeline, its data and its autoencoder, small enough for a test."""

import io
import json
import tarfile
from pathlib import Path

import torch
from clips import PACKAGES
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from emoji import ARCHIVE, INDEX
from PIL import Image
from tiny_text import tiny_encoder

from foreseer.integration.pipelines.sentence_encoder import WIDTH
from foreseer.integration.pipelines.sentence_wan_pipeline import SentenceWanPipeline

FRAMES, SIDE = 5, 16
COLOURS = ("red", "green", "blue", "yellow")
SHAPES = ("circle", "square", "heart", "cat", "dog", "fish", "tree", "star", "book", "cup", "hat")
LOOP = 10  # frames of a packaged loop


def tiny_video_pipeline() -> SentenceWanPipeline:
    """Random weights, five frames of 16 x 16 pixels in 2 x 2 x 2 tokens."""
    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
        scale_factor_spatial=4,
    )
    transformer = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=WIDTH,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=16,
    )
    pipe = SentenceWanPipeline(
        None,
        tiny_encoder(),
        vae.eval(),
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer.eval(),
        sample_size=SIDE,
        num_frames=FRAMES,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def named() -> list[tuple[str, str]]:
    """The emoji of `write_packages`, a colour and a shape each."""
    return [(colour, shape) for colour in COLOURS for shape in SHAPES]


def write_packages(folder: Path) -> Path:
    """44 moving emoji, one still one, one of a skin tone and one without a name, as packaged."""
    entries, files = [], {}
    for place, (colour, shape) in enumerate([*named(), ("still", "moon")]):
        code = f"{0x1F400 + place:x}"
        entry = {"name": f"{colour} {shape}".upper(), "short_name": f"{shape}_{colour}"}
        entries.append(entry | {"unified": f"{code.upper()}-FE0F", "non_qualified": code.upper()})
        entries[-1] |= {"category": "Symbols" if shape == "heart" else "Objects"}
        files[code] = loop(colour, place) if colour != "still" else loop("black", 0, count=1)
    files |= {"1f44b-1f3fb": loop("red", 0), "10ffff": loop("red", 0)}
    parts = list(files.items())
    for number, name in enumerate(PACKAGES):
        content = {f"package/assets/{code}.webp": data for code, data in parts[number::4]}
        write_tar(folder / name, content)
    write_tar(folder / ARCHIVE, {INDEX: json.dumps(entries).encode()})
    return folder


def loop(colour: str, place: int, count: int = LOOP) -> bytes:
    """A square of a colour that moves down, on white; its size tells clips apart.

    Pillow (12) writes no transparency into an animation; what is still keeps it.
    """
    frames = []
    for number in range(count):
        frame = Image.new("RGBA", (64, 64), (255, 255, 255, 255 if count > 1 else 0))
        frame.paste(colour, (0, 4 * number, 12 + place, 4 * number + 20))
        frames.append(frame)
    content = io.BytesIO()
    frames[0].save(content, "WEBP", save_all=count > 1, append_images=frames[1:], lossless=True)
    return content.getvalue()


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    """A `.tgz` of these files."""
    with tarfile.open(path, "w:gz") as package:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            package.addfile(member, io.BytesIO(content))
