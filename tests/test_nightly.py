"""Every test of the nightly run has a case that runs by default, and the run leaves its date."""

import datetime
import re
from pathlib import Path

import pytest
from nightly import nightly

TESTS = Path(__file__).parent
LAST = TESTS / "LAST_FULL_RUN.txt"
CONTRIBUTING = TESTS.parent / "CONTRIBUTING.md"


def test_single_cases_are_marked_and_never_a_test():
    marked = {p.name for p in TESTS.glob("*.py") if "mark.nightly" in p.read_text()}
    assert marked == {"nightly.py", Path(__file__).name}


def test_some_cases_run_by_default():
    cases = nightly(["a", "b", "c"], by_default=["b"])
    assert [getattr(case, "values", (case,))[0] for case in cases] == ["a", "b", "c"]
    assert [bool(getattr(case, "marks", ())) for case in cases] == [True, False, True]
    for kept in ([], ["d"]):
        with pytest.raises(ValueError, match="expected at least one, and each one of"):
            nightly(["a", "b"], kept)


@pytest.mark.skipif(not CONTRIBUTING.exists(), reason="the wheel holds no pages")
def test_it_is_said_when_everything_last_ran():
    assert f"tests/{LAST.name}" in CONTRIBUTING.read_text()
    day, commit, result = LAST.read_text().splitlines()
    assert datetime.date.fromisoformat(day) <= datetime.datetime.now(datetime.UTC).date()
    assert re.match(r"[0-9a-f]{40}", commit) and re.search(r"\d+ passed", result)
