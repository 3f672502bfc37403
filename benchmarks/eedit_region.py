"""Editing with a reference picture: rows by token group against one common row, and EEdit's rule.

    python benchmarks/eedit_region.py --archive ARCHIVE --out runs/eedit

The emoji editor of examples/emoji_editor on bases that it was not trained on, 28 steps without
guidance. Fitted and chosen on edits of the bases for choosing; judged on edits of those for
judging. A common readout and one by group run on the same anchors and are fitted by the same walk
on the same edits. Parts that are in the folder are not computed again.

Shapes: B edits, H x W pixels, N tokens.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import foreseer as fs
from foreseer.evaluation.measure import closed_loop_errors
from foreseer.evaluation.metrics import paired
from foreseer.evaluation.search import beam_search
from foreseer.integration.schedule import warped
from foreseer.predictors.region_policy import RegionPolicy
from foreseer.predictors.rules import AdamsBashforth2, Reuse, Taylor
from foreseer.predictors.spot_edit import SpotEdit
from foreseer.predictors.token_groups import TokenGroups
from foreseer.training.least_squares import fit_rows
from foreseer.training.readout.readout_runs import QuietFit, run_fit
from foreseer.trajectories.datamodule import ItemsDataModule
from foreseer.trajectories.prompts import Item, generate_batch
from foreseer.trajectories.recorder import record
from foreseer.trajectories.recording import Recording

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "emoji_editor"))
from edit_pairs import ARCHIVE, KINDS, Edit, EmojiEdits, instructions, judged_edits  # noqa: E402
from editor import EmojiEditPipeline, load_editor, regions  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "eedit.json"
PICTURE = Path(__file__).parents[1] / "docs" / "images" / "editing_regions.png"
STEPS, BUDGETS, BATCH = 28, (8, 6, 11), 16
CALL: dict[str, Any] = {"num_inference_steps": STEPS, "guidance_scale": 1.0}
FITTED_ON, JUDGED = 128, 64
RANK = 24  # of both readouts
FORMULAS = {"taylor_1": Taylor(1), "ab2": AdamsBashforth2()}


def items_of(edits: Sequence[Edit]) -> list[Item]:
    """An item per edit, whose seed is its number."""
    return [
        Item(
            number,
            number,
            {
                "image": edit.source[None],
                "prompt": edit.instruction,
                "mask_image": edit.changed[None],
            },
        )
        for number, edit in enumerate(edits)
    ]


def drawn(pipe: EmojiEditPipeline, items: Sequence[Item], **changes: Any) -> tuple[Tensor, float]:
    """The pictures of all items, and the process seconds of an edit."""
    began, pictures = time.process_time(), []
    for start in range(0, len(items), BATCH):
        batch = items[start : start + BATCH]
        found = generate_batch(pipe, batch, output_type="pt", **{**CALL, **changes})[0]
        pictures.append(found)
    return torch.cat(pictures), (time.process_time() - began) / len(items)


def qualities(pictures: Tensor, full: Tensor, edits: Sequence[Edit]) -> dict[str, Tensor]:
    """PSNR in dB to the full run, inside and outside the mask and whole, and to the true target."""
    changed = torch.stack([edit.changed for edit in edits])
    target = torch.stack([edit.target for edit in edits])
    squares = (pictures - full).double().square().mean(1)  # (B, H, W)
    truth = (pictures - target).double().square().mean(1)
    found = {
        "inside": (squares * changed).sum((1, 2)) / changed.sum((1, 2)),
        "outside": (squares * ~changed).sum((1, 2)) / (~changed).sum((1, 2)),
        "whole": squares.mean((1, 2)),
        "truth": truth.mean((1, 2)),
    }
    return {name: -10 * each.clamp_min(1e-10).log10() for name, each in found.items()}


class Bench:
    """The editor, its edits, and what has been measured of them so far.

    Args:
        archive: the package of emoji.
        out: folder for recordings, predictors and measurements.
    """

    def __init__(self, archive: Path, out: Path) -> None:
        self.out = out
        out.mkdir(parents=True, exist_ok=True)
        fitting, judging = EmojiEdits(archive, "choose"), EmojiEdits(archive, "judge")
        self.pipe = load_editor(instructions([fitting, judging]))
        self.fitted_on = items_of(judged_edits(fitting, FITTED_ON // len(KINDS), seed=1))
        self.edits = judged_edits(judging, JUDGED // len(KINDS), seed=2)
        self.items = items_of(self.edits)
        self.kept = out / "measured.pt"
        self.measured: dict[str, Any] = {}
        if self.kept.exists():
            self.measured = torch.load(self.kept, weights_only=True)

    def recording(self) -> Recording:
        """Full runs of the edits to fit on, with Grams of all picture tokens and of the groups."""
        record(
            self.pipe,
            self.fitted_on,
            self.out / "recording",
            taps=["output"],
            batch_size=BATCH,
            partitions={"output/regions": TokenGroups()},
            token_groups=regions,
            **CALL,
        )
        return Recording(self.out / "recording")

    def measure(self, name: str, attach: Callable[[], Any] | None, **changes: Any) -> None:
        """Draw the judged edits once, under what `attach` attaches.

        Args:
            name: of the row.
            attach: makes the context of the runs; None for the pipeline alone.
            changes: of the call.
        """
        if name in self.measured:
            return
        if attach is None:
            pictures, seconds = drawn(self.pipe, self.items, **changes)
        else:
            with attach() as run:
                pictures, seconds = drawn(self.pipe, self.items, **changes)
        full = pictures if name == "full" else self.measured["full"]["pictures"]
        report = None if attach is None or not hasattr(run, "report") else run.report()
        self.measured[name] = {
            "pictures": pictures,
            "seconds": seconds,
            "anchors": [] if report is None else list(report.anchors),
            "partials": [] if report is None else list(report.partials),
            **qualities(pictures, full, self.edits),
        }
        torch.save(self.measured, self.kept)
        row = self.measured[name]
        told = "  ".join(f"{key} {float(row[key].mean()):.2f}" for key in QUALITIES)
        print(f"{name:28s} {told}  {seconds:.3f} s", flush=True)


QUALITIES = ("inside", "outside", "whole", "truth")


def searched(bench: Bench, recording: Recording, budget: int) -> dict[str, list[int]]:
    """Every formula's best list, by samples that are fitted on, of the beam's first and a warp."""
    path = bench.out / f"lists_{budget}.json"
    if path.exists():
        return json.loads(path.read_text())
    grams, sigmas = recording.stack("gram/output", recording.items), recording.header.sigmas
    chosen = bench.fitted_on[:: FITTED_ON // 16]
    finals = recording.stack("final", [item.index for item in chosen])
    batches = [chosen[start : start + BATCH] for start in range(0, len(chosen), BATCH)]
    found = {}
    for name, rule in FORMULAS.items():
        lists = [list(each) for each in beam_search(grams, sigmas, budget, rule)[:2]]
        lists += [list(warped(budget, STEPS, gamma)) for gamma in (1.0, 1.3)]
        errors = []
        for each in lists:
            rows = rule.rows(each, sigmas)[:, 0]
            error = closed_loop_errors(bench.pipe, rows, each, "output", batches, finals, **CALL)
            errors.append(float(error.mean()))
        found[name] = lists[errors.index(min(errors))]
        print(budget, name, found[name], f"{min(errors):.2f} dB", flush=True)
        found[f"{name}_error"] = min(errors)
    path.write_text(json.dumps(found))
    return found


def fit_readout(bench: Bench, recording: Recording, anchors: Sequence[int], by_group: bool) -> Any:
    """A readout of all tokens alike or by group, by the same walk over the same edits."""
    own = {"partition": "regions", "groups": regions} if by_group else {}
    options: dict[str, Any] = {"rank": RANK, "past": 1, "first_times": 0, "batch_size": BATCH}
    module = QuietFit(str(recording.folder), "", list(anchors), **options, **own)
    run_fit(module, bench.pipe, ItemsDataModule(str(recording.folder), 0.0, batch_size=BATCH))
    predictor = module.deployed()
    predictor.spec = module.spec()
    return predictor


def run_budget(bench: Bench, recording: Recording, budget: int) -> None:
    """All methods at a number of evaluations."""
    pipe = bench.pipe
    lists = searched(bench, recording, budget)
    best = min(FORMULAS, key=lambda name: lists[f"{name}_error"])
    anchors = lists[best]
    for name, rule in FORMULAS.items():
        bench.measure(f"{name}, {budget}", partial(fs.forecasting, pipe, rule, lists[name]))
    bench.measure(f"euler, {budget}", None, num_inference_steps=budget)
    spot = SpotEdit(FORMULAS[best])
    given = {"groups": regions}
    bench.measure(f"spotedit, {budget}", partial(fs.forecasting, pipe, spot, anchors, **given))
    for by_group in (False, True):
        kind = "by group" if by_group else "common"
        own = given if by_group else {}
        if f"readout {kind}, {budget}" not in bench.measured:
            began = time.process_time()
            readout = fit_readout(bench, recording, anchors, by_group)
            print(f"readout {kind}: fitted in {time.process_time() - began:.0f} s", flush=True)
            bench.measure(
                f"readout {kind}, {budget}", partial(fs.forecasting, pipe, readout, **own)
            )
        rows = fit_rows(recording, anchors, partition="regions" if by_group else None)
        bench.measure(f"rows {kind}, {budget}", partial(fs.forecasting, pipe, rows, **own))
    for fewer in (1, 2):
        steps = [round(place * STEPS / (budget - fewer)) for place in range(budget - fewer)]
        ratio = (
            fewer * 128 / (STEPS - len(steps)) / 64
        )  # of the picture: the tokens of `fewer` steps
        policy = RegionPolicy(ratio, interval=max(1, STEPS // len(steps)))
        name = f"region policy {budget - fewer} + {ratio:.2f}, {budget}"
        bench.measure(name, partial(fs.forecasting, pipe, Reuse(), steps, tokens=policy, **given))


def summary(bench: Bench) -> dict[str, Any]:
    """What goes into the results: means, seconds, and paired differences."""
    rows = {}
    for name, row in bench.measured.items():
        rows[name] = {key: round(float(row[key].mean()), 3) for key in QUALITIES}
        rows[name] |= {"seconds": round(row["seconds"], 4), "anchors": row["anchors"]}
        rows[name]["partial_steps"] = len(row["partials"])
    differences = {}
    for budget in BUDGETS:
        own = bench.measured[f"readout by group, {budget}"]
        rivals = [n for n in bench.measured if n.endswith(f", {budget}")]
        for name in rivals:
            if name == f"readout by group, {budget}":
                continue
            differences[f"readout by group - {name}"] = compared(own, bench.measured[name])
        pair = (bench.measured[f"rows {kind}, {budget}"] for kind in ("by group", "common"))
        differences[f"rows by group - rows common, {budget}"] = compared(*pair)
    kinds = {}
    for budget in BUDGETS:
        for place, kind in enumerate(KINDS):
            count = JUDGED // len(KINDS)
            part = slice(place * count, (place + 1) * count)
            pair = [
                {q: bench.measured[f"readout {how}, {budget}"][q][part] for q in QUALITIES}
                for how in ("by group", "common")
            ]
            kinds[f"{kind}, {budget}"] = compared(*pair)
    return {
        "steps": STEPS,
        "judged": JUDGED,
        "fitted_on": FITTED_ON,
        "rank": RANK,
        "rows": rows,
        "differences": differences,
        "by_kind": kinds,
    }


def compared(own: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, list[float]]:
    """Mean difference in dB and its 95 % interval, by quality."""
    found = {}
    for quality in QUALITIES:
        pair = paired(own[quality], other[quality])
        found[quality] = [round(each, 3) for each in (pair.mean, pair.low, pair.high)]
    return found


def picture(bench: Bench, budget: int = 8, columns: int = 8) -> None:
    """Source, target, full edit, readout by group and the best formula, the mask outlined."""
    lists = json.loads((bench.out / f"lists_{budget}.json").read_text())
    best = min(FORMULAS, key=lambda name: lists[f"{name}_error"])
    shown = range(1, JUDGED, JUDGED // columns)
    rows = [torch.stack([bench.edits[place].source for place in shown])]
    for name in ("full", f"readout by group, {budget}", f"{best}, {budget}"):
        rows.append(bench.measured[name]["pictures"][list(shown)].float())
    scale, gap = 3, 4
    height = width = 32 * scale
    sheet = np.full((len(rows) * (height + gap), columns * (width + gap), 3), 255, np.uint8)
    for down, pictures in enumerate(rows):
        for right, (tensor, place) in enumerate(zip(pictures, shown, strict=True)):
            pixels = (255 * tensor.clamp(0, 1)).round().byte().permute(1, 2, 0).numpy()
            tile = np.asarray(Image.fromarray(pixels).resize((width, height), Image.NEAREST))
            tile = outlined(tile.copy(), bench.edits[place].changed.numpy(), scale)
            top, left = down * (height + gap), right * (width + gap)
            sheet[top : top + height, left : left + width] = tile
    Image.fromarray(sheet).save(PICTURE, optimize=True)


def outlined(tile: np.ndarray, mask: np.ndarray, scale: int) -> np.ndarray:
    """A picture with the border of a mask drawn in magenta, one pixel wide."""
    large = mask.repeat(scale, 0).repeat(scale, 1)
    padded = np.pad(large, 1)
    inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    tile[large & ~inner] = (255, 0, 255)
    return tile


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--archive", type=Path, default=Path(ARCHIVE))
    parser.add_argument("--out", type=Path, required=True)
    torch.set_num_threads(1)
    arguments = parser.parse_args()
    bench = Bench(arguments.archive, arguments.out)
    bench.measure("full", None)
    recording = bench.recording()
    for budget in BUDGETS:
        run_budget(bench, recording, budget)
    told = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    RESULTS.write_text(json.dumps(told | {"region": summary(bench)}, indent=1) + "\n")
    picture(bench)


if __name__ == "__main__":
    main()
