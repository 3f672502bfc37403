"""HTML pages need nothing from outside, say the rows' numbers, and let no name become markup."""

import base64
import io
import itertools
import math
import re

import numpy
import pytest
import torch
from html_pages import check_page, read_page
from PIL import Image
from row_cases import tabulate
from test_report import META, row

from foreseer.evaluation.page.charts import Axes, Curve, LineChart
from foreseer.evaluation.page.compare import LARGEST, comparison, encoded
from foreseer.evaluation.page.figures import gates, weights
from foreseer.evaluation.page.heat import HeatAxes, HeatMap, Timeline
from foreseer.evaluation.page.html import write_report
from foreseer.evaluation.page.template import Section, drawn, page, sortable, tile
from foreseer.predictors.linear import L2P
from foreseer.predictors.rules import Taylor

EVIL = "</script><img src=x onerror=alert(1)>&\"'|`"
AXES = Axes("evaluations", "dB")


def decoded(address):
    kind, data = address.split(",", 1)
    return kind, Image.open(io.BytesIO(base64.b64decode(data)))


@pytest.fixture(scope="module")
def bench_page(tmp_path_factory):
    rows = [
        row("euler", psnr_db=25.0),
        row("ab2", psnr_db=30.0),
        row("euler", psnr_db=22.5, num_anchors=6),
        row("ab2", psnr_db=24.0, num_anchors=6),
        row(EVIL, "learned", 35.25),
        row(EVIL, "learned", 20.0, 6),
        row("full", "full", math.inf, 2, anchors_name="all"),
    ]
    full = torch.rand(3, 1, 16, 16)
    images = {"full run": full, f"{EVIL}\n8 evaluations": full * 0.9, "ab2\n8 evaluations": full}
    errors = {EVIL: [(0, 0.0), (1, 0.125)], "ab2": [(1, 0.25)]}
    rule = L2P(4, [0, 2])
    weights = {f"{EVIL}, branch 0": (rule.weight[0], rule.anchors)}
    out = tmp_path_factory.mktemp("bench")
    path = write_report(rows, META, images, out, errors, weights=weights)
    return rows, full, read_page(path.read_text())


def test_the_bench_page_is_whole_and_labelled(bench_page):
    _, _, html = bench_page
    check_page(html)
    sections = [section.attributes["id"] for section in html.all("section")]
    assert sections == ["pareto", "samples", "methods", "steps", "anchors", "weights", "again"]
    assert [a.attributes["href"] for a in html.one("nav").all("a")] == [f"#{s}" for s in sections]


def test_no_name_becomes_markup(bench_page):
    _, _, html = bench_page
    sources = {e.attributes["src"].split(",")[0] for e in html.all("img")}
    assert sources == {"data:image/png;base64"}
    assert EVIL in html.one("ul", "tiles").words()
    assert any(EVIL in cell.words() for cell in html.all("td"))
    assert [o.words() for o in html.all("option")][0].startswith(f"{EVIL}, 8 evaluations (")
    for figure in html.all("figure"):
        for script in figure.all("script"):
            assert "<" not in script.text and figure.island()


def test_the_pareto_chart_holds_the_numbers_of_the_rows(bench_page):
    rows, _, html = bench_page
    chart = next(s for s in html.all("section") if s.attributes["id"] == "pareto").one("figure")
    heads, *lines = [[cell.words() for cell in line.children] for line in chart.all("tr")]
    assert heads == ["network evaluations", "6", "8"]
    assert lines == [
        [EVIL, "20.00", "35.25"],
        ["ab2", "24.00", "30.00"],
        ["euler", "22.50", "25.00"],
    ]
    names = [text for text in chart.one("svg").all("text") if text.text in (EVIL, "ab2", "euler")]
    assert [name.text for name in names] == [EVIL, "ab2", "euler"]  # from top to bottom
    bold = ["700" in name.attributes["style"] for name in names]
    assert bold == [True, False, False]


def test_the_tables_hold_the_numbers_of_the_rows(bench_page):
    rows, _, html = bench_page
    block = html.all("details", "block")[0]
    (evil, ab2, euler) = block.one("tbody").all("tr")
    assert evil.css == ["learned"]
    values = [line.children[1].attributes["data-value"] for line in (evil, ab2, euler)]
    assert values == ["35.25", "30.0", "25.0"]
    assert all(head.one("button").words() for head in block.all("th"))


def test_the_slider_holds_every_sample_of_every_method(bench_page):
    _, full, html = bench_page
    figure = html.one("figure", "samples")
    told = figure.island()
    assert told["full"]["label"] == "full run" and len(told["full"]["images"]) == 3
    _, first = decoded(told["full"]["images"][0])
    assert first.size == (16, 16) and first.mode == "L"
    pixels = torch.tensor(numpy.asarray(first).tolist()) / 255
    assert (pixels - full[0, 0]).abs().max() <= 0.5 / 255 + 1e-6
    evil, same = told["methods"]
    expected = -10 * (0.1 * full[1]).double().square().mean().log10()
    assert evil["psnr"][1] == f"{float(expected):.2f} dB" and len(evil["images"]) == 3
    assert same["psnr"] == ["exact"] * 3 and same["images"] == told["full"]["images"]
    slider = figure.one("div", "stage").one("input")
    assert slider.attributes["type"] == "range" and slider.attributes["aria-label"]
    assert len(figure.one("div", "thumbs").all("button")) == 3
    assert len(figure.all("option")) == 2 and figure.one("select").parent.tag == "label"


def test_large_samples_are_made_small_enough_for_a_page():
    kind, image = decoded(encoded(torch.rand(3, 1024, 768)))
    assert kind == "data:image/webp;base64" and image.size == (LARGEST * 3 // 4, LARGEST)
    assert decoded(encoded(torch.rand(3, 128, 128)))[0] == "data:image/png;base64"


def test_a_slider_without_a_method_or_with_other_shapes_is_refused():
    with pytest.raises(ValueError, match=r"needs the full run and a method, got \['full'\]"):
        comparison("c", {"full": torch.rand(1, 1, 8, 8)})
    with pytest.raises(ValueError, match=r"samples of \['x'\] are not \(1, 1, 8, 8\)"):
        comparison("c", {"full": torch.rand(1, 1, 8, 8), "x": torch.rand(1, 1, 8, 9)})


def lines_of(chart):
    """The curves of a drawing, by their numbers."""
    (panel,) = chart.figure().axes
    return {line.get_gid(): line for line in panel.get_lines() if line.get_gid()}


def test_an_error_of_zero_breaks_a_line_on_a_logarithmic_axis():
    axes = Axes("step", "error", ".3g", log=True)
    points = [(0, 0.0), (1, 0.1), (2, 0.2), (3, 0.0), (4, 0.4)]
    chart = LineChart("c", [Curve("a", points)], axes)
    found = lines_of(chart)["mark0"].get_ydata()
    assert [math.isnan(y) for y in found] == [True, False, False, True, False]
    assert [cells[1] for cells in chart.values()[1]] == ["0", "0.1", "0.2", "0", "0.4"]


def test_names_stand_beside_the_ends_none_upon_another():
    heights = [3.0, 1.001, 1.0, 1.002, 2.0]
    curves = [Curve(f"c{i}", [(0, 0), (1, y)], note=str(y)) for i, y in enumerate(heights)]
    (panel,) = LineChart("c", curves, AXES).figure().axes
    placed = {text.get_text(): text.xyann for text in panel.texts if text.get_text() in CURVES}
    order = sorted(placed, key=lambda name: -placed[name][1])
    assert order == ["c0", "c4", "c3", "c1", "c2"]
    gaps = [placed[a][1] - placed[b][1] for a, b in itertools.pairwise(order)]
    assert min(gaps) > 0.03 and max(gaps) == pytest.approx(gaps[0], rel=0.2)
    assert len({x for x, _ in placed.values()}) == 1


CURVES = [f"c{i}" for i in range(5)]


def test_more_names_than_the_height_has_room_for_make_a_chart_higher():
    few, many = (
        LineChart("c", [Curve(f"c{i}", [(0, 1), (1, 1)]) for i in range(n)], AXES).figure()
        for n in (3, 60)
    )
    assert many.get_figheight() > 2 * few.get_figheight()
    (panel,) = many.axes
    heights = [text.xyann[1] for text in panel.texts if text.get_text()]
    assert -0.01 < min(heights) < max(heights) < 1.01


def test_a_chart_of_nothing_is_refused():
    for curves in ([], [Curve("a", [])]):
        with pytest.raises(ValueError, match="no point to draw"):
            LineChart("c", curves, AXES)


def test_curves_that_are_all_exact_are_still_named():
    for log, y in ((False, math.inf), (True, 0.0)):
        chart = LineChart("c", [Curve("a", [(1, y), (2, y)])], Axes("x", "y", log=log))
        assert "a" in [text.get_text() for text in chart.figure().axes[0].texts]


def test_a_curve_that_is_exact_is_named_and_listed():
    curves = [Curve("a", [(1, 2.0)]), Curve("same", [(1, math.inf)])]
    chart = LineChart("c", curves, AXES)
    assert chart.values()[1] == [["a", "2.00"], ["same", "exact"]]
    assert "same" in [text.get_text() for text in chart.figure().axes[0].texts]


def test_curves_of_a_kind_look_different():
    kinds = {"learned": 7, "solver": 6, "formula": 16}
    points = [(0, 1), (1, 2)]
    curves = [Curve(f"{kind}{i}", points, kind) for kind, n in kinds.items() for i in range(n)]
    looks = [
        (line.get_color(), line.get_linestyle(), str(line._unscaled_dash_pattern))
        for line in lines_of(LineChart("c", curves, AXES)).values()
    ]
    assert len(set(looks)) == len(curves)
    assert lines_of(LineChart("c", curves, AXES))["mark0"].get_linewidth() > 2


def test_weights_are_drawn_where_a_forecast_can_use_them():
    anchors = (0, 2, 5)
    rows = tabulate(Taylor(1), anchors, [1 - t / 8 for t in range(8)])
    heads, lines = weights("taylor", rows, anchors).values()
    assert heads[1:] == ["0", "2", "5"] and [line[0] for line in lines] == ["1", "3", "4", "6", "7"]
    assert lines[0][1:] == ["1.000", "–", "–"]  # reuse of the first
    assert lines[1][1:] == ["-0.500", "1.500", "–"]
    assert lines[4][1:] == ["0.000", "-0.667", "1.667"]
    with pytest.raises(ValueError, match="all 8 steps are anchors"):
        weights("full", torch.eye(8), range(8))


def test_a_heat_map_has_a_pixel_per_cell_and_leaves_zero_without_a_colour():
    axes = HeatAxes([1, 2], ["a", "b", "c"], "row", "column", "value")
    values = torch.tensor([[-2.0, 0.0, 1.0], [0.5, math.nan, 2.0]])
    html = read_page(f"<html>{drawn(HeatMap('c', values, axes, signed=True))}</html>")
    cells = decoded(html.all("image")[0].attributes["href"])[1].convert("RGBA")
    assert cells.size == (3, 2)
    assert cells.getpixel((1, 0))[3] <= 3  # a page of any colour shows through
    assert cells.getpixel((1, 1))[:3] == (128, 128, 128)
    red, _, blue, alpha = cells.getpixel((2, 1))
    assert red > blue and alpha == 255 and cells.getpixel((0, 0))[2] > cells.getpixel((0, 0))[0]
    with pytest.raises(ValueError, match="its axes name 2 rows and 3 columns"):
        HeatMap("c", values.T, axes, signed=True)
    with pytest.raises(ValueError, match="no finite value"):
        HeatMap("c", values * math.nan, axes, signed=True)


def test_the_gate_is_drawn_at_forecast_steps_with_its_stages():
    alpha = torch.arange(12.0).reshape(2, 6)
    chart = gates(alpha, [1.0, 0.8, 0.6, 0.4, 0.2, 0.1], [0.5], [0, 3])
    found = lines_of(chart)["mark1"].get_ydata()
    assert [None if math.isnan(y) else y for y in found] == [None, 7, 8, None, 10, 11]
    (edge,) = [line for line in chart.figure().axes[0].get_lines() if not line.get_gid()]
    assert list(edge.get_xdata()) == [2.5, 2.5]  # between sigma 0.6 and 0.4


def test_a_timeline_marks_the_steps_and_refuses_others():
    chart = Timeline("c", {EVIL: [0, 3], "b": [0]}, 4, [EVIL])
    found = lines_of(chart)
    assert list(found["mark0"].get_xdata()) == [0, 3] and list(found["mark1"].get_xdata()) == [0]
    assert found["mark0"].get_color() != found["mark1"].get_color()
    assert chart.values()[1] == [(EVIL, "2", "0 3"), ("b", "1", "0")]
    names = read_page(f"<html>{drawn(chart)}</html>").one("svg").all("text")
    assert EVIL in [name.text for name in names]
    with pytest.raises(ValueError, match=r"of 'b' are \[0, 4\], expected steps from 0 to 3"):
        Timeline("c", {"b": [0, 4]}, 4)
    with pytest.raises(ValueError, match="no list of anchors"):
        Timeline("c", {}, 4)


def test_a_figure_follows_the_hues_of_its_page_and_holds_none_of_its_own():
    html = drawn(LineChart("c", [Curve("$x$ #cc5500", [(0, 1), (1, 2)], "learned")], AXES))
    check_page(
        read_page(f"<html lang='en'><meta name='viewport'><main><h1>c</h1>{html}</main></html>")
    )
    svg = read_page(f"<html>{html}</html>").one("svg")
    assert "$x$ #cc5500" in [text.text for text in svg.all("text")]  # a name is no formula
    styles = " ".join(each.attributes.get("style", "") for each in svg.all())
    assert "var(--warm0)" in styles and "var(--soft)" in styles
    assert not re.search("#[0-9a-f]{6}|font-family", styles)
    assert {each.attributes["data-mark"] for each in svg.all("g") if "data-mark" in each.attributes}


def test_a_page_without_sections_or_with_the_same_twice_is_refused():
    section = Section("a", "A", "<p>text</p>")
    for sections in ([], [section, section]):
        with pytest.raises(ValueError, match="sections with different keys"):
            page("bench", "c", "v", sections, "0")
    with pytest.raises(ValueError, match="has no row"):
        sortable([], "empty")


def test_words_of_a_page_are_escaped_and_commands_set_apart():
    made = page(
        "x",
        EVIL,
        f"run `foreseer bench` {EVIL}",
        [Section("a", EVIL, "")],
        "0",
        [tile(EVIL, "1 dB", EVIL, True)],
    )
    html = read_page(made)
    check_page(html)
    verdict = html.one("p", "verdict")
    assert verdict.one("code").words() == "foreseer bench" and verdict.text.startswith("Run ")
    assert html.one("ul", "tiles").one("b").css == ["ahead"]
    assert [h.words() for h in html.all("h2")] == [EVIL]
