"""Go on training the bundled text-to-image transformer on small and large pictures in turn.

Shapes: B batch, C channels, H height, W width.
"""

from collections.abc import Sequence

from jaxtyping import Float
from text_teacher import TextTeacherModule
from torch import Tensor, nn

from foreseer.integration.pipelines.load import load_pipeline


class GridTeacherModule(TextTeacherModule):
    """Train on the pictures and on their averages over squares, a batch of one, then of the other.

    A token of averages over r x r pixels stands for r x r tokens of the pictures and lies at the
    mean of their positions, so a sampler may go from one grid to the other.

    Args:
        start: pipeline whose transformer the training starts from, of the same sizes; None starts
            from nothing.
        reductions: sides r of the squares, one batch each in turn; 1 is the picture itself.
        num_layers: double-stream blocks.
        num_single_layers: single-stream blocks.
        num_attention_heads: heads of 64 channels each; the width is 64 times this.
        patch_size: pixels per token side.
        sample_size: image side in pixels, of the largest pictures.
        text_dropout: probability of replacing a sample's caption by the empty one.
        learning_rate: AdamW's rate before the schedule.
        prompts: prompts whose pictures are drawn into TensorBoard and whose embeddings are saved
            with the pipeline.
        compile_blocks: train through `torch.compile`.

    Raises:
        ValueError: a reduction does not divide the picture into whole tokens.
    """

    def __init__(
        self,
        start: str | None = "zoo:emoji_flux",
        reductions: Sequence[int] = (1, 2),
        num_layers: int = 2,
        num_single_layers: int = 6,
        num_attention_heads: int = 3,
        patch_size: int = 4,
        sample_size: int = 32,
        text_dropout: float = 0.1,
        learning_rate: float = 5e-4,
        prompts: Sequence[str] = (),
        compile_blocks: bool = False,
    ) -> None:
        super().__init__(
            num_layers,
            num_single_layers,
            num_attention_heads,
            patch_size,
            sample_size,
            text_dropout,
            learning_rate,
            prompts,
            compile_blocks,
        )
        self.save_hyperparameters()
        wrong = [r for r in reductions if r < 1 or sample_size % (r * patch_size)]
        if wrong or not reductions:
            raise ValueError(
                f"reductions holds {wrong or 'nothing'}, expected sides of squares that leave "
                f"whole tokens of {patch_size} px in pictures of {sample_size} px."
            )
        self.reductions = tuple(reductions)
        if start is not None:
            self.transformer.load_state_dict(load_pipeline(start).transformer.state_dict())

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Float[Tensor, ""]:
        """The loss on the grid whose turn it is.

        Args:
            batch: images `(B, C, H, W)` in [-1, 1] and their conditions.
            batch_idx: not used: the turn follows the optimiser steps, which a resumed run keeps.
        """
        images, *conditions = batch
        turn = self.reductions[self.global_step % len(self.reductions)]
        return super().training_step([averaged(images, turn), *conditions], batch_idx)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Log the held-out loss of the pictures themselves, and of every smaller grid.

        Args:
            batch: images `(B, C, H, W)` in [-1, 1] and their conditions.
            batch_idx: seed of the noise.
        """
        super().validation_step(batch, batch_idx)
        images, *conditions = batch
        for reduction in self.reductions:
            reduced = [averaged(images, reduction), *conditions]
            self.log(f"val/loss_over_{reduction}", self.held_out_loss(reduced, batch_idx))


def averaged(images: Float[Tensor, "B C H W"], reduction: int) -> Float[Tensor, "B C height width"]:
    """Pictures averaged over squares of `reduction` x `reduction` pixels."""
    return nn.functional.avg_pool2d(images, reduction)
