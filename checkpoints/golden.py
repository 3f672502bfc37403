"""A golden pair: features at the anchors and the forecasts a predictor makes from them.

Shapes: K anchors, F forecast steps, B branches, N tokens, D channels.
"""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from foreseer.checkpoints.config import REFUSALS, CheckpointError
from foreseer.checkpoints.spec import PredictorSpec
from foreseer.predictors.base import SMALLEST, History, Predictor, Reading, Step

GOLDEN_SEED = 20260
TOLERANCE = 1e-5  # relative; float32 sums of another processor or torch release agree to about 1e-6


def golden_pair(
    predictor: Predictor, spec: PredictorSpec
) -> tuple[Float[Tensor, "K B N D"], Float[Tensor, "F B N D"]]:
    """Random features and the forecasts of every forecast step, float32."""
    generator = torch.Generator().manual_seed(GOLDEN_SEED)
    features = torch.randn(_shapes(predictor, spec)[0], generator=generator)
    return features, replay(predictor, spec, features)


def _shapes(predictor: Predictor, spec: PredictorSpec) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(K, B, N, D) and (F, B, N, D) of a pair: as small as the predictor takes."""
    rest = (spec.num_branches, *predictor.smallest)
    num_anchors = len(spec.anchors)
    return (num_anchors, *rest), (len(spec.sigmas) - num_anchors, *rest)


@torch.no_grad()  # with gradients, a folded predictor would be folded anew at every step
def replay(
    predictor: Predictor, spec: PredictorSpec, features: Float[Tensor, "K B N D"]
) -> Float[Tensor, "F B N D"]:
    """The forecasts of every forecast step from given features at the anchors."""
    history = History(predictor.window)
    branches = tuple(range(spec.num_branches))
    anchors = dict(zip(spec.anchors, features, strict=True))
    state = iter(predictor.state_dict().values())
    device = next((tensor.device for tensor in state), torch.device("cpu"))
    for place, anchor in enumerate(predictor.continues):  # made up of the others'
        made = features[place % len(features)].to(device).flip(-1)
        history.push(Step(anchor, 1.0, len(spec.sigmas), branches), made)
    forecasts = [features[:0]]
    for index, sigma in enumerate(spec.sigmas):
        step = Step(index, sigma, len(spec.sigmas), branches, sigmas=spec.sigmas)
        if predictor.group_names:
            count = len(predictor.group_names)
            numbers = torch.arange(features.shape[2], device=device) % count
            step = replace(step, groups=numbers.expand(features.shape[1], -1))
        if predictor.needs:
            step = _asked(predictor, step, features[index % len(features)].to(device))
        if index in anchors:
            feature = anchors[index].to(device)
            read = _read(predictor, step, feature, history) if predictor.reads else None
            history.push(step, feature, read)
        else:
            forecasts.append(predictor(history, step).detach().cpu()[None])
    return torch.cat(forecasts)


def _read(predictor: Predictor, step: Step, feature: Tensor, history: History) -> Reading | None:
    """What the predictor reads off a made-up hidden state."""
    width, rows = predictor.width, len(feature)
    angles = torch.arange(rows * SMALLEST[0] * width, dtype=torch.float32, device=feature.device)
    hidden = (angles + step.index).sin().reshape(rows, SMALLEST[0], width)
    read = predictor.read(hidden, step, (1, 1, SMALLEST[0]), history.carried)
    return None if read is None else Reading(read.values.to(feature), read.carried)


def _asked(predictor: Predictor, step: Step, tokens: Float[Tensor, "B N D"]) -> Step:
    """The step with made-up tokens and modulation, for a predictor that asks for them."""
    width = predictor.modulation_width
    angles = torch.arange(len(tokens) * width, dtype=torch.float32, device=tokens.device)
    modulation = (angles + step.index).sin().reshape(len(tokens), width)
    return replace(step, tokens=tokens, modulation=modulation)


def check_golden(
    predictor: Predictor, spec: PredictorSpec, features: Tensor, forecasts: Tensor, where: str
) -> None:
    """Raise unless the predictor still makes the stored forecasts.

    Args:
        predictor: the predictor as loaded.
        spec: what it was fitted on.
        features: stored features, `(K, B, N, D)`.
        forecasts: stored forecasts, `(F, B, N, D)`.
        where: what to call the file in an error.

    Raises:
        CheckpointError: another shape, or another forecast, or none at all.
    """
    expected = dict(zip(("features", "forecasts"), _shapes(predictor, spec), strict=True))
    for name, tensor in {"features": features, "forecasts": forecasts}.items():
        if tensor.shape != expected[name]:
            raise CheckpointError(
                f"{where}: golden.{name} has shape {tuple(tensor.shape)}, expected "
                f"{expected[name]}; export the predictor again."
            )
    try:
        found = replay(predictor, spec, features)
    except REFUSALS as error:
        raise CheckpointError(
            f"{where}: the golden pair cannot be replayed: {str(error)[:200]}; export the "
            "predictor again."
        ) from error
    if not found.numel():
        return
    gap = float((found - forecasts).abs().max())
    limit = TOLERANCE * max(1.0, float(forecasts.abs().max()))
    if not gap <= limit:
        raise CheckpointError(
            f"{where}: replaying the golden pair differs by {gap:.2e}, expected at most "
            f"{limit:.2e}: this release computes something else than the one that saved it. Use "
            "the versions in config.json, or export the predictor again."
        )
