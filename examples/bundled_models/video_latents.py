"""Clips as the latents of a trained autoencoder, which is written beside them as it is shipped.

Shapes: N clips, F frames, Z latent channels, f latent frames, h latent height, w latent width,
B batch, L text tokens, E text channels.

    python examples/bundled_models/video_latents.py --checkpoint DIR/last.ckpt --out prepared
"""

from collections.abc import Sequence
from pathlib import Path

import lightning
import numpy as np
import torch
from clips import Clip, pixels, read_clips, split
from diffusers import AutoencoderKLWan
from emoji import has_two_sides
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from video_vae import VideoVaeModule, frame_psnr

from foreseer.integration.pipelines.sentence_encoder import encode
from foreseer.trajectories.epoch_sampler import ResumableLoader

LATENTS = "latents.safetensors"
BATCH = 16


def write_latents(
    checkpoint: str, clips: str = "clips.npz", out: str = "prepared", starts: int = 4
) -> None:
    """Write the autoencoder, in bfloat16, and what it makes of all clips, normalised.

    Every loop is encoded from `starts` of its frames on, evenly spread, and its mirror image too:
    `train` is `(2 starts, N, Z, f, h, w)`, plain ones first, `held_out` `(n, Z, f, h, w)`, from the
    first frame on.

    Args:
        checkpoint: Lightning checkpoint of a `VideoVaeModule`.
        clips: file of `write_clips`.
        out: folder to write.
        starts: frames that a loop is begun at.
    """
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    arguments = {k: v for k, v in state["hyper_parameters"].items() if not k.startswith("_")}
    module = VideoVaeModule(**arguments)
    module.load_state_dict(state["state_dict"])
    vae = module.vae.to(torch.bfloat16).float().eval()  # encode with the weights that are shipped
    train, test = split(read_clips(clips))
    held_out = encoded(vae, [pixels(clip.frames) for clip in test])
    values = [frame_psnr(vae, pixels(clip.frames)[None])[0] for clip in test]
    print(f"held-out frames: {float(torch.stack(values).mean()):.2f} dB")
    variants = []
    for mirrored in (False, True):
        for start in range(starts):
            begin = start * len(train[0].frames) // starts
            turned = [pixels(np.roll(clip.frames, -begin, 0)) for clip in train]
            variants.append(encoded(vae, [t.flip(-1) for t in turned] if mirrored else turned))
    found = torch.stack(variants)
    mean, std = found.mean((0, 1, 3, 4, 5)), found.std((0, 1, 3, 4, 5))
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
    vae.to(torch.bfloat16).save_pretrained(Path(out) / "vae")
    latents = {"train": found, "held_out": held_out}
    scaled = {name: normalised(each, mean, std).half() for name, each in latents.items()}
    save_file(scaled, Path(out) / LATENTS)
    print(
        f"wrote {out}: {tuple(found.shape)}, standard deviations {std.min():.2f} to {std.max():.2f}"
    )


def normalised(
    latents: Float[Tensor, "... Z f h w"], mean: Float[Tensor, " Z"], std: Float[Tensor, " Z"]
) -> Float[Tensor, "... Z f h w"]:
    """Latents as the transformer sees them: (z - mean) / std of every channel."""
    return (latents - mean[:, None, None, None]) / std[:, None, None, None]


@torch.no_grad()
def encoded(
    vae: AutoencoderKLWan, clips: Sequence[Float[Tensor, "3 F H W"]]
) -> Float[Tensor, "N Z f h w"]:
    """Posterior means of clips in [-1, 1]."""
    found = []
    for start in tqdm(range(0, len(clips), BATCH), desc="encode", unit="batch"):
        batch = torch.stack(list(clips[start : start + BATCH]))
        found.append(vae.encode(batch).latent_dist.mode())
    return torch.cat(found)


class CaptionedLatents(lightning.LightningDataModule):
    """Latents of clips with their captions; the held-out loops of `clips` are not trained on.

    Args:
        clips: file of `write_clips`, for the captions.
        folder: of `write_latents`, made of the same file.
        batch_size: captions per batch.
        seed: seed of the training order.
    """

    def __init__(
        self,
        clips: str = "clips.npz",
        folder: str = "prepared",
        batch_size: int = 32,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.clips = clips
        self.folder = folder
        self.batch_size = batch_size
        self.seed = seed

    def setup(self, stage: str) -> None:
        """Read the latents and encode the captions (80 MB).

        Raises:
            FileNotFoundError: there are no latents.
            ValueError: they are of other clips.
        """
        path = Path(self.folder) / LATENTS
        if not path.is_file():
            raise FileNotFoundError(
                f"there is no {path}; write it with "
                "`python examples/bundled_models/video_latents.py`."
            )
        latents, (train, test) = load_file(path), split(read_clips(self.clips))
        counts = latents["train"].shape[1], len(latents["held_out"])
        if counts != (len(train), len(test)):
            raise ValueError(
                f"{path} is of {counts} clips, trained on and held out, {self.clips} has "
                f"{len(train), len(test)}; write the latents anew."
            )
        self.train = CaptionedClips(latents["train"], train)
        self.test = CaptionedClips(latents["held_out"][None], test)

    def train_dataloader(self) -> ResumableLoader:
        """Shuffled batches `(latents (B, Z, f, h, w), prompt_embeds (B, L, E))`."""
        return ResumableLoader(self.train, self.batch_size, self.seed, drop_last=True)

    def val_dataloader(self) -> DataLoader:
        """Batches of the clips kept from training, in order."""
        return DataLoader(self.test, self.batch_size, generator=torch.Generator())


class CaptionedClips(Dataset[tuple[Tensor, Tensor]]):
    """Every variant of every clip once with each of its captions.

    Args:
        latents: variants of each clip; the second half is mirrored, and is replaced by the first
            where a mirror does not suit the clip's names.
        clips: the clips, in the same order.
    """

    def __init__(self, latents: Float[Tensor, "v N Z f h w"], clips: Sequence[Clip]) -> None:
        self.latents = latents
        self.two_sided = [has_two_sides(clip) for clip in clips]
        self.embeds = encode([caption for clip in clips for caption in clip.captions])[0]

    def __len__(self) -> int:
        """Variants times captions."""
        return len(self.latents) * len(self.embeds)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """A clip's latents and the hidden states of one of its captions."""
        variant, caption = divmod(index, len(self.embeds))
        owner = caption // 2
        half = len(self.latents) // 2
        if variant >= half and half and not self.two_sided[owner]:
            variant -= half
        return self.latents[variant, owner].float(), self.embeds[caption]


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(write_latents, as_positional=False)
