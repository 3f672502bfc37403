"""Verdict and table of docs/shallow.md from what benchmarks/shallow.py has measured.

python benchmarks/shallow_page.py [--pictures]

With `--pictures` the sheet too, where the samples of the U-Net are kept.
"""

import json
import sys
from pathlib import Path
from typing import Any

from readout_page import put

RESULT, PAGE = Path("benchmarks/results/dato.json"), Path("docs/shallow.md")
SHOWN = ("full", "reuse_on_deep.1", "rows_on_deep.1", "three_kinds,_searched*")
SHOWN += ("taylor_1,_searched,_8_anchors",)
COLUMNS = 12
HEAD = "| host | | full steps' cost | PSNR, dB | p10 | against | difference, dB | wins |"


def page() -> None:
    """Write both."""
    found = json.loads(RESULT.read_text())
    rows = found["shallow"]
    put(PAGE, "shallow_verdict", verdict(rows))
    put(PAGE, "shallow_search", searches(found["shallow_search"]))
    put(PAGE, "shallow_table", table(rows))


def searches(found: dict[str, dict[str, Any]]) -> str:
    """One line per host."""
    lines = [
        "| host | lists named | seconds | best of them, dB | lists at random | best of them, dB |",
        "|" + " --- |" * 6,
    ]
    for host, each in found.items():
        drawn = "" if each["random_db"] is None else f"{each['random_db']:.1f}"
        lines.append(
            f"| `{host}` | {each['lists']} | {each['programming_seconds']:.1f} | "
            f"{each['programming_db']:.1f} | {each['random_lists']} | {drawn} |"
        )
    return "\n".join(lines)


def table(rows: list[dict[str, Any]]) -> str:
    """One line per method."""
    lines = [HEAD, "|" + " --- |" * (HEAD.count("|") - 1)]
    for row in rows:
        between = f"{row['paired_db']:+.1f} ({row['paired_low_db']:+.1f} to "
        lines.append(
            f"| `{row['host']}` | {row['method']} | {row['evaluations']:.1f} | {row['psnr']:.1f} | "
            f"{row['p10']:.1f} | {row['rival']} | {between}{row['paired_high_db']:+.1f}) | "
            f"{row['wins']} of {row['num_samples']} |"
        )
    return "\n".join(lines)


def verdict(rows: list[dict[str, Any]]) -> str:
    """What the table comes to, host by host."""
    told = []
    for host in dict.fromkeys(row["host"] for row in rows):
        own = {row["method"]: row for row in rows if row["host"] == host}
        plain = [row for row in own.values() if row["tap"] == "output" and not row["shallow"]]
        learned = own["rows on deep.1"]
        within = [row for row in plain if row["evaluations"] <= learned["evaluations"] + 0.5]
        best = max(within, key=lambda row: row["psnr"])
        three = next(row for name, row in own.items() if "searched" in name)
        eight = own[three["rival"]]
        told.append(
            f"On `{host}` a shallow step costs {learned['share']:.0%} of a full one. With 8 full "
            f"steps and 42 shallow ones ({learned['evaluations']:.1f} full steps) rows on `deep.1` "
            f"reach {learned['psnr']:.1f} dB, {learned['paired_db']:+.1f} dB on reuse "
            f"({learned['paired_low_db']:+.1f} to {learned['paired_high_db']:+.1f}), Taylor "
            f"{own['taylor_1 on deep.1']['psnr']:.1f} dB; of plain lists at that cost "
            f"{best['method']} reach {best['psnr']:.1f} dB. At a cost of 8 {three['method']}, "
            f"reach {three['psnr']:.1f} dB, {eight['method']} {eight['psnr']:.1f}: "
            f"{three['paired_db']:+.1f} dB ({three['paired_low_db']:+.1f} to "
            f"{three['paired_high_db']:+.1f})."
        )
    told.insert(
        0,
        "**Use plain anchors.** What shallow steps cost was never better spent than on more "
        "anchors: with 42 of them they are far behind, with a few behind or level. They are there "
        "to be compared with, as DeepCache's scheme is; what they are worth where one costs next "
        "to nothing, as in networks of very many blocks, was not measured.",
    )
    count = f"{rows[0]['num_samples']} judged samples, fitted on {rows[0]['num_trajectories']}"
    return "\n\n".join(
        [
            *told,
            f"({count} trajectories, 50 steps, guidance 3, lists uniform or searched.)",
        ]
    )


def picture() -> None:
    """Draw the first judged samples of the U-Net, a row per way."""
    import torch
    from PIL import Image

    rows = []
    for name in SHOWN:
        (path,) = Path("runs/shallow/fashion_unet").glob(f"{name}_64*.pt")
        samples = torch.load(path, weights_only=True)[:COLUMNS, 0].cpu()
        rows.append(torch.cat(list(samples.repeat_interleave(2, 1).repeat_interleave(2, 2)), 1))
    sheet = (255 * torch.cat(rows)).round().byte().numpy()
    Image.fromarray(sheet).save("docs/images/shallow.png")


if __name__ == "__main__":
    page()
    if "--pictures" in sys.argv:
        picture()
