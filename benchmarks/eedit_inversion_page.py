"""Verdict and tables of docs/inversion.md from what benchmarks/eedit_inversion.py has measured.

python benchmarks/eedit_inversion_page.py
"""

import json
from pathlib import Path
from typing import Any

from readout_page import put

RESULT, PAGE = Path("benchmarks/results/eedit.json"), Path("docs/inversion.md")
NAMES = {
    "full": "full inversion",
    "heun": "Heun, 4 steps",
    "implicit_euler": "inverse Euler, 4 steps of 2 rounds",
    "ab2": "Adams-Bashforth 2",
    "lstsq_of_reconstruction": "rows of the exact inverse",
    "readout_of_inversion": "readout of the inversion",
    "readout": "**readout of the exact inverse**",
}


def page() -> None:
    """Write all of them."""
    found = json.loads(RESULT.read_text())["inversion"]
    put(PAGE, "inversion_verdict", verdict(found))
    put(PAGE, "inversion", table(found))
    put(PAGE, "inversion_tried", tried_table(found))
    put(PAGE, "inversion_edits", edits_table(found))


def own(found: dict[str, Any], method: str) -> dict[str, Any]:
    """The row of a method on its own list."""
    rows = [row for row in found["reconstruction"] if row["method"] == method]
    row: dict[str, Any] = next((r for r in rows if r["own_list"]), rows[0])
    return row


def best_rival(found: dict[str, Any]) -> dict[str, Any]:
    """The best formula or solver at the readout's evaluations."""
    rows = found["reconstruction"]
    rivals = [r for r in rows if r["method"] not in FITTED and r["evaluations"] == 8]
    return max(rivals, key=lambda row: row["psnr_db"])


FITTED = ("readout",)


def verdict(found: dict[str, Any]) -> str:
    """What a user acts on."""
    none = next(row for row in found["edits"] if row["inversion"] == "none")
    exact = next(row for row in found["tried"] if row["method"] == "exact")
    rows = [own(found, "full"), best_rival(found), own(found, "taylor_1")]
    others = ["all 28 evaluations", f"{NAMES[rows[1]['method']]} on steps of its own", "Taylor"]
    told = [f"{standing(row)} {name} ({row['psnr_db']:.1f} dB; paired {interval(row)})"
            for row, name in zip(rows, others, strict=True)]  # fmt: skip
    return (
        "**At gamma 0.7, as EEdit publishes it, leave the inversion out: starting from drawn noise "
        f"the edit is at {none['psnr_db']:.1f} dB to the one after a full inversion. At gamma 0, "
        "where the picture is to come back, a readout fitted on exact inverses brings it back at "
        f"{own(found, 'readout')['psnr_db']:.1f} dB in 8 evaluations of 28: {', '.join(told)}. "
        f"Without a fit, take {NAMES[rows[1]['method']]} on late steps; where "
        f"{4 * found['steps']} evaluations are no trouble, `invert_exactly`, at "
        f"{exact['psnr_db']:.0f} dB.**"
    )


def standing(row: dict[str, Any]) -> str:
    """How the readout stands to a rival, by the paired interval."""
    if row["low_db"] > 0:
        return "ahead of"
    return "behind" if row["high_db"] < 0 else "level with"


def interval(row: dict[str, Any]) -> str:
    """The paired interval of what the readout is ahead by."""
    return f"{row['low_db']:+.1f} to {row['high_db']:+.1f}"


def table(found: dict[str, Any]) -> str:
    """Reconstruction by method, best first."""
    lines = [
        "| evaluations | method | steps | PSNR, dB | readout ahead by, dB | wins | s | std of the "
        "noise |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    rows = found["reconstruction"]
    for row in sorted(rows, key=lambda row: (-row["evaluations"], -row["psnr_db"])):
        steps = "all" if row["list"] is None else " ".join(map(str, found["lists"][row["list"]]))
        if row["list"] is not None and not row["own_list"]:
            steps += " (the readout's)"
        ahead, wins = "", ""
        if "readout_ahead_db" in row:
            ahead = f"{row['readout_ahead_db']:+.2f} ({interval(row)})"
            wins = f"{row['wins']} of {row['num_samples']}"
        lines.append(
            f"| {row['evaluations']} | {NAMES.get(row['method'], row['method'])} | {steps} | "
            f"{row['psnr_db']:.2f} | {ahead} | {wins} | {row['seconds']:.2f} | "
            f"{row['noise_std']:.2f} |"
        )
    return "\n".join(lines)


def tried_table(found: dict[str, Any]) -> str:
    """What was measured on the pictures to choose on."""
    lists = found["lists"]
    lines = [f"| method | {' | '.join(lists)} |", f"| --- |{' --- |' * len(lists)}"]
    by_name: dict[str, dict[str, float]] = {}
    for row in found["tried"]:
        if row["list"] is not None:
            by_name.setdefault(row["method"], {})[row["list"]] = row["psnr_db"]
    for name, values in by_name.items():
        told = [f"{values[listed]:.2f}" if listed in values else "" for listed in lists]
        lines.append(f"| {NAMES.get(name, name)} | {' | '.join(told)} |")
    return "\n".join(lines)


def edits_table(found: dict[str, Any]) -> str:
    """Edits after skipped inversions."""
    lines = ["| the network runs at | evaluations | PSNR, dB |", "| --- | --- | --- |"]
    for row in found["edits"]:
        told = "" if row["psnr_db"] is None else f"{row['psnr_db']:.1f}"
        steps = {"all": "all steps", "none": "no step: drawn noise"}
        where = steps.get(row["inversion"], f"{row['inversion']} step")
        lines.append(f"| {where} | {row['evaluations']} | {told} |")
    return "\n".join(lines)


if __name__ == "__main__":
    page()
