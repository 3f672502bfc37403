"""A small class-conditional U-Net, the host of shallow steps: rectified flow in pixel space.

Shapes: B batch, C channels, H height, W width.
Convention: x_t = (1 - sigma) x_0 + sigma eps, v = eps - x_0, sigma runs 1 to 0.
"""

from collections.abc import Sequence

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UNet2DModel
from dit_teacher import class_grid
from flow_teacher import FlowTeacher
from jaxtyping import Bool, Float
from torch import Tensor, nn

from foreseer.integration.pipelines.pixel_pipeline import PixelUNetPipeline

HEAD_CHANNELS = 32
NORM_GROUPS = 8


class UNetTeacherModule(FlowTeacher):
    """Train a `UNet2DModel` with one layer a block to predict v = eps - x_0.

    Every level halves height and width; all but the first have self-attention.

    Args:
        channels: of each level, the finest first.
        num_classes: class labels; the null class of guidance is the one after them.
        sample_size: image side in pixels.
        label_dropout: probability of replacing a sample's label by the null class.
        learning_rate: AdamW's rate before the schedule.
    """

    transformer: UNet2DModel

    def __init__(
        self,
        channels: Sequence[int] = (24, 64, 96),
        num_classes: int = 10,
        sample_size: int = 32,
        label_dropout: float = 0.1,
        learning_rate: float = 1e-3,
    ) -> None:
        super().__init__(label_dropout, learning_rate)
        self.save_hyperparameters()
        self.num_classes = num_classes
        deeper = len(channels) - 1
        self.transformer = UNet2DModel(
            sample_size=sample_size,
            in_channels=1,
            out_channels=1,
            layers_per_block=1,
            block_out_channels=tuple(channels),
            down_block_types=("DownBlock2D", *["AttnDownBlock2D"] * deeper),
            up_block_types=(*["AttnUpBlock2D"] * deeper, "UpBlock2D"),
            attention_head_dim=HEAD_CHANNELS,
            norm_num_groups=NORM_GROUPS,
            num_class_embeds=num_classes + 1,
        )
        nn.init.zeros_(self.transformer.conv_out.weight)

    def velocity(
        self,
        x_t: Float[Tensor, "B C H W"],
        sigma: Float[Tensor, " B"],
        conditions: list[Tensor],
        dropped: Bool[Tensor, " B"],
    ) -> Float[Tensor, "B C H W"]:
        """The U-Net's v; the null class stands where a label is dropped."""
        labels = conditions[0].masked_fill(dropped, self.num_classes)
        v: Tensor = self.transformer(x_t, timestep=1000 * sigma, class_labels=labels).sample
        return v

    def pipeline(self) -> PixelUNetPipeline:
        """A pipeline around this module's U-Net itself, with the Euler flow scheduler."""
        return PixelUNetPipeline(self.transformer, FlowMatchEulerDiscreteScheduler())

    def sample_grid(
        self, columns: int, num_inference_steps: int, guidance_scale: float
    ) -> Float[Tensor, "C height width"]:
        """`columns` samples of every class, a class per row; seed 0."""
        with torch.no_grad():
            return class_grid(self.pipeline(), columns, num_inference_steps, guidance_scale)
