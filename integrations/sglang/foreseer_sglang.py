"""A plugin of SGLang Diffusion that forecasts with a predictor of foreseer.

Written against sglang 0.5.23: the entry-point group `sglang.multimodal_gen.plugins`, whose
functions register hooks at start-up, `HookRegistry.register(target, hook, HookType.AROUND)`, and
the forward context, which holds the step and the request of a call.

    FORESEER_PREDICTOR=runs/qwen_8 sglang generate --model-path Qwen/Qwen-Image ...
"""

import functools
import os
from collections.abc import Callable
from typing import Any

from sglang.multimodal_gen.runtime.managers.forward_context import get_forward_context_or_none
from sglang.multimodal_gen.runtime.platforms.plugins import HookRegistry, HookType
from torch import nn

import foreseer as fs
from foreseer.integration.served import ServedNetwork

PREDICTOR = "FORESEER_PREDICTOR"
STATE = "_foreseer"  # the engine transfers no entry of a request that begins with "_"
DITS = "sglang.multimodal_gen.runtime.models.dits"
TARGETS = (
    f"{DITS}.flux.FluxTransformer2DModel.forward",
    f"{DITS}.qwen_image.QwenImageTransformer2DModel.forward",
    f"{DITS}.wanvideo.WanTransformer3DModel.forward",
)
"""Networks that are forecast."""


class Forecasts:
    """The hook around a network's forward: computed at anchors, forecast elsewhere.

    A request keeps its own history. The engine tells the unconditional branch; it is the second
    one, unless the predictor's file says that the fit ran it first.
    Weights are compared by their values in any layout, as this engine lays them out in its own way.

    Args:
        predictor: one on the tap `output`, with its spec.
    """

    def __init__(self, predictor: Any) -> None:
        self.predictor = predictor

    def __call__(
        self, forward: Callable[..., Any], network: nn.Module, *args: Any, **kw: Any
    ) -> Any:
        """One call of the network.

        Raises:
            PredictorMismatch: another model, sampler, grid or guidance than the fit's.
        """
        context = get_forward_context_or_none()
        request = getattr(context, "forward_batch", None)
        if context is None or request is None or request.is_warmup:
            return forward(network, *args, **kw)
        if STATE not in request.extra:
            request.extra[STATE] = ServedNetwork(self.predictor, network, request.scheduler)
        branch = int(request.is_cfg_negative)
        if self.predictor.spec.first_branch == "unconditional":
            branch = 1 - branch
        call = functools.partial(forward, network)
        return request.extra[STATE](context.current_timestep, branch, call, *args, **kw)


def register() -> None:
    """Register the hook on every network in `TARGETS`.

    Raises:
        ValueError: FORESEER_PREDICTOR names no predictor.
    """
    name = os.environ.get(PREDICTOR)
    if not name:
        raise ValueError(
            f"the plugin foreseer is installed and {PREDICTOR} is not set; set it to the folder, "
            "zoo:name or owner/name of a predictor, or leave the plugin out with SGLANG_PLUGINS."
        )
    hook = functools.partial(Forecasts(fs.load(name)).__call__)
    for target in TARGETS:
        HookRegistry.register(target, hook, HookType.AROUND)
