"""Write everything a benchmark leaves behind: rows, tables, figures and one self-contained page.

Shapes: B samples, C channels, H height, W width.
"""

import base64
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template

from jaxtyping import Float
from torch import Tensor

from .report_analysis import plot_step_errors
from .report_plots import contact_sheet, plot_pareto, plot_timeline
from .report_rows import BenchMeta, BenchRow, save_meta, save_rows
from .report_table import blocks, decibels, gaps, markdown_table, save_csv, short_table, verdict
from .report_template import PAGE

Cell = tuple[str, int | float | str | None]  # text shown, value sorted by
TEXT_COLUMNS = ("method", "kind", "tap", "anchors")


def write_report(
    rows: Sequence[BenchRow],
    meta: BenchMeta,
    images: Mapping[str, Float[Tensor, "B C H W"]],
    out: Path,
    step_errors: Mapping[str, Sequence[tuple[int, float]]] | None = None,
    figures: Mapping[str, Path] | None = None,
) -> Path:
    """Write the results, tables, figures and the HTML page of a benchmark into one folder.

    The files are results.json, results.meta.json, results.csv, results.md, pareto.png,
    contact_sheet.png, timeline.png, step_errors.png (when given) and report.html.

    Args:
        rows: rows of one benchmark.
        meta: how the rows were made.
        images: label to samples in [0, 1] for the contact sheet; the first is the full run.
        out: folder to write, made when missing.
        step_errors: label to (step, relative error) pairs.
        figures: caption to PNG of further figures, such as the weights of a predictor.

    Returns:
        Path of the HTML page, which needs no other file and no network.

    Raises:
        ValueError: there is no row.
    """
    if not rows:
        raise ValueError("Expected at least one benchmark row, got none; did every method fail?")
    out.mkdir(parents=True, exist_ok=True)
    save_rows(rows, out / "results.json")
    save_meta(meta, out / "results.json")
    save_csv(rows, out / "results.csv")
    (out / "results.md").write_text(
        f"{verdict(rows)}\n\n{short_table(rows)}\n{markdown_table(rows)}"
    )
    extras = dict(figures or {})
    if step_errors:
        path = plot_step_errors(step_errors, out / "step_errors.png")
        extras = {"Relative error of the feature at each step": path, **extras}
    (out / "report.html").write_text(_page(rows, meta, images, out, extras))
    return out / "report.html"


def _page(
    rows: Sequence[BenchRow],
    meta: BenchMeta,
    images: Mapping[str, Float[Tensor, "B C H W"]],
    out: Path,
    extras: Mapping[str, Path],
) -> str:
    """The HTML page; its figures are drawn into `out` on the way."""
    num_steps = max(row.steps[-1] for row in rows) + 1
    return Template(PAGE).substitute(
        context=escape(_context(rows, meta)),
        verdict=escape(verdict(rows)),
        tiles=_tiles(rows),
        pareto=_figure(
            "PSNR against network evaluations, each method on its best tap and anchor list",
            plot_pareto(rows, out / "pareto.png"),
        ),
        tables=_tables(rows),
        contact_sheet=_figure(
            "The same seeds from every method; dark strips: absolute difference to the full run",
            contact_sheet(images, out / "contact_sheet.png"),
        ),
        timeline=_figure(
            "Steps at which the network runs, one line per anchor list",
            plot_timeline(anchor_lists(rows), num_steps, out / "timeline.png"),
        ),
        extras="\n".join(f"<h2>{escape(k)}</h2>\n{_figure(k, v)}" for k, v in extras.items()),
        command=escape(meta.command),
        facts=_facts(meta),
    )


def anchor_lists(rows: Sequence[BenchRow]) -> dict[str, tuple[int, ...]]:
    """Every anchor list of a benchmark once, labelled, most evaluations first.

    A searched list is labelled with the methods that use it, since each method has its own.
    """
    users: dict[tuple[int, str, str], dict[str, BenchRow]] = {}
    for row in rows:
        if row.kind != "full":
            key = (-row.num_anchors, row.anchors_name, row.anchors)
            users.setdefault(key, {})[row.method] = row
    lists: dict[str, tuple[int, ...]] = {}
    for (_, name, _), methods in sorted(users.items(), key=lambda item: item[0]):
        row = next(iter(methods.values()))
        label = f"{row.num_anchors} {name}"
        if name == "searched":
            more = f" and {len(methods) - 2} more" if len(methods) > 2 else ""
            label += f" ({', '.join(list(methods)[:2])}{more})"
        same = sum(known.startswith(label) for known in lists)  # another guidance scale or tap
        lists[f"{label}, list {same + 1}" if same else label] = row.steps
    return lists


def _context(rows: Sequence[BenchRow], meta: BenchMeta) -> str:
    """Day, machine and what the full run costs."""
    full = [
        f"full run at guidance {row.guidance_scale:g}: {row.num_anchors} evaluations"
        + (f", {row.seconds_per_image:.2f} s per image" if row.seconds_per_image else "")
        for row in rows
        if row.kind == "full"
    ]
    samples = max(row.num_samples for row in rows)
    return "; ".join([meta.date, meta.hardware, f"{samples} held-out samples", *full])


def _tiles(rows: Sequence[BenchRow]) -> str:
    """One tile per budget with the gap between learned and everything else."""
    return "\n".join(
        f"<li>{gap.learned.num_anchors} evaluations, guidance {gap.learned.guidance_scale:g}"
        f'<b class="{"ahead" if gap.psnr_db > 0 else "behind"}">{gap.psnr_db:+.2f} dB</b>'
        f"{escape(gap.learned.method)} {decibels(gap.learned.psnr_db)}, "
        f"{escape(gap.other.method)} {decibels(gap.other.psnr_db)}</li>"
        for gap in gaps(rows)
    )


def _tables(rows: Sequence[BenchRow]) -> str:
    """One sortable table per budget, the first one open."""
    sentences = {
        (gap.learned.guidance_scale, gap.learned.num_anchors): gap.sentence() for gap in gaps(rows)
    }
    parts: list[str] = []
    for (scale, evaluations), block in blocks(rows).items():
        heads = "".join(
            f"<th{_text(name)}><button>{escape(name)}</button></th>" for name in _cells(block[0])
        )
        body = "\n".join(_table_row(row) for row in block)
        gap = sentences.get((scale, evaluations))
        parts.append(
            f"<details{'' if parts else ' open'}><summary><b>{evaluations} evaluations, "
            f"guidance {scale:g}</b>{f'<br>{escape(gap)}' if gap else ''}</summary>\n"
            f'<div class="scroll"><table>\n<thead><tr>{heads}</tr></thead>\n'
            f"<tbody>\n{body}\n</tbody></table></div></details>"
        )
    return "\n".join(parts)


def _table_row(row: BenchRow) -> str:
    """One line of a sortable table."""
    cells = []
    for name, (shown, value) in _cells(row).items():
        css = ' class="text steps"' if name == "anchors" else _text(name)
        key = "" if value is None else escape(str(value))
        cells.append(f'<td{css} data-value="{key}">{escape(shown)}</td>')
    return f'<tr class="{row.kind}">{"".join(cells)}</tr>'


def _text(name: str) -> str:
    """The class of a column that holds words."""
    return ' class="text"' if name in TEXT_COLUMNS else ""


def _cells(row: BenchRow) -> dict[str, Cell]:
    """Column heading to what a row shows there and sorts by."""
    interval = f"[{decibels(row.psnr_ci_low)}, {decibels(row.psnr_ci_high)}]"
    kib = None if row.state_bytes is None else row.state_bytes / 1024
    return {
        "method": (row.method, row.method),
        "PSNR mean (dB)": (f"{decibels(row.psnr_db)} {interval}", _sortable(row.psnr_db)),
        "median": (decibels(row.psnr_median), _sortable(row.psnr_median)),
        "10 % quantile": (decibels(row.psnr_q10), _sortable(row.psnr_q10)),
        "90 % quantile": (decibels(row.psnr_q90), _sortable(row.psnr_q90)),
        "SSIM": (f"{row.ssim:.4f}", row.ssim),
        "latent rel. L2": (f"{row.latent_rel_l2:.4f}", row.latent_rel_l2),
        "kind": (row.kind, row.kind),
        "tap": (row.tap, row.tap),
        "anchors": (f"{row.anchors_name}: {row.anchors}", row.anchors_name),
        "forecast / full step": _number(row.forecast_step_ratio, ".3f"),
        "state (KiB)": _number(kib, ".0f"),
        "fit (s)": _number(row.fit_seconds, ".1f"),
        "trajectories": _number(row.num_trajectories, "d"),
        "FLOPs / full run": _number(row.flops_ratio, ".3f"),
        "s per image": _number(row.seconds_per_image, ".3f"),
    }


def _number(value: int | float | None, form: str) -> Cell:
    """A cell for a number that may not have been measured."""
    return ("–", None) if value is None else (format(value, form), value)


def _sortable(value: float) -> float:
    """A finite stand-in for infinity, which the page's script cannot read."""
    return 1e9 if value == math.inf else value


def _figure(caption: str, path: Path) -> str:
    """An image inside the page, scrolling sideways where the screen is narrower than legible."""
    data = base64.b64encode(path.read_bytes()).decode()
    return (
        f'<figure><div class="frame">'
        f'<img alt="{escape(caption)}" src="data:image/png;base64,{data}"></div>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _facts(meta: BenchMeta) -> str:
    """Versions, seeds and machine as a definition list."""
    seeds = ", ".join(map(str, meta.seeds[:8])) + (", ..." if len(meta.seeds) > 8 else "")
    facts = {
        "date": meta.date,
        "commit": meta.commit,
        "hardware": meta.hardware,
        "seeds": f"{len(meta.seeds)}: {seeds}",
        **meta.versions,
    }
    return "\n".join(
        f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in facts.items()
    )
