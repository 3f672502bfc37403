"""Prompts as words or as files: a path is read or refused, and never drawn as words."""

import codecs
import os
import re
from collections.abc import Sequence
from pathlib import Path

READ = (".txt", ".safetensors")
DATA = "csv|tsv|jsonl?|ya?ml|toml|xml|parquet|arrow|txt|safetensors|pt|pth|ckpt|np[yz]|pkl|md|zip"
PATHS = (
    r"\S*[^\s.]\.[A-Za-z]\w{0,11}",  # one word with an ending
    rf".*\.(?:{DATA})",  # several with a known one
    r"\S*[/\\]\S*",  # one word with a slash
    r"(?:\.{0,2}|~|[A-Za-z]:)[/\\].*",  # the start of a path
)


def is_path(words: str) -> bool:
    """Whether a string is, or looks like, the path of something."""
    looks = any(re.fullmatch(path, words.strip(), re.IGNORECASE) for path in PATHS)
    return looks or _exists(words)


def _exists(words: str) -> bool:
    try:
        return os.path.exists(words)
    except ValueError:  # a null character
        return False


def prompts_of(prompts: str | os.PathLike[str] | Sequence[str]) -> Path | list[str]:
    """The prompts asked for, or the file of embeddings that holds them.

    Args:
        prompts: words; a list of them; or a path, of a text file with a prompt per line or of a
            safetensors file.

    Raises:
        ValueError: a path of another kind, an entry of a list that looks like a path, or a text
            file that holds no prompt or cannot be read as text.
        FileNotFoundError: the file does not exist.
    """
    if not isinstance(prompts, str | os.PathLike):
        for words in prompts:
            if is_path(words):
                raise ValueError(_refusal(words, "an entry of a list of prompts"))
        return list(prompts)
    if isinstance(prompts, str) and not is_path(prompts):
        return [prompts]
    path = Path(prompts)
    if path.suffix.lower() not in READ:
        raise ValueError(_refusal(str(prompts), "a folder" if path.is_dir() else "a path"))
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no file {path}; expected one with a prompt per line (.txt), or of prompt "
            "embeddings (.safetensors)."
        )
    return path if path.suffix.lower() == ".safetensors" else lines(path)


def _refusal(found: str, kind: str) -> str:
    return (
        f"found the prompt {found!r}, which is or looks like {kind}; expected words, or a file "
        "that ends in .txt (a prompt per line) or .safetensors (prompt embeddings). To draw these "
        "very words, end them with a full stop."
    )


def lines(path: Path) -> list[str]:
    """The prompts of a text file, one per line, without empty lines and without its mark.

    Args:
        path: UTF-8, or UTF-16 with its byte-order mark.

    Raises:
        ValueError: it is in another encoding, or holds no prompt.
    """
    content = path.read_bytes()
    wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = content.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is no text in UTF-8: {error}. Save it as UTF-8, with a prompt per line."
        ) from error
    found = [line.strip() for line in re.split(r"\r\n|\r|\n", text)]
    if not any(found):
        raise ValueError(f"{path} holds no prompt; expected one per line.")
    return [line for line in found if line]
