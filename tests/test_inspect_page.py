"""`foreseer inspect` leaves a page, Markdown and figures that say what it printed."""

import json
import math
import re

import pytest
import torch
from html_pages import check_page, read_page
from test_offline import RUN_STEPS, recorded

from foreseer.commands import inspect
from foreseer.evaluation.motion import motion
from foreseer.evaluation.page.inspect_markdown import inspect_markdown
from foreseer.evaluation.page.inspect_page import inspect_page, sections_of
from foreseer.predictors.rules import RULES
from foreseer.trajectories.gram import cosines, gram

EVIL = "<b>|`&\"'"
TOLD = {"trajectories": "1, 2 MB", "host": EVIL, "scheduler": "Euler"}


@pytest.fixture(scope="module")
def inspected(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inspect")
    paths = inspect(str(recorded(folder / "r", 6)), str(folder / "out"), [5, 3])
    return folder / "out", paths


def section(html, key):
    return next(s for s in html.all("section") if s.attributes["id"] == key)


def table(figure):
    """The headings and lines of a figure's table."""
    heads, *lines = [[cell.words() for cell in line.children] for line in figure.all("tr")]
    return heads, lines


def test_every_file_is_named_and_the_page_is_whole(inspected):
    folder, paths = inspected
    assert {path.name for path in folder.iterdir()} == {path.name for path in paths} | {
        "offline.json"
    }
    assert [path.name for path in paths[-2:]] == ["inspect.md", "inspect.html"]
    for path in paths[:-2]:
        assert path.read_bytes().startswith(b"\x89PNG")
    html = read_page((folder / "inspect.html").read_text())
    check_page(html)
    assert [s.attributes["id"] for s in html.all("section")] == [
        "rules",
        "steps",
        "anchors",
        "weights",
        "motion",
        "cosines",
        "limits",
        "recording",
    ]


def test_the_page_holds_the_numbers_of_the_rows(inspected):
    folder, _ = inspected
    html = read_page((folder / "inspect.html").read_text())
    content = json.loads((folder / "offline.json").read_text())
    estimate = {
        (r["method"], r["tap"], r["num_anchors"], r["anchors_name"]): -20
        * math.log10(r["accumulated_error"])
        for r in content["rows"]
    }
    heads, lines = table(section(html, "rules").one("figure"))
    assert heads[1:] == ["3", "5"] and len(lines) == len(RULES) + 1
    for label, *shown in lines:
        for n, cell in zip((3, 5), shown, strict=True):
            best = max(estimate[label, tap, n, "searched"] for tap in ("output", "hidden"))
            assert float(cell) == pytest.approx(best, abs=0.005)
    (body,) = section(html, "rules").one("details", "block").all("tbody")
    lines = [[cell.attributes["data-value"] for cell in line.children] for line in body.all("tr")]
    assert len(lines) == 2 * (len(RULES) + 1)
    for method, tap, *values in lines:
        expected = [estimate[method, tap, n, kind] for n in (5, 3) for kind in KINDS]
        assert [float(value) for value in values] == pytest.approx(expected, rel=1e-12)
    verdict = html.one("p", "verdict").words()
    assert verdict.lower() == content["verdict"].replace("`", "").lower()


KINDS = ("searched", "uniform")


def test_errors_weights_and_cosines_are_drawn_for_every_tap(inspected):
    folder, _ = inspected
    html = read_page((folder / "inspect.html").read_text())
    charts = section(html, "steps").all("figure")
    captions = [chart.one("figcaption").words() for chart in charts]
    assert [caption.split(",")[0] for caption in captions] == ["Tap output", "Tap hidden"]
    for chart, caption in zip(charts, captions, strict=True):
        _, lines = table(chart)
        for anchor in re.findall(r"\d+", caption):
            assert {float(line[1 + int(anchor)]) for line in lines} == {0.0}
    maps = [f.one("figcaption").words() for f in section(html, "weights").all("figure")]
    assert [name for name in maps if name.startswith("l2p_lstsq, output")]
    assert len(section(html, "cosines").all("figure")) == 2
    _, lines = table(section(html, "cosines").all("figure")[0])
    assert [lines[i][i + 1] for i in range(RUN_STEPS)] == ["1.0000"] * RUN_STEPS


def test_the_markdown_holds_the_tables_and_shows_the_figures(inspected):
    folder, paths = inspected
    text = (folder / "inspect.md").read_text()
    content = json.loads((folder / "offline.json").read_text())
    assert content["verdict"] in text
    shown = re.findall(r"!\[[^\]]*\]\(([^)]*)\)", text)
    assert shown == [path.name for path in paths[:-2]]
    assert len(re.findall(r"^\| `", text, re.M)) == 2 * (len(RULES) + 1)
    row = next(r for r in content["rows"] if r["anchors_name"] == "searched")
    cell = f"{-20 * math.log10(row['accumulated_error']):.1f}"
    assert re.search(rf"^\| `{row['method']}` \| {cell} \|", text, re.M)


def test_a_recording_of_blocks_shows_its_layers_and_says_why_no_rule(tmp_path):
    folder = recorded(tmp_path / "r", 2, ("blocks.0", "blocks.1"))
    *_, page = inspect(str(folder), str(tmp_path / "out"))
    html = read_page(page.read_text())
    check_page(html)
    assert html.one("p", "verdict").words().startswith("No rule was compared: found the taps")
    assert [s.attributes["id"] for s in html.all("section")] == ["motion", "cosines", "recording"]
    heads, lines = table(section(html, "motion").all("figure")[1])
    assert [line[0] for line in lines] == ["blocks.0", "blocks.1"] and len(heads) == RUN_STEPS


def test_no_name_becomes_markup():
    grams = gram(torch.randn(2, 1, 6, 9).cumsum(2))
    motions = {EVIL: motion(grams)}
    sections = sections_of(TOLD, motions, {EVIL: cosines(grams).mean((0, 1))}, EVIL)
    html = read_page(inspect_page(TOLD, EVIL, sections))
    check_page(html)
    assert not html.all("b") or all(b.words() == "foreseer" for b in html.all("b"))
    assert html.one("dl").all("dd")[1].words() == EVIL
    assert f"Tap {EVIL}" in [f.words() for f in html.all("figcaption")]
    text = inspect_markdown(TOLD, "nothing", [])
    assert "| host | &lt;b&gt;\\|`&amp;\"' |" in text


def test_cosines_have_ones_on_the_diagonal_and_no_nan_for_a_feature_of_zero():
    features = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    found = cosines(gram(features))
    half = 0.5**0.5
    expected = torch.tensor([[1.0, half, 0.0], [half, 1.0, 0.0], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(found, expected.double())
