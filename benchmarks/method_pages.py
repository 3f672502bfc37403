"""Write the tables "when it wins" of the pages of docs/ from the results beside this file.

python benchmarks/method_pages.py
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from disca_page import replace, table

RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).parent.parent / "docs"
BUDGETS = (11, 8, 6)
Row = dict[str, Any]
Better = Callable[[Row], float]

FAMILIES = {
    "l2p.md": ("l2p_closed_loop", "l2p_lstsq", "l2p_adam"),
    "continuous.md": ("l2p_continuous",),
    "parts.md": ("freqca_dct", "freqca_fft", "hyca", "l2p_bands_3", "l2p_groups_4"),
}
"""Methods of a page, by their names in reference_table.json; rules.md has all other formulas."""

SCHEDULES = {
    "teacache.md": ("teacache",),
    "first_block.md": ("first_block",),
    "speca.md": ("speca", "speca_falling", "speca_free", "speca_free_falling"),
}
"""Schedules of a page, by their names in adaptive.json."""


def main() -> None:
    """Write every table between its markers."""
    for page, tables in made().items():
        for name, content in tables.items():
            replace(DOCS / page, name, content)


def made() -> dict[str, dict[str, str]]:
    """The tables of every page, by the names of their markers."""
    rows = load("reference_table.json")
    of_parts = FAMILIES["parts.md"]
    formulas = {r["method"] for r in rows if r["kind"] == "formula"} - set(of_parts)
    pages = {page: {"standing": standing(rows, names)} for page, names in FAMILIES.items()}
    pages["rules.md"] = {"standing": standing(rows, sorted(formulas))}
    pages["lesa.md"] = {"standing": standing(load("lesa.json"), ("lesa", "lesa_published"))}
    pages["disca.md"] = {"standing": on_the_student(load("disca.json"))}
    pages["tokens.md"] = {"standing": with_tokens(load("tokens.json")["rows"])}
    pages["distill.md"] = {"standing": of_students(load("disca.json"))}
    pages["schedule_lists.md"] = {"lists": by_list(rows)}
    for page, names in SCHEDULES.items():
        pages[page] = {"standing": decided(load("adaptive.json"), names)}
    pages["when_not.md"] = {"margin": margin(rows), "guidance": by_guidance()}
    return pages


def load(name: str) -> Any:
    """What a results file holds."""
    return json.loads((RESULTS / name).read_text())


def psnr(row: Row) -> float:
    """What a row is ranked by."""
    value: float = row["psnr_db"]
    return value


def best(rows: Sequence[Row], budget: int, **wanted: str) -> Row | None:
    """The row of highest PSNR at a number of evaluations, on whatever list and tap."""
    found = [
        r
        for r in rows
        if r["num_anchors"] == budget
        and r["psnr_db"] is not None
        and all(r[key] == value for key, value in wanted.items())
    ]
    return max(found, key=psnr, default=None)


def standing(rows: Sequence[Row], methods: Sequence[str]) -> str:
    """PSNR of each method on its best list and tap; what it is ahead of solvers and formulas."""
    lines = []
    for method in methods:
        cells = [told(rows, best(rows, budget, method=method), budget) for budget in BUDGETS]
        lines.append([f"`{method}`", *cells])
    lines.sort(key=lambda line: line[2], reverse=True)
    return table(["method", *(f"{budget} evaluations" for budget in BUDGETS)], lines)


def told(rows: Sequence[Row], row: Row | None, budget: int) -> str:
    """One cell: PSNR, minus the best solver's, minus the best formula's."""
    if row is None:
        return ""
    rivals = [best(rows, budget, kind=kind) for kind in ("solver", "formula")]
    gaps = [f"{psnr(row) - psnr(rival):+.2f}" for rival in rivals if rival is not None]
    return f"{psnr(row):.2f} ({', '.join(gaps)})"


def margin(rows: Sequence[Row]) -> str:
    """The best of every kind at every budget, with 95 % intervals."""
    lines = []
    for budget in BUDGETS:
        cells = []
        for kind in ("learned", "formula", "solver"):
            row = best(rows, budget, kind=kind)
            assert row is not None
            interval = f"{row['psnr_ci_low']:.1f} to {row['psnr_ci_high']:.1f}"
            cells.append(f"{psnr(row):.2f} ({interval}), `{row['method']}`")
        lines.append([str(budget), *cells])
    return table(["evaluations", "best learned", "best formula", "best solver"], lines)


def by_guidance() -> str:
    """The same at 6 evaluations and other guidance scales."""
    lines = []
    for scale, name in (
        ("1", "fashion_dit_guidance_1.json"),
        ("3", "fashion_dit.json"),
        ("6", "fashion_dit_guidance_6.json"),
    ):
        rows = load(name)
        found = [best(rows, 6, kind=kind) for kind in ("learned", "formula", "solver")]
        cells = [f"{psnr(r):.2f}, `{r['method']}`" for r in found if r is not None]
        lines.append([scale, *cells])
    return table(["guidance", "best learned", "best formula", "best solver"], lines)


def by_list(rows: Sequence[Row]) -> str:
    """What some methods gain from their anchors: the best tap on each list."""
    lines = []
    for method in ("l2p_closed_loop", "l2p_lstsq", "taylor_1", "taylor_2", "reuse", "dpmpp_2m"):
        for budget in BUDGETS:
            found = [
                best(rows, budget, method=method, anchors_name=name)
                for name in ("uniform", "published", "searched")
            ]
            cells = ["" if row is None else f"{psnr(row):.2f}" for row in found]
            lines.append([str(budget), f"`{method}`", *cells])
    lines.sort(key=lambda line: -int(line[0]))
    return table(["evaluations", "method", "uniform", "published", "searched"], lines)


def on_the_student(rows: Sequence[Row]) -> str:
    """PSNR to the student's own 20 steps, and what it is ahead of its rivals on these anchors."""
    own = [r for r in rows if r["reference"] == "student_20"]
    lines = []
    for method in ("disca", "disca_published"):
        for budget in (13, 11, 8):
            row = best(own, budget, method=method)
            rivals = [
                best(own, budget, kind="formula"),
                best(own, budget, method="student"),
                best(own, budget, method="l2p_lstsq"),
            ]
            assert row is not None
            gaps = [f"{psnr(row) - psnr(rival):+.2f}" for rival in rivals if rival is not None]
            lines.append([f"`{method}`", str(budget), f"{psnr(row):.2f}", *gaps])
    head = ["method", "anchors", "PSNR, dB", "minus the best formula"]
    return table([*head, "minus the student in as many steps", "minus `l2p_lstsq`"], lines)


def of_students(rows: Sequence[Row]) -> str:
    """PSNR to the teacher's 50 steps at equal evaluations: students, solvers, L2P."""
    own = [r for r in rows if r["reference"] == "teacher_50" and r["psnr_db"] is not None]
    methods = ("student", "student_embedded", "student_rmf", "l2p_closed_loop")
    lines = []
    for evaluations in (4, 8, 10, 16, 20, 40):
        at = [r for r in own if r["num_network_evaluations"] == evaluations]
        plain = [r for r in at if r["tap"] == "none" or r["host"] == "teacher"]
        cells = [[r for r in plain if r["method"] == method] for method in methods]
        cells.append([r for r in plain if r["kind"] == "solver"])
        told_all = [f"{max(map(psnr, found)):.2f}" if found else "" for found in cells]
        lines.append([str(evaluations), *told_all])
    return table(["evaluations", *(f"`{m}`" for m in methods), "best solver"], lines)


def with_tokens(rows: Sequence[Row]) -> str:
    """What computed tokens add to a forecast, and what as many full steps would have added."""
    lines = []
    plain = [r for r in rows if r["tokens"] == "none" and r["predictor"] == "taylor_1"]
    for row in rows:
        if row["tokens"] not in ("ClusCa 16, gamma 0.005", "DuCa 16"):
            continue
        base = next(
            r
            for r in rows
            if r["tokens"] == "none"
            and (r["predictor"], r["num_anchors"]) == (row["predictor"], row["num_anchors"])
        )
        cheaper = [r for r in plain if r["run_in_full_steps"] <= row["run_in_full_steps"]]
        rival = max(cheaper, key=psnr)
        lines.append(
            [
                row["tokens"],
                f"`{row['predictor']}`, {row['num_anchors']}",
                f"{psnr(row):.2f}",
                f"{row['run_in_full_steps']:.1f}",
                f"{psnr(row) - psnr(base):+.2f}",
                f"{psnr(row) - psnr(rival):+.2f}",
            ]
        )
    head = ["tokens", "forecast, anchors", "PSNR, dB", "cost in full steps"]
    return table([*head, "minus no tokens", "minus plain `taylor_1` at that cost or less"], lines)


def decided(rows: Sequence[Row], schedules: Sequence[str]) -> str:
    """A schedule that decides during the run, against a fixed list at the same mean evaluations."""
    lines = []
    for row in sorted(rows, key=lambda r: (r["target"], -psnr(r))):
        if row["schedule"] not in schedules:
            continue
        target, predictor = row["target"], row["predictor"]
        own = predictor if predictor in ("taylor_1", "l2p_any") else f"l2p_{target}"
        fixed = next(
            r
            for r in rows
            if (r["schedule"], r["predictor"], r["target"]) == ("fixed", own, target)
        )
        lines.append(
            [
                row["schedule"],
                f"`{predictor}`",
                f"{row['evaluations']:.2f}",
                f"{row['cost']:.2f}",
                f"{psnr(row):.2f}",
                f"{psnr(row) - psnr(fixed):+.2f} (`{own}`)",
            ]
        )
    head = ["schedule", "predictor", "evaluations", "with checks", "PSNR, dB"]
    return table([*head, "minus the searched list"], lines)


if __name__ == "__main__":
    main()
