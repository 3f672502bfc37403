"""The bundled text-to-video transformer's own recipe: rectified flow on the latents of clips.

Shapes: B batch, Z latent channels, f latent frames, h latent height, w latent width, L text tokens,
E text channels.
"""

from collections.abc import Sequence

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from flow_teacher import FlowTeacher, compile_for_training, initialise_linear, muon_of_blocks
from jaxtyping import Bool, Float
from muon import Muon
from text_teacher import in_float
from torch import Tensor, nn

from foreseer.integration.pipelines.load import DTYPE
from foreseer.integration.pipelines.sentence_encoder import WIDTH, SentenceEncoder
from foreseer.integration.pipelines.sentence_wan_pipeline import SentenceWanPipeline

HEAD_CHANNELS = 64
LONGEST = 64  # tokens of an axis: rotary positions there are tables for
FLOW_SHIFT = 3.0  # of the sampler's times, as Wan 2.1 has it for small videos
TRAIN_TIMES = 1000  # the transformer's times are sigma times this


class VideoTeacherModule(FlowTeacher):
    """Train a `WanTransformer3DModel` on latents, with a sentence encoder's states as text.

    Args:
        num_layers: blocks.
        num_attention_heads: heads of 64 channels each; the width is 64 times this.
        ffn_ratio: inner width of the feed-forward layers by the width.
        latent_channels: channels of a latent.
        sample_size: side in pixels that the autoencoder decodes to.
        num_frames: frames that it decodes to.
        text_dropout: probability of replacing a sample's caption by the empty one.
        learning_rate: AdamW's rate before the schedule.
        vae: folder of the autoencoder, see `video_latents.py`; needed to draw and to export.
        prompts: prompts that are drawn into TensorBoard, and whose embeddings are saved with the
            pipeline.
        compile_blocks: train through `torch.compile`, which on a CPU asks for a C++ compiler, takes
            a minute at the first start and half off every step (1.43 to 0.70 s on one core).
    """

    transformer: WanTransformer3DModel

    def __init__(
        self,
        num_layers: int = 8,
        num_attention_heads: int = 4,
        ffn_ratio: int = 4,
        latent_channels: int = 16,
        sample_size: int = 32,
        num_frames: int = 17,
        text_dropout: float = 0.1,
        learning_rate: float = 1e-3,
        vae: str = "prepared/vae",
        prompts: Sequence[str] = (),
        compile_blocks: bool = False,
    ) -> None:
        super().__init__(text_dropout, learning_rate)
        self.save_hyperparameters()
        self.sample_size = sample_size
        self.num_frames = num_frames
        self.vae_folder = vae
        self.prompts = tuple(prompts)
        self.compile_blocks = compile_blocks
        width = HEAD_CHANNELS * num_attention_heads
        self.transformer = WanTransformer3DModel(
            num_attention_heads=num_attention_heads,
            attention_head_dim=HEAD_CHANNELS,
            in_channels=latent_channels,
            out_channels=latent_channels,
            text_dim=WIDTH,
            ffn_dim=ffn_ratio * width,
            num_layers=num_layers,
            rope_max_seq_len=LONGEST,
        )
        initialise_linear(self.transformer, zeroed_layers(self.transformer))
        zero_tables(self.transformer)

    def setup(self, stage: str) -> None:
        """Encode the prompts that are drawn, and the empty one; compile what is to be trained."""
        self.text_encoder = [SentenceEncoder.knowing(self.prompts)]  # in a list: not trained
        if stage != "fit":
            return
        self.transformer.patch_embedding.register_forward_hook(in_float)
        if self.compile_blocks:
            compile_for_training(self.transformer)

    def velocity(
        self,
        x_t: Float[Tensor, "B Z f h w"],
        sigma: Float[Tensor, " B"],
        conditions: list[Tensor],
        dropped: Bool[Tensor, " B"],
    ) -> Float[Tensor, "B Z f h w"]:
        """The transformer's v; where the caption is dropped, the empty prompt is in its place."""
        (embeds,) = conditions
        nothing = self.text_encoder[0]([""])[0].to(embeds)
        embeds = torch.where(dropped[:, None, None], nothing, embeds)
        return self.transformer(x_t, TRAIN_TIMES * sigma, embeds).sample

    def configure_optimizers(self) -> Muon:
        """Muon in the blocks, AdamW for the rest; the rates follow `ClockCosine`."""
        return muon_of_blocks(self.transformer, self.learning_rate)

    def pipeline(self) -> SentenceWanPipeline:
        """A pipeline around this module's transformer itself, with the Euler flow scheduler."""
        return SentenceWanPipeline(
            None,
            self.text_encoder[0],
            AutoencoderKLWan.from_pretrained(self.vae_folder, **{DTYPE: self.transformer.dtype}),
            FlowMatchEulerDiscreteScheduler(shift=FLOW_SHIFT),
            self.transformer,
            sample_size=self.sample_size,
            num_frames=self.num_frames,
        )

    def sample_grid(
        self, columns: int, num_inference_steps: int, guidance_scale: float
    ) -> Float[Tensor, "C height width"]:
        """A row of frames of every prompt, `columns` of them evenly spread; seed 0."""
        pipe = self.pipeline()
        pipe.set_progress_bar_config(disable=True)
        videos = draw_videos(pipe, self.prompts, num_inference_steps, guidance_scale)
        return strip(videos, columns)


def zeroed_layers(transformer: WanTransformer3DModel) -> list[nn.Linear]:
    """The modulation, what cross-attention adds, and the output layer."""
    layers = [transformer.condition_embedder.time_proj, transformer.proj_out]
    return layers + [block.attn2.to_out[0] for block in transformer.blocks]


def zero_tables(transformer: WanTransformer3DModel) -> None:
    """Zero the constant part of every block's modulation: blocks start at the identity."""
    nn.init.zeros_(transformer.scale_shift_table)
    for block in transformer.blocks:
        nn.init.zeros_(block.scale_shift_table)


def draw_videos(
    pipe: SentenceWanPipeline,
    prompts: Sequence[str],
    num_inference_steps: int,
    guidance_scale: float,
) -> Float[Tensor, "B F 3 H W"]:
    """One video in [0, 1] of every prompt; seed 0."""
    return pipe(
        list(prompts),
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
        return_dict=False,
    )[0]


def strip(videos: Float[Tensor, "B F C H W"], columns: int) -> Float[Tensor, "C height width"]:
    """A row of frames of every video, `columns` of them evenly spread."""
    places = torch.linspace(0, videos.shape[1] - 1, columns).round().long()
    shown = videos[:, places]  # (rows, columns, C, H, W)
    return shown.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)
