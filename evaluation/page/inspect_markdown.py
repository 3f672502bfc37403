"""What `foreseer inspect` found as Markdown, for a README or a model card."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from foreseer.evaluation.offline import OfflineRow
from foreseer.evaluation.page.inspect_page import LIMITS, NOT_KNOWN, Answer, decibels


def inspect_markdown(told: Mapping[str, str], answer: Answer | str, plots: Sequence[Path]) -> str:
    """Verdict, tables, anchors, figures that lie beside the file, and facts.

    Args:
        told: facts of the recording.
        answer: what was found, or why no rule was compared.
        plots: PNG files in the folder the text is written to.
    """
    parts = ["# foreseer inspect", answer if isinstance(answer, str) else answer.verdict]
    if isinstance(answer, Answer):
        for tap in dict.fromkeys(row.tap for row in answer.rows):
            parts.append(_table([row for row in answer.rows if row.tap == tap], tap, answer))
        lists = {label: " ".join(map(str, steps)) for label, steps in answer.lists.items()}
        parts.append("## Anchors\n\n" + _lines(("list", "steps"), list(lists.items())))
        limits = "\n".join(f"- {line}" for line in LIMITS)
        parts.append(f"## {NOT_KNOWN}\n\n{limits}")
    names = [plot.name for plot in plots]
    parts += [f"![{_words(name)}]({name})" for name in names]
    parts.append("## The recording\n\n" + _lines(("fact", "value"), list(told.items())))
    return "\n\n".join(parts) + "\n"


def _table(rows: Sequence[OfflineRow], tap: str, answer: Answer) -> str:
    """Estimates on one tap, best first at the middle budget."""
    found = {(row.method, row.num_anchors, row.anchors_name): row for row in rows}
    methods = dict.fromkeys(row.method for row in rows)
    ranked = sorted(methods, key=lambda m: found[m, answer.middle, "searched"].accumulated_error)
    columns = [(n, name) for n in answer.budgets for name in ("searched", "uniform")]
    heads = ("rule", *(f"{n} evaluations, {name}" for n, name in columns))
    lines = [
        (f"`{method}`", *(decibels(found[method, n, name].estimate_db) for n, name in columns))
        for method in ranked
    ]
    return f"## Tap {tap}: offline estimate in dB, higher is better\n\n{_lines(heads, lines)}"


def _lines(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table; cells are plain text."""
    rows = [heads, ["---"] * len(heads), *lines]
    return "\n".join(f"| {' | '.join(map(_cell, row))} |" for row in rows)


def _cell(text: str) -> str:
    return escape(text, quote=False).replace("|", "\\|").replace("\n", " ")


def _words(name: str) -> str:
    return name.removesuffix(".png").replace("_", " ")
