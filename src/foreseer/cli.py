"""The `foreseer` command: a thin dispatcher over LightningCLI and jsonargparse."""

import functools
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from foreseer import commands, fit_commands, pipeline_commands
from foreseer.errors import meant
from foreseer.extras import require
from foreseer.moved import RECIPES_MOVED
from foreseer.words import RESUMING, by_trainer, flagged, linked, packaged, refusing

TRAINER_WORDS = {
    "validate": "Run a trained predictor over the validation split (LightningCLI).",
    "distill": "Distil a guided model into a few-step student, stage by stage (LightningCLI).",
}
PIPELINE = "--pipeline"
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "record": commands.record,
    "fit": fit_commands.fit,
    "search": fit_commands.search,
    "export": fit_commands.export,
    "refit": fit_commands.refit,
    "generate": pipeline_commands.generate,
    "bench": pipeline_commands.bench,
    "inspect": commands.inspect,
    f"inspect {PIPELINE}": pipeline_commands.inspect,
    "verify": commands.verify,
    f"verify {PIPELINE}": pipeline_commands.verify,
    "merge": commands.merge,
    "push": fit_commands.push,
    "demo": commands.demo,
}
"""The function of every command; two have another one where a pipeline is among their words."""

ASKING = (commands.verify, pipeline_commands.verify, pipeline_commands.inspect)
"""Commands that answer yes or no; a no is code 1."""

DEBUG = "--debug"  # among the words of any command: errors as they are, with their traceback


def main(argv: list[str] | None = None) -> None:
    """Run one sub-command.

    Args:
        argv: command-line words after the program name; `sys.argv[1:]` when None.

    Raises:
        SystemExit: after help or the version (code 0), a usage error (2), Ctrl-C (130), an answer
            that is no (1), or one of the package's own errors, which it holds in words (1);
            `--debug` raises the error.
    """
    given = sys.argv[1:] if argv is None else argv
    words = [word for word in given if word != DEBUG]
    command = words[0] if words else ""
    resumes = command in RESUMING or (command == "fit" and by_trainer(words))
    with refusing(command, resumes, debug=len(words) < len(given)):
        run(words)


def run(words: list[str]) -> None:
    """Run one sub-command, whose errors are raised."""
    word, rest = (words[0], packaged(words[0], words[1:])) if words else ("", [])
    if word == "fit":
        require("train", "foreseer fit")
    if word in ("-h", "--help"):
        show(usage())
    elif word == "--version":
        from foreseer.environment import version_report

        show(version_report())
    elif word == "fit" and by_trainer(rest):
        run_trainer([word, *rest], "foreseer")
    elif word in FUNCTIONS:
        of_pipeline = f"{word} {PIPELINE}"
        named = any(each.partition("=")[0] == PIPELINE for each in rest)
        function = FUNCTIONS[of_pipeline if named and of_pipeline in FUNCTIONS else word]
        asked = {"-h", "--help"} & set(rest)  # whatever else, also where a value is missing
        run_function(function, ["--help"] if asked else rest)
    elif word == "distill":
        run_trainer(["fit", *rest], "foreseer distill")
    elif word in TRAINER_WORDS:
        run_trainer([word, *rest], "foreseer")
    else:
        refuse(word)


def show(text: str) -> None:
    """Print, or stop with code 1 and no traceback where the reader has left (`| head`)."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # flushed again at exit
        raise SystemExit(1) from None


def usage() -> str:
    """The list of commands, one line each."""
    lines = {name: str(function.__doc__).split("\n")[0] for name, function in FUNCTIONS.items()}
    listed = [f"  {name:<20}{line}" for name, line in (lines | TRAINER_WORDS).items()]
    return "\n".join(
        [
            "usage: foreseer COMMAND [--config FILE] [--OPTION VALUE ...]",
            "",
            "Learned feature caching for diffusion transformers: record, train, deploy.",
            "",
            "commands:",
            *listed,
            "",
            "  foreseer COMMAND --help lists the options; --print_config prints them as YAML.",
            "  foreseer --version prints the version, and what a bug report must say.",
            f"  {DEBUG} among the words shows where an error comes from.",
        ]
    )


def run_function(function: Callable[..., Any], words: list[str]) -> Any:
    """Parse `words` against the function's signature and call it.

    Required parameters are options, since `--config` cannot be combined with an override of a
    positional one; `inspect` and `verify` read a recording, the one thing they require, and need
    no name for it.
    """
    from jsonargparse import auto_cli

    from foreseer.parsing import Parser

    lone = function in (commands.inspect, commands.verify)
    called = function if lone else spelled_out(function)
    prog = f"foreseer {function.__name__}"
    words = flagged(words, function)
    answer = auto_cli(called, words, as_positional=lone, prog=prog, parser_class=Parser)
    if function in ASKING and not answer:
        raise SystemExit(1)
    return answer


def spelled_out(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function as a command line can give it: by options only, further keywords as a mapping.

    `**settings` becomes the option `--settings`, and what may be None need not be given.
    """
    signature = inspect.signature(function)
    parameters, further = [], ""
    for each in signature.parameters.values():
        default, kind = each.default, each.annotation
        if each.kind is each.VAR_KEYWORD:
            further, default, kind = each.name, None, dict[str, Any] | None
        elif default is each.empty and "None" in str(kind):
            default = None
        named = inspect.Parameter(each.name, each.KEYWORD_ONLY, default=default, annotation=kind)
        parameters.append(named)

    @functools.wraps(function)
    def called(**given: Any) -> Any:
        more = given.pop(further, None) or {}
        return function(**given, **more)

    del called.__wrapped__
    called.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    called.__annotations__ = {each.name: each.annotation for each in parameters}
    return called


def run_trainer(words: list[str], prog: str) -> None:
    """Hand `words`, the first one a Trainer method, to LightningCLI."""
    require("train", f"{prog} {words[0]}" if words else prog)
    words = linked(words)
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

    from foreseer.parsing import Parser
    from foreseer.training.plumbing.progress import quiet

    class TrainerParser(Parser, LightningArgumentParser):
        """Lightning's options and our errors."""

    with command_line(words), quiet():
        LightningCLI(
            save_config_kwargs={"overwrite": True},
            parser_kwargs={"prog": prog},
            parser_class=TrainerParser,
        )


@contextmanager
def command_line(words: list[str]) -> Iterator[None]:
    """Let `sys.argv` hold `words` for a while.

    LightningCLI warns when it is given words that differ from `sys.argv`, and Lightning starts the
    other processes of a multi-device run from `sys.argv`: they must see the same words.
    """
    before = sys.argv
    sys.argv = [before[0], *words]
    try:
        yield
    finally:
        sys.argv = before


def refuse(word: str) -> NoReturn:
    """Exit with code 2: no command, or one that does not exist."""
    if word == "teacher":  # of version 0.2
        print(f"foreseer teacher: {RECIPES_MOVED}", file=sys.stderr)
        raise SystemExit(2)
    found = f"unknown command {word!r}" if word else "no command"
    hint = meant(word, [*FUNCTIONS, *TRAINER_WORDS]).removesuffix(".")
    told = f"foreseer: {found}{hint}; name one of the commands above."
    print(f"{usage()}\n\n{told.replace('?;', '? Else')}", file=sys.stderr)
    raise SystemExit(2)
