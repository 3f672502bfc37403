"""Every fault and situation of docs/faults.md has tests named after it and marked `fault`."""

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
NAME = re.compile(r"test_(?:case_(\d\d)|field_([a-z]+))_\w+")


def marked(node: ast.AST) -> bool:
    """Whether a function's decorators, or a module's `pytestmark`, name the mark."""
    return "mark.fault" in ast.unparse(node)


def found_tests() -> dict[str, list[str]]:
    """Names of the tests of every case or situation, and of those only that carry the mark."""
    found: dict[str, list[str]] = {}
    for path in sorted(TESTS.glob("test_*.py")):
        tree = ast.parse(path.read_text())
        whole = any(
            isinstance(node, ast.Assign) and "pytestmark" in ast.unparse(node) and marked(node)
            for node in tree.body
        )
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and (name := NAME.fullmatch(node.name)):
                if whole or any(map(marked, node.decorator_list)):
                    found.setdefault(name[1] or name[2], []).append(node.name)
    return found


def page() -> str:
    path = ROOT / "docs" / "faults.md"
    if not path.exists():
        pytest.skip("the pages are not beside the tests of an installed wheel")
    return path.read_text()


def listed_cases() -> list[str]:
    lines = re.findall(r"^\| (\d+)\. .*`test_case_(\d\d)` \|$", page(), flags=re.M)
    assert all(int(number) == int(test) for number, test in lines)
    return [test for _, test in lines]


def listed_situations() -> list[str]:
    return re.findall(r"^\| .* \| `test_field_([a-z]+)` \|$", page(), flags=re.M)


def test_every_fault_of_the_list_has_a_test() -> None:
    found = sorted(name for name in found_tests() if name.isdigit())
    assert listed_cases() == found == [f"{number:02}" for number in range(1, 24)]


def test_every_situation_of_the_list_has_a_test() -> None:
    found = sorted(name for name in found_tests() if not name.isdigit())
    assert sorted(listed_situations()) == found
