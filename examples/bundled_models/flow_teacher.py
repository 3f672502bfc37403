"""What the bundled hosts' recipes have in common: rectified flow at logit-normal times.

Shapes: B batch, C channels, H height, W width; of videos, frames stand before the height.
Convention: x_t = (1 - sigma) x_0 + sigma eps, v = eps - x_0, sigma runs 1 to 0.
Source: Liu et al., arXiv 2209.03003 (rectified flow); Esser et al., arXiv 2403.03206, eq. 19
(logit-normal times); Ho & Salimans, arXiv 2207.12598 (dropping the condition).
"""

from abc import abstractmethod

import torch
from diffusers import ModelMixin
from jaxtyping import Bool, Float
from muon import Muon
from torch import Tensor, nn

from foreseer.training.plumbing.resuming import Drawing


class FlowTeacher(Drawing):
    """Train a transformer to predict v = eps - x_0.

    Args:
        dropout: probability of drawing a sample without its condition.
        learning_rate: AdamW's rate before the schedule.
    """

    transformer: nn.Module

    def __init__(self, dropout: float, learning_rate: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.learning_rate = learning_rate

    @abstractmethod
    def velocity(
        self,
        x_t: Float[Tensor, "B C *frames H W"],
        sigma: Float[Tensor, " B"],
        conditions: list[Tensor],
        dropped: Bool[Tensor, " B"],
    ) -> Float[Tensor, "B C *frames H W"]:
        """The transformer's v.

        Args:
            x_t: noisy images.
            sigma: their noise levels in [0, 1].
            conditions: what a batch holds besides its images.
            dropped: samples that get no condition.
        """

    @abstractmethod
    def sample_grid(
        self, columns: int, num_inference_steps: int, guidance_scale: float
    ) -> Float[Tensor, "C height width"]:
        """An image in [0, 1] that shows what the transformer draws by now.

        Args:
            columns: samples per row.
            num_inference_steps: sampler steps.
            guidance_scale: classifier-free guidance scale.
        """

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Float[Tensor, ""]:
        """Mean squared error of v at logit-normal sigma, conditions dropped once per sample.

        Args:
            batch: images `(B, C, H, W)` in [-1, 1] and their conditions.
            batch_idx: not used.
        """
        x_0, *conditions = batch
        eps = torch.randn(x_0.shape).to(x_0)  # drawn on the CPU: the same on every device
        sigma = torch.randn(len(x_0)).to(x_0).sigmoid()
        dropped = (torch.rand(len(x_0)) < self.dropout).to(x_0.device)
        loss = self._loss(x_0, eps, sigma, conditions, dropped)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Log the same error on held-out images, all conditions kept, the same noise every time.

        Args:
            batch: images `(B, C, H, W)` in [-1, 1] and their conditions.
            batch_idx: seed of the noise.
        """
        self.log("val/loss", self.held_out_loss(batch, batch_idx), prog_bar=True)

    def held_out_loss(self, batch: list[Tensor], batch_idx: int) -> Float[Tensor, ""]:
        """What `validation_step` logs.

        Args:
            batch: images `(B, C, H, W)` in [-1, 1] and their conditions.
            batch_idx: seed of the noise.
        """
        x_0, *conditions = batch
        generator = torch.Generator().manual_seed(batch_idx)
        eps = torch.randn(x_0.shape, generator=generator).to(x_0)
        sigma = torch.randn(len(x_0), generator=generator).to(x_0).sigmoid()
        kept = torch.zeros_like(sigma, dtype=torch.bool)
        return self._loss(x_0, eps, sigma, conditions, kept)

    def _loss(
        self,
        x_0: Float[Tensor, "B C *frames H W"],
        eps: Float[Tensor, "B C *frames H W"],
        sigma: Float[Tensor, " B"],
        conditions: list[Tensor],
        dropped: Bool[Tensor, " B"],
    ) -> Float[Tensor, ""]:
        x_t = torch.lerp(x_0, eps, sigma.view(-1, *[1] * (x_0.ndim - 1)))
        v = self.velocity(x_t, sigma, conditions, dropped)
        return nn.functional.mse_loss(v.float(), eps - x_0)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW without weight decay; the rate follows `ClockCosine`."""
        return torch.optim.AdamW(
            self.parameters(), self.learning_rate, betas=(0.9, 0.99), weight_decay=0.0
        )


def muon_of_blocks(transformer: nn.Module, learning_rate: float) -> Muon:
    """Muon for the matrices of a transformer's blocks, AdamW for the rest.

    Args:
        transformer: the transformer.
        learning_rate: AdamW's rate before the schedule; Muon's is twenty times as much.
    """
    blocks = [m for m in transformer.modules() if isinstance(m, nn.ModuleList)]
    matrices = {id(p): p for b in blocks for p in b.parameters() if p.ndim == 2}
    return Muon(transformer.parameters(), learning_rate, matrices.values(), ratio=20)


def compile_for_training(transformer: ModelMixin) -> None:
    """Compile the blocks; on a CPU, attention becomes plain matrix products.

    The backward pass of its fused kernel takes 40 % of a small model's step there.
    """
    if not torch.cuda.is_available():
        transformer.set_attention_backend("_native_math")
    transformer.compile_repeated_blocks()


def initialise_linear(transformer: nn.Module, zeroed: list[nn.Linear]) -> None:
    """Xavier weights and zero biases in every linear layer, and zero weights in some of them.

    Args:
        transformer: the transformer.
        zeroed: modulation and output layers: blocks start at the identity (adaLN-Zero, Peebles &
            Xie, arXiv 2212.09748), which diffusers leaves to the trainer.
    """
    for module in transformer.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for layer in zeroed:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
