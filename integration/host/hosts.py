"""What runs are made on: a pipeline of diffusers, or any module in a loop of somebody's own.

A host says which networks are forecast, what counts their steps and whose code a call belongs to;
whoever attaches to it, records it or fits on it knows no more of it than that. Its clock is always
a scheduler: a pipeline's own, or one that stands for a loop (`module_host.py`).
"""

from types import FrameType
from typing import Any

from torch import Tensor, nn

from foreseer.integration.host.branches import rows_per_branch
from foreseer.integration.host.caller import Caller, pipeline_call
from foreseer.integration.host.fingerprint import host_fingerprint, values_digest
from foreseer.integration.host.trunk import UnsupportedHost, takes_time

TURNS = {"transformer": 0, "unconditional_transformer": 0, "transformer_2": 1, "unet": 0}
"""Networks that are forecast, by name. Wan 2.2 runs `transformer` at high noise and `transformer_2`
at low noise, so they take turns; Ideogram 4 guides with `unconditional_transformer` at every step
of `transformer`; Stable Diffusion and its like run a `unet`."""


class Host:
    """What runs are made on.

    Attributes:
        given: what the user calls: a pipeline, or the host itself.
        scheduler: counts the steps: `set_timesteps` opens a run, `step` closes a step.
        by_hand: whether a loop that nothing else tells of may end before its last step.
    """

    given: Any
    scheduler: Any
    by_hand: bool = True
    steps_elsewhere: str = (
        "the pipeline's scheduler made no step between: the steps are made elsewhere (by copies of "
        "it, as in diffusion forcing, or without it), so they cannot be counted and nothing can be "
        "forecast. Run this pipeline without foreseer."
    )
    """What is wrong, and what to do, where the calls of one step are given several times."""

    @property
    def name(self) -> str:
        """What it is called in messages."""
        return type(self.given).__name__

    def networks(self) -> dict[str, nn.Module]:
        """The networks that are forecast, by name, in the order in which they take turns.

        Raises:
            UnsupportedHost: there is none, or one is compiled as a whole.
        """
        raise NotImplementedError

    def others(self) -> dict[str, nn.Module]:
        """Networks that take a time and are not forecast, such as a ControlNet."""
        return {}

    def turn(self, name: str) -> int:
        """The place of a network among those that take turns; those of one step share it."""
        return 0

    def fingerprint(self) -> dict[str, Any]:
        """What a predictor was fitted on, see `host_fingerprint`."""
        return host_fingerprint(*self.networks().values())

    def values_digest(self) -> str:
        """Digest of the weights' values, alike in every layout of them."""
        return values_digest(*self.networks().values())

    def samples(self, latents: Tensor) -> int:
        """Samples of a run, given the latents that its scheduler works on, batch first."""
        return max(1, len(latents))

    def call(self) -> FrameType | None:
        """The call under way whose arguments are settings of the run; None in a loop."""
        return None

    def caller(self) -> Any:
        """Who made the call under way; None where no run is open."""
        return Caller.here()

    def new_caller(self) -> Any:
        """Who is opening a run now; it lives as long as the run may go on."""
        return Caller.new()

    def beside(self) -> Any:
        """The run that the code now running is in, where it has another clock than `scheduler`."""
        return None

    def check_outside(self) -> None:
        """Raise where calls of the network outside of a run are a mistake."""


class DiffusersHost(Host):
    """A pipeline of diffusers, or whatever has its `transformer` and `scheduler`.

    Args:
        pipe: the pipeline.
    """

    def __init__(self, pipe: Any) -> None:
        self.given = pipe

    @property
    def scheduler(self) -> Any:
        """The pipeline's own, which may be exchanged.

        Raises:
            UnsupportedHost: this is no pipeline.
        """
        if not hasattr(self.given, "scheduler"):
            self.networks()
            raise UnsupportedHost(
                f"{self.name} has no `scheduler`, by which steps are counted; those of a loop of "
                "your own are counted by foreseer.host(module)."
            )
        return self.given.scheduler

    def networks(self) -> dict[str, nn.Module]:
        """See `Host`.

        Raises:
            UnsupportedHost: the pipeline has no `transformer`, or a compiled one.
        """
        found: dict[str, nn.Module] = {}
        for name in TURNS:
            module = getattr(self.given, name, None)
            if isinstance(module, nn.Module) and all(module is not m for m in found.values()):
                found[name] = module
        if not found:
            raise UnsupportedHost(
                f"{self.name} has no `transformer` or `unet` module; foreseer works on diffusion "
                "transformers and U-Nets, and on other modules through foreseer.host(module)."
            )
        for name, module in found.items():
            if is_compiled(module):
                raise UnsupportedHost(
                    f"the whole {name} is compiled, which fixes one path through it; "
                    f"use pipe.{name}.compile_repeated_blocks(fullgraph=True) instead, which "
                    "compiles the blocks and keeps forecasting exact."
                )
        return found

    def others(self) -> dict[str, nn.Module]:
        """See `Host`."""
        forecast = list(self.networks().values())
        return {
            name: module
            for name, module in vars(self.given).items()
            if isinstance(module, nn.Module)
            and all(module is not other for other in forecast)
            and takes_time(module)
        }

    def turn(self, name: str) -> int:
        """See `Host`."""
        return TURNS[name]

    def samples(self, latents: Tensor) -> int:
        """See `Host`."""
        return rows_per_branch(self.given, latents)

    def call(self) -> FrameType | None:
        """See `Host`."""
        return pipeline_call()


def is_compiled(module: nn.Module) -> bool:
    """Whether a module is compiled as a whole."""
    return hasattr(module, "_orig_mod") or module._compiled_call_impl is not None


def host_of(pipe: Any) -> Host:
    """The host that somebody means who gives a pipeline, or a host."""
    return pipe if isinstance(pipe, Host) else DiffusersHost(pipe)


def transformers_of(pipe: Any) -> dict[str, nn.Module]:
    """The networks of a pipeline or host that are forecast, see `Host.networks`."""
    return host_of(pipe).networks()


def transformer_of(pipe: Any) -> nn.Module:
    """The network of a pipeline or host that has one.

    Raises:
        UnsupportedHost: it has none, or two.
    """
    found = transformers_of(pipe)
    if len(found) > 1:
        raise UnsupportedHost(
            f"{host_of(pipe).name} has the experts {', '.join(found)}; this needs a pipeline with "
            "one transformer. Recording, L2PLeastSquares and forecasting take both."
        )
    return next(iter(found.values()))


def others_of(pipe: Any) -> dict[str, nn.Module]:
    """Networks of a pipeline or host that take a time and are not forecast."""
    return host_of(pipe).others()
