"""The bundled DiT's own recipe: class-conditional rectified flow in pixel space.

Shapes: B batch, C channels, H height, W width.
Convention: x_t = (1 - sigma) x_0 + sigma eps, v = eps - x_0, sigma runs 1 to 0.
Source: Liu et al., arXiv 2209.03003 (rectified flow); Esser et al., arXiv 2403.03206, eq. 19
(logit-normal times); Peebles & Xie, arXiv 2212.09748 (adaLN-Zero, label dropout).
"""

import torch
from diffusers import DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler
from flow_teacher import FlowTeacher, initialise_linear
from jaxtyping import Bool, Float
from torch import Tensor

from foreseer.integration.pipelines.pixel_pipeline import PixelDiTPipeline


class TeacherModule(FlowTeacher):
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
        super().__init__(label_dropout, learning_rate)
        self.save_hyperparameters()
        self.num_classes = num_classes
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

    def velocity(
        self,
        x_t: Float[Tensor, "B C H W"],
        sigma: Float[Tensor, " B"],
        conditions: list[Tensor],
        dropped: Bool[Tensor, " B"],
    ) -> Float[Tensor, "B C H W"]:
        """The transformer's v; the null class stands where a label is dropped."""
        labels = conditions[0].masked_fill(dropped, self.num_classes)
        v: Tensor = self.transformer(x_t, timestep=1000 * sigma, class_labels=labels).sample
        return v

    def pipeline(self) -> PixelDiTPipeline:
        """A pipeline around this module's transformer itself, with the Euler flow scheduler."""
        return PixelDiTPipeline(self.transformer, FlowMatchEulerDiscreteScheduler())

    def sample_grid(
        self, columns: int, num_inference_steps: int, guidance_scale: float
    ) -> Float[Tensor, "C height width"]:
        """`columns` samples of every class, a class per row; seed 0."""
        return class_grid(self.pipeline(), columns, num_inference_steps, guidance_scale)


def initialise_adaln_zero(transformer: DiTTransformer2DModel) -> None:
    """Start every block at the identity and the output at zero, and stop per-block label dropout.

    diffusers leaves the modulation and the output layer at their default initialisation, and lets
    each block drop labels on its own in training mode (DiT, section 3.2, drops once per sample).
    """
    zeroed = [transformer.proj_out_1, transformer.proj_out_2]
    for block in transformer.transformer_blocks:
        zeroed.append(block.norm1.linear)
        block.norm1.emb.class_embedder.dropout_prob = 0.0
    initialise_linear(transformer, zeroed)


def class_grid(
    pipe: PixelDiTPipeline, columns: int, num_inference_steps: int, guidance_scale: float
) -> Float[Tensor, "C height width"]:
    """One image in [0, 1] that shows `columns` samples of every class, a class per row; seed 0.

    Args:
        pipe: its progress bar is switched off.
        columns: samples per class.
        num_inference_steps: sampler steps.
        guidance_scale: classifier-free guidance scale.
    """
    pipe.set_progress_bar_config(disable=True)
    num_classes = pipe.num_classes
    images = pipe(
        [label for label in range(num_classes) for _ in range(columns)],
        guidance_scale=guidance_scale,
        num_inference_steps=num_inference_steps,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
        return_dict=False,
    )[0]
    rows = images.unflatten(0, (num_classes, columns))  # (rows, columns, C, H, W)
    return rows.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)
