"""Tell an unmodified diffusers transformer where its step ends and which guidance it stands for.

The transformer keeps its class, its arguments and its parameters. A small second module adds a
vector to every modulation vector the transformer makes, through forward hooks; its last layer
starts at zero, so a student starts exactly at its teacher.

Shapes: B batch, M places where a host makes a modulation vector, W width of that vector.
Convention: x_t = (1 - t) x_0 + t eps; a step goes from t down to r, 0 <= r <= t <= 1, and the
network predicts the average velocity u with x_r = x_t - (t - r) u (MeanFlow, arXiv 2505.13447).
"""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from jaxtyping import Float
from torch import Tensor, nn

from foreseer.integration.host.fingerprint import CONDITIONER
from foreseer.integration.host.trunk import (
    UnsupportedHost,
    modulation_places,
    modulation_width,
    time_facts,
    wave_places,
)

NUM_FREQUENCIES = 32
HIGHEST_FREQUENCY = 30.0  # radians over the unit interval: smooth enough to be differentiated


class IntervalConditioner(ModelMixin, ConfigMixin):
    """What is added to a host's modulation vectors for an interval t - r and a guidance scale.

    k_m += W_m silu(W [phi(t - r), phi((g - g_0) / (g_1 - g_0))] + b) + b_m, with phi sines and
    cosines of modest frequencies and W_m, b_m zero at the start. The interval enters, not r itself:
    what is added at t = r then does not depend on t (docs/decisions.md).

    Args:
        width: width of the host's modulation vector.
        num_places: places where the host makes one.
        max_interval: longest interval t - r trained on, in (0, 1].
        min_guidance: smallest guidance scale trained on; None for a student without a scale.
        max_guidance: largest one.
        embed_guidance: whether the scale is embedded, so that a step is one evaluation; else the
            student keeps both branches, u_0 + g (u_c - u_0).
        band_limit: frequency, in radians per unit of flow time, at which the host's own waves of
            time are halved (by 1 / (1 + (f / band_limit)^4)); None leaves them alone.

    Raises:
        ValueError: an argument is out of range.
    """

    @register_to_config
    def __init__(
        self,
        width: int,
        num_places: int,
        max_interval: float = 0.2,
        min_guidance: float | None = None,
        max_guidance: float | None = None,
        embed_guidance: bool = True,
        band_limit: float | None = None,
    ) -> None:
        super().__init__()
        if not 0 < max_interval <= 1 or (min_guidance is None) != (max_guidance is None):
            raise ValueError(
                f"found max_interval {max_interval} and guidance from {min_guidance} to "
                f"{max_guidance}; expected an interval in (0, 1], and both ends or none."
            )
        if min_guidance is not None and not min_guidance < float(max_guidance or 0):
            raise ValueError(f"guidance runs from {min_guidance} to {max_guidance}, expected up.")
        if band_limit is not None and not band_limit > 0:
            raise ValueError(f"band_limit is {band_limit}, expected a positive frequency or None.")
        num_inputs = 2 if self.takes_guidance else 1
        self.inner = nn.Linear(2 * NUM_FREQUENCIES * num_inputs, width)
        self.outer = nn.Linear(width, num_places * width)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    @property
    def takes_guidance(self) -> bool:
        """Whether a guidance scale is embedded."""
        return self.config.min_guidance is not None and self.config.embed_guidance

    def forward(
        self, interval: Float[Tensor, " B"], guidance_scale: Float[Tensor, " B"] | None = None
    ) -> Float[Tensor, "B M W"]:
        """The vectors to add.

        Args:
            interval: t - r, in [0, 1].
            guidance_scale: guidance scale of every sample, where one is embedded.

        Raises:
            ValueError: a scale is missing or was not trained.
        """
        features = [_waves(interval)]
        if self.takes_guidance:
            if guidance_scale is None:
                raise ValueError("this student embeds its guidance scale; pass guidance_scale.")
            low, high = self.config.min_guidance, self.config.max_guidance
            features.append(_waves((guidance_scale - low) / (high - low)))
        elif guidance_scale is not None:
            raise ValueError("this student embeds no guidance scale; leave guidance_scale out.")
        hidden = self.inner(torch.cat(features, dim=1).to(self.inner.weight.dtype))
        added = self.outer(nn.functional.silu(hidden))
        return added.unflatten(1, (self.config.num_places, self.config.width))

    def check(self, interval: float, guidance_scale: float | None) -> None:
        """Raise unless a sampler's interval and scale are among those trained on.

        Raises:
            ValueError: the interval is longer than R, or the scale is out of range.
        """
        if interval > self.config.max_interval + 1e-4:  # float32 grids round
            raise ValueError(
                f"a sampler step spans an interval of {interval:.3f}, but the student was trained "
                f"on intervals up to R = {self.config.max_interval:g}; its error grows several "
                f"times beyond. Take more steps: {math.ceil(1 / self.config.max_interval - 1e-6)} "
                "where all are equally long, more of a schedule with a shift."
            )
        if guidance_scale is None or self.config.min_guidance is None:
            return
        low, high = self.config.min_guidance, self.config.max_guidance
        if not low - 1e-6 <= guidance_scale <= high + 1e-6:
            raise ValueError(
                f"guidance_scale is {guidance_scale:g}, but the student was trained on {low:g} to "
                f"{high:g}; stay inside, or distil for that range."
            )


def _waves(value: Float[Tensor, " B"]) -> Float[Tensor, "B features"]:
    """Sines and cosines of a value in [0, 1]; the lowest frequency is nearly linear."""
    exponents = torch.linspace(0, 1, NUM_FREQUENCIES, device=value.device)
    frequencies = 0.3 * (HIGHEST_FREQUENCY / 0.3) ** exponents
    angles = value.float()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class Conditioning:
    """A conditioner at work on a transformer, through hooks that stay until `detach`.

    Args:
        transformer: the host.
        conditioner: what is added.

    Raises:
        UnsupportedHost: the host's class is not known, or has another number of places.
        ValueError: the host has a conditioner already.
    """

    def __init__(self, transformer: nn.Module, conditioner: IntervalConditioner) -> None:
        places = modulation_places(transformer)
        if len(places) != conditioner.config.num_places:
            raise UnsupportedHost(
                f"{type(transformer).__name__} makes its modulation vector at {len(places)} "
                f"places, the conditioner is for {conditioner.config.num_places}."
            )
        if getattr(transformer, CONDITIONER, None) is not None:
            raise ValueError("this transformer has a conditioner already; detach it first.")
        object.__setattr__(transformer, CONDITIONER, conditioner)  # no submodule of the host
        self.transformer = transformer
        self.conditioner = conditioner
        self.added: Tensor | None = None
        self.handles = [
            place.register_forward_hook(_Adder(self, number)) for number, place in enumerate(places)
        ]
        if conditioner.config.band_limit is not None:
            limiter = _BandLimit(conditioner.config.band_limit)
            waves = wave_places(transformer)
            self.handles += [module.register_forward_hook(limiter) for module in waves]

    @contextlib.contextmanager
    def at(
        self,
        interval: Float[Tensor, " B"],
        guidance_scale: Float[Tensor, " B"] | None = None,
        same: bool = False,
    ) -> Iterator[None]:
        """Inside, calls of the transformer are for this interval and guidance scale.

        Args:
            interval: of every sample.
            guidance_scale: of every sample, where one is embedded.
            same: both are the same for all samples, so that calls may be of any batch size.
        """
        added = self.conditioner(interval, guidance_scale)
        self.added = added[:1] if same else added
        try:
            yield
        finally:
            self.added = None

    @contextlib.contextmanager
    def along(
        self, times: Float[Tensor, " bounds"], guidance_scale: float | None = None
    ) -> Iterator[None]:
        """Inside, a call of the transformer is for the step that begins at the time it is told.

        For pipelines whose loops are not ours.

        Args:
            times: flow times of all steps and the final 0.
            guidance_scale: of all samples, where one is embedded.
        """
        scale = time_facts(self.transformer).time_scale

        def enter(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            told = kwargs["timestep"].flatten()[0].to(times) / scale
            step = int((times[:-1] - told).abs().argmin())
            embedded = None if guidance_scale is None else times.new_full((1,), guidance_scale)
            self.added = self.conditioner((times[step] - times[step + 1])[None], embedded)

        handle = self.transformer.register_forward_pre_hook(enter, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()
            self.added = None

    def detach(self) -> None:
        """Take the hooks off."""
        object.__delattr__(self.transformer, CONDITIONER)
        for handle in self.handles:
            handle.remove()


class _Adder:
    """Forward hook of one place."""

    def __init__(self, conditioning: Conditioning, number: int) -> None:
        self.conditioning = conditioning
        self.number = number

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        added = self.conditioning.added
        return output if added is None else output + added[:, self.number].to(output.dtype)


class _BandLimit:
    """Forward hook on diffusers' `Timesteps`: damp what oscillates faster in time than can be used.

    A network trained at random times is free to answer to frequencies of 1000 radians per unit of
    flow time with noise, which costs its own loss little and rules its time derivative.
    """

    def __init__(self, band_limit: float) -> None:
        self.band_limit = band_limit

    def __call__(self, module: Any, args: Any, output: Tensor) -> Tensor:
        half = output.shape[-1] // 2
        exponents = torch.arange(half, device=output.device) / (half - module.downscale_freq_shift)
        frequencies = 1000 * module.scale * 10000.0**-exponents  # every host embeds 1000 t
        damping = 1 / (1 + (frequencies / self.band_limit) ** 4)
        return output * torch.cat([damping, damping]).to(output.dtype)


def conditioner_for(
    transformer: nn.Module,
    max_interval: float = 0.2,
    min_guidance: float | None = None,
    max_guidance: float | None = None,
    embed_guidance: bool = True,
    band_limit: float | None = None,
) -> IntervalConditioner:
    """A fresh conditioner for a host.

    Args:
        transformer: the host.
        max_interval: longest interval R, in (0, 1].
        min_guidance: smallest guidance scale; None for a student without a scale.
        max_guidance: largest one.
        embed_guidance: see `IntervalConditioner`.
        band_limit: see `IntervalConditioner`.

    Raises:
        UnsupportedHost: the host's class is not known.
    """
    width, num_places = modulation_width(transformer), len(modulation_places(transformer))
    return IntervalConditioner(
        width, num_places, max_interval, min_guidance, max_guidance, embed_guidance, band_limit
    )
