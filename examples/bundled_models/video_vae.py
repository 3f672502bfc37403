"""The bundled video model's autoencoder: a small `AutoencoderKLWan`, trained on loops of emoji.

Shapes: B batch, F frames, H height, W width, Z latent channels, f = 1 + (F - 1) / 4, h = H / 4,
w = W / 4.
"""

from collections.abc import Sequence

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, WanResample
from jaxtyping import Float
from muon import Muon
from torch import Tensor

from foreseer.training.plumbing.resuming import Drawing


class VideoVaeModule(Drawing):
    """Train an `AutoencoderKLWan` by mean squared error and a small divergence.

    loss = mse(x, decode(z)) + kl_weight * mean KL(q(z | x) || N(0, 1)), z ~ q(z | x)
    (Kingma & Welling, arXiv 1312.6114, eq. 10); mirrored left and right with probability 1/2.

    Args:
        base_dim: channels at full resolution.
        z_dim: latent channels.
        dim_mult: channels of each resolution relative to `base_dim`; three, for a quarter of the
            height, of the width and of the frames.
        num_res_blocks: residual blocks of each resolution.
        kl_weight: weight of the divergence, in nats per latent number.
        learning_rate: AdamW's rate before the schedule; that of kernels is ten times as much.
        start: checkpoint of such a module trained on single frames (`window: 1`), which are learned
            several times as fast; clips begin at its weights, inflated.
        decoder_only: begin at the weights of `start` as they are, trained on clips, and leave the
            encoder alone, so that latents stay what a transformer was trained on.
    """

    def __init__(
        self,
        base_dim: int = 16,
        z_dim: int = 16,
        dim_mult: Sequence[int] = (1, 2, 4),
        num_res_blocks: int = 1,
        kl_weight: float = 5e-4,
        learning_rate: float = 2e-3,
        start: str | None = None,
        decoder_only: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.kl_weight = kl_weight
        self.learning_rate = learning_rate
        self.start = start
        self.decoder_only = decoder_only
        self.vae = AutoencoderKLWan(
            base_dim=base_dim,
            z_dim=z_dim,
            dim_mult=list(dim_mult),
            num_res_blocks=num_res_blocks,
            temperal_downsample=[True, True],
            latents_mean=[0.0] * z_dim,
            latents_std=[1.0] * z_dim,
            scale_factor_temporal=4,
            scale_factor_spatial=4,
        )
        if decoder_only:
            self.vae.encoder.requires_grad_(False)
            self.vae.quant_conv.requires_grad_(False)

    def training_step(self, batch: Float[Tensor, "B 3 F H W"], batch_idx: int) -> Float[Tensor, ""]:
        """The loss of one batch of clips in [-1, 1]."""
        mirrored = (torch.rand(len(batch)) < 0.5).to(batch.device)[:, None, None, None, None]
        x = torch.where(mirrored, batch.flip(-1), batch)
        posterior = self.vae.encode(x).latent_dist
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        z = mean + (0.5 * logvar).exp() * torch.randn(mean.shape).to(mean)
        error = (self.vae.decode(z).sample.float() - x).square().mean()
        divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        self.log("train/mse", error, prog_bar=True)
        self.log("train/kl", divergence)
        loss = error + self.kl_weight * divergence
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: Float[Tensor, "B 3 F H W"], batch_idx: int) -> None:
        """Log the mean PSNR of held-out frames, of the first of a clip, and of the last."""
        values = frame_psnr(self.vae, batch)
        self.log("val/psnr", values.mean(), prog_bar=True)
        self.log("val/psnr_first", values[:, 0].mean())
        self.log("val/psnr_last", values[:, -1].mean())

    def setup(self, stage: str) -> None:
        """Take the weights to start from."""
        if stage == "fit" and self.start is not None:
            state = torch.load(self.start, map_location="cpu", weights_only=True)
            self.load_state_dict(state["state_dict"])
            if not self.decoder_only:
                inflate(self.vae)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Muon for kernels, AdamW for the rest; the rates follow `ClockCosine`."""
        kernels = [p for p in self.parameters() if p.ndim >= 4]
        return Muon(self.parameters(), self.learning_rate, kernels, ratio=10)


@torch.no_grad()
def inflate(vae: AutoencoderKLWan) -> None:
    """Let an autoencoder of single frames treat each frame of a clip as it would treat it alone.

    Kernels see no earlier frame, two frames are joined to their mean, and a joined one is doubled:
    what a clip loses at first is motion within four frames. Weights of earlier frames, which single
    frames do not train, would be noise.
    """
    for layer in vae.modules():
        if isinstance(layer, WanCausalConv3d) and layer.kernel_size[0] == 3:
            layer.weight[:, :, :2] = 0
    for layer in vae.modules():
        if isinstance(layer, WanResample) and hasattr(layer, "time_conv"):
            kernel, channels = layer.time_conv.weight.zero_(), layer.time_conv.in_channels
            layer.time_conv.bias.zero_()
            own = torch.arange(channels)
            if layer.time_conv.out_channels == channels:
                kernel[own, own, 1:, 0, 0] = 0.5
            else:
                kernel[own, own, 2, 0, 0] = kernel[channels + own, own, 2, 0, 0] = 1


@torch.no_grad()
def frame_psnr(vae: AutoencoderKLWan, x: Float[Tensor, "B 3 F H W"]) -> Float[Tensor, "B F"]:
    """PSNR in dB of every frame that is encoded (posterior mean) and decoded; peak 2."""
    decoded = vae.decode(vae.encode(x).latent_dist.mode().float()).sample.float()
    error = (decoded - x).square().mean((1, 3, 4)).clamp(min=1e-10)
    return 10 * torch.log10(4 / error)
