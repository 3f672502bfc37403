"""The model card of a predictor: what it is, what it was fitted on, its errors, its limits."""

from collections.abc import Mapping, Sequence
from typing import Any

from foreseer.checkpoints.spec import PredictorSpec, at_step, readable_setting
from foreseer.checkpoints.standing import interval, standing
from foreseer.predictors.base import Predictor
from foreseer.predictors.rules import SHOWN

MEASURES = {
    "psnr_db": ("PSNR of the samples against the full run, dB (higher is better)", 1),
    "test_error_db": ("10 log10 MSE of the final latents of samples that chose nothing", -1),
    "val_error_db": ("10 log10 MSE of the final latents on the split the rows were chosen on", -1),
    "estimate_db": ("Estimate of what piles up on recorded features, dB (higher is better)", 1),
    "open_loop_error": ("Relative error against recorded features (lower is better)", -1),
}
"""Text and direction of the measurements a card explains, by key in `PredictorSpec.metrics`."""

RIVALS = {"start": "start of the fit"} | {
    name: name.replace("_", " ").replace("taylor", "Taylor") for name in SHOWN
}
"""Rivals every card names, by the suffix of their keys."""

PAIRED = ("paired_db", "paired_low_db", "paired_high_db")
"""What a fit is ahead of its best rival by, and the 95 % interval, by key in the metrics."""

LOOP = "LoopClock"  # the scheduler of a spec whose sampler is a loop of its user's own
USE_PIPELINE = """\
pipe = fs.load_pipeline("...")  # the model described below, or yours loaded by diffusers
with fs.forecasting(pipe, "..."):  # this folder or repository
    pipe(..., num_inference_steps={num_steps}, guidance_scale={guidance_scale:g})"""
USE_LOOP = """\
host = fs.host(net)  # the model described below, with the blocks= and head= of the recording
with fs.forecasting(host, "...") as run, run.steps(times) as steps:  # this folder or repository
    for t in steps:  # {num_steps} steps at the flow times below
        ...  # your loop's own step, which calls net"""

NOT_MEASURED = "not measured"
HOW_FAST, HOW_FAR = "How much faster", "How far from the full run"

CARD = """---
{head}
---

# {title} for {host_class}

A learned feature-caching predictor: of the {num_steps} steps of a sampling run the network runs at
{num_anchors}, and the other {num_forecasts} are forecast as {form} what it computed
before (tap `{tap}`, {num_branches} guidance branch(es), {size}). The
model itself stays as it is.

{answers}

**Verdict.** {verdict}

## Use

```python
import foreseer as fs

{use}
```

## Fitted on

{facts}

## Measured

{measured}

## Limits

{bound}: running it on other weights (a LoRA fused in, too),
{other_sampler}, on {other_grid}, or
in another dtype than {dtype} is an error, not a worse {result}. Samples are close to those of the
full run, not equal to them. What was not measured above is not known.{any_anchors}
"""

OTHER_GRID = "another number or spacing of steps"
OTHER_GRID_ANY = "a number or spacing of steps outside of its range (`grids`, `min_steps`,\n\
`max_steps` and `sigma_margin` in `config.json`)"
ANY_ANCHORS = """ It serves any list of anchors; the
one above is what it takes when none is given."""


def model_card(predictor: Predictor, spec: PredictorSpec) -> str:
    """The text of a predictor's `README.md`.

    Args:
        predictor: the predictor.
        spec: what it was fitted on, with its measured errors.

    Returns:
        Markdown with a YAML head.
    """
    in_loop = spec.scheduler == LOOP
    use = USE_LOOP if in_loop else USE_PIPELINE
    bound = ["model"] + ["grid"] * (not predictor.any_grid) + ["guidance"] * (not in_loop)
    return CARD.format(
        head=card_head(type(predictor).__name__, predictor.tag, {len(spec.anchors): spec}),
        title=type(predictor).__name__,
        form=predictor.form,
        host_class=spec.host.get("class", "an unnamed model"),
        num_steps=len(spec.sigmas),
        num_anchors=len(spec.anchors),
        num_forecasts=len(spec.sigmas) - len(spec.anchors),
        tap=spec.tap,
        num_branches=spec.num_branches,
        size=predictor.size(),
        answers=answers([spec]),
        verdict=verdict(spec.metrics),
        use=use.format(num_steps=len(spec.sigmas), guidance_scale=spec.guidance_scale),
        facts=_facts(spec),
        measured=_metrics_table(spec.metrics),
        dtype=spec.dtype,
        bound=f"It is bound to this {' and '.join(', '.join(bound).rsplit(', ', 1))}",
        other_sampler="in a loop of other times"
        if in_loop
        else "under another scheduler class, at another guidance scale",
        result="sample" if in_loop else "picture",
        other_grid=OTHER_GRID_ANY if predictor.any_grid else OTHER_GRID,
        any_anchors=ANY_ANCHORS if predictor.any_anchors else "",
    )


def card_head(name: str, tag: str, specs: Mapping[int, PredictorSpec]) -> str:
    """The YAML that the hub reads: base model, tags, and the measurements as results.

    Args:
        name: of the model, under which the hub lists its results.
        tag: the kind of predictor.
        specs: of one predictor, or of several for one model, by their network evaluations.
    """
    from huggingface_hub import EvalResult, ModelCardData

    results = [
        EvalResult(
            task_type="other" if spec.scheduler == LOOP else "image-generation",
            dataset_type="recording",
            dataset_name=f"recording {spec.recording_digest or 'without digest'}, "
            f"{evaluations} of {len(spec.sigmas)} evaluations",
            metric_type=key,
            metric_value=spec.metrics[key],
            metric_name=text,
        )
        for evaluations, spec in specs.items()
        for key, (text, _) in MEASURES.items()
        if key in spec.metrics
    ]
    data = ModelCardData(
        license="apache-2.0",
        library_name="foreseer",
        tags=["feature-caching", "diffusion", tag],
        base_model=next(iter(specs.values())).host.get("base_model"),
        model_name=name if results else None,
        eval_results=results or None,
    )
    return str(data.to_yaml())


def answers(specs: Sequence[PredictorSpec]) -> str:
    """What whoever finds a predictor asks first: for which model, how, how fast and how good.

    Args:
        specs: of one predictor, or of several for one model and its settings.
    """
    first = specs[0]
    name, count = first.host.get("base_model"), first.host.get("parameters")
    model = [f"[{name}](https://huggingface.co/{name})"] if name else []
    model += [f"`{first.host.get('class', 'an unnamed model')}`"]
    model += [f"{count:,} parameters"] if isinstance(count, int) else []
    sampler = "a loop" if first.scheduler == LOOP else first.scheduler
    settings = [f"{len(first.sigmas)} steps of {sampler}"]
    settings += [f"guidance_scale {first.guidance_scale:g}"] * (first.scheduler != LOOP)
    settings += [
        f"{name} {readable_setting(at_step(value, 0))}"
        for name, value in first.guidance.items()
        if value is not None and name != "guidance_scale"
    ]
    settings += [first.dtype]
    settings += [f"latents {'x'.join(map(str, shape))}" for shape in first.latent_shapes]
    lines = [
        ("For which model", ", ".join(model)),
        ("At which settings", ", ".join(settings)),
        (HOW_FAST, f"{'; '.join(map(fewer, specs))}; seconds {NOT_MEASURED}"),
        (HOW_FAR, "; ".join(map(_told, specs))),
    ]
    return table(("question", "answer"), lines)


def fewer(spec: PredictorSpec) -> str:
    """How many of the network's evaluations a predictor leaves."""
    steps, anchors = len(spec.sigmas), len(spec.anchors)
    return f"{anchors} of {steps} network evaluations, {steps / anchors:.1f} x fewer"


def _told(spec: PredictorSpec) -> str:
    measured = [
        f"{text}: {spec.metrics[key]:.4g}"
        for key, (text, _) in MEASURES.items()
        if key in spec.metrics
    ]
    return f"at {len(spec.anchors)} evaluations {', '.join(measured) or NOT_MEASURED}"


def verdict(metrics: Mapping[str, float]) -> str:
    """One sentence: how the predictor stands to the best formula measured beside it."""
    for key, (_, direction) in MEASURES.items():
        rivals = _rivals(metrics, key)
        if key in metrics and rivals:
            name = max(rivals, key=lambda rival: direction * rivals[rival])
            label = RIVALS.get(name, name)
            if PAIRED[0] in metrics:
                return _paired(key, label, *(metrics[end] for end in PAIRED))
            gain = direction * (metrics[key] - rivals[name])
            unit = " dB" if key.endswith("_db") else ""
            if gain > 0:
                return f"Better than {label} by {gain:.3g}{unit} (`{key}`)."
            if gain == 0:
                return f"No gain over {label} (`{key}`): that formula does as well."
            return f"Worse than {label} by {-gain:.3g}{unit} (`{key}`): use that formula."
    return "Not measured against any formula; run `foreseer bench` before relying on it."


def _paired(key: str, label: str, gain: float, low: float, high: float) -> str:
    """The sentence where samples were compared one by one."""
    estimated = key == "estimate_db"
    told = f"{gain:+.2g} dB ({interval(low, high)}, `{key}`)"
    match standing(low, high, estimated):
        case "ahead":
            return f"Ahead of {label}, the best rival on its own anchors: {told}."
        case "behind":
            return f"Behind {label}, the best rival on its own anchors: {told}; use that."
    level = "An estimate does not tell it apart from" if estimated else "Level with"
    return f"{level} {label}, the best rival on its own anchors: {told}."


def _facts(spec: PredictorSpec) -> str:
    guided = f"scale {spec.guidance_scale:g}, " * (spec.scheduler != LOOP)
    facts = {
        **{f"host: {name}": value for name, value in spec.host.items()},
        "scheduler": spec.scheduler,
        "steps": len(spec.sigmas),
        "sigmas": f"{spec.sigmas[0]:g} to {spec.sigmas[-1]:g}",
        "anchors": " ".join(map(str, spec.anchors)),
        "tap": spec.tap,
        "guidance": f"{guided}{spec.num_branches} branch(es)",
        "dtype": spec.dtype,
        "recording digest": spec.recording_digest or "none",
        "trajectories": spec.num_trajectories,
    }
    return table(("what", "value"), list(facts.items()))


def _metrics_table(metrics: Mapping[str, float]) -> str:
    """This predictor beside its rivals, one line per measurement; the rest as they are named."""
    shown = [key for key in MEASURES if key in metrics or _rivals(metrics, key)] or ["psnr_db"]
    names: list[str] = []
    for key in shown:
        names += [rival for rival in _rivals(metrics, key) if rival not in names]
    lines = []
    for key in shown:
        values = [metrics.get(key), *(metrics.get(f"{key}_{name}") for name in names)]
        lines.append((MEASURES[key][0], *map(_number, values)))
    measured = table(("", "this predictor", *(RIVALS.get(n, n) for n in names)), lines)
    known = {key for key in metrics for shown_key in shown if key.startswith(shown_key)}
    others = [f"- {name}: {_number(metrics[name])}" for name in sorted(metrics.keys() - known)]
    return "\n\n".join([measured, *(["\n".join(others)] if others else [])])


def _rivals(metrics: Mapping[str, float], key: str) -> dict[str, float]:
    start = f"{key}_"
    return {name.removeprefix(start): v for name, v in metrics.items() if name.startswith(start)}


def table(head: Sequence[str], lines: Sequence[Sequence[Any]]) -> str:
    """A table in Markdown."""
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(str(cell) for cell in row) + " |" for row in rows)


def _number(value: Any) -> str:
    if value is None:
        return NOT_MEASURED
    return f"{value:.4g}" if isinstance(value, float) else str(value)
