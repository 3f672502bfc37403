"""Verdict and tables of docs/progressive.md from what benchmarks/fresco.py has measured.

python benchmarks/fresco_page.py
"""

import json
from pathlib import Path
from typing import Any

from readout_page import put

RESULT, PAGE = Path("benchmarks/results/fresco.json"), Path("docs/progressive.md")
NAMES = {
    "euler": "Euler, 64 tokens throughout",
    "ab2": "Adams-Bashforth 2, 64 tokens throughout",
    "stages_full": "stages, every step computed",
    "stages_euler": "stages, Euler (Fresco without forecasts)",
    "stages_ab2": "stages, Adams-Bashforth 2",
    "drop": "stages, drop the history: rows over fine anchors",
    "joint": "stages, learned resampling",
    "innovation": "stages, learned resampling and innovation",
    "copy_late": "stages, copies of the parents, first fine anchor late",
    "joint_late": "stages, learned resampling, first fine anchor late",
    "innovation_late": "stages, resampling and innovation, first fine anchor late",
}
MEASURED_BEFORE = {
    "field": {0.9: 43.2, 0.8: 38.3, 0.7: 34.7, 0.6: 31.5, 0.5: 29.1},
    "fresh": {0.9: 18.1, 0.8: 18.7, 0.7: 19.2, 0.6: 19.9, 0.5: 20.7},
}
"""Of the same experiment on 16 other pictures."""


def page() -> None:
    """Write all of them."""
    found = json.loads(RESULT.read_text())
    put(PAGE, "progressive_verdict", verdict(found))
    put(PAGE, "progressive_stages", table(found))
    put(PAGE, "progressive_pairs", pairs(found))
    put(PAGE, "progressive_ideal", ideal(found))
    put(PAGE, "progressive_across", across(found))


def row_of(found: dict[str, Any], method: str) -> dict[str, Any]:
    """What a way came to."""
    return next(row for row in found["stages"]["rows"] if row["method"] == method)


def pair_of(found: dict[str, Any], method: str, rival: str) -> dict[str, Any]:
    """A paired difference."""
    pairs = found["pairs"]
    return next(row for row in pairs if (row["method"], row["rival"]) == (method, rival))


def difference(row: dict[str, Any]) -> str:
    """A paired difference and its interval."""
    low, high = row["paired_low_db"], row["paired_high_db"]
    return f"{row['paired_db']:+.2f} dB ({low:+.2f} to {high:+.2f})"


def verdict(found: dict[str, Any]) -> str:
    """What a user acts on."""
    plain, staged = row_of(found, "ab2"), row_of(found, "innovation")
    to_plain = pair_of(found, "innovation", "ab2")
    euler = pair_of(found, "stages_euler", "euler")
    drop = pair_of(found, "innovation", "drop")
    copy = pair_of(found, "innovation_late", "copy_late")
    stays = to_plain["paired_high_db"] < 0
    lead = (
        "**Where the full run is to be met, stay on the fine grid"
        if stays
        else "**Where the full run is to be met, stages are worth trying"
    )
    bars = (drop["paired_db"] >= 0.5 and drop["paired_low_db"] > 0) and (
        copy["paired_db"] >= 0.3 and copy["paired_low_db"] > 0
    )
    met = "both bars, +0.5 and +0.3 dB, are met"
    return (
        f"{lead}: at a cost of {staged['cost']:.1f} evaluations the stages come to "
        f"{staged['psnr_db']:.2f} dB, Adams-Bashforth 2 on 64 tokens throughout to "
        f"{plain['psnr_db']:.2f} dB at {plain['cost']:.1f}: paired {difference(to_plain)}. "
        f"Fresco's stages without forecasts stand {difference(euler)} to Euler at equal cost. "
        "Within the stages, at the same anchors, learned resampling with innovation stands "
        f"{difference(drop)} to dropping the history, and {difference(copy)} to copies of the "
        "parents where the first fine anchor comes late: "
        f"{met if bars else 'the bars of +0.5 and +0.3 dB are missed'}.**"
    )


def table(found: dict[str, Any]) -> str:
    """All ways, best first."""
    lines = [
        "| way | coarse anchors | fine anchors | cost | PSNR, dB | median | p10 | to the stages "
        "in full |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in sorted(found["stages"]["rows"], key=lambda row: -row["psnr_db"]):
        anchors = ["", *row["anchors"]] if len(row["anchors"]) == 1 else row["anchors"]
        told = [_listed(each) for each in anchors]
        inside = f"{row['to_stages_db']:.2f}" if "to_stages_db" in row and told[0] else ""
        lines.append(
            f"| {NAMES[row['method']]} | {' | '.join(told)} | {row['cost']:.1f} | "
            f"{row['psnr_db']:.2f} | {row['psnr_median']:.2f} | {row['psnr_q10']:.2f} | {inside} |"
        )
    return "\n".join(lines)


def _listed(anchors: Any) -> str:
    if not anchors:
        return ""
    if len(anchors) > 12:
        return f"all {len(anchors)}"
    return " ".join(map(str, anchors))


def pairs(found: dict[str, Any]) -> str:
    """Paired differences."""
    lines = [
        "| way | against | difference (95 %) | wins | to the stages in full | wins |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    inside = {(row["method"], row["rival"]): row for row in found["pairs_to_stages"]}
    for row in found["pairs"]:
        told = [NAMES[row[key]] for key in ("method", "rival")]
        for each in (row, inside.get((row["method"], row["rival"]))):
            won = each and f"{each['wins']} of {each['num_samples']}"
            told += [difference(each), won] if each else ["", ""]
        lines.append(f"| {' | '.join(told)} |")
    return "\n".join(lines)


def ideal(found: dict[str, Any]) -> str:
    """What the lift alone loses."""
    rows = found["ideal"]["rows"]
    times = list(dict.fromkeys(row["switch"] for row in rows))
    lines = [
        f"| switch at s | {' | '.join(f'{time:.1f}' for time in times)} |",
        f"| --- |{' --- |' * len(times)}",
    ]
    named = {"field": "details of the run's own field", "fresh": "fresh noise"}
    for noise, name in named.items():
        own = {row["switch"]: row["psnr_db"] for row in rows if row["noise"] == noise}
        lines.append(f"| {name} | {' | '.join(f'{own[time]:.1f}' for time in times)} |")
        before = MEASURED_BEFORE[noise]
        lines.append(f"| before | {' | '.join(str(before[t]) for t in times)} |")
    return "\n".join(lines)


def across(found: dict[str, Any]) -> str:
    """Readouts of one grid at the other."""
    share = {(r["grid"], r["fitted_on"]): r["explained"] for r in found["across"]["rows"]}
    names = {"coarse": "16 tokens", "fine": "64 tokens"}
    lines = ["| read on | fitted on 16 tokens | fitted on 64 tokens |", "| --- | --- | --- |"]
    for grid, name in names.items():
        own = " | ".join(f"{100 * share[grid, fitted]:.1f} %" for fitted in names)
        lines.append(f"| {name} | {own} |")
    return "\n".join(lines)


if __name__ == "__main__":
    page()
