"""What a recording holds, how it moves, and which rule it speaks for.

Everything follows from Grams: no network, no features. Shapes: S sampling steps.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from foreseer.evaluation.motion import facts, motion, table, tap_order, told
from foreseer.evaluation.offline import (
    FORECAST_TAPS,
    LEARNED,
    MAX_TRAJECTORIES,
    OfflineRow,
    TapGrams,
    best_row,
    compared,
    verdict,
)
from foreseer.evaluation.page.figures import Curves, Weights
from foreseer.evaluation.page.inspect_markdown import inspect_markdown
from foreseer.evaluation.page.inspect_page import Answer, inspect_page, sections_of
from foreseer.evaluation.page.template import save_figures
from foreseer.trajectories.gram import cosines, relative_errors
from foreseer.trajectories.recording import Recording

BUDGETS = (11, 8, 6)
UNITS = {
    "open_loop_error": "||F_hat_t - F_t|| / ||F_t||, mean over forecast steps, trajectories and "
    "branches",
    "integrated_error": "||sum_t h_t (F_hat_t - F_t)|| over the run, h_t in flow time, RMS over "
    "trajectories and branches, in units of the feature's RMS distance from its mean over the run",
    "accumulated_error": "the integrated error up to each step, RMS over the steps too; its "
    "-20 log10 is the offline estimate in dB",
}


def inspect_recording(opened: Recording, folder: Path, budgets: Sequence[int] | None) -> list[Path]:
    """Print what a recording holds and what its Grams say about every rule; draw both on a page.

    Args:
        opened: the recording.
        folder: for the page, the plots and the table; made when missing.
        budgets: see `foreseer.commands.inspect`.

    Returns:
        The plots, the Markdown and the page; nothing of an empty recording.

    Raises:
        ValueError: a budget is out of range.
    """
    num_steps = opened.header.num_steps
    budgets = BUDGETS if budgets is None else suitable(budgets, opened)
    print(facts(opened))
    if not len(opened):
        print("no trajectory is finished, so there is nothing to measure yet")
        return []
    items = opened.items[:: -(-len(opened) // MAX_TRAJECTORIES)]
    taps = sorted(opened.header.taps, key=tap_order)
    grams = {tap: opened.stack(f"gram/{tap}", items) for tap in taps}
    motions = {tap: motion(grams[tap]) for tap in taps}
    print(table(motions))
    folder.mkdir(parents=True, exist_ok=True)
    alike = {tap: cosines(grams[tap].double()).flatten(0, 1).mean(0) for tap in taps}
    sigmas, starts = opened.header.sigmas, opened.header.expert_steps
    usable = sorted({n for n in budgets if len(starts) <= n < num_steps}, reverse=True)
    found = [TapGrams(t, grams[t], sigmas, starts) for t in FORECAST_TAPS if t in grams]
    answered: Answer | str
    if usable and found:
        answered = answer(found, usable, folder)
    else:
        answered = no_answer(taps, num_steps, len(starts), budgets)
        print(answered)
    page, text = folder / "inspect.html", folder / "inspect.md"
    sections = sections_of(told(opened), motions, alike, answered)
    page.write_text(inspect_page(told(opened), answered, sections))
    plots = save_figures(sections, folder)
    text.write_text(inspect_markdown(told(opened), answered, plots))
    for path in (*plots, text, page):
        print(f"wrote {path}")
    return [*plots, text, page]


def suitable(budgets: Sequence[int], recording: Recording) -> Sequence[int]:
    """The budgets themselves.

    Raises:
        ValueError: there are none, or one is out of range.
    """
    num_steps, least = recording.header.num_steps, len(recording.header.expert_steps)
    if not budgets or not all(least <= n < num_steps for n in budgets):
        raise ValueError(
            f"the budgets {list(budgets)} do not suit {recording.folder}, whose runs have "
            f"{num_steps} steps; expected numbers of evaluations from {least} to {num_steps - 1}."
        )
    return budgets


def answer(taps: Sequence[TapGrams], budgets: Sequence[int], folder: Path) -> Answer:
    """Compare the rules, print the tables and the verdict, write `offline.json`."""
    rows = compared(taps, budgets)
    num_held_out = len(taps[0].held) if taps[0].can_learn else 0
    line = verdict(rows, num_held_out)
    for grams in taps:
        print(f"\n{offline_table(rows, grams.tap, budgets)}")
    print(
        "(estimate in dB of the error piled up during the run, from recorded features; higher is "
        "better)"
    )
    lists = chosen_lists(rows, budgets)
    width = max(map(len, lists)) + 2
    print(
        "\n" + "\n".join(f"{label:<{width}}{' '.join(map(str, a))}" for label, a in lists.items())
    )
    print(f"\n{line}\n")
    write_json(rows, line, num_held_out, folder / "offline.json")
    middle = [row for row in rows if row.num_anchors == budgets[len(budgets) // 2]]
    panels, weights = error_panels(taps, middle), shown_weights(taps, middle)
    return Answer(rows, line, budgets, lists, panels, weights)


def no_answer(
    taps: Sequence[str], num_steps: int, num_transformers: int, budgets: Sequence[int]
) -> str:
    """Why no rule was compared."""
    return (
        f"no rule was compared: found the taps {' '.join(taps)}, {num_steps} steps, "
        f"{num_transformers} transformer(s) and budgets {' '.join(map(str, budgets))}; expected "
        f"one of the taps {' '.join(FORECAST_TAPS)} and a budget below the steps, not below the "
        "transformers"
    )


def offline_table(rows: Sequence[OfflineRow], tap: str, budgets: Sequence[int]) -> str:
    """A line per method, best first at the middle budget: its estimate per budget and list."""
    here = {
        (row.method, row.num_anchors, row.anchors_name): row.estimate_db
        for row in rows
        if row.tap == tap
    }
    middle = budgets[len(budgets) // 2]
    methods = sorted(
        dict.fromkeys(method for method, _, _ in here),
        key=lambda method: -here[method, middle, "searched"],
    )
    head = "".join(f"{n:>9} searched  uniform" for n in budgets)
    lines = [f"{'tap ' + tap:<20}{head}"]
    for method in methods:
        cells = (
            f"{here[method, n, 'searched']:>18.1f}{here[method, n, 'uniform']:>9.1f}"
            for n in budgets
        )
        lines.append(f"{method:<20}{''.join(cells)}")
    return "\n".join(lines)


def chosen_lists(rows: Sequence[OfflineRow], budgets: Sequence[int]) -> dict[str, Sequence[int]]:
    """The searched lists of the best formula and the learned rows on every tap, and uniform."""
    lists: dict[str, Sequence[int]] = {}
    for n in budgets:
        here = [row for row in rows if row.num_anchors == n]
        for tap in dict.fromkeys(row.tap for row in here):
            found = [row for row in here if row.tap == tap and row.anchors_name == "searched"]
            best = [best_row(found, learned=False)]
            best += [row for row in found if row.method == LEARNED]
            lists |= {f"{n} evaluations: {row.method}, {tap}": row.anchors for row in best}
        even = next(row for row in here if row.anchors_name == "uniform")
        lists[f"{n} evaluations: uniform"] = even.anchors
    return lists


def error_panels(taps: Sequence[TapGrams], rows: Sequence[OfflineRow]) -> dict[str, Curves]:
    """Relative error per step of every method, on the list of the tap's best formula."""
    panels: dict[str, Curves] = {}
    for grams in taps:
        here = [row for row in rows if row.tap == grams.tap]
        row = best_row(here, learned=False)
        curves: dict[str, list[tuple[int, float]]] = {}
        for method in dict.fromkeys(found.method for found in here):
            table = grams.rows(method, row.anchors).unsqueeze(-3)
            errors = relative_errors(grams.held.unsqueeze(-3), table).mean((0, 1))
            curves[method] = list(enumerate(errors.tolist()))
        panels[f"{grams.tap}, anchors {' '.join(map(str, row.anchors))}"] = curves
    return panels


def shown_weights(taps: Sequence[TapGrams], rows: Sequence[OfflineRow]) -> dict[str, Weights]:
    """The rows of the least-squares fit and of the best formula of every tap, on their own lists.

    Args:
        taps: Grams of every tap.
        rows: of one budget.
    """
    shown: dict[str, Weights] = {}
    for grams in taps:
        here = [row for row in rows if row.tap == grams.tap and row.anchors_name == "searched"]
        learned = [row for row in here if row.method == LEARNED]
        for row in [*learned, best_row(here, learned=False)]:
            matrices = grams.rows(row.method, row.anchors)
            for branch, matrix in enumerate(matrices):
                name = f", branch {branch}" if len(matrices) > 1 else ""
                shown[f"{row.method}, {row.tap}{name}"] = (matrix, row.anchors)
    return shown


def write_json(rows: Sequence[OfflineRow], line: str, num_held_out: int, path: Path) -> None:
    """The table as JSON, with its units; an exact method has errors of 0."""
    content: Mapping[str, object] = {
        "verdict": line,
        "num_held_out": num_held_out,
        "units": UNITS,
        "rows": [dataclasses.asdict(row) for row in rows if math.isfinite(row.accumulated_error)],
    }
    path.write_text(json.dumps(content, indent=1) + "\n")
