"""Learned feature caching for diffusion transformers: record, fit, forecast.

    import foreseer as fs

    pipe = fs.load_pipeline("black-forest-labs/FLUX.1-dev", torch.bfloat16, "cuda")  # or your own
    recording = fs.record(pipe, prompts, "runs/flux", num_inference_steps=50, batch_size=1)
    predictor = fs.fit(recording, evaluations=8, pipeline=pipe, out="runs/flux_8")
    with fs.forecasting(pipe, predictor) as run:  # or "runs/flux_8", "zoo:name", "owner/name"
        image = pipe("a lighthouse in fog", num_inference_steps=50).images[0]
    run.report()  # 42 of 50 steps forecast: 6.2 x fewer evaluations, 5.7 x faster

| name | what it is |
| --- | --- |
| `load_pipeline(name, dtype, device)` | a diffusers pipeline, or a bundled one: `zoo:fashion_dit` |
| `record(pipeline, prompts, out, ...)` | run it in full and keep what fits need: a `Recording` |
| `fit(recording, evaluations, ...)` | a predictor; method, tap and anchors chosen if not given |
| `search(recording, pipeline, ...)` | anchors by the error of real samples |
| `save(predictor, folder)`, `load(name)`, `push(folder, repo_id)` | its file, and the hub |
| `forecasting(pipe, predictor, ...)` | a `with` block in which the pipeline forecasts; a `Run` |
| `attach(pipe, predictor, ...)`, `detach(pipe)` | the same across the cells of a notebook |
| `host(module, blocks, head, ...)` | any module in a loop of yours; goes wherever a pipeline does |
| `forecast_model(f, predictor, ...)` | the same for a sampler without a pipeline, `f(x, sigma)` |
| `verify(pipeline, ...)`, `bench(pipeline, out, ...)` | is it exact here, and is it worth it |
| `predictors`, `schedules` | formulas and learned forecasters; lists of anchors and TeaCache, ... |
| `ForeseerError` | `PredictorMismatch`, `UnsupportedHost`, `RecordingError`, `CheckpointError` |

The command line is the same functions under the same names. Everything else may move; importing
this package loads nothing but itself, and a name loads what it needs when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from foreseer.moved import install

__version__ = "0.2.0"

install()

if TYPE_CHECKING:
    from foreseer import predictors, schedules
    from foreseer.checkpoints.format import load_predictor as load
    from foreseer.commands import record
    from foreseer.errors import (
        CheckpointError,
        ForeseerError,
        PredictorMismatch,
        RecordingError,
        UnsupportedHost,
    )
    from foreseer.fit_commands import fit, push, save, search
    from foreseer.integration.forecast_model import forecast_model
    from foreseer.integration.forecasting import attach, detach, forecasting
    from foreseer.integration.host.module_host import host
    from foreseer.integration.pipelines.load import load_pipeline
    from foreseer.pipeline_commands import bench, verify
    from foreseer.trajectories.recording import Recording

_HOMES = {
    "CheckpointError": "errors",
    "ForeseerError": "errors",
    "PredictorMismatch": "errors",
    "Recording": "trajectories.recording",
    "RecordingError": "errors",
    "UnsupportedHost": "errors",
    "attach": "integration.forecasting",
    "bench": "pipeline_commands",
    "detach": "integration.forecasting",
    "fit": "fit_commands",
    "forecast_model": "integration.forecast_model",
    "forecasting": "integration.forecasting",
    "host": "integration.host.module_host",
    "load": "checkpoints.format:load_predictor",
    "load_pipeline": "integration.pipelines",
    "predictors": "",
    "push": "fit_commands",
    "record": "commands",
    "save": "fit_commands",
    "schedules": "",
    "search": "fit_commands",
    "verify": "pipeline_commands",
}
"""Module of every public name, and its name there where it is another."""

__all__ = [
    "CheckpointError",
    "ForeseerError",
    "PredictorMismatch",
    "Recording",
    "RecordingError",
    "UnsupportedHost",
    "attach",
    "bench",
    "detach",
    "fit",
    "forecast_model",
    "forecasting",
    "host",
    "load",
    "load_pipeline",
    "predictors",
    "push",
    "record",
    "save",
    "schedules",
    "search",
    "verify",
]


def __getattr__(name: str) -> Any:
    """A public name, from its module, which is imported now."""
    if name not in _HOMES:
        raise AttributeError(f"foreseer has no {name!r}; it has {', '.join(__all__)}.")
    module, _, own = _HOMES[name].partition(":")
    if not module:
        return import_module(f".{name}", __name__)
    found = globals()[name] = getattr(import_module(f".{module}", __name__), own or name)
    return found


def __dir__() -> list[str]:
    """The public names, beside what every module has."""
    return sorted({*globals(), *__all__})
