"""One entry of a benchmark: its samples, how far off they are, and what is kept of them.

Shapes: B samples, C channels, H height, W width.

A kill loses at most the row in progress; the same command goes on from there.
"""

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median_low
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor

from foreseer.evaluation.metrics import latent_rel_l2, psnr, ssim, summarise
from foreseer.evaluation.plan import Entry
from foreseer.evaluation.results import (
    BenchRow,
    Errors,
    from_record,
    plain_errors,
    read_errors,
    to_record,
)
from foreseer.evaluation.solvers import sampling_with, solver_scheduler
from foreseer.evaluation.st_lpips import StLpips
from foreseer.evaluation.timing import StepFlops, StepTimer, run_flops, transformer_device
from foreseer.integration.forecaster import Forecaster
from foreseer.integration.host.clock import Clock
from foreseer.integration.host.module_host import has_loop
from foreseer.integration.pipelines.pipeline_call import heat_maps, pictures
from foreseer.integration.session import Session
from foreseer.trajectories.prompts import Item, generate_batch

Tick = Callable[[int], Any]  # told the network evaluations, times samples, just done


@dataclass(frozen=True)
class Samples:
    """What one entry generated.

    Args:
        images: in [0, 1], `(B, C, H, W)`; of videos their middle frames; of a host's loop what it
            came to, until `as_pictures`.
        latents: final latents, `(B, ...)`.
        sigmas: flow time of every step of the run.
        seconds: wall seconds per image, the lower median over batches.
        state_bytes: bytes of cached features per image; None where nothing is forecast.
        step_ratio: CPU time of a forecast step over a full step; None where there is no such step.
    """

    images: Float[Tensor, " B *drawn"]
    latents: Float[Tensor, " B *shape"]
    sigmas: list[float]
    seconds: float
    state_bytes: int | None = None
    step_ratio: float | None = None


def run_entry(
    pipe: Any,
    entry: Entry,
    sigmas: Sequence[float],
    batches: Sequence[Sequence[Item]],
    tick: Tick,
    **settings: Any,
) -> Samples:
    """Generate every batch by an entry's method; the pipeline is its old self afterwards.

    Args:
        pipe: the pipeline.
        entry: what to run.
        sigmas: flow time of every step of the full run; not used by the full run itself.
        batches: the items.
        tick: told of each batch.
        settings: keyword arguments of every call, such as `guidance_scale`.
    """
    if entry.kind == "full":
        return run_plain(pipe, batches, tick, **settings)
    if entry.kind in ("solver", "learned solver"):
        scheduler = (
            solver_scheduler(entry.method, [sigmas[anchor] for anchor in entry.anchors])
            if entry.solver is None
            else entry.solver.scheduler(pipe)
        )
        with sampling_with(pipe, scheduler):
            settings = {**settings, "num_inference_steps": len(scheduler.given)}
            return run_plain(pipe, batches, tick, **settings)
    return run_forecast(pipe, entry, batches, tick, **settings)


def run_plain(pipe: Any, batches: Sequence[Sequence[Item]], tick: Tick, **settings: Any) -> Samples:
    """Generate with the pipeline's scheduler as it is; the network runs at every step."""
    finals: list[Tensor] = []
    clock = Clock(
        pipe.scheduler, lambda sigmas: None, lambda i, v, before, after: finals.append(after)
    )
    images, latents, seconds = [], [], []
    try:
        for batch in batches:
            image, spent = _timed(pipe, batch, settings)
            images.append(image)
            latents.append(finals[-1].cpu())
            seconds.append(spent)
            tick(len(clock.sigmas) * len(batch))
            finals.clear()
    finally:
        clock.detach()
    return Samples(torch.cat(images), torch.cat(latents), clock.sigmas, median_low(seconds))


def steps_made(pipe: Any, items: Sequence[Item]) -> int:
    """The steps that a host's loop makes."""
    return len(run_plain(pipe, [items], lambda _: None).sigmas)


def run_forecast(
    pipe: Any, entry: Entry, batches: Sequence[Sequence[Item]], tick: Tick, **settings: Any
) -> Samples:
    """Generate while forecasting."""
    spec = None if entry.predictor is None else entry.predictor.spec
    assert entry.predictor is not None  # only full runs have none
    source = Forecaster(entry.predictor, entry.tap, entry.anchors, spec, pipe)
    timer = StepTimer(transformer_device(pipe))
    session = Session(pipe, source, [timer])
    images, latents, seconds = [], [], []
    try:
        for batch in batches:
            image, spent = _timed(pipe, batch, settings)
            images.append(image)
            if timer.final is not None:
                latents.append(timer.final.cpu())
            seconds.append(spent)
            tick(len(entry.anchors) * len(batch))
        state_bytes = session.report.state_bytes // len(batches[-1])
    finally:
        session.detach()
    return Samples(
        torch.cat(images),
        torch.cat(latents),
        session.clock.sigmas,
        median_low(seconds),
        state_bytes,
        timer.ratio(entry.anchors),
    )


def as_pictures(pipe: Any, samples: Samples, reference: Samples) -> Samples:
    """Samples with pictures: those of a host's loop, which are numbers of any shape, as heat maps.

    Args:
        pipe: what generated them.
        samples: what an entry generated.
        reference: what the full run generated.
    """
    if not has_loop(pipe):
        return samples
    return replace(samples, images=heat_maps(samples.latents, reference.latents))


@dataclass(frozen=True)
class Judge:
    """What every row of a benchmark is measured against.

    Args:
        reference: what the full run generated.
        prompts: of every sample, a number: those of one prompt are resampled together.
        guidance_scale: guidance strength of the runs.
        flops: cost of a step on each tap, those that are known.
        fine: what a full run of more steps generated, which the full run misses too; None leaves
            that distance out.
        perceptual: ST-LPIPS, or None to leave it out.
    """

    reference: Samples
    prompts: Sequence[int]
    guidance_scale: float
    flops: Mapping[str, StepFlops]
    fine: Samples | None = None
    perceptual: StLpips | None = None

    def errors(self, samples: Samples) -> dict[str, Float[Tensor, " B"]]:
        """How far off every sample is, by the name of the field of a row that is its mean."""
        images, reference = samples.images, self.reference.images
        errors = {
            "psnr_db": psnr(images, reference),
            "ssim": ssim(images, reference),
            "latent_rel_l2": latent_rel_l2(samples.latents, self.reference.latents),
        }
        if self.fine is not None:
            errors["fine_psnr_db"] = psnr(images, self.fine.images)
        if self.perceptual is not None:
            errors["st_lpips"] = self.perceptual(images, reference)
        return errors

    def row(self, entry: Entry, samples: Samples) -> tuple[BenchRow, Errors]:
        """A row of what an entry generated, which names no rival yet, and its samples' errors.

        Raises:
            ValueError: the samples hold NaN or Inf.
        """
        if not bool(samples.latents.isfinite().all()):
            raise ValueError(
                f"{entry.method} on the tap {entry.tap} diverged on the anchors "
                f"{list(entry.anchors)}; leave it out with `methods`."
            )
        errors = self.errors(samples)
        quality = summarise(errors["psnr_db"], self.prompts)
        spec = None if entry.predictor is None else entry.predictor.spec
        means: dict[str, Any] = {name: float(values.mean()) for name, values in errors.items()}
        row = BenchRow(
            method=entry.method,
            kind=entry.kind,
            tap=entry.tap,
            anchors_name=entry.anchors_name,
            anchors=" ".join(map(str, entry.anchors)),
            num_anchors=len(entry.anchors),
            guidance_scale=float(self.guidance_scale),
            psnr_median=quality.median,
            psnr_q10=quality.q10,
            psnr_q90=quality.q90,
            psnr_ci_low=quality.ci_low,
            psnr_ci_high=quality.ci_high,
            forecast_step_ratio=samples.step_ratio,
            state_bytes=samples.state_bytes,
            fit_seconds=spec.metrics.get("fit_seconds") if spec else 0.0,
            fit_evaluations=spec.metrics.get("fit_evaluations") if spec else 0.0,
            num_trajectories=spec.num_trajectories if spec else 0,
            flops_ratio=self._flops_ratio(entry),
            num_samples=len(samples.images),
            seconds_per_image=samples.seconds,
            **means,
        )
        return row, errors

    def _flops_ratio(self, entry: Entry) -> float | None:
        """FLOPs of the accelerated run over those of the full run; None where not known."""
        num_steps = len(self.reference.sigmas)
        if entry.predictor is None:
            return len(entry.anchors) / num_steps
        if entry.tap not in self.flops:
            return None
        used, whole = run_flops(
            self.flops[entry.tap], entry.anchors, num_steps, entry.predictor.window
        )
        return used / whole


def _timed(
    pipe: Any, batch: Sequence[Item], settings: dict[str, Any]
) -> tuple[Float[Tensor, " B *drawn"], float]:
    """A batch in [0, 1], or what a host's loop came to, and wall seconds per sample."""
    started = time.perf_counter()
    output = generate_batch(pipe, batch, **{**settings, "output_type": "pt"})
    images = output[0].float().cpu() if has_loop(pipe) else pictures(output)
    return images, (time.perf_counter() - started) / len(batch)


ROWS_FILE = "rows.partial.jsonl"


class RowLog:
    """Finished rows and their samples' errors by key, on disk before `add` returns.

    One JSON line each. A line of an older version has no errors, so its row is measured again.

    Args:
        path: the file; begun when missing. A last line torn by a kill is cut off.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, tuple[BenchRow, Errors]] = {}
        text = path.read_bytes() if path.exists() else b""
        whole = text[: text.rfind(b"\n") + 1]
        if len(whole) < len(text):
            os.truncate(path, len(whole))
        for number, line in enumerate(whole.decode().splitlines(), 1):
            record = json.loads(line)
            row = from_record(record["row"], f"{path}, line {number}")
            if "errors" in record:
                self.rows[record["key"]] = row, read_errors(record["errors"])

    def add(self, key: str, row: BenchRow, errors: Errors) -> None:
        """Append a row."""
        record = {"key": key, "row": to_record(row), "errors": plain_errors(errors)}
        with self.path.open("a") as file:
            file.write(json.dumps(record, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.rows[key] = row, errors


def save_samples(samples: Samples, path: Path) -> None:
    """Write the full run's samples, under a temporary name first."""
    tensors = {
        "images": samples.images.contiguous(),
        "latents": samples.latents.contiguous().cpu(),
        "sigmas": torch.tensor(samples.sigmas, dtype=torch.float64),
        "seconds": torch.tensor(samples.seconds, dtype=torch.float64),
    }
    unfinished = path.with_suffix(".tmp")
    save_file(tensors, unfinished)
    unfinished.replace(path)


def load_samples(path: Path) -> Samples:
    """What `save_samples` wrote."""
    tensors = load_file(path)
    sigmas, seconds = tensors["sigmas"].tolist(), float(tensors["seconds"])
    return Samples(tensors["images"], tensors["latents"], sigmas, seconds)
