"""The words of a command as they are typed, and as its parser wants them."""

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

NAME = re.compile(r"[a-z][a-z0-9_]*")  # of a shipped configuration
DEFAULT_FIT = "readout"
OF_TRAINER = re.compile(r"--(config|model|data|trainer|ckpt_path|seed_everything)\b")
"""Options of a `fit` that is LightningCLI's: one by a YAML file or by a class's own arguments."""


def with_values(function: Callable[..., Any], words: list[str]) -> list[str]:
    """Words in which flags have their value and lists their brackets.

    jsonargparse wants a value of every option, so a flag alone stands for `--flag true`; and of
    every list that it is one, so `--taps output,hidden` stands for `--taps [output,hidden]`.
    """
    kinds = {
        name: str(each.annotation) for name, each in inspect.signature(function).parameters.items()
    }
    found: list[str] = []
    for place, word in enumerate(words):
        name, equals, value = word.removeprefix("--").partition("=")
        kind = kinds.get(name, "") if word.startswith("--") else ""
        before = words[place - 1].removeprefix("--") if place else ""
        if (
            kind == str(bool)
            and not equals
            and [*words, ""][place + 1].lower() not in ("true", "false")
        ):
            word = f"--{name}=true"
        elif equals and is_list(kind, value):
            word = f"--{name}={bracketed(value)}"
        elif is_list(kinds.get(before, ""), word) and words[place - 1].startswith("--"):
            word = bracketed(word)
        found.append(word)
    return found


def is_list(kind: str, value: str) -> bool:
    """Whether a value is a list, for an option of this annotation.

    One that takes a number too holds a list where there is a comma; one that takes a string, never.
    """
    if kind.startswith("int"):
        return "Sequence[" in kind and "," in value
    return "Sequence[" in kind and not kind.startswith("str")


def bracketed(value: str) -> str:
    """A list as YAML has it."""
    return value if value.startswith("[") or value == "null" else f"[{value}]"


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
