"""RF inversion with FLUX-type pipelines: a picture to noise, and back under another prompt.

In flow time sigma (1 is noise, 0 the picture) and v = eps - x_0, after Rout et al.
(arXiv 2410.10792). Inversion goes up the sigmas that editing comes down, towards noise y:

    x <- x + (sigma' - sigma) [u + gamma ((y - x) / (1 - sigma) - u)],   u = v(x, sigma, no prompt)

Editing comes down, at the steps start <= i < stop pulled to the picture x_0:

    v <- v + eta ((x - x_0) / sigma - v),   x <- x + (sigma' - sigma) v

and puts what lies outside of a mask M back at its first steps (EEdit, arXiv 2503.10270):

    x <- (1 - M) ((1 - sigma') x_0 + sigma' y) + M x

Each is a run of its own, with a host, steps and a predictor of its own.
Shapes: B pictures, C channels, H height, W width, N tokens, D channels of a token.
"""

import copy
import itertools
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, TypeGuard

import numpy as np
import torch
from diffusers import FluxPipeline
from diffusers.utils.torch_utils import randn_tensor
from jaxtyping import Bool, Float
from torch import Tensor, nn

from foreseer.integration.host.module_host import host
from foreseer.integration.pipelines.picture_latents import (
    AutoencoderLatents,
    Embedded,
    PixelLatents,
)
from foreseer.integration.pipelines.pixel_pipeline import PixelFluxPipeline

Prompt: TypeAlias = str | Sequence[str] | Embedded
Generator: TypeAlias = torch.Generator | list[torch.Generator] | None


@dataclass(frozen=True)
class Inverted:
    """What an inversion came to.

    Args:
        latents: noise that editing starts from.
        source: the picture x_0 as latents.
        noise: y, which the inversion was drawn towards.
        num_inference_steps: steps of the inversion, and of every edit.
        height: of the picture in pixels.
        width: likewise.
    """

    latents: Float[Tensor, "B N D"]
    source: Float[Tensor, "B N D"]
    noise: Float[Tensor, "B N D"]
    num_inference_steps: int
    height: int
    width: int


class RFInversion:
    """Invert pictures and edit them, with a `PixelFluxPipeline` or diffusers' `FluxPipeline`.

        editor = RFInversion(fs.load_pipeline("zoo:emoji_flux"))
        with fs.forecasting(editor.inversion, fs.predictors.Taylor(1), anchors=[0, 3, 7, 14, 21]):
            inverted = editor.invert(pictures, gamma=0.0)
        with fs.forecasting(editor.editing, "runs/edit_8"):
            edited = editor.edit(inverted, "a red apple", stop=6)

    Args:
        pipe: the pipeline; it is not changed.

    Attributes:
        inversion: host of the inversion, which goes wherever a pipeline does; by itself it runs 28
            steps at gamma 0 on `images` and their `prompt`.
        exact: host of `invert_exactly`, alike. Fits on its recordings, with `inversion` as their
            pipeline, aim at what reconstructs.
        editing: host of the editing.

    Raises:
        ValueError: the pipeline is of another kind.
    """

    def __init__(self, pipe: Any) -> None:
        if isinstance(pipe, PixelFluxPipeline):
            self.coder: PixelLatents | AutoencoderLatents = PixelLatents(pipe)
        elif isinstance(pipe, FluxPipeline):
            self.coder = AutoencoderLatents(pipe)
        else:
            raise ValueError(
                f"found {type(pipe).__name__}, expected a PixelFluxPipeline or diffusers' "
                "FluxPipeline: RF inversion is for models that predict v of packed latents."
            )
        self.pipe = pipe
        self._own = copy.copy(pipe.transformer)  # what is attached to the original passes it by
        self.inversion = host(pipe.transformer, sample=self._inverted)
        self.exact = host(pipe.transformer, sample=self._inverted_exactly)
        self.editing = host(pipe.transformer)

    @torch.no_grad()
    def invert(
        self,
        images: Any,
        gamma: float = 0.5,
        num_inference_steps: int = 28,
        *,
        prompt: Prompt = "",
        guidance_scale: float = 1.0,
        generator: Generator = None,
        noise: Float[Tensor, "B N D"] | None = None,
    ) -> Inverted:
        """Take pictures to noise.

        Args:
            images: `(B, C, H, W)` in [-1, 1], or PIL images.
            gamma: pull to drawn noise, in [0, 1]: 0 follows the model's ODE alone, 1 the straight
                line, in which the model has no say.
            num_inference_steps: steps, those of the edits that start from it.
            prompt: none, as published; that of the picture for a closer reconstruction with it.
            guidance_scale: see `edit`.
            generator: draws y.
            noise: y, instead of drawing it.

        Raises:
            ValueError: gamma, the pictures or the noise are out of range or of another size.
        """
        if not 0 <= gamma <= 1:
            raise ValueError(f"gamma is {gamma}, expected 0 to 1.")
        source, (height, width) = self.coder.encoded(images)
        grid = self.grid(num_inference_steps, source)[::-1]
        if noise is None:
            noise = randn_tensor(source.shape, generator, source.device, source.dtype)
        elif noise.shape != source.shape or not bool(noise.isfinite().all()):
            raise ValueError(
                f"the noise has the shape {tuple(noise.shape)}, expected finite numbers in that of "
                f"the pictures' latents, {tuple(source.shape)}."
            )
        if gamma == 1:
            warnings.warn(
                f"at gamma 1 the inversion comes to the drawn noise whatever the model says: its "
                f"{num_inference_steps} evaluations are thrown away, and forecasting them is "
                "pointless. Take a gamma below 1, or draw the noise: no inversion is the same.",
                stacklevel=2,
            )
        model = self._model(prompt, guidance_scale, source, (height, width))
        x, noise = source, noise.to(source)
        with self.inversion.steps(grid[:-1], inversion=True) as steps:
            for sigma, after in zip(steps, grid[1:], strict=True):
                u = model(x, sigma)
                if gamma:
                    u = u + gamma * ((noise.float() - x.float()) / (1 - sigma) - u)
                x = (x.float() + (after - sigma) * u).to(x.dtype)
        return Inverted(x, source, noise, num_inference_steps, height, width)

    @torch.no_grad()
    def invert_exactly(
        self,
        images: Any,
        num_inference_steps: int = 28,
        *,
        prompt: Prompt = "",
        guidance_scale: float = 1.0,
        iterations: int = 3,
    ) -> Inverted:
        """The noise that editing under the same prompt, at eta 0, brings back to the pictures.

        The inverse of an Euler step, x' = x + (sigma' - sigma) v(x', sigma'), by so many rounds of
        its fixed point: `iterations + 1` evaluations a step, of which none is forecast.

        Args:
            images: see `invert`.
            num_inference_steps: see `invert`.
            prompt: of the edit.
            guidance_scale: of the edit.
            iterations: rounds, at least 1.

        Raises:
            ValueError: see `invert`.
        """
        if iterations < 1:
            raise ValueError(f"iterations is {iterations}, expected at least 1.")
        source, size = self.coder.encoded(images)
        grid = self.grid(num_inference_steps, source)[::-1]
        model = self._model(prompt, guidance_scale, source, size)
        aside = replace(model, transformer=self._own)
        states = [source]
        for sigma, after in itertools.pairwise(grid):
            x = found = states[-1]
            for _ in range(iterations):
                found = (x.float() + (after - sigma) * aside(found, after)).to(x.dtype)
            states.append(found)
        with self.exact.steps(grid[:-1], inversion=True) as steps:
            for sigma, x in zip(steps, states, strict=False):
                model(x, sigma)
        return Inverted(states[-1], source, states[-1], num_inference_steps, *size)

    @torch.no_grad()
    def edit(
        self,
        inverted: Inverted,
        prompt: Prompt,
        eta: float = 0.7,
        stop: int = 6,
        mask: Any = None,
        *,
        start: int = 0,
        background_steps: int = 18,
        guidance_scale: float = 3.0,
        output_type: str = "pil",
    ) -> Any:
        """Come back to pictures under a prompt.

        Args:
            inverted: where to start, and what to be pulled to.
            prompt: of the edit, one for all pictures or one each.
            eta: pull to the source picture, in [0, 1].
            stop: the first step without it.
            mask: True where the picture may change, in its pixels, a tensor `(B, 1, H, W)` or one
                for all; None for everywhere.
            start: the first step with the pull.
            background_steps: steps after which what is outside of the mask is put back.
            guidance_scale: of a model with guidance embedded, what it is told; of another,
                strength of guidance against no prompt, at 1 or below without.
            output_type: `pil`, `np` or `pt` (in [0, 1]), or `latent` (packed).

        Returns:
            The pictures.

        Raises:
            ValueError: a number is out of range, or the mask is empty, full or of another size.
        """
        count = inverted.num_inference_steps
        if not 0 <= eta <= 1 or not 0 <= start <= stop <= count:
            raise ValueError(
                f"found eta {eta}, start {start} and stop {stop}; expected eta in [0, 1] and "
                f"0 <= start <= stop <= {count}, the steps of the inversion."
            )
        size = inverted.height, inverted.width
        free = None if mask is None else self._tokens_of(mask, inverted)
        grid = self.grid(count, inverted.source)
        place = self.pipe._execution_device, self.pipe.transformer.dtype  # of another editor, maybe
        x = inverted.latents.to(*place)
        source, noise = (each.to(*place).float() for each in (inverted.source, inverted.noise))
        model = self._model(prompt, guidance_scale, x, size)
        with self.editing.steps(grid[:-1]) as steps:
            for index, (sigma, after) in enumerate(zip(steps, grid[1:], strict=True)):
                v = model(x, sigma)
                if start <= index < stop:
                    v = v + eta * ((x.float() - source) / sigma - v)
                moved = x.float() + (after - sigma) * v
                if free is not None and index < background_steps:
                    kept = (1 - after) * source + after * noise
                    moved = torch.where(free, moved, kept)
                x = moved.to(x.dtype)
        return self.coder.finished(x, size, output_type)

    def grid(self, num_inference_steps: int, latents: Float[Tensor, "B N D"]) -> list[float]:
        """Flow times of every step of an edit, falling from 1, and its end, 0.

        Args:
            num_inference_steps: steps.
            latents: whose number of tokens shifts the times, where the scheduler does that.

        Raises:
            ValueError: there are no steps.
        """
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps is {num_inference_steps}, expected at least 1.")
        scheduler = copy.deepcopy(self.pipe.scheduler)
        even = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)
        shift = {}
        if scheduler.config.get("use_dynamic_shifting"):
            shift = {"mu": _mu(latents.shape[1], scheduler.config)}
        scheduler.set_timesteps(sigmas=even, **shift)
        return [float(sigma) for sigma in scheduler.sigmas]

    def _inverted(self, inputs: dict[str, Any], generator: Any) -> Tensor:
        """One inversion, for whatever records or fits `inversion`."""
        return self.invert(**_sampled(inputs), gamma=0.0, generator=generator).latents

    def _inverted_exactly(self, inputs: dict[str, Any], generator: Any) -> Tensor:
        """The same for `exact`."""
        return self.invert_exactly(**_sampled(inputs)).latents

    def _model(
        self,
        prompt: Prompt,
        guidance_scale: float,
        like: Float[Tensor, "B N D"],
        size: tuple[int, int],
    ) -> "_Model":
        if not math.isfinite(guidance_scale):
            raise ValueError(f"guidance_scale is {guidance_scale}, expected a finite number.")
        ids = self.coder.positions(size).to(like.device)
        made = [self._embedded(prompt, like)]
        embeds = bool(self.pipe.transformer.config.guidance_embeds)
        if guidance_scale > 1 and not embeds:
            made.append(self._embedded("", like))
        told = torch.full((len(like),), float(guidance_scale), device=like.device)
        return _Model(
            self.pipe.transformer, made, ids, guidance_scale, told.float() if embeds else None
        )

    def _embedded(self, prompt: Any, like: Float[Tensor, "B N D"]) -> Embedded:
        """A prompt for every picture, encoded.

        Raises:
            ValueError: there is another number of prompts than of pictures.
        """
        if _is_embedded(prompt):
            embeds, pooled = prompt
        else:
            words = [prompt] * len(like) if isinstance(prompt, str) else prompt
            if not isinstance(words, list | tuple) or not all(isinstance(w, str) for w in words):
                raise ValueError(
                    f"the prompt is {prompt!r}, expected words, a list of them with one for each "
                    'picture, or hidden states and pooled vectors as a pair; "" is no prompt.'
                )
            embeds, pooled = self.coder.prompts(list(words))
        if len(embeds) != len(like):
            raise ValueError(
                f"found {len(embeds)} prompts for {len(like)} pictures, expected one for all or "
                "one each."
            )
        return embeds.to(like), pooled.to(like)

    def _tokens_of(self, mask: Any, inverted: Inverted) -> Bool[Tensor, "B N D"]:
        """Where latents may change: where any pixel of theirs may."""
        rows, wanted = len(inverted.source), (1, inverted.height, inverted.width)
        if not isinstance(mask, Tensor):
            raise ValueError(
                f"the mask is a {type(mask).__name__}, expected a tensor of booleans: of a PIL "
                "image, torch.from_numpy(numpy.array(image.convert('L')) > 127)[None, None]."
            )
        if mask.ndim != 4 or tuple(mask.shape[1:]) != wanted or len(mask) not in (1, rows):
            raise ValueError(
                f"the mask is {'x'.join(map(str, mask.shape))}, expected "
                f"{rows}x{'x'.join(map(str, wanted))}: a row per picture or one for all, one "
                "channel, and the pictures' own pixels; resize it with mode='nearest'."
            )
        shares = mask.bool().flatten(1).double().mean(1).tolist()
        for row, share in enumerate(shares):
            if share in (0, 1):
                whole = {0: "no pixel, so there is nothing to edit", 1: "every pixel"}[int(share)]
                raise ValueError(
                    f"the mask of picture {row} holds {whole}, of {wanted[1]}x{wanted[2]}; expected"
                    " some to change and some to keep. Leave the mask out to edit everywhere."
                )
        tokens = self.coder.packed_mask(mask.bool().to(inverted.source.device))
        return tokens.expand(rows, -1, -1)


@dataclass(frozen=True)
class _Model:
    """v of latents at a flow time, after guidance, in float32.

    Args:
        transformer: the network.
        prompts: what it is told; with two, guidance of the first against the second.
        ids: positions of the picture's tokens.
        guidance_scale: strength.
        told: what a model with guidance embedded is told of it.
    """

    transformer: nn.Module
    prompts: Sequence[Embedded]
    ids: Tensor
    guidance_scale: float
    told: Tensor | None

    def __call__(self, x: Float[Tensor, "B N D"], sigma: float) -> Float[Tensor, "B N D"]:
        found = [self._called(x, sigma, *prompt).float() for prompt in self.prompts]
        if len(found) == 1:
            return found[0]
        v, without = found
        return without + self.guidance_scale * (v - without)

    def _called(
        self, x: Tensor, sigma: float, embeds: Tensor, pooled: Tensor
    ) -> Float[Tensor, "B N D"]:
        given = {} if self.told is None else {"guidance": self.told}
        v: Tensor = self.transformer(
            x,
            timestep=torch.full((len(x),), sigma, device=x.device, dtype=x.dtype),
            encoder_hidden_states=embeds,
            pooled_projections=pooled,
            img_ids=self.ids,
            txt_ids=self.ids.new_zeros(embeds.shape[1], 3),
            return_dict=False,
            **given,
        )[0]
        return v


def source_share(gamma: float, sigmas: Sequence[float]) -> float:
    """Weight of the picture in inverted noise: prod_i (1 - gamma (sigma' - sigma) / (1 - sigma)).

    What the model says aside, this is all that the noise knows of the picture.

    Args:
        gamma: pull to drawn noise.
        sigmas: flow times of the inversion, rising, with the end.
    """
    pairs = itertools.pairwise(sigmas)
    return math.prod(1 - gamma * (after - sigma) / (1 - sigma) for sigma, after in pairs)


def _is_embedded(prompt: Any) -> TypeGuard[Embedded]:
    return isinstance(prompt, tuple) and len(prompt) == 2 and isinstance(prompt[0], Tensor)


def _sampled(inputs: dict[str, Any]) -> dict[str, Any]:
    """Inputs of recorded inversions.

    Raises:
        ValueError: there are others than a recording has.
    """
    if "images" not in inputs or not inputs.keys() <= {"images", "prompt"}:
        raise ValueError(
            f"the inputs are {', '.join(sorted(inputs)) or 'none'}, expected images and, if any, "
            "prompt: inversions are recorded and fitted at 28 steps, gamma 0, without guidance."
        )
    return inputs


def _mu(tokens: int, config: Any) -> float:
    """Shift of the times for a number of tokens, as diffusers' FLUX pipelines have it."""
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
    mu: float = calculate_shift(tokens, *(config[name] for name in names))
    return mu
