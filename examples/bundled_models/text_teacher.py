"""The bundled text-to-image transformer's own recipe: rectified flow in pixel space.

Shapes: B batch, C channels, H height, W width, L text tokens, E text channels.
"""

from collections.abc import Sequence

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from flow_teacher import FlowTeacher, compile_for_training, initialise_linear, muon_of_blocks
from jaxtyping import Bool, Float
from torch import Tensor, nn

from foreseer.integration.pipelines.pixel_pipeline import (
    PixelFluxPipeline,
    image_ids,
    pack,
    unpack,
)
from foreseer.integration.pipelines.sentence_encoder import NUM_TOKENS, WIDTH, SentenceEncoder

HEAD_CHANNELS = 64
ROTARY_AXES = (8, 28, 28)  # channels of a head turned by text position, row, column


class TextTeacherModule(FlowTeacher):
    """Train a `FluxTransformer2DModel` on pixels, with a sentence encoder's hidden states as text.

    Args:
        num_layers: double-stream blocks.
        num_single_layers: single-stream blocks.
        num_attention_heads: heads of 64 channels each; the width is 64 times this.
        patch_size: pixels per token side.
        sample_size: image side in pixels.
        text_dropout: probability of replacing a sample's caption by the empty one.
        learning_rate: AdamW's rate before the schedule.
        prompts: prompts whose pictures are drawn into TensorBoard and whose embeddings are saved
            with the pipeline.
        compile_blocks: train through `torch.compile`, which on a CPU asks for a C++ compiler, takes
            a minute and a half at the start and a fifth off every step (1.10 to 0.85 s on two
            cores).
        muon: Muon's steps in the blocks, twenty times AdamW's rate.
    """

    transformer: FluxTransformer2DModel

    def __init__(
        self,
        num_layers: int = 2,
        num_single_layers: int = 6,
        num_attention_heads: int = 3,
        patch_size: int = 4,
        sample_size: int = 32,
        text_dropout: float = 0.1,
        learning_rate: float = 1e-3,
        prompts: Sequence[str] = (),
        compile_blocks: bool = False,
        muon: bool = False,
    ) -> None:
        super().__init__(text_dropout, learning_rate)
        self.save_hyperparameters()
        self.patch_size = patch_size
        self.sample_size = sample_size
        self.prompts = tuple(prompts)
        self.compile_blocks = compile_blocks
        self.muon = muon
        self.transformer = FluxTransformer2DModel(
            patch_size=1,
            in_channels=3 * patch_size**2,
            num_layers=num_layers,
            num_single_layers=num_single_layers,
            attention_head_dim=HEAD_CHANNELS,
            num_attention_heads=num_attention_heads,
            joint_attention_dim=WIDTH,
            pooled_projection_dim=WIDTH,
            axes_dims_rope=ROTARY_AXES,
        )
        initialise_linear(self.transformer, zeroed_layers(self.transformer))

    def setup(self, stage: str) -> None:
        """Encode the prompts that are drawn, and the empty one; compile what is to be trained."""
        self.text_encoder = [SentenceEncoder.knowing(self.prompts)]  # in a list: not trained
        if stage != "fit":
            return
        self.transformer.x_embedder.register_forward_hook(in_float)
        if self.compile_blocks:
            compile_for_training(self.transformer)

    def velocity(
        self,
        x_t: Float[Tensor, "B C H W"],
        sigma: Float[Tensor, " B"],
        conditions: list[Tensor],
        dropped: Bool[Tensor, " B"],
    ) -> Float[Tensor, "B C H W"]:
        """The transformer's v; where the caption is dropped, the empty prompt is in its place."""
        embeds, pooled = conditions
        null_embeds, null_pooled = self.text_encoder[0]([""])
        embeds = torch.where(dropped[:, None, None], null_embeds.to(embeds), embeds)
        pooled = torch.where(dropped[:, None], null_pooled.to(pooled), pooled)
        side = x_t.shape[-1] // self.patch_size
        ids = image_ids(side, self.sample_size // x_t.shape[-1]).to(x_t.device)
        v = self.transformer(
            pack(x_t, self.patch_size),
            timestep=sigma,
            encoder_hidden_states=embeds,
            pooled_projections=pooled,
            img_ids=ids,
            txt_ids=ids.new_zeros(NUM_TOKENS, 3),
        ).sample
        return unpack(v, self.patch_size)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW, with Muon in the blocks if `muon`; the rates follow `ClockCosine`."""
        if not self.muon:
            return super().configure_optimizers()
        return muon_of_blocks(self.transformer, self.learning_rate)

    def pipeline(self) -> PixelFluxPipeline:
        """A pipeline around this module's transformer itself, with the Euler flow scheduler."""
        return PixelFluxPipeline(
            self.transformer,
            self.text_encoder[0],
            FlowMatchEulerDiscreteScheduler(),
            self.sample_size,
            self.patch_size,
        )

    def sample_grid(
        self, columns: int, num_inference_steps: int, guidance_scale: float
    ) -> Float[Tensor, "C height width"]:
        """One picture of every prompt, `columns` a row; seed 0."""
        return prompt_grid(
            self.pipeline(), self.prompts, columns, num_inference_steps, guidance_scale
        )


def in_float(module: nn.Module, arguments: tuple[Tensor], tokens: Tensor) -> Tensor:
    """The embedded tokens in float32, also where autocast made bfloat16 of them.

    The transformer brings sigma into their type, and bfloat16 has 128 values between 0.5 and 1.
    """
    return tokens.float()


def zeroed_layers(transformer: FluxTransformer2DModel) -> list[nn.Linear]:
    """The modulation of every block and of the output, and the output layer."""
    layers = [transformer.norm_out.linear, transformer.proj_out]
    for block in transformer.transformer_blocks:
        layers += [block.norm1.linear, block.norm1_context.linear]
    return layers + [block.norm.linear for block in transformer.single_transformer_blocks]


def prompt_grid(
    pipe: PixelFluxPipeline,
    prompts: Sequence[str],
    columns: int,
    num_inference_steps: int,
    guidance_scale: float,
) -> Float[Tensor, "C height width"]:
    """One picture in [0, 1] of every prompt, white where the last row ends early; seed 0.

    Args:
        pipe: its progress bar is switched off.
        prompts: at least one prompt.
        columns: pictures per row.
        num_inference_steps: sampler steps.
        guidance_scale: classifier-free guidance scale.
    """
    pipe.set_progress_bar_config(disable=True)
    images = pipe(
        list(prompts),
        guidance_scale=guidance_scale,
        num_inference_steps=num_inference_steps,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
        return_dict=False,
    )[0]
    images = torch.cat([images, images.new_ones(-len(images) % columns, *images.shape[1:])])
    rows = images.unflatten(0, (-1, columns))  # (rows, columns, C, H, W)
    return rows.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)
