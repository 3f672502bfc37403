"""HTML pages need nothing from outside, say the rows' numbers, and let no name become markup."""

import base64
import io
import math

import numpy
import pytest
import torch
from html_pages import check_page, read_page
from PIL import Image
from row_cases import tabulate
from test_report import META, row

from foreseer.evaluation.page.charts import Axes, Curve, Scale, line_chart, looks
from foreseer.evaluation.page.compare import LARGEST, comparison, encoded
from foreseer.evaluation.page.heat import HeatAxes, heat_map, timeline, weight_map
from foreseer.evaluation.page.html import write_report
from foreseer.evaluation.page.template import Section, page, sortable, tile
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
    told = chart.island()
    assert told["x"] == [6, 8]
    found = {curve["label"]: curve["y"] for curve in told["curves"]}
    assert found == {EVIL: [20.0, 35.25], "ab2": [24.0, 30.0], "euler": [22.5, 25.0]}
    lines = [[cell.words() for cell in line.children] for line in chart.one("table").all("tr")]
    assert lines[1:] == [["6", "20.00", "24.00", "22.50"], ["8", "35.25", "30.00", "25.00"]]
    strong = [e for e in chart.all("polyline") if "strong" in e.css]
    assert [e.attributes["data-curve"] for e in strong] == ["0"]


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


def test_an_error_of_zero_breaks_a_line_on_a_logarithmic_axis():
    axes = Axes("step", "error", ".3g", log=True)
    points = [(0, 0.0), (1, 0.1), (2, 0.2), (3, 0.0), (4, 0.4)]
    chart = read_page(f"<html>{line_chart('c', [Curve('a', points)], axes)}</html>")
    assert len(chart.all("polyline")) == 2
    assert chart.island()["curves"][0]["y"] == [None, 0.1, 0.2, None, 0.4]
    cells = [cell.words() for cell in chart.one("tbody").all("td")]
    assert cells == ["0", "0.1", "0.2", "0", "0.4"]


def test_heights_run_from_the_top_and_ticks_lie_on_the_axis():
    for scale in (Scale.around([1.0, 3.0], log=False), Scale.around([0.001, 0.7], log=True)):
        assert scale.height(scale.high) == 0 and scale.height(scale.low) == 1
        heights = [scale.height(tick) for tick in scale.ticks()]
        assert len(heights) >= 3 and heights == sorted(heights, reverse=True)
        assert 0 <= min(heights) and max(heights) <= 1
    level = Scale.around([2.0], log=False)
    assert level.low < 2 < level.high


def test_a_chart_without_a_finite_point_is_refused():
    with pytest.raises(ValueError, match="no point to draw"):
        line_chart("c", [Curve("a", [(1, math.inf)])], AXES)
    with pytest.raises(ValueError, match="no point to draw"):
        line_chart("c", [], AXES)


def test_curves_of_a_kind_look_different():
    found = looks({"learned": ["a", "b"], "solver": ["c"], "formula": [f"f{i}" for i in range(16)]})
    assert found["a"] == "w0" and found["c"] == "k0" and found["f0"] == "g0 d1"
    assert len(set(found.values())) == len(found)


def test_weights_are_drawn_where_a_forecast_can_use_them():
    anchors = (0, 2, 5)
    rows = tabulate(Taylor(1), anchors, [1 - t / 8 for t in range(8)])
    told = read_page(f"<html>{weight_map('taylor', rows, anchors)}</html>").island()
    assert told["rows"] == [1, 3, 4, 6, 7] and told["columns"] == [0, 2, 5]
    assert told["values"][0] == ["1.000", None, None]  # reuse of the first
    assert told["values"][1] == ["-0.500", "1.500", None]
    assert told["values"][4] == ["0.000", "-0.667", "1.667"]
    with pytest.raises(ValueError, match="all 8 steps are anchors"):
        weight_map("full", torch.eye(8), range(8))


def test_a_heat_map_has_a_pixel_per_cell_for_light_and_dark():
    axes = HeatAxes([1, 2], ["a", "b", "c"], "row", "column", "value")
    values = torch.tensor([[-2.0, 0.0, 1.0], [0.5, math.nan, 2.0]])
    html = read_page(f"<html>{heat_map('c', values, axes, signed=True)}</html>")
    picture = html.one("div", "canvas").one("picture")
    light = decoded(picture.one("img").attributes["src"])[1]
    dark = decoded(picture.one("source").attributes["srcset"])[1]
    assert light.size == dark.size == (3, 2)
    assert light.getpixel((1, 1)) == (242, 242, 242) != light.getpixel((1, 0))
    red, _, blue = light.getpixel((2, 1))
    assert red > blue and light.getpixel((0, 0))[2] > light.getpixel((0, 0))[0]
    card = (0x19, 0x1D, 0x22)  # 0 leaves no mark on it; a colour table has 256 entries
    assert all(abs(a - b) <= 1 for a, b in zip(dark.getpixel((1, 0)), card, strict=True))
    with pytest.raises(ValueError, match="its axes name 2 rows and 3 columns"):
        heat_map("c", values.T, axes, signed=True)
    with pytest.raises(ValueError, match="no finite value"):
        heat_map("c", values * math.nan, axes, signed=True)


def test_a_timeline_marks_the_steps_and_refuses_others():
    html = read_page(f"<html>{timeline('c', {EVIL: [0, 3], 'b': [0]}, 4, [EVIL])}</html>")
    first, second, _ = html.all("li")
    assert first.css == ["learned"] and first.one("span").words() == EVIL
    assert [mark.words() for mark in first.all("rect")] == ["step 0", "step 3"]
    assert first.one("svg").attributes["aria-label"] == "2 evaluations, at the steps 0 3"
    assert second.css == []
    with pytest.raises(ValueError, match=r"of 'b' are \[0, 4\], expected steps from 0 to 3"):
        timeline("c", {"b": [0, 4]}, 4)
    with pytest.raises(ValueError, match="no list of anchors"):
        timeline("c", {}, 4)


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
