"""The parsers behind the commands: an error is its sentence and the option probably meant."""

import inspect
import re
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NoReturn, get_args, get_origin

from jsonargparse import ArgumentParser

from foreseer.errors import meant

UNKNOWN = r"unrecognized arguments: --?([\w.]+)"
NOT_ACCEPTED = r"Option '([^']+)' is not accepted"
OF_CLASS = r"class_path '(foreseer[\w.]+)\.(\w+)'"


class Parser(ArgumentParser):
    """jsonargparse's, but lists need no brackets, and an error does not print all options first."""

    def _get_values(self, action: Any, arg_strings: list[str]) -> Any:
        """What the words of an option stand for: `output,hidden` of a list is `[output,hidden]`."""
        found = super()._get_values(action, arg_strings)
        kind = getattr(action, "_typehint", None)
        return bracketed(found) if isinstance(found, str) and is_list(kind, found) else found

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Exit with code 2."""
        if self.exit_on_error:
            refuse_words(self, message)
        super().error(message, ex)


def refuse_words(parser: ArgumentParser, message: str) -> None:
    """Say what is wrong with the words of a command, and end.

    Raises:
        SystemExit: with code 2.
    """
    prog = parser.prog.replace(" [options]", "")
    if named := re.search(NOT_ACCEPTED, message):
        known = options(parser)
        if kind := re.search(OF_CLASS, message):
            known = [*inspect.signature(getattr(import_module(kind[1]), kind[2])).parameters]
        message = named[0] + meant(named[1], known)  # the rest repeats the configuration
    elif unknown := re.search(UNKNOWN, message):
        message += meant(unknown[1], options(parser))
    print(f"{prog}: error: {message}\n{prog} --help lists the options.", file=sys.stderr)
    raise SystemExit(2)


def is_list(kind: Any, value: str) -> bool:
    """Whether a value is meant as a list, for an option of this type.

    One that takes a number too holds a list where there is a comma; one that takes a string, never.
    """
    kinds = get_args(kind) if get_origin(kind) is not Sequence else (kind,)
    lists = any(get_origin(each) is Sequence for each in kinds)
    return lists and str not in kinds and (int not in kinds or "," in value)


def bracketed(value: str) -> str:
    """A list as YAML has it."""
    return value if value.startswith("[") or value == "null" else f"[{value}]"


def options(parser: Any) -> list[str]:
    """Names of the options of a parser and its sub-commands, without dashes."""
    names: list[str] = []
    for action in parser._actions:
        names += [each.lstrip("-") for each in action.option_strings]
        if isinstance(action.choices, dict):  # of sub-commands
            names += [name for each in action.choices.values() for name in options(each)]
    return names
