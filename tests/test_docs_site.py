"""The site builds strictly, and what its pages say of results is what the results files say."""

import re
import sys
import tomllib
from pathlib import Path
from subprocess import run

import pytest
import yaml
from doc_pages import ROOT, all_blocks

if not (ROOT / "docs").exists():
    pytest.skip("the pages are not beside the tests of an installed wheel", allow_module_level=True)

DOCS = ROOT / "docs"
STANDING = "## When it wins, when it loses"
METHODS = (
    "continuous.md",
    "disca.md",
    "distill.md",
    "first_block.md",
    "jit.md",
    "l2p.md",
    "lesa.md",
    "parts.md",
    "pruning.md",
    "rules.md",
    "schedule_lists.md",
    "speca.md",
    "teacache.md",
    "tokens.md",
)
NUMBER = re.compile(r"(?<![\w.])\d+\.\d+(?![\w.]*\d)")


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_imports_nothing_of_ours(tmp_path):
    hide = (
        "import sys; sys.modules.update(torch=None, diffusers=None, lightning=None, foreseer=None)"
    )
    build = "from mkdocs.__main__ import cli; cli()"
    words = ["build", "--strict", "--site-dir", str(tmp_path / "site")]
    command = [sys.executable, "-c", f"{hide}; {build}", *words]
    done = run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    page = (tmp_path / "site" / "api" / "predictors.html").read_text()
    assert 'id="foreseer.predictors.linear.L2P"' in page
    assert "Raises" in page
    first = (tmp_path / "site" / "index.html").read_text()  # works from a disk, search included
    assert (
        'href="api/predictors.html"' in first and '<script src="assets/iframe-worker.js"' in first
    )
    assert (tmp_path / "site" / "search" / "search_index.js").exists()
    assert not re.search(r'<script[^>]*src="(https?:)?//', first)


def test_every_page_is_in_the_navigation_once():
    config = (ROOT / "mkdocs.yml").read_text()
    listed = re.findall(r"[\w/]+\.md$", config, flags=re.M)
    assert sorted(listed) == sorted(p.relative_to(DOCS).as_posix() for p in DOCS.rglob("*.md"))


def test_whoever_develops_installs_what_builds_the_site():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert any(re.match(r"foreseer\[.*\bdocs\b", each) for each in extras["dev"])
    plugins = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["plugins"]
    assert {"mkdocs-material", "mkdocstrings[python]"} == {
        re.split("[>=]", e)[0] for e in extras["docs"]
    }
    assert "mkdocstrings" in plugins[-1]


def test_what_the_pages_import_is_in_the_reference():
    code = "\n".join(block.text for block in all_blocks() if block.kind == "python")
    imported = set(re.findall(r"^from (foreseer\.[\w.]+) import", code, flags=re.M))
    described = "\n".join(path.read_text() for path in (DOCS / "api").glob("*.md"))
    missing = {name for name in imported if f"::: {name}\n" not in described + "\n"}
    assert imported and not missing


# ------------------------------------------------------------------------------- pages of methods


@pytest.mark.parametrize("page", METHODS)
def test_a_method_has_equation_source_and_verdict(page):
    text = (DOCS / page).read_text()
    assert re.search(r"^ {4}.*(=|when)", text, flags=re.M) or "| forecast | source |" in text
    assert re.search(r"arXiv:? ?\d{4}\.\d{5}", text) or "it has no paper" in text
    verdict = text.split(STANDING)[1]
    assert re.search(r"\*\*[^*]*(Wins|wins)", verdict) and re.search(
        r"\*\*[^*]*(Loses|loses)", verdict
    )


@pytest.mark.parametrize("page", METHODS)
def test_a_verdict_says_no_number_that_its_table_does_not(page):
    verdict = (DOCS / page).read_text().split(STANDING)[1].split("\n## ")[0]
    table = [line for line in verdict.splitlines() if line.startswith("|")]
    told = [line for line in verdict.splitlines() if not line.startswith("|")]
    in_table = {float(number) for line in table for number in NUMBER.findall(line)}
    lost = [
        number
        for line in told
        for number in NUMBER.findall(re.sub(r"arXiv.*", "", line))
        if not any(f"{value:.{len(number.split('.')[1])}f}" == number for value in in_table)
    ]
    assert not lost


def test_what_is_said_against_use_is_in_its_tables():
    text = (DOCS / "when_not.md").read_text()
    first, _, second = re.findall(r"<!-- margin -->\n(.*?)<!-- /margin -->()(.*)", text, re.S)[0]
    rows = [re.findall(r"(\d+\.\d+) \(", line) for line in first.splitlines()[2:]]
    behind = [f"{float(learned) - float(solver):.2f}" for learned, _, solver in rows]
    assert f"{behind[0]}, {behind[1]} and {behind[2]} dB behind" in text
    formulas = max(abs(float(formula) - float(solver)) for _, formula, solver in rows)
    assert f"within {formulas:.2f} dB of the best solver" in text


# ------------------------------------------------------------------------- tables of results files


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the scripts, importable, and the working folder they expect."""
    folder = ROOT / "benchmarks"
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.chdir(ROOT)
    return folder


def between(page: str, name: str) -> str:
    found = re.findall(
        rf"<!-- {name} -->\n(.*?)\n<!-- /{name} -->", (DOCS / page).read_text(), re.S
    )
    assert len(found) == 1, f"{page} has {len(found)} places called {name}"
    return found[0]


def test_the_tables_of_wins_and_losses_are_those_of_the_results(benchmarks):
    import method_pages

    for page, tables in method_pages.made().items():
        for name, content in tables.items():
            assert between(page, name) == content, f"python benchmarks/method_pages.py: {page}"


def test_the_reference_tables_are_those_of_the_results(benchmarks):
    import reference_page

    rows = [r for r in reference_page.load("reference_table.json") if r["kind"] != "full"]
    for budget in (11, 8, 6):
        table = reference_page.by_list([r for r in rows if r["num_anchors"] == budget])
        assert between("reference.md", f"evaluations {budget}") == table
    adaptive = reference_page.adaptive(reference_page.load("adaptive.json"))
    assert between("reference.md", "adaptive") == adaptive
    rows = reference_page.load("lesa.json")
    rows = [r for r in rows if r["kind"] != "full" and r["tap"] != "output"]
    assert between("lesa.md", "evaluations") == reference_page.by_budget(rows)


def test_the_table_of_language_models_is_that_of_the_results(benchmarks):
    import json

    import dllm_page

    rows = json.loads((benchmarks / "results" / "dllm.json").read_text())["rows"]
    assert between("language_models.md", "results") == dllm_page.table(rows)


def test_the_verdict_and_table_of_shallow_steps_are_those_of_the_results(benchmarks):
    import json

    import shallow_page

    found = json.loads((benchmarks / "results" / "dato.json").read_text())
    rows = found["shallow"]
    searches = shallow_page.searches(found["shallow_search"])
    assert between("shallow.md", "shallow_search") == searches
    assert between("shallow.md", "shallow_verdict") == shallow_page.verdict(rows)
    assert between("shallow.md", "shallow_table") == shallow_page.table(rows)


def test_the_tables_of_editing_are_those_of_the_results(benchmarks):
    import json

    import editing_page

    region = json.loads((benchmarks / "results" / "eedit.json").read_text())["region"]
    assert between("editing.md", "regions") == editing_page.regions(region)
    assert between("editing.md", "kinds") == editing_page.by_kind(region)


def test_the_tables_of_token_policies_are_those_of_the_results(benchmarks):
    import token_policies_page

    for page, tables in token_policies_page.tables().items():
        for name, content in tables.items():
            assert between(page, name) == content, "python benchmarks/token_policies_page.py"


def test_the_tables_of_inversions_are_those_of_the_results(benchmarks):
    import json

    import eedit_inversion_page

    found = json.loads((benchmarks / "results" / "eedit.json").read_text())["inversion"]
    assert between("inversion.md", "inversion_verdict") == eedit_inversion_page.verdict(found)
    assert between("inversion.md", "inversion") == eedit_inversion_page.table(found)
    assert between("inversion.md", "inversion_tried") == eedit_inversion_page.tried_table(found)
    assert between("inversion.md", "inversion_edits") == eedit_inversion_page.edits_table(found)


def test_the_tables_of_growing_pictures_are_those_of_the_results(benchmarks):
    import json

    import fresco_page

    found = json.loads((benchmarks / "results" / "fresco.json").read_text())
    assert between("progressive.md", "progressive_verdict") == fresco_page.verdict(found)
    assert between("progressive.md", "progressive_stages") == fresco_page.table(found)
    assert between("progressive.md", "progressive_pairs") == fresco_page.pairs(found)
    assert between("progressive.md", "progressive_ideal") == fresco_page.ideal(found)
    assert between("progressive.md", "progressive_across") == fresco_page.across(found)


def test_the_tables_of_students_are_those_of_the_results(benchmarks):
    import json

    import disca_page

    rows = json.loads((benchmarks / "results" / "disca.json").read_text())
    ring = json.loads((benchmarks / "results" / "rmf_ring.json").read_text())
    assert between("distill.md", "results") == disca_page.samplers(rows)
    assert between("distill.md", "ring") == disca_page.ring(ring)
    assert between("disca.md", "forecasts") == disca_page.forecasts(rows)
