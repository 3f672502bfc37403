"""The words of a command line: what they are taken for, and errors in one paragraph each."""

import inspect
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from foreseer.errors import ForeseerError

NAME = re.compile(r"[a-z][a-z0-9_]*")  # of a shipped configuration
DEFAULT_FIT = "readout"
OF_TRAINER = re.compile(r"--(config|model|data|trainer|ckpt_path|seed_everything)\b")
"""Options of a `fit` that is LightningCLI's: one by a YAML file or by a class's own arguments."""


def flagged(words: list[str], function: Callable[..., Any]) -> list[str]:
    """Words in which flags alone have their value, which jsonargparse wants: `--repair=true`."""
    parameters = inspect.signature(function).parameters.values()
    flags = {f"--{each.name}" for each in parameters if each.annotation is bool}
    following = [*words[1:], ""]
    return [
        f"{word}=true" if word in flags and after.lower() not in ("true", "false") else word
        for word, after in zip(words, following, strict=True)
    ]


def by_trainer(words: list[str]) -> bool:
    """Whether a fit is LightningCLI's; `--print_config` is our fit's where a recording is named."""
    if any(map(OF_TRAINER.match, words)):
        return True
    named = any(word.startswith("--recording") for word in words)
    return not named and any(word.startswith("--print_config") for word in words)


def packaged(word: str, words: list[str]) -> list[str]:
    """Words in which a shipped configuration's name stands for its file.

    `--config readout` takes `configs/fit/readout.yaml` of the installation where no file `readout`
    lies in the working directory. A `fit` of LightningCLI that names neither a configuration nor a
    model is that of a readout.
    """
    ours = word != "fit" or not by_trainer(words) or {"-h", "--help"} & set(words)
    if not ours and not any(re.match(r"--(config|model|print_config)(=|$)", w) for w in words):
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


def linked(words: list[str]) -> list[str]:
    """Words in which the data module has the recording and tap of the model, unless told its own.

    Of a configuration whose data module takes them.
    """
    import yaml

    given = dict(zip(words, [*words[1:], ""], strict=True))
    given |= dict(word.split("=", 1) for word in words if word.startswith("--") and "=" in word)
    path = Path(given.get("--config", ""))
    if not path.is_file():
        return words
    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, ValueError, RecursionError):
        return words  # the parser that reads it next says what is wrong with it
    data = inside(content, "data", "init_args")
    own = str(inside(content, "model", "init_args").get("tap", ""))
    found = list(words)
    for source, target in (("recording", "folder"), ("tap", "tap")):
        value = given.get(f"--model.init_args.{source}")
        option = f"--data.init_args.{target}"
        if value is None or option in given or target not in data:
            continue
        if target == "tap":
            value = str(data["tap"]).replace(own, value)  # that of parts is `<tap>/<parts>`
        found += [option, value]
    return found


def inside(content: Any, *names: str) -> dict[str, Any]:
    """The mapping under some keys of a configuration; empty where there is none."""
    for name in names:
        content = content.get(name) if isinstance(content, dict) else None
    return content if isinstance(content, dict) else {}


PACKAGE = str(Path(__file__).parent)
INTERRUPTED = 130  # 128 + SIGINT, as shells count
RESUMING = ("record", "search", "bench", "merge", "demo", "distill")


def is_told(error: BaseException) -> bool:
    """Whether an error is one of this package's sentences, to be read without its traceback."""
    if isinstance(error, ForeseerError):
        return True
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    raised_here = place is not None and place.tb_frame.f_code.co_filename.startswith(PACKAGE)
    return raised_here and isinstance(error, ValueError | OSError)


def told_in(error: BaseException) -> BaseException | None:
    """Of an error and what caused it, the first one that is told; parsers wrap ours into theirs."""
    found: BaseException | None = error
    while found is not None and not is_told(found):
        found = found.__cause__
    return found


@contextmanager
def refusing(command: str, resumes: bool, debug: bool) -> Iterator[None]:
    """Turn what is refused, and an interruption, into the end of the program.

    Args:
        command: its name, as typed.
        resumes: whether the same command goes on after an interruption.
        debug: let errors through as they are.

    Raises:
        SystemExit: with the paragraph, which Python prints on stderr and exits with code 1; with
            code 130 after Ctrl-C.
    """
    try:
        yield
    except KeyboardInterrupt:
        stop_interrupted(command, resumes)
    except SystemExit as stop:
        if not isinstance(stop.__context__, KeyboardInterrupt):
            raise
        signal.signal(signal.SIGINT, signal.default_int_handler)  # Lightning has it ignored
        stop_interrupted(command, resumes)
    except Exception as error:
        told = told_in(error)
        if debug or told is None:
            raise
        text = " ".join(str(told).split())
        raise SystemExit(f"foreseer {command}: {text}") from None


def stop_interrupted(command: str, resumes: bool) -> None:
    """Say in one line how to go on, and end.

    Raises:
        SystemExit: with code 130.
    """
    kept = "what is finished is kept, and the same command goes on from there"
    told = kept if resumes else "nothing was finished; the same command starts anew"
    print(f"\nforeseer {command}: interrupted; {told}.", file=sys.stderr, flush=True)
    raise SystemExit(INTERRUPTED) from None
