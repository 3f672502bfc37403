"""What may be attached together, and what may not."""

from foreseer.checkpoints.spec import PredictorMismatch
from foreseer.integration.handover import Handover
from foreseer.integration.host.taps import BEFORE_LAST, outer_blocks
from foreseer.integration.policy import Schedule
from foreseer.integration.schedule import Shallow
from foreseer.predictors.base import LinearPredictor, Predictor
from foreseer.predictors.tokens import TokenPolicy


def hidden_for(
    tokens: TokenPolicy | None,
    attention_rule: LinearPredictor | None,
    predictor: Predictor,
    tap: str | None,
    schedule: Schedule | None,
) -> str:
    """The tap of forecasts of which tokens are computed, once all goes together."""
    if tokens is None:
        raise ValueError("attention_rule is for computed tokens; pass tokens=, which of them.")
    if not isinstance(tokens, TokenPolicy):
        raise ValueError(
            f"tokens is {tokens!r}, expected a policy of foreseer.predictors.tokens, such as "
            "ClusterPolicy(16)."
        )
    if schedule is not None:
        raise ValueError(
            f"tokens are computed on a list of anchors, not under {type(schedule).__name__}; leave "
            "schedule or tokens out."
        )
    if tap not in (None, "hidden"):
        raise ValueError(f"tokens are computed on the tap 'hidden', not on {tap!r}.")
    if predictor.spec is not None and predictor.spec.tap != "hidden":
        raise PredictorMismatch(
            f"the predictor was fitted on the tap {predictor.spec.tap!r}; computed tokens need one "
            "fitted on 'hidden', the stream that enters the head."
        )
    if attention_rule is not None and attention_rule.learned:
        raise ValueError(
            f"the attention rule {type(attention_rule).__name__} is learned, but nothing was "
            "recorded of the attention outputs; use Reuse() or Taylor(1)."
        )
    return "hidden"


def check_after(
    predictor: Predictor,
    after: Handover | None,
    schedule: Schedule | None,
    tokens: TokenPolicy | None,
) -> None:
    """Raise unless a predictor begins its runs with what it is given, or with nothing.

    Raises:
        PredictorMismatch: a learned predictor was fitted on runs that begin otherwise.
        ValueError: a schedule or a token policy decides by what a run itself has computed.
    """
    kind = type(predictor).__name__
    if after is None:
        if predictor.continues:
            raise PredictorMismatch(
                f"this {kind} was fitted on runs that go on from a stage before; attach to that "
                "stage, and give its run: after=pipe.after(run)."
            )
        return
    if predictor.spec is not None and not predictor.continues:
        raise PredictorMismatch(
            f"this {kind} was fitted on runs that begin with nothing; leave after= out, or fit "
            "one with fit_resampled."
        )
    if schedule is not None or tokens is not None:
        name = type(tokens if schedule is None else schedule).__name__
        raise ValueError(
            f"{name} decides by what the run itself has computed, and this run begins with the "
            "features of another; use a list of anchors."
        )


def check_together(predictor: Predictor, tap: str, schedule: Schedule | None) -> None:
    """Raise unless predictor, tap and schedule go together."""
    if predictor.reads and tap != "output":
        raise ValueError(
            f"{type(predictor).__name__} reads the output off the hidden state, so it forecasts "
            f"the tap 'output', not {tap!r}."
        )
    inside = sorted(predictor.needs - {"x_t"})
    decides = schedule is not None and (schedule.probe is not None or schedule.checks)
    places = ("hidden", BEFORE_LAST) if inside == ["tokens"] else ("hidden",)
    if inside and (tap not in places or decides):
        raise ValueError(
            f"{type(predictor).__name__} needs the {' and '.join(inside)} of the step, which exist "
            f"on the tap {' or '.join(map(repr, places))} with a list of anchors, not on "
            f"{tap!r} under {type(schedule).__name__ if schedule else 'a list'}."
        )
    if predictor.block_weights is not None and tap != BEFORE_LAST:
        raise ValueError(
            f"{type(predictor).__name__} has weights for the last block, which runs on the tap "
            f"{BEFORE_LAST!r}, not {tap!r}."
        )
    if outer_blocks(tap) and decides:
        raise ValueError(
            f"{type(schedule).__name__} looks into the network on its way, which the tap "
            f"{tap!r} does not go with; use a list of anchors, or a tap of its own."
        )
    if schedule is not None and schedule.checks and tap != "hidden":
        raise ValueError(
            f"{type(schedule).__name__} checks what enters the head, so the tap must be 'hidden', "
            f"not {tap!r}."
        )


def check_shallow(
    shallow: Shallow | None, tokens: TokenPolicy | None, after: Handover | None
) -> None:
    """Raise unless shallow steps are the only thing that changes how anchors are computed.

    Raises:
        ValueError: they are no `Shallow`, or tokens are chosen or a run goes on from another.
    """
    if shallow is None:
        return
    if not isinstance(shallow, Shallow):
        raise ValueError(
            f"shallow is {shallow!r}, expected foreseer.schedules.Shallow(steps, predictor, tap)."
        )
    if tokens is not None or after is not None:
        other = "tokens" if tokens is not None else "after"
        raise ValueError(
            f"shallow steps do not go with {other}=, which changes what is computed in another "
            "way; leave one of them out."
        )


def check_between(tap: str, schedule: Schedule | None) -> None:
    """Raise unless shallow steps go with what is forecast at the steps that are no anchors.

    Raises:
        ValueError: it is none of the output or the hidden state, or a schedule chooses anchors.
    """
    if schedule is not None or tap not in ("output", "hidden"):
        under = "a list" if schedule is None else type(schedule).__name__
        raise ValueError(
            f"shallow steps belong to a list of anchors, with forecasts of the taps 'output' or "
            f"'hidden' between them; found the tap {tap!r} under {under}."
        )
