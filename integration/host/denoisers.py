"""Which networks of a pipeline denoise: those that are forecast, and those that are left alone."""

import inspect
from typing import Any

from torch import nn

from foreseer.integration.host.trunk import UnsupportedHost

TURNS = {"transformer": 0, "unconditional_transformer": 0, "transformer_2": 1}
"""Networks that are forecast, by name. Wan 2.2 runs `transformer` at high noise and `transformer_2`
at low noise, so they take turns; Ideogram 4 guides with `unconditional_transformer` at every step
of `transformer`."""

TIME_ARGUMENTS = ("timestep", "timesteps", "t", "sigma")


def transformers_of(pipe: Any) -> dict[str, nn.Module]:
    """The networks of a pipeline that are forecast, by name, those for high noise first.

    Raises:
        UnsupportedHost: the pipeline has no `transformer`, or a compiled one.
    """
    found: dict[str, nn.Module] = {}
    for name in TURNS:
        module = getattr(pipe, name, None)
        if isinstance(module, nn.Module) and all(module is not other for other in found.values()):
            found[name] = module
    if not found:
        raise UnsupportedHost(
            f"{type(pipe).__name__} has no `transformer` module; foreseer works on diffusion "
            "transformers."
        )
    for name, module in found.items():
        if hasattr(module, "_orig_mod") or module._compiled_call_impl is not None:
            raise UnsupportedHost(
                f"the whole {name} is compiled, which fixes one path through it; "
                f"use pipe.{name}.compile_repeated_blocks(fullgraph=True) instead, which compiles "
                "the blocks and keeps forecasting exact."
            )
    return found


def transformer_of(pipe: Any) -> nn.Module:
    """The denoiser of a pipeline that has one.

    Raises:
        UnsupportedHost: the pipeline has no `transformer`, or two.
    """
    found = transformers_of(pipe)
    if len(found) > 1:
        raise UnsupportedHost(
            f"{type(pipe).__name__} has the experts {', '.join(found)}; this needs a pipeline with "
            "one transformer. Recording, L2PLeastSquares and forecasting take both."
        )
    return next(iter(found.values()))


def others_of(pipe: Any) -> dict[str, nn.Module]:
    """The networks of a pipeline that take a time and are not forecast, such as a ControlNet."""
    forecast = list(transformers_of(pipe).values())
    return {
        name: module
        for name, module in vars(pipe).items()
        if isinstance(module, nn.Module)
        and all(module is not other for other in forecast)
        and takes_time(module)
    }


def takes_time(network: nn.Module) -> bool:
    """Whether a network is told a time, as whatever denoises is."""
    owner: Any = type(getattr(network, "_orig_mod", network))
    return any(name in inspect.signature(owner.forward).parameters for name in TIME_ARGUMENTS)
