"""No source file is longer than 500 lines and no function longer than 60.

The docstring of a command is the help text of its options, a page of its own, and does not count.
"""

import ast

import pytest
from source_files import PACKAGE, source_files

MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60


def too_long(source: str, of_commands: bool = False) -> list[str]:
    """What is too long in one file's text, with its number of lines."""
    lines = len(source.splitlines())
    found = [f"{lines} lines, at most {MAX_FILE_LINES}"] if lines > MAX_FILE_LINES else []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1
            if of_commands and ast.get_docstring(node):
                length -= node.body[0].end_lineno - node.body[0].lineno + 1
            if length > MAX_FUNCTION_LINES:
                found.append(f"{node.name} has {length} lines, at most {MAX_FUNCTION_LINES}")
    return found


@pytest.mark.parametrize("path", source_files())
def test_files_and_functions_stay_short(path):
    found = too_long((PACKAGE / path).read_text(), path.endswith("commands.py"))
    assert not found, f"{path}: {'; '.join(found)}; split it."


def test_the_guard_names_the_number_of_lines():
    assert too_long("x = 1\n" * 501) == ["501 lines, at most 500"]
    long_function = "def f():\n" + "    x = 1\n" * 60
    assert too_long(long_function) == ["f has 61 lines, at most 60"]
    assert too_long("def f():\n" + "    x = 1\n" * 59) == []
    documented = 'def f():\n    """A.\n\n    B.\n    """\n' + "    x = 1\n" * 59
    assert too_long(documented) == ["f has 64 lines, at most 60"]
    assert too_long(documented, of_commands=True) == []
