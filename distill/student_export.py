"""Turn a distillation's checkpoint into the student's pipeline folder."""

import json
from pathlib import Path
from typing import Any

import torch
import yaml

from foreseer.distill.module import conditioner_of
from foreseer.distill.teacher_runs import starting
from foreseer.integration.pipelines.average_velocity import IntervalConditioner
from foreseer.integration.pipelines.load import load_pipeline
from foreseer.integration.pipelines.student_pipeline import student_of

CARD = """---
license: apache-2.0
library_name: diffusers
tags:
- few-step
- distillation
- foreseer
---

# Few-step student of {teacher}

A `{host}` distilled to average velocities: x_r = x_t - (t - r) u(x_t, r, t). {branches}
It draws in {fewest} steps or more; longer intervals than R = {max_interval:g} were not trained and
are refused, and so are guidance scales outside of {min_guidance} to {max_guidance}.

```python
import torch
from foreseer.integration.pipelines import load_pipeline

pipe = load_pipeline("...")  # this folder
images = pipe([5, 8], num_inference_steps=10, generator=torch.Generator().manual_seed(0)).images
```

`transformer/` is an ordinary diffusers transformer; `conditioner/` adds what it has to know about
the interval and the guidance scale to its modulation vectors. Without the conditioner the
transformer is no model of anything.

## Training

{training}
{measured}"""


def export_student(
    checkpoint: str, out: str, dtype: str = "bfloat16", measured: str | None = None
) -> None:
    """Write a student's pipeline folder with its averaged weights, recipe and model card.

    Args:
        checkpoint: Lightning checkpoint of a `DistillModule`.
        out: folder to write.
        dtype: dtype of the stored weights.
        measured: Markdown file with what was measured, for the card.

    Raises:
        FileNotFoundError: there is no such checkpoint.
    """
    path, folder = Path(checkpoint), Path(out)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; expected a checkpoint of `foreseer distill`.")
    state = torch.load(path, map_location="cpu", weights_only=True)
    settings = state["hyper_parameters"]
    pipe = load_pipeline(settings["pipeline"])
    conditioner = conditioner_of(pipe.transformer, settings)
    for name, part in (("transformer", pipe.transformer), ("conditioner", conditioner)):
        part.load_state_dict(starting(state["state_dict"], f"{name}."), strict=True)
        part.to(getattr(torch, dtype)).eval()
    student = student_of(pipe, conditioner)
    student.save_pretrained(folder, safe_serialization=True)
    _forget_origin(folder / "transformer" / "config.json")
    facts = _facts(path, state)
    (folder / "training.json").write_text(json.dumps(facts, indent=1) + "\n")
    (folder / "README.md").write_text(_card(settings, conditioner, facts, pipe, measured))


def _forget_origin(config: Path) -> None:
    """Take out where the teacher was loaded from: a path of one machine."""
    values = json.loads(config.read_text())
    values.pop("_name_or_path", None)
    config.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def _facts(path: Path, state: dict[str, Any]) -> dict[str, Any]:
    """What a run folder tells about its training."""
    recipe = path.parent / "config.yaml"
    config = yaml.safe_load(recipe.read_text()) if recipe.exists() else {}
    clock: dict[str, Any] = next(
        (value for key, value in state.get("callbacks", {}).items() if "ClockCosine" in key), {}
    )
    return {
        "updates": state["global_step"],
        "minutes": round(clock.get("elapsed_s", 0.0) / 60, 1),
        "model": config.get("model", {}),
        "data": config.get("data", {}),
    }


def _card(
    settings: dict[str, Any],
    conditioner: IntervalConditioner,
    facts: dict[str, Any],
    pipe: Any,
    measured: str | None,
) -> str:
    longest = conditioner.config.max_interval
    arguments = facts["model"].get("init_args", {})
    target = arguments.get("target", {}).get("class_path", "").rsplit(".", 1)[-1]
    batch = facts["data"].get("init_args", {}).get("batch_size", "?")
    told = f"{facts['updates']} updates of {batch} runs in {facts['minutes']} minutes"
    start = settings.get("start")
    embedded = "Guidance is embedded: a step is one network evaluation."
    kept = "Both guidance branches are kept: a step is two network evaluations."
    return CARD.format(
        branches=embedded if conditioner.takes_guidance else kept,
        teacher=settings["pipeline"],
        host=type(pipe.transformer).__name__,
        fewest=-int(-1 / longest // 1),
        max_interval=longest,
        min_guidance=conditioner.config.min_guidance,
        max_guidance=conditioner.config.max_guidance,
        training=f"{told}, target {target or 'of the checkpoint'}"
        + (f", started at the stage in {start}." if start else "."),
        measured=f"\n## Measured\n\n{Path(measured).read_text()}" if measured else "",
    )


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(export_student, as_positional=False)
