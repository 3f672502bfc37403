"""Runs that forecast, differentiated in the predictor while the network stands still.

The network's features at the anchors count as constants, so no graph of the network is kept: a
forecast moves the latents through the head, the guidance and the sampler, and what the network
would answer to moved latents is left out.
Shapes: B batch.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from foreseer.integration.forecaster import Forecaster
from foreseer.integration.host.call import Call
from foreseer.integration.host.denoisers import transformer_of
from foreseer.integration.host.expert import Expert
from foreseer.integration.runner import Answer, Runner
from foreseer.integration.session import Session
from foreseer.predictors.base import Predictor, Step
from foreseer.trajectories.prompts import Item, generate_with_gradients


class FrozenNetwork(Runner):
    """Runs whose anchors keep no graph."""

    @torch.no_grad()
    def prove(self, expert: Expert, call: Call) -> None:
        """Check on a transformer's first call everything that is relied on."""
        super().prove(expert, call)

    @torch.no_grad()
    def run(self, expert: Expert, call: Call, step: Step) -> Answer:
        """Run the network and capture its taps."""
        return super().run(expert, call, step)


def final_latents(
    pipe: Any,
    predictor: Predictor,
    tap: str,
    anchors: Sequence[int],
    items: Sequence[Item],
    **settings: Any,
) -> Float[Tensor, " B *shape"]:
    """The final latents of a batch, differentiable in the predictor.

    Args:
        pipe: the pipeline; its parameters get no gradient.
        predictor: the forecaster.
        tap: `output`, `hidden` or `residual`.
        anchors: steps at which the network runs.
        items: the batch.
        settings: keyword arguments of the pipeline call.

    Raises:
        ValueError: the pipeline or its scheduler cuts the graph.
    """
    transformer = transformer_of(pipe)
    wanted = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    source = Forecaster(predictor, tap, list(anchors))
    session = Session(pipe, source, runner=FrozenNetwork())
    transformer.requires_grad_(False)
    try:
        latents = generate_with_gradients(pipe, items, output_type="latent", **settings)[0]
    finally:
        session.detach()
        for parameter in wanted:
            parameter.requires_grad_(True)
    if not latents.requires_grad:
        raise ValueError(
            f"the final latents of {type(pipe).__name__} do not depend on the predictor: the "
            f"pipeline or {type(pipe.scheduler).__name__} works without gradients, or no step is "
            "forecast. Train on features instead (closed_loop_target: feature)."
        )
    return latents
