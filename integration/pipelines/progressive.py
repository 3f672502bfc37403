"""Pictures that grow while they are sampled: early steps on a coarse grid of tokens, later finer.

In flow time, x = (1 - sigma) x_0 + sigma eps, the orthonormal Haar transform takes a block of four
pixels to their half sum LL and three details. LL of a picture at time s is the average of the
picture at time sigma, scaled by 2 / (1 + sigma), exactly where

    s = 2 sigma / (1 + sigma),    x_fine = 1/2 H4 [2 / (1 + sigma) x_coarse; s e_1; s e_2; s e_3]

with H4 the 4 x 4 Hadamard matrix and e_i noise: Fresco's expansion (arXiv 2601.07462) without free
coefficients, and the time shift sqrt(4) of SD3 (arXiv 2403.03206). All noise comes from one field,
a function of place, channel and seed alone, so that every grid sees the same.
Shapes: B pictures, C channels, H height, W width, N tokens, D channels of a token.
"""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from jaxtyping import Float
from torch import Tensor, nn

from foreseer.integration.handover import Handover
from foreseer.integration.pipelines.pixel_pipeline import PixelFluxPipeline, pack, unpack

HADAMARD = torch.tensor([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 2
"""H4 / 2: orthonormal, symmetric, its own inverse."""


def noise_field(
    seeds: Sequence[int], channels: int, height: int, width: int
) -> Float[Tensor, "B C H W"]:
    """Normal noise that is a function of (row, column, channel, seed) alone.

    Every row of every channel is a stream of its own of numpy's Philox, whose counter starts at
    (channel, row), so a larger picture has the noise of a smaller one in its corner.

    Args:
        seeds: one per picture.
        channels: C.
        height: H.
        width: W.
    """
    field = np.empty((len(seeds), channels, height, width), dtype=np.float32)
    for place, seed in enumerate(seeds):
        for channel in range(channels):
            for row in range(height):
                stream = np.random.Philox(key=seed, counter=[0, 0, channel, row])
                field[place, channel, row] = np.random.Generator(stream).standard_normal(width)
    return torch.from_numpy(field)


def haar(images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B 4 C H/2 W/2"]:
    """Half sums of blocks of 2 x 2 pixels, and their three details."""
    corners = nn.functional.pixel_unshuffle(images, 2).unflatten(1, (-1, 4))
    return torch.einsum("ij,bcjhw->bichw", HADAMARD.to(images), corners)


def inverse_haar(bands: Float[Tensor, "B 4 C h w"]) -> Float[Tensor, "B C 2*h 2*w"]:
    """The pixels of their bands."""
    corners = torch.einsum("ij,bjchw->bcihw", HADAMARD.to(bands), bands)
    return nn.functional.pixel_shuffle(corners.flatten(1, 2), 2)


def fine_time(sigma: float, reduction: int = 2) -> float:
    """Flow time s = r sigma / (1 + (r - 1) sigma) of pictures whose r x r averages are at sigma.

    Args:
        sigma: flow time of the averages.
        reduction: r.
    """
    return reduction * sigma / (1 + (reduction - 1) * sigma)


class FlowMatchStageScheduler(FlowMatchEulerDiscreteScheduler):
    """Euler steps of one stage; `num_inference_steps` counts those of all stages.

    Attributes:
        begins: flow time of the full pictures that the stage begins at, or the step below it.
        ends: likewise, its end.
        reduction: r of the stage's pictures, averages over r x r pixels, whose flow time is
            s / (r - (r - 1) s).
    """

    sigmas: Tensor
    timesteps: Tensor
    begins: float = 1.0
    ends: float = 0.0
    reduction: int = 1

    def set_timesteps(self, num_inference_steps: int | None = None, *args: Any, **kw: Any) -> None:
        """The steps of this stage out of those of all.

        Raises:
            ValueError: the stage has none.
        """
        super().set_timesteps(num_inference_steps, *args, **kw)
        first = int((self.sigmas[:-1] > self.begins).sum())
        last = int((self.sigmas[:-1] > self.ends).sum())
        if last <= first:
            raise ValueError(
                f"of {len(self.timesteps)} steps none begins at a flow time in ({self.ends:g}, "
                f"{self.begins:g}], so the stage of {self.reduction} x {self.reduction} pixels has "
                "no step; switch at other times, or make more steps."
            )
        self.timesteps = self.timesteps[first:last]
        self.sigmas = self.sigmas[first : last + 1]
        if self.reduction > 1:
            self.sigmas = self.sigmas / (self.reduction - (self.reduction - 1) * self.sigmas)
            self.timesteps = self.sigmas[:-1] * self.config.num_train_timesteps


class GridChange:
    """From a grid of tokens to one of twice its side.

    Args:
        side: tokens per side of the coarse grid.
        patch_size: pixels per side of a token, on both.
    """

    def __init__(self, side: int, patch_size: int) -> None:
        self.side = side
        self.patch_size = patch_size

    def lift(self, feature: Float[Tensor, "B N D"]) -> Float[Tensor, "B 4*N D"]:
        """A feature on the fine grid: every token a copy of its parent's.

        Raises:
            ValueError: it is not of the coarse grid.
        """
        if feature.ndim != 3 or feature.shape[1] != self.side**2:
            raise ValueError(
                f"found a feature of shape {tuple(feature.shape)}, expected (rows, {self.side**2}, "
                f"channels): the tokens of a {self.side} x {self.side} grid."
            )
        grid = feature.unflatten(1, (self.side, self.side))
        return grid.repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1, 2)

    def time(self, sigma: float) -> float:
        """Flow time on the fine grid."""
        return fine_time(sigma)

    def latents(
        self, coarse: Float[Tensor, "B N D"], details: Float[Tensor, "B 3 C H W"], sigma: float
    ) -> Float[Tensor, "B 4*N D"]:
        """The state on the fine grid, see above.

        Args:
            coarse: the state on the coarse grid.
            details: e_1 to e_3.
            sigma: flow time of the coarse state.
        """
        half_sums = 2 / (1 + sigma) * unpack(coarse, self.patch_size)
        bands = torch.cat([half_sums[:, None], fine_time(sigma) * details.to(half_sums)], 1)
        return pack(inverse_haar(bands), self.patch_size)

    def restricted(self, fine: Float[Tensor, "B M D"], sigma: float) -> Float[Tensor, "B N D"]:
        """The coarse state, at flow time `sigma`, that a fine one was made of."""
        half_sums = haar(unpack(fine.float(), self.patch_size))[:, 0]
        return pack((1 + sigma) / 2 * half_sums, self.patch_size)


class ProgressivePipeline:
    """Draw pictures on grids that grow, with a `PixelFluxPipeline` whose model knows them all.

        grown = ProgressivePipeline(fs.load_pipeline(FOLDER), switches=[0.7])
        coarse, fine = grown.stages
        with fs.forecasting(coarse, "runs/coarse_4"), fs.forecasting(fine, "runs/fine_6"):
            pictures = grown(["grinning face"])

    Every stage is a pipeline, which is recorded, fitted and attached to as any is; its steps are
    those of its part of the run. With `after`, a stage's history begins with what the one before it
    computed.

    Args:
        pipe: the pipeline; it is not changed.
        switches: flow times in (0, 1), falling, at which the grid grows to twice its side; none is
            plain sampling.

    Attributes:
        stages: a `PixelFluxPipeline` each, coarsest first, around one set of weights.
        changes: between them.

    Raises:
        ValueError: the pipeline is of another kind, or its grid cannot be halved so often.
    """

    def __init__(self, pipe: Any, switches: Any = (0.7,)) -> None:
        self.pipe = pipe
        self.switches = _checked(switches)
        scheduler = type(getattr(pipe, "scheduler", None))
        if not isinstance(pipe, PixelFluxPipeline) or scheduler not in EULER:
            raise ValueError(
                f"found {type(pipe).__name__} with {scheduler.__name__}, expected a "
                "PixelFluxPipeline with FlowMatchEulerDiscreteScheduler: the expansion is exact on "
                "pixels, and a solver's memory does not outlast a change of grid."
            )
        if "forward" in vars(pipe.transformer):
            raise ValueError(
                "something is attached to the pipeline's transformer; detach it, build the "
                "ProgressivePipeline, and attach to its stages."
            )
        side, patch = pipe.config.sample_size // pipe.config.patch_size, pipe.config.patch_size
        reductions = [2**k for k in range(len(self.switches), -1, -1)]
        if side % reductions[0]:
            raise ValueError(
                f"a grid of {side} x {side} tokens is not {reductions[0]} times a coarser one; "
                f"expected a side that {len(self.switches)} switches can halve."
            )
        times = [1.0, *self.switches, 0.0]
        self.stages = [
            self._stage(reduction, begins, ends)
            for reduction, begins, ends in zip(reductions, times, times[1:], strict=False)
        ]
        self.changes = [GridChange(side // r, patch) for r in reductions[:-1]]

    def _stage(self, reduction: int, begins: float, ends: float) -> PixelFluxPipeline:
        scheduler = FlowMatchStageScheduler.from_config(self.pipe.scheduler.config)
        scheduler.begins, scheduler.ends, scheduler.reduction = begins, ends, reduction
        transformer = self.pipe.transformer if reduction == 1 else twin(self.pipe.transformer)
        config = self.pipe.config
        stage = PixelFluxPipeline(
            transformer,
            self.pipe.text_encoder,
            scheduler,
            config.sample_size // reduction,
            config.patch_size,
            spacing=reduction,
        )
        stage.set_progress_bar_config(disable=True)
        return stage

    def after(self, run: Any, stage: int = 1) -> Handover:
        """What the forecasts of a stage begin with: the features of the stage before it.

        Args:
            run: of `fs.forecasting` on that stage.
            stage: number of the stage that goes on from it.
        """
        return Handover(run, self.changes[stage - 1])

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        seeds: Sequence[int] | None = None,
        guidance_scale: float = 3.0,
        num_inference_steps: int = 50,
        output_type: str = "pil",
    ) -> Any:
        """Draw one picture per prompt.

        Args:
            prompt: one prompt or several.
            seeds: of the noise, one per picture; None counts up from 0.
            guidance_scale: guidance strength, of all stages.
            num_inference_steps: sampler steps of all stages together.
            output_type: as of `PixelFluxPipeline`.

        Returns:
            The pictures, as that pipeline returns them.

        Raises:
            ValueError: a stage gets no step, or there are not as many seeds as prompts.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        seeds = range(len(prompts)) if seeds is None else seeds
        if len(seeds) != len(prompts):
            raise ValueError(
                f"found {len(seeds)} seeds for {len(prompts)} prompts, expected one each."
            )
        call: dict[str, Any] = {
            "guidance_scale": guidance_scale,
            "num_inference_steps": num_inference_steps,
        }
        latents, details = self.noise(seeds)
        for stage, change, own in zip(self.stages, self.changes, details, strict=False):
            ends = stage(prompts, latents=latents, output_type="latent", return_dict=False, **call)
            latents = change.latents(ends[0], own, float(stage.scheduler.sigmas[-1]))
        return self.stages[-1](prompts, latents=latents, output_type=output_type, **call)

    def noise(
        self, seeds: Sequence[int]
    ) -> tuple[Float[Tensor, "B N D"], list[Float[Tensor, "B 3 C h w"]]]:
        """The coarsest stage's noise, and the details that every change of grid adds."""
        config, size = self.pipe.config, self.pipe.config.sample_size
        channels = self.pipe.transformer.config.in_channels // config.patch_size**2
        field = noise_field(seeds, channels, size, size)
        details: list[Tensor] = []
        for _ in self.changes:
            bands = haar(field)
            field, own = bands[:, 0], bands[:, 1:]
            details.insert(0, own)
        return pack(field, config.patch_size), details


EULER = (FlowMatchEulerDiscreteScheduler, FlowMatchStageScheduler)


def _checked(switches: Any) -> tuple[float, ...]:
    """The switches.

    Raises:
        ValueError: they are no falling flow times: of several samples, all switch together.
    """
    found = tuple(switches) if isinstance(switches, Sequence | Tensor) else (switches,)
    numbers = all(isinstance(each, float | int) for each in found)
    if not numbers or any(not 0 < s < 1 for s in found) or list(found) != sorted(set(found))[::-1]:
        raise ValueError(
            f"switches are {found}, expected falling flow times in (0, 1), one per change of grid: "
            "all pictures of a call change their grid at one step."
        )
    return found


def twin(transformer: nn.Module) -> nn.Module:
    """A transformer of modules of its own around the same parameters.

    What is attached to one passes by the other.
    """
    tensors = [*transformer.parameters(), *transformer.buffers()]
    return copy.deepcopy(transformer, {id(tensor): tensor for tensor in tensors})
