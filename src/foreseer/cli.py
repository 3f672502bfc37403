"""The `foreseer` command: a thin dispatcher over LightningCLI and jsonargparse."""

import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from . import commands, pipeline_commands
from .extras import require

TRAINER_WORDS = {
    "fit": "Train a predictor from a YAML file (LightningCLI).",
    "validate": "Run a trained predictor over the validation split (LightningCLI).",
    "distill": "Distil a guided model into a few-step student, stage by stage (LightningCLI).",
    "teacher": "Train the bundled model by its own recipe: foreseer teacher fit (LightningCLI).",
}
FUNCTIONS: dict[str, Callable[..., None]] = {
    function.__name__: function
    for function in (
        commands.record,
        commands.search,
        commands.export,
        commands.refit,
        commands.generate,
        commands.bench,
        commands.inspect,
        commands.verify,
        commands.merge,
        commands.demo,
    )
}

NAME = re.compile(r"[a-z][a-z0-9_]*")  # of a shipped configuration
DEFAULT_FIT = "readout"
FLAGS = ("--repair", "--compare")
"""Options that are switched on by being named."""

OF_PIPELINES: dict[str, Callable[..., None]] = {
    "inspect": pipeline_commands.inspect,
    "verify": pipeline_commands.verify,
}
"""Commands on recordings that are also on pipelines, where `--pipeline` is among their words."""


def main(argv: list[str] | None = None) -> None:
    """Run one sub-command.

    Args:
        argv: command-line words after the program name; `sys.argv[1:]` when None.

    Raises:
        SystemExit: after help or the version (code 0), or a usage error (code 2).
    """
    words = sys.argv[1:] if argv is None else argv
    word, rest = (words[0], packaged(words[0], words[1:])) if words else ("", [])
    if word in ("-h", "--help"):
        show(usage())
    elif word == "--version":
        from .environment import version_report

        show(version_report())
    elif word in OF_PIPELINES and any(w.partition("=")[0] == "--pipeline" for w in rest):
        asked = {"-h", "--help"} & set(rest)  # also without the pipeline's name
        run_function(OF_PIPELINES[word], ["--help"] if asked else rest)
    elif word in FUNCTIONS:
        run_function(FUNCTIONS[word], with_values(rest))
    elif word == "teacher":
        run_trainer(rest, "foreseer teacher")
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
    listed = [f"  {name:<10}{line}" for name, line in (TRAINER_WORDS | lines).items()]
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
        ]
    )


def run_function(function: Callable[..., None], words: list[str]) -> None:
    """Parse `words` against the function's signature and call it.

    Required parameters are options, since `--config` cannot be combined with an override of a
    positional one; `inspect` and `verify` read a recording, the one thing they require, and need
    no name for it.
    """
    from jsonargparse import auto_cli

    lone = function in (commands.inspect, commands.verify)
    auto_cli(function, words, as_positional=lone, prog=f"foreseer {function.__name__}")


def with_values(words: list[str]) -> list[str]:
    """A flag alone stands for `--flag true`: jsonargparse wants a value of every option."""
    following = [*words[1:], ""]
    return [
        f"{word}=true" if word in FLAGS and after not in ("true", "false") else word
        for word, after in zip(words, following, strict=True)
    ]


def packaged(word: str, words: list[str]) -> list[str]:
    """Words in which a shipped configuration's name stands for its file.

    `--config readout` takes `configs/fit/readout.yaml` of the installation where no file `readout`
    lies in the working directory. A `fit` that names neither a configuration nor a model is that of
    a readout.
    """
    asks = {"-h", "--help", "--print_config"} & set(words)
    if word == "fit" and not asks and not any(re.match(r"--(config|model)(=|$)", w) for w in words):
        print(f"No --config and no --model: fitting a readout, --config {DEFAULT_FIT}.")
        words = ["--config", DEFAULT_FIT, *words]
    found, before = [], ""
    for each in words:
        name = each.removeprefix("--config=")
        if (before == "--config" or name != each) and NAME.fullmatch(name):
            path = Path(__file__).parent / "configs" / word / f"{name}.yaml"
            if path.exists() and not Path(name).exists():
                each = f"{each.removesuffix(name)}{path}"
        found.append(each)
        before = each
    return found


def run_trainer(words: list[str], prog: str) -> None:
    """Hand `words`, the first one a Trainer method, to LightningCLI."""
    require("train", f"{prog} {words[0]}" if words else prog)
    from lightning.pytorch.cli import LightningCLI

    with command_line(words):
        LightningCLI(save_config_kwargs={"overwrite": True}, parser_kwargs={"prog": prog})


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
    found = f"unknown command {word!r}" if word else "no command"
    print(f"{usage()}\n\nforeseer: {found}; name one of the commands above.", file=sys.stderr)
    raise SystemExit(2)
