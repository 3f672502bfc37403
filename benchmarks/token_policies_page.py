"""The tables and pictures of docs/jit.md and docs/pruning.md from what the benchmarks measured.

python benchmarks/token_policies_page.py            # rewrites the tables in place
python benchmarks/token_policies_page.py --pictures # and the pictures, from runs/token_policies
"""

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SHOWN = {  # rows of the pictures: what is drawn, and the name of its file
    "jit": ("full", "50% interpolated (JiT)", "lattice 0.5", "zoo_fashion_dit_readout_11"),
    "pruning": ("full", "40% copied (DaTo)", "pruning 0.4", "zoo_fashion_dit_readout_11"),
}
COLUMNS = 12


def quality(rows: Sequence[dict[str, Any]]) -> str:
    """A table per model."""
    hosts = dict.fromkeys(row["host"] for row in rows)
    return "\n\n".join(of_host([row for row in rows if row["host"] == host]) for host in hosts)


def of_host(rows: Sequence[dict[str, Any]]) -> str:
    """A line per method: what it costs, its error, and the paired differences."""
    lines = [
        "| model | method | steps that run | partial steps | such a step costs | the run costs | "
        f"PSNR, dB | p10 | over {rows[0]['base']}, dB | over {rows[0]['rival']}, dB | wins |",
        f"|{' --- |' * 11}",
    ]
    for row in rows:
        plain = " at " in row["method"]
        each = row["step_cost"] if row["partial_steps"] or row["evaluations"] == 50 else None
        cells = [
            f"`{row['host']}`",
            row["method"],
            str(row["evaluations"]),
            str(row["partial_steps"] or ""),
            "" if each is None or plain else f"{each:.2f}",
            f"{row['evaluations'] if plain else row['cost_in_full_steps']:.1f}",
            f"{row['psnr_db']:.2f}",
            f"{row['psnr_q10']:.2f}",
            "" if row["method"] == row["base"] else gap(row, "over_base"),
            "" if row["method"] == row["rival"] else gap(row, "paired"),
            "" if row["method"] == row["rival"] else f"{row['wins']} of {row['num_samples']}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def gap(row: dict[str, Any], name: str) -> str:
    """A paired difference and its 95 % interval."""
    low, high = row[f"{name}_low_db"], row[f"{name}_high_db"]
    return f"{row[f'{name}_db']:+.2f} ({low:+.2f} to {high:+.2f})"


def open_loop(rows: Sequence[dict[str, Any]]) -> str:
    """Relative errors by model, gap and share, a line per way."""
    names = [name for name in rows[0] if name not in ("host", "anchors_every", "share")]
    heads = [f"`{r['host']}`, every {r['anchors_every']}, {r['share']:.0%}" for r in rows]
    lines = [f"| | {' | '.join(heads)} |", f"|{' --- |' * (len(rows) + 1)}"]
    for name in names:
        lines.append(f"| {name} | {' | '.join(f'{row[name]:.3f}' for row in rows)} |")
    return "\n".join(lines)


def seconds(rows: Sequence[dict[str, Any]]) -> str:
    """Cost of a block with pruned attention relative to the whole one."""
    lines = [
        "| block | channels | tokens | whole, ms | ratio | own choice | choice given |",
        f"|{' --- |' * 7}",
    ]
    for row in rows:
        lines.append(
            f"| {row['host']} | {row['width']} | {row['tokens']} | {row['whole_ms']:.0f} | "
            f"{row['ratio']} | {row['own_choice']:.2f} | {row['given_choice']:.2f} |"
        )
    return "\n".join(lines)


def tables() -> dict[str, dict[str, str]]:
    """Tables by page and name."""
    jit = json.loads((RESULTS / "jit.json").read_text())
    states = json.loads((RESULTS / "jit_open_loop.json").read_text())
    pruned = json.loads((RESULTS / "dato.json").read_text())["tokens"]
    return {
        "jit.md": {"lattice": quality(jit), "open_loop": open_loop(states)},
        "pruning.md": {
            "pruning": quality([row for row in pruned if row["kind"] == "quality"]),
            "seconds": seconds([row for row in pruned if row["kind"] == "seconds"]),
        },
    }


def pictures() -> None:
    """Draw the first judged samples of the class model, a row per method."""
    import torch
    from PIL import Image

    kept = ROOT / "runs" / "token_policies" / "fashion_dit"
    for page, shown in SHOWN.items():
        rows = []
        for name in shown:
            path = kept / f"{name} of 64.pt".replace(" ", "_")
            samples = torch.load(path, weights_only=True)["pictures"][:COLUMNS, 0]
            rows.append(torch.cat(list(samples.repeat_interleave(2, 1).repeat_interleave(2, 2)), 1))
        sheet = (255 * torch.cat(rows)).round().byte().numpy()
        Image.fromarray(sheet).save(ROOT / "docs" / "images" / f"{page}.png")


def main() -> None:
    """Exchange what stands between the marks of both pages."""
    for page, made in tables().items():
        path = ROOT / "docs" / page
        text = path.read_text()
        for name, content in made.items():
            place = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
            text = re.sub(place, lambda m, told=content: f"{m[1]}{told}\n{m[2]}", text, flags=re.S)
        path.write_text(text)
    if "--pictures" in sys.argv:
        pictures()


if __name__ == "__main__":
    main()
