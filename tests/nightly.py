"""What only `make test-all` runs: cases of a test of which others run by default.

The mark `nightly` is given to single cases of a parametrized test, here and nowhere else, so no
test is left out as a whole (tests/test_nightly.py).
"""

from collections.abc import Iterable
from typing import Any

import pytest


def nightly(cases: Iterable[Any], by_default: Iterable[Any]) -> list[Any]:
    """The cases of a test; those that are not of `by_default` run in `make test-all` only."""
    cases, kept = list(cases), list(by_default)
    if not kept or any(case not in cases for case in kept):
        raise ValueError(f"by default run {kept}; expected at least one, and each one of {cases}")
    return [c if c in kept else pytest.param(c, marks=pytest.mark.nightly) for c in cases]


def selected(request: pytest.FixtureRequest, argument: str) -> set[Any]:
    """The values of an argument in the tests of a fixture's module that run this time."""
    items = [item for item in request.session.items if item.path == request.path]
    given = [item.callspec.params for item in items if hasattr(item, "callspec")]
    return {values[argument] for values in given if argument in values}
