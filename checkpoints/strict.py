"""Read the header of a safetensors file that nobody vouches for, within limits checked first."""

import json
from pathlib import Path
from typing import Any

import torch

MAX_HEADER_BYTES = 1_000_000
MAX_TENSORS = 4096

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


class MalformedFile(ValueError):
    """A safetensors file that cannot be trusted; the message says what is wrong, not where."""


def read_header(path: Path, size: int | None = None) -> dict[str, dict[str, Any]]:
    """The entry of every tensor (`dtype`, `shape`, `data_offsets`), sorted by name.

    Args:
        path: the file.
        size: size in bytes it must have; None checks against the header only.

    Raises:
        MalformedFile: the file is missing, cut short, too long, or its header is over a limit or is
            no safetensors header.
    """
    if not path.is_file():
        raise MalformedFile("the file is missing")
    found = path.stat().st_size
    if size is not None and found != size:
        kind = "truncated" if found < size else "has trailing bytes"
        raise MalformedFile(f"{kind}: {found} bytes, expected {size}")
    if found < 8:
        raise MalformedFile(f"truncated: {found} bytes, a header needs at least 8")
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > MAX_HEADER_BYTES:
            raise MalformedFile(f"header claims {length} bytes, the limit is {MAX_HEADER_BYTES}")
        if length > found - 8:
            raise MalformedFile(f"truncated: header of {length} bytes in a file of {found}")
        text = file.read(length)
    try:
        entries = json.loads(text, object_pairs_hook=unique_keys)
        entries.pop("__metadata__", None)
        end = max((int(entry["data_offsets"][1]) for entry in entries.values()), default=0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise MalformedFile(f"malformed header ({error!r})") from error
    if len(entries) > MAX_TENSORS:
        raise MalformedFile(f"header lists {len(entries)} tensors, the limit is {MAX_TENSORS}")
    if 8 + length + end != found:
        kind = "truncated" if found < 8 + length + end else "has trailing bytes"
        raise MalformedFile(f"{kind}: {found} bytes, its header says {8 + length + end}")
    return dict(sorted(entries.items()))


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys occur once: safetensors itself accepts repeated names."""
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key occurs twice")
    return result
