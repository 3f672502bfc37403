"""The bundled DiT's own recipe: class-conditional rectified flow in pixel space.

Shapes: B batch, C channels, H height, W width.
Convention: x_t = (1 - sigma) x_0 + sigma eps, v = eps - x_0, sigma runs 1 to 0.
Source: Liu et al., arXiv 2209.03003 (rectified flow); Esser et al., arXiv 2403.03206, eq. 19
(logit-normal times); Peebles & Xie, arXiv 2212.09748 (adaLN-Zero, label dropout).
"""

import torch
from diffusers import DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..integration.pixel_pipeline import PixelDiTPipeline
from .resuming import Drawing


class TeacherModule(Drawing):
    """Train a `DiTTransformer2DModel` to predict v = eps - x_0.

    Args:
        num_layers: transformer blocks.
        num_attention_heads: heads of 64 channels each; the width is 64 times this.
        patch_size: pixels per token side.
        num_classes: class labels; index `num_classes` is the null class of guidance.
        sample_size: image side in pixels.
        label_dropout: probability of replacing a sample's label by the null class.
        learning_rate: AdamW's rate before the schedule.
    """

    def __init__(
        self,
        num_layers: int = 8,
        num_attention_heads: int = 3,
        patch_size: int = 4,
        num_classes: int = 10,
        sample_size: int = 32,
        label_dropout: float = 0.1,
        learning_rate: float = 1e-3,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.num_classes = num_classes
        self.label_dropout = label_dropout
        self.learning_rate = learning_rate
        self.transformer = DiTTransformer2DModel(
            num_attention_heads=num_attention_heads,
            attention_head_dim=64,
            in_channels=1,
            num_layers=num_layers,
            sample_size=sample_size,
            patch_size=patch_size,
            num_embeds_ada_norm=num_classes,
        )
        initialise_adaln_zero(self.transformer)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Float[Tensor, ""]:
        """Mean squared error of v at logit-normal sigma, with labels dropped once per sample.

        Args:
            batch: images `(B, C, H, W)` in [-1, 1] and labels `(B,)`.
            batch_idx: not used.
        """
        x_0, labels = batch
        eps = torch.randn(x_0.shape).to(x_0)  # drawn on the CPU: the same on every device
        sigma = torch.randn(len(x_0)).to(x_0).sigmoid()
        dropped = (torch.rand(len(x_0)) < self.label_dropout).to(x_0.device)
        loss = self._loss(x_0, eps, sigma, labels.masked_fill(dropped, self.num_classes))
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Log the same error on test images, with all labels and the same noise every time.

        Args:
            batch: images `(B, C, H, W)` in [-1, 1] and labels `(B,)`.
            batch_idx: seed of the noise.
        """
        x_0, labels = batch
        generator = torch.Generator().manual_seed(batch_idx)
        eps = torch.randn(x_0.shape, generator=generator).to(x_0)
        sigma = torch.randn(len(x_0), generator=generator).to(x_0).sigmoid()
        self.log("val/loss", self._loss(x_0, eps, sigma, labels), prog_bar=True)

    def _loss(
        self,
        x_0: Float[Tensor, "B C H W"],
        eps: Float[Tensor, "B C H W"],
        sigma: Float[Tensor, " B"],
        labels: Int[Tensor, " B"],
    ) -> Float[Tensor, ""]:
        x_t = torch.lerp(x_0, eps, sigma[:, None, None, None])
        v = self.transformer(x_t, timestep=1000 * sigma, class_labels=labels).sample
        return nn.functional.mse_loss(v.float(), eps - x_0)

    def pipeline(self) -> PixelDiTPipeline:
        """A pipeline around this module's transformer itself, with the Euler flow scheduler."""
        return PixelDiTPipeline(self.transformer, FlowMatchEulerDiscreteScheduler())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW without weight decay; the rate follows `ClockCosine`."""
        return torch.optim.AdamW(
            self.parameters(), self.learning_rate, betas=(0.9, 0.99), weight_decay=0.0
        )


def initialise_adaln_zero(transformer: DiTTransformer2DModel) -> None:
    """Start every block at the identity and the output at zero, and stop per-block label dropout.

    diffusers leaves the modulation and the output layer at their default initialisation, and lets
    each block drop labels on its own in training mode (DiT, section 3.2, drops once per sample).
    """
    for module in transformer.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    zeroed = [transformer.proj_out_1, transformer.proj_out_2]
    for block in transformer.transformer_blocks:
        zeroed.append(block.norm1.linear)
        block.norm1.emb.class_embedder.dropout_prob = 0.0
    for layer in zeroed:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
