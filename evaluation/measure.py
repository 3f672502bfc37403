"""Closed-loop measurements: what rows do to the samples that are really generated.

Shapes: S sampling steps, B batch, n trajectories.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from foreseer.checkpoints.spec import check_model, check_scheduler
from foreseer.integration.call_groups import CallGroups
from foreseer.integration.forecaster import Forecaster
from foreseer.integration.host.hosts import host_of
from foreseer.integration.host.module_host import ModuleHost
from foreseer.integration.pipelines.load import opened
from foreseer.integration.session import Session
from foreseer.predictors.base import Predictor
from foreseer.predictors.linear import L2P
from foreseer.trajectories.prompts import Item, generate_batch, recorded_inputs
from foreseer.trajectories.recorder import own_device
from foreseer.trajectories.recording import Recording


def opened_for(
    recording: Recording, pipeline: Any, dtype: str | None = None, device: str | None = None
) -> Any:
    """The recorded pipeline, given itself or by name, for whatever runs it once more.

    Args:
        recording: what is fitted on.
        pipeline: a pipeline, which is taken as and where it is, or the name of one to load.
        dtype: dtype to load it in; None takes that of the recording.
        device: where to put it then; None takes this process's GPU, the CPU where there is none.

    Raises:
        PredictorMismatch: another model, other weights or another scheduler than the recording's.
    """
    place = device or own_device(os.environ)
    pipe = opened(pipeline, dtype or recording.header.dtype, place)
    check_pipeline(recording, pipe)
    return pipe


def check_pipeline(recording: Recording, pipe: Any) -> None:
    """Raise unless a pipeline is the recorded one.

    Raises:
        PredictorMismatch: another model, other weights or another scheduler.
    """
    header, made = recording.header, f"{recording.folder} was recorded"
    host = host_of(pipe)
    check_model(header.host, host.fingerprint(), made)
    check_scheduler(header.scheduler["class"], type(host.scheduler).__name__, made)


@dataclass(frozen=True)
class References:
    """Recorded trajectories a closed-loop measurement compares with.

    Args:
        recording: where they come from.
        items: their numbers.
        batch_size: trajectories per pipeline call.
    """

    recording: Recording
    items: Sequence[int]
    batch_size: int = 16

    @property
    def settings(self) -> dict[str, Any]:
        """The pipeline settings of the recording, which a run must repeat.

        Raises:
            ValueError: a setting was a tensor or another object: only a digest is stored.
        """
        header = self.recording.header
        settings = dict(header.recipe.get("settings", {}))
        known = {"num_inference_steps": len(header.sigmas)}
        known["guidance_scale"] = header.scheduler["guidance_scale"]
        objects = [name for name, value in settings.items() if str(value).startswith("<")]
        if objects:
            raise ValueError(
                f"the recording was made with the settings {objects}, of which only a digest is "
                "stored, so its runs cannot be repeated; pass such values per item when recording."
            )
        if header.recipe.get("pipeline") == ModuleHost.__name__:
            return settings  # its loop goes by nothing else
        return settings or known  # a pipeline may take no guidance_scale, and run fewer steps

    @cached_property
    def batches(self) -> list[list[Item]]:
        """The items, cut into pipeline calls."""
        items = [item_of(self.recording, item) for item in self.items]
        return [items[i : i + self.batch_size] for i in range(0, len(items), self.batch_size)]

    @cached_property
    def finals(self) -> Tensor:
        """Final latents of the full run, in the order of `items`."""
        return self.recording.stack("final", self.items)

    @cached_property
    def states(self) -> Tensor:
        """States of the full run, `(n, S + 1, *shape)`."""
        return self.recording.stack("states", self.items)


def item_of(recording: Recording, item: int) -> Item:
    """The item a trajectory was recorded from, by its manifest line and the tensors in its shard.

    Raises:
        ValueError: it was made from something of which only a digest is stored.
    """
    inputs = recorded_inputs(recording, item)
    if inputs is None:
        raise ValueError(
            f"item {item} of {recording.folder} was made from pictures or large tensors, of which "
            "only a digest is stored, so its run cannot be repeated; use a fit on Grams "
            "(L2PLeastSquares, L2PAdam), or record from prompts or their embeddings."
        )
    return Item(item, int(recording.meta(item)["seed"]), inputs)


@torch.no_grad()
def generate(
    pipe: Any,
    predictor: Predictor,
    tap: str,
    items: Sequence[Item],
    anchors: Sequence[int],
    groups: CallGroups | None = None,
    **settings: Any,
) -> Float[Tensor, " B *shape"]:
    """The final latents of a batch generated while forecasting.

    Args:
        pipe: the pipeline.
        predictor: the forecaster.
        tap: `output`, `hidden` or `residual`.
        items: the batch.
        anchors: steps at which the network runs.
        groups: token groups of the call, for a predictor that goes by them.
        settings: keyword arguments of the pipeline call.
    """
    session = Session(pipe, Forecaster(predictor, tap, anchors), groups=groups)
    try:
        return generate_batch(pipe, items, output_type="latent", **settings)[0]
    finally:
        session.detach()


def log_error(
    latents: Float[Tensor, " B *shape"], reference: Float[Tensor, " B *shape"]
) -> Float[Tensor, " B"]:
    """10 log10 of each sample's mean squared error, in dB: the negative of what PSNR averages."""
    squared = (latents.float() - reference.to(latents.device).float()).flatten(1).square().mean(1)
    return 10 * squared.clamp_min(1e-12).log10()


def closed_loop_errors(
    pipe: Any,
    rows: Float[Tensor, "branches S S"],
    anchors: Sequence[int],
    tap: str,
    batches: Sequence[Sequence[Item]],
    finals: Float[Tensor, " n *shape"],
    **settings: Any,
) -> Float[Tensor, " n"]:
    """Error in dB of every item's final latents when forecasting with the given rows."""
    predictor = L2P(rows.shape[-1], anchors, rows.shape[0])
    predictor.weight.copy_(rows)
    return predictor_errors(pipe, predictor, tap, anchors, batches, finals, **settings)


def predictor_errors(
    pipe: Any,
    predictor: Predictor,
    tap: str,
    anchors: Sequence[int],
    batches: Sequence[Sequence[Item]],
    finals: Float[Tensor, " n *shape"],
    groups: CallGroups | None = None,
    **settings: Any,
) -> Float[Tensor, " n"]:
    """Error in dB of every item's final latents when forecasting with a predictor."""
    latents = [
        generate(pipe, predictor, tap, batch, anchors, groups, **settings) for batch in batches
    ]
    return log_error(torch.cat(latents).cpu(), finals)
