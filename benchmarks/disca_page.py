"""Write the tables of docs/distill.md and docs/disca.md, and the picture, from the results.

    python benchmarks/disca_page.py

Each page keeps its text; what stands between `<!-- NAME -->` and `<!-- /NAME -->` is replaced.
"""

import json
import re
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

RESULTS = Path("benchmarks/results")
DOCS = Path("docs")
PICTURE = DOCS / "images" / "disca.png"
COLUMNS = ("0_0.02", "0.02_0.1", "0.1_0.2", "0.2_0.4", "0.4_1")
Row = dict[str, Any]


def table(head: list[str], lines: list[list[str]]) -> str:
    """A Markdown table."""
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def psnr(row: Row) -> str:
    """Mean PSNR with its 95 % interval."""
    if row["psnr_db"] is None:
        return "equal"
    return f"{row['psnr_db']:.2f} ({row['psnr_ci_low']:.1f} to {row['psnr_ci_high']:.1f})"


def costs(row: Row) -> list[str]:
    """Evaluations, accuracy and measured ratio."""
    return [
        str(row["num_network_evaluations"]),
        f"{100 * row['class_accuracy']:.1f} %",
        f"{row['speedup_measured']:.2f}",
    ]


def samplers(rows: list[Row]) -> str:
    """Everything that is compared with the guided teacher's 50 steps at its own cost."""
    own = [r for r in rows if r["reference"] == "teacher_50" and r["tap"] == "none"]
    own += [r for r in rows if r["host"] == "teacher" and r["kind"] == "learned"]
    own.sort(key=lambda r: (r["num_network_evaluations"], -(r["psnr_db"] or 1e9)))
    lines = [
        [r["host"], f"`{r['method']}`", str(r["num_anchors"]), *costs(r), psnr(r)] for r in own
    ]
    head = [
        "host",
        "method",
        "full steps",
        "evaluations",
        "right class",
        "times faster",
        "PSNR, dB",
    ]
    return table(head, lines)


def forecasts(rows: list[Row]) -> str:
    """What forecasts on the student, against both references."""
    found: dict[tuple[str, int], dict[str, Row]] = {}
    wanted = {(r["method"], r["num_anchors"]) for r in rows if r["reference"] == "student_20"}
    for row in rows:
        key = (row["method"], row["num_anchors"])
        if row["host"] == "student" and key in wanted:
            found.setdefault(key, {})[row["reference"]] = row
    lines = []
    for (method, anchors), pair in sorted(
        found.items(), key=lambda item: (item[0][1], -(item[1]["student_20"]["psnr_db"] or 0))
    ):
        own, teacher = pair["student_20"], pair["teacher_50"]
        ratio = own["forecast_step_ratio"]
        share = "" if ratio is None else f"{100 * ratio:.1f} %"
        lines.append([str(anchors), f"`{method}`", share, *costs(own), psnr(own), psnr(teacher)])
    head = ["anchors", "method", "forecast step", "evaluations", "right class", "times faster"]
    return table([*head, "PSNR to the student's 20 steps", "PSNR to the teacher's 50"], lines)


def ring(rows: list[Row]) -> str:
    """The ring's table."""
    lines = []
    for row in rows:
        errors = [f"{row[f'error_{c}']:.3f}" if f"error_{c}" in row else "" for c in COLUMNS]
        distances = [f"{row[f'distance_{n}_steps']:.3f}" for n in (1, 5, 10, 20)]
        lines.append([row["training"], *errors, *distances])
    intervals = [f"l {c.replace('_', ' to ')}" for c in COLUMNS]
    return table(["training", *intervals, "1 step", "5", "10", "20"], lines)


def draw(rows: list[Row]) -> None:
    """PSNR to the teacher's 50 steps over evaluations."""
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for (host, method), style in {
        ("teacher", "euler"): "x--",
        ("teacher", "ab2"): "+--",
        ("teacher", "dpmpp_2m"): "1--",
        ("teacher", "l2p_closed_loop"): "s-",
        ("student", "student"): "o-",
        ("student", "student_rmf"): "v-",
        ("student", "student_embedded"): "d-",
        ("student", "disca"): "*",
    }.items():
        chosen = [
            r
            for r in rows
            if (r["host"], r["method"], r["reference"]) == (host, method, "teacher_50")
            and r["psnr_db"] is not None
        ]
        chosen.sort(key=lambda r: r["num_network_evaluations"])
        if chosen:
            x = [r["num_network_evaluations"] for r in chosen]
            axes.plot(x, [r["psnr_db"] for r in chosen], style, label=f"{method} ({host})")
    axes.set_xscale("log", base=2)
    ticks = [4, 8, 16, 32]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_xlabel("network evaluations per image, both guidance branches counted")
    axes.set_ylabel("PSNR to 50 guided steps, dB")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(PICTURE, dpi=110)


def replace(page: Path, name: str, content: str) -> None:
    """Put content between a page's markers."""
    pattern = re.compile(f"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    text, count = pattern.subn(lambda found: f"{found[1]}{content}\n{found[2]}", page.read_text())
    if count != 1:
        raise ValueError(f"{page} has {count} places called {name}, expected one.")
    page.write_text(text)


def main() -> None:
    """Write all tables and the picture."""
    rows = json.loads((RESULTS / "disca.json").read_text())
    replace(DOCS / "distill.md", "results", samplers(rows))
    replace(DOCS / "distill.md", "ring", ring(json.loads((RESULTS / "rmf_ring.json").read_text())))
    replace(DOCS / "disca.md", "forecasts", forecasts(rows))
    draw(rows)


if __name__ == "__main__":
    main()
