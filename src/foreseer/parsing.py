"""The parsers behind the commands: an error is its sentence and the option probably meant."""

import inspect
import re
import sys
from importlib import import_module
from typing import Any, NoReturn

from jsonargparse import ArgumentParser

from foreseer.errors import meant

UNKNOWN = r"unrecognized arguments: --?([\w.]+)"
NOT_ACCEPTED = r"Option '([^']+)' is not accepted"
OF_CLASS = r"class_path '(foreseer[\w.]+)\.(\w+)'"


class Parser(ArgumentParser):
    """jsonargparse's, which does not print all options before what is wrong with one."""

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


def options(parser: Any) -> list[str]:
    """Names of the options of a parser and its sub-commands, without dashes."""
    names: list[str] = []
    for action in parser._actions:
        names += [each.lstrip("-") for each in action.option_strings]
        if isinstance(action.choices, dict):  # of sub-commands
            names += [name for each in action.choices.values() for name in options(each)]
    return names
