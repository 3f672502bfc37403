"""Read JSON and safetensors headers that nobody vouches for, within limits checked first."""

import io
import json
import math
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from foreseer.errors import ForeseerError

REPO_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)  # how the hub names a repository
MAX_HEADER_BYTES = 1_000_000
MAX_TENSORS = 4096
MAX_NAME_LENGTH = 256
MAX_AXES = 8
MAX_NUMBERS = 2**60
MAX_DEPTH = 16
"""Levels of lists and objects inside each other in any JSON that is read."""

DTYPE_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
ENTRY_KEYS = {"dtype", "shape", "data_offsets"}


class MalformedFile(ForeseerError, ValueError):
    """A file that cannot be trusted; the message says what is wrong, not where."""


def read_header(path: Path, size: int | None = None) -> dict[str, tuple[str, list[int]]]:
    """Dtype and shape of every tensor, as the file names them, sorted by name.

    Args:
        path: the file.
        size: size in bytes it must have; None checks against the header only.

    Raises:
        MalformedFile: the file is missing, no plain file, cut short, too long, or its header is
            over a limit or is no safetensors header.
    """
    with open_plain(path) as file:
        found = os.fstat(file.fileno()).st_size
        if size is not None and found != size:
            kind = "truncated" if found < size else "has trailing bytes"
            raise MalformedFile(f"{kind}: {found} bytes, expected {size}")
        check_header(file, found)
    with refused_by_library(), safe_open(path, framework="pt") as opened:
        slices = {name: opened.get_slice(name) for name in sorted(opened.keys())}
        return {name: (s.get_dtype(), s.get_shape()) for name, s in slices.items()}


def check_header(file: io.BufferedIOBase, found: int) -> None:
    """Raise where the header at the start of a file of `found` bytes is over a limit.

    What it says of bytes is for the library to check, which refuses overlaps, holes and shapes of
    another size; it takes headers of 100 MB and any names, each as often as it likes.

    Raises:
        MalformedFile: see `read_header`.
    """
    if found < 8:
        raise MalformedFile(f"truncated: {found} bytes, a header needs at least 8")
    length = int.from_bytes(file.read(8), "little")
    if length > MAX_HEADER_BYTES:
        raise MalformedFile(f"header claims {length} bytes, the limit is {MAX_HEADER_BYTES}")
    if length > found - 8:
        raise MalformedFile(f"truncated: header of {length} bytes in a file of {found}")
    try:
        entries = parse_json(file.read(length))
    except ValueError as error:
        raise MalformedFile(f"malformed header ({str(error)[:200]})") from error
    if not isinstance(entries, dict):
        raise MalformedFile(f"malformed header: it is a {type(entries).__name__}, no object")
    entries.pop("__metadata__", None)
    if len(entries) > MAX_TENSORS:
        raise MalformedFile(f"header lists {len(entries)} tensors, the limit is {MAX_TENSORS}")
    for name, entry in entries.items():
        _check_entry(name, entry)


@contextmanager
def refused_by_library() -> Iterator[None]:
    """Turn what safetensors says of a file into `MalformedFile`.

    Raises:
        MalformedFile: the header does not describe the bytes that follow it.
    """
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise MalformedFile(
            f"truncated, has trailing bytes or a damaged header ({str(error)[:200]})"
        ) from error


def read_plain(path: Path, limit: int) -> bytes:
    """The content of a plain file, if it is not over the limit.

    Raises:
        MalformedFile: it is missing, no plain file, or has more bytes.
    """
    with open_plain(path) as file:
        found = os.fstat(file.fileno()).st_size
        content = file.read(limit + 1) if found <= limit else b""
    found = max(found, len(content))
    if found > limit:
        raise MalformedFile(f"has {found} bytes, the limit is {limit}")
    return content


def open_plain(path: Path) -> io.BufferedReader:
    """Open a file for reading, unless it is a folder, a pipe or a device, which may never end.

    Raises:
        MalformedFile: it is missing, cannot be read or is no plain file.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise MalformedFile("is no plain file but a folder, pipe, socket or device")
        return open(path, "rb")
    except FileNotFoundError as error:
        raise MalformedFile("the file is missing") from error
    except OSError as error:
        raise MalformedFile(f"cannot be read ({error.strerror})") from error


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text, in which no key occurs twice and every number is finite.

    Raises:
        ValueError: it is not such a text, or nested deeper than `MAX_DEPTH`.
    """
    try:
        value = json.loads(
            text,
            object_pairs_hook=unique_keys,
            parse_constant=_finite,
            parse_float=_finite,
        )
    except RecursionError as error:
        raise ValueError(f"nested deeper than {MAX_DEPTH} levels") from error
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [each for each in level if isinstance(each, dict | list)]
        if not level:
            return value
        level = [
            inner for each in level for inner in (each.values() if isinstance(each, dict) else each)
        ]
    raise ValueError(f"nested deeper than {MAX_DEPTH} levels")


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys occur once: safetensors itself accepts repeated names."""
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key occurs twice")
    return result


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:20]} is no finite number")
    return number


def _check_entry(name: str, entry: Any) -> None:
    if not 0 < len(name) <= MAX_NAME_LENGTH or not name.isprintable():
        raise MalformedFile(
            f"malformed header: a tensor is called {name[:40]!r}, expected 1 to {MAX_NAME_LENGTH} "
            "printable characters"
        )
    if not isinstance(entry, dict) or entry.keys() != ENTRY_KEYS:
        raise MalformedFile(f"malformed header: tensor {name} has not the keys of a tensor")
    code, shape = entry["dtype"], entry["shape"]
    if code not in DTYPE_CODES.values():
        raise MalformedFile(
            f"malformed header: tensor {name} has the dtype {str(code)[:20]!r}, expected one of "
            f"{list(DTYPE_CODES.values())}"
        )
    sizes = isinstance(shape, list) and all(type(size) is int and size >= 0 for size in shape)
    if not sizes or len(shape) > MAX_AXES or math.prod(max(n, 1) for n in shape) > MAX_NUMBERS:
        raise MalformedFile(
            f"malformed header: tensor {name} has no shape of at most {MAX_AXES} axes and 2^60 "
            "numbers"
        )
