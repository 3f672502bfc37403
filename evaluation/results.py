"""The rows of a benchmark result, the files that hold them, and the machine they come from."""

import datetime
import json
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from foreseer import __version__
from foreseer.checkpoints.page import Benchmark
from foreseer.checkpoints.standing import Standing, standing
from foreseer.environment import commit, installed, processor, usable_cores
from foreseer.integration.schedule import COMMON

KINDS = ("solver", "formula", "learned solver", "learned", "full")
TAPS = ("output", "hidden", "none")
ANCHOR_NAMES = (*COMMON, "searched", "given", "all")
RESULTS_FILE = "results.json"
INFINITE_KEY = "infinite"  # JSON has no inf: it is written as null and its key is named here


@dataclass(frozen=True)
class BenchRow:
    """One method on one anchor list, measured against the full run on the same seeds.

    Args:
        method: name of the solver or predictor.
        kind: `solver` (few-step sampler), `learned solver` (one whose coefficients were fitted),
            `formula` (untrained forecast), `learned` (ours) or `full`.
        tap: tensor that is forecast; `none` where nothing is.
        anchors_name: where the anchor list comes from; `given` was picked by hand, `all` is every
            step.
        anchors: step indices at which the network runs, ascending, separated by spaces.
        num_anchors: length of `anchors`, the number of network evaluations.
        guidance_scale: classifier-free guidance strength.
        psnr_db: mean PSNR in dB; `inf` when every pixel is reproduced.
        psnr_median: median over samples in dB.
        psnr_q10: 10 % quantile over samples in dB.
        psnr_q90: 90 % quantile over samples in dB.
        psnr_ci_low: lower end of the 95 % interval of the mean, in dB.
        psnr_ci_high: upper end of the 95 % interval of the mean, in dB.
        ssim: mean structural similarity.
        latent_rel_l2: mean relative L2 error of the final latents.
        forecast_step_ratio: CPU time of a forecast step over a full step; None for solvers.
        state_bytes: bytes of cached features per image; None when not measured, as for all
            fields below.
        fit_seconds: time to fit the predictor.
        num_trajectories: trajectories the predictor was fitted on.
        flops_ratio: FLOPs of the accelerated run over the full run.
        num_samples: samples behind the means.
        seconds_per_image: wall time per image; None when not measured.
        rival: the method it is compared with sample by sample: of a learned row the best of
            everything else with as many evaluations, of others the best learned row. None where
            there is none, and in older files, as for all fields below.
        paired_db: mean PSNR of the row minus that of its rival, in dB.
        paired_low_db: lower end of the 95 % interval of that difference.
        paired_high_db: upper end.
        wins: samples on which the row is ahead of its rival.
        fit_evaluations: network evaluations the fit took for each trajectory fitted on; 0 for what
            is not fitted.
        st_lpips: mean ST-LPIPS, see st_lpips.py; lower is better.
        fine_psnr_db: mean PSNR against a full run of more steps, which the full run misses too.

    Raises:
        ValueError: a value has the wrong type, is NaN, or contradicts another.
    """

    method: str
    kind: str
    tap: str
    anchors_name: str
    anchors: str
    num_anchors: int
    guidance_scale: float
    psnr_db: float
    psnr_median: float
    psnr_q10: float
    psnr_q90: float
    psnr_ci_low: float
    psnr_ci_high: float
    ssim: float
    latent_rel_l2: float
    forecast_step_ratio: float | None
    state_bytes: int | None
    fit_seconds: float | None
    num_trajectories: int | None
    flops_ratio: float | None
    num_samples: int
    seconds_per_image: float | None
    rival: str | None = None
    paired_db: float | None = None
    paired_low_db: float | None = None
    paired_high_db: float | None = None
    wins: int | None = None
    fit_evaluations: float | None = None
    st_lpips: float | None = None
    fine_psnr_db: float | None = None

    def __post_init__(self) -> None:
        """Refuse values that no benchmark can have produced."""
        for each in fields(self):
            value = _checked(each.name, each.type, getattr(self, each.name), self.method)
            object.__setattr__(self, each.name, value)
        for key, allowed in (("kind", KINDS), ("tap", TAPS), ("anchors_name", ANCHOR_NAMES)):
            if getattr(self, key) not in allowed:
                raise ValueError(
                    f"Row of {self.method}: {key} is {getattr(self, key)!r}, "
                    f"expected one of {', '.join(allowed)}."
                )
        if len(self.steps) != self.num_anchors or list(self.steps) != sorted(set(self.steps)):
            raise ValueError(
                f"Row of {self.method}: anchors must be {self.num_anchors} ascending step "
                f"indices (num_anchors), got {self.anchors!r}."
            )

    @property
    def standing(self) -> Standing | None:
        """How it stands to its rival; None where it is not compared with one."""
        if self.paired_low_db is None or self.paired_high_db is None:
            return None
        return standing(self.paired_low_db, self.paired_high_db)

    @property
    def steps(self) -> tuple[int, ...]:
        """The anchors as numbers."""
        try:
            return tuple(int(step) for step in self.anchors.split())
        except ValueError as error:
            raise ValueError(
                f"Row of {self.method}: anchors must be step indices separated by spaces, "
                f"got {self.anchors!r}."
            ) from error


@dataclass(frozen=True)
class BenchMeta:
    """What is needed to run a benchmark again.

    Args:
        versions: version of each package that matters, and of Python.
        seeds: seed of every sample.
        hardware: the machine in words, with the number of threads used.
        command: the command line.
        date: day of the run, ISO 8601.
        commit: commit of the code, or of the release.
        lists: what searches for lists of anchors took, by method, tap and evaluations; empty where
            none was searched for a solver or formula, and in older files.
    """

    versions: dict[str, str]
    seeds: list[int]
    hardware: str
    command: str
    date: str
    commit: str
    lists: dict[str, str] = field(default_factory=dict)


def save_rows(rows: Sequence[BenchRow], path: Path) -> None:
    """Write rows as a JSON list; `inf` becomes null, its key named under `infinite`."""
    records = [to_record(row) for row in rows]
    path.write_text(json.dumps(records, indent=1, allow_nan=False) + "\n")


def load_rows(path: Path) -> list[BenchRow]:
    """Read what `save_rows` wrote.

    Raises:
        ValueError: the file is not a list of rows, or a row has an unknown or missing key or a
            malformed value.
    """
    records = json.loads(path.read_text())
    if not isinstance(records, list) or not all(isinstance(row, dict) for row in records):
        raise ValueError(f"{path} must hold a JSON list of rows, one object each.")
    return [from_record(record, f"{path}, row {index}") for index, record in enumerate(records)]


def to_record(row: BenchRow) -> dict[str, Any]:
    """A row as a JSON object."""
    record: dict[str, Any] = asdict(row)
    infinite = [key for key, value in record.items() if value == math.inf]
    record.update(dict.fromkeys(infinite))
    if infinite:
        record[INFINITE_KEY] = " ".join(infinite)
    return record


def from_record(record: Mapping[str, Any], where: str) -> BenchRow:
    """What `to_record` made, as a row again; `where` opens the message of an error.

    Raises:
        ValueError: a key is unknown or missing, or a value malformed.
    """
    values = dict(record)
    infinite = str(values.pop(INFINITE_KEY, "")).split()
    _check_keys(values, BenchRow, where)
    for key in infinite:
        if key not in values or values[key] is not None:
            raise ValueError(f"{where}: {key!r} is listed as infinite, so it must be null.")
        values[key] = math.inf
    types = {each.name: each.type for each in fields(BenchRow)}
    return BenchRow(
        **{k: _checked(k, types[k], v, str(values["method"])) for k, v in values.items()}
    )


Errors = Mapping[str, Float[Tensor, " B"]]
"""Numbers of every sample of a row, by the name of the row's field that is their mean."""


def samples_path(path: Path) -> Path:
    """The sibling of a results file that holds the errors of every sample."""
    return path.with_suffix(".samples.json")


def save_errors(errors: Sequence[Errors], prompts: Sequence[int], path: Path) -> None:
    """Write the errors of every sample beside the rows in `path`, so that others can be paired.

    Args:
        errors: of every row, in the rows' order.
        prompts: of every sample, a number.
        path: the results file.
    """
    content = {"prompts": list(prompts), "rows": [plain_errors(each) for each in errors]}
    samples_path(path).write_text(json.dumps(content, allow_nan=False) + "\n")


def load_errors(path: Path) -> tuple[list[dict[str, Float[Tensor, " B"]]], list[int]]:
    """What `save_errors` wrote: the errors of every row, in the rows' order, and the prompts."""
    content = json.loads(samples_path(path).read_text())
    return [read_errors(each) for each in content["rows"]], list(content["prompts"])


def plain_errors(errors: Errors) -> dict[str, list[float | None]]:
    """Errors as JSON has them: infinite ones as null."""
    return {
        name: [value if math.isfinite(value) else None for value in values.tolist()]
        for name, values in errors.items()
    }


def read_errors(record: Mapping[str, Sequence[float | None]]) -> dict[str, Float[Tensor, " B"]]:
    """What `plain_errors` made, as it was."""
    return {
        name: torch.tensor([math.inf if v is None else v for v in values], dtype=torch.float64)
        for name, values in record.items()
    }


def meta_path(path: Path) -> Path:
    """The sibling of a results file that tells how it was made."""
    return path.with_suffix(".meta.json")


def save_meta(meta: BenchMeta, path: Path) -> None:
    """Write how the results in `path` were made next to them."""
    meta_path(path).write_text(json.dumps(asdict(meta), indent=1, allow_nan=False) + "\n")


def load_meta(path: Path) -> BenchMeta:
    """Read how the results in `path` were made.

    Raises:
        ValueError: the file has an unknown or missing key.
    """
    record = json.loads(meta_path(path).read_text())
    _check_keys(record, BenchMeta, str(meta_path(path)))
    return BenchMeta(**record)


def load_benchmark(folder: str | Path) -> Benchmark:
    """What `foreseer bench` wrote into a folder, for a predictor's page.

    Raises:
        ValueError: it is none, or a file of it is malformed.
    """
    path = Path(folder) / RESULTS_FILE
    if not path.is_file():
        raise ValueError(f"{folder} has no {path.name}; expected the folder of a `foreseer bench`.")
    picture = path.with_name("contact_sheet.png")
    rows = [asdict(row) for row in load_rows(path)]
    return Benchmark(rows, load_meta(path).hardware, picture if picture.is_file() else None)


def _check_keys(record: Mapping[str, Any], kind: type[BenchRow | BenchMeta], where: str) -> None:
    """Refuse unknown keys, and missing ones but those that came later, naming them."""
    known = {
        each.name: each.default is MISSING and each.default_factory is MISSING
        for each in fields(kind)
    }
    unknown = sorted(record.keys() - known)
    missing = sorted(name for name, needed in known.items() if needed and name not in record)
    if unknown or missing:
        raise ValueError(
            f"{where}: unknown keys: {', '.join(unknown) or 'none'}; "
            f"missing keys: {', '.join(missing) or 'none'}. Written by another version?"
        )


def _checked(name: str, annotation: Any, value: Any, method: str) -> Any:
    """The value in the type its field announces; whole numbers are welcome as floats."""
    optional = not isinstance(annotation, type)
    wanted = annotation.__args__[0] if optional else annotation
    if value is None and optional:
        return None
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, wanted) or isinstance(value, bool):
        raise ValueError(
            f"Row of {method}: {name} must be {wanted.__name__}{' or null' if optional else ''}, "
            f"got {value!r}."
        )
    if wanted is float and (math.isnan(value) or value == -math.inf):
        raise ValueError(f"Row of {method}: {name} is {value}; a diverged run cannot be ranked.")
    return value


PACKAGES = ("torch", "diffusers", "lightning", "torchmetrics", "numpy")


def decibels(value: float) -> str:
    """A PSNR with two decimals, or `exact` when nothing differs."""
    return "exact" if value == math.inf else f"{value:.2f}"


def collect_meta(
    command: str, seeds: Sequence[int], lists: Mapping[str, str] | None = None
) -> BenchMeta:
    """What is needed to run a benchmark again, without naming the machine.

    Args:
        command: the command line.
        seeds: seed of every sample.
        lists: what searches for lists of anchors took.
    """
    versions = {"foreseer": __version__, "python": platform.python_version()}
    versions |= {name: installed(name) for name in PACKAGES}
    return BenchMeta(
        versions=versions,
        seeds=list(seeds),
        hardware=hardware(),
        command=command,
        date=datetime.date.today().isoformat(),
        commit=commit(),
        lists=dict(lists or {}),
    )


def hardware() -> str:
    """Processor model, cores and threads used, and the GPU where there is one."""
    words = f"{processor()}, {usable_cores()} cores, {torch.get_num_threads()} torch thread(s)"
    if torch.cuda.is_available():
        words += f", {torch.cuda.get_device_name()}"
    return words
