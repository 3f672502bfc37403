"""Each of the 23 faults of docs/faults.md has tests that are named after it and marked `fault`."""

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
NAME = re.compile(r"test_case_(\d\d)_\w+")


def marked(node: ast.AST) -> bool:
    """Whether a function's decorators, or a module's `pytestmark`, name the mark."""
    return "mark.fault" in ast.unparse(node)


def found_tests() -> dict[int, list[str]]:
    """Names of the tests of every case, and of those only that carry the mark."""
    found: dict[int, list[str]] = {}
    for path in sorted(TESTS.glob("test_*.py")):
        tree = ast.parse(path.read_text())
        whole = any(
            isinstance(node, ast.Assign) and "pytestmark" in ast.unparse(node) and marked(node)
            for node in tree.body
        )
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and (name := NAME.fullmatch(node.name)):
                if whole or any(map(marked, node.decorator_list)):
                    found.setdefault(int(name[1]), []).append(node.name)
    return found


def listed_cases() -> list[int]:
    page = ROOT / "docs" / "faults.md"
    if not page.exists():
        pytest.skip("the pages are not beside the tests of an installed wheel")
    lines = re.findall(r"^\| (\d+)\. .*`test_case_(\d\d)` \|$", page.read_text(), flags=re.M)
    assert all(int(number) == int(test) for number, test in lines)
    return [int(number) for number, _ in lines]


def test_every_fault_of_the_list_has_a_test() -> None:
    assert listed_cases() == sorted(found_tests()) == list(range(1, 24))
