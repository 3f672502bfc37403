"""`manifest.<rank>.jsonl`: one line per finished trajectory, append-only, merged by reading all."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foreseer.checkpoints.strict import parse_json
from foreseer.trajectories.files.header import MAX_INT, RecordingError, canonical_json

MAX_LINE_BYTES = 65_536
MAX_META_BYTES = 60_000
MAX_MANIFEST_BYTES = 1 << 30
ENTRY_KEYS = {"item", "file", "xxh3", "bytes", "meta"}
MANIFEST_NAME = re.compile(r"manifest\.[0-9]{5,}\.jsonl")
SHARD_NAME = re.compile(r"shards(/[A-Za-z0-9_-][A-Za-z0-9._-]*)+")
HASH = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One finished trajectory: its shard (path inside the folder), hash, size and meta values."""

    item: int
    file: str
    xxh3: str
    bytes: int
    meta: dict[str, str | int | float]


def manifest_path(folder: Path, rank: int) -> Path:
    """Path of the manifest that `rank` appends to."""
    return folder / f"manifest.{rank:05d}.jsonl"


def append_entry(path: Path, entry: Entry) -> None:
    """Append the line of an entry and fsync; on failure the file is as before.

    Raises:
        OSError: the disk refused.
    """
    rest = canonical_json(vars(entry)).encode() + b"\n"
    with open(path, "ab", buffering=0) as file:
        before = os.fstat(file.fileno()).st_size
        try:
            while rest:
                rest = rest[file.write(rest) :]
            os.fsync(file.fileno())
        except BaseException:
            file.truncate(before)
            raise


def cut_half_line(path: Path) -> None:
    """Drop what follows the last newline: the line a killed recorder was writing."""
    if not path.exists():
        return
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole != len(content):
        with open(path, "r+b") as file:
            file.truncate(whole)
            os.fsync(file.fileno())


def merge_manifests(manifests: Mapping[str, bytes], place: str) -> dict[int, Entry]:
    """Entries of all writers by item, in item order; a half line at the end is not counted.

    Args:
        manifests: bytes of every manifest by its file name.
        place: of the recording, for messages.

    Raises:
        RecordingError: a malformed line, a file outside `shards/`, or one item with two hashes.
    """
    merged: dict[int, tuple[Entry, str]] = {}
    for name, content in sorted(manifests.items()):
        for number, line in enumerate(content.split(b"\n")[:-1], start=1):
            entry = parse_line(line, f"{place}/{name}, line {number}")
            kept, where = merged.setdefault(entry.item, (entry, name))
            if kept.xxh3 != entry.xxh3:
                raise RecordingError(
                    f"item {entry.item} was recorded twice in {place} with different content: "
                    f"{kept.file} ({where}) and {entry.file} ({name}). "
                    "`foreseer verify --repair` keeps the first."
                )
    return {item: merged[item][0] for item in sorted(merged)}


def parse_line(line: bytes, where: str) -> Entry:
    """One line of a manifest.

    Args:
        line: without its newline.
        where: its place, for messages.

    Raises:
        RecordingError: it is too long, malformed, or names a file outside `shards/`.
    """
    if len(line) > MAX_LINE_BYTES:
        raise RecordingError(f"{where} has {len(line)} bytes, the limit is {MAX_LINE_BYTES}.")
    try:
        values = parse_json(line)
    except ValueError as error:
        raise RecordingError(
            f"{where} is not JSON ({error}); run `foreseer verify --repair`, then record again."
        ) from error
    if not isinstance(values, dict) or values.keys() != ENTRY_KEYS:
        found = sorted(values) if isinstance(values, dict) else type(values).__name__
        raise RecordingError(f"{where} holds {found}, expected the keys {sorted(ENTRY_KEYS)}.")
    for key in ("item", "bytes"):
        if type(values[key]) is not int or not 0 <= values[key] < MAX_INT:
            raise RecordingError(f"{where}: {key} is {values[key]!r}, expected an int >= 0.")
    if not _matches(HASH, values["xxh3"]):
        raise RecordingError(
            f"{where}: xxh3 is {values['xxh3']!r}, expected 32 hexadecimal digits."
        )
    if not _matches(SHARD_NAME, values["file"]):
        raise RecordingError(
            f"{where}: file is {values['file']!r}, expected a plain path under shards/. "
            "The manifest was not written by `record`; do not trust it."
        )
    if problem := meta_problem(values["meta"]):
        raise RecordingError(f"{where}: {problem}")
    return Entry(**values)


def meta_problem(meta: Any) -> str | None:
    """What is wrong with the meta values of an item, or None."""
    if not isinstance(meta, dict):
        return f"meta is {meta!r}, expected a dict."
    for key, value in meta.items():
        if not isinstance(key, str) or not key or key in ENTRY_KEYS:
            return f"meta key {key!r}: expected a non-empty string outside {sorted(ENTRY_KEYS)}."
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            return f"meta[{key!r}] is {value!r}, expected a string, an int or a float."
        if isinstance(value, float) and not abs(value) < float("inf"):
            return f"meta[{key!r}] is {value!r}, expected a finite number."
    if (size := len(canonical_json(meta))) > MAX_META_BYTES:
        return f"meta has {size} bytes, the limit is {MAX_META_BYTES}; shorten it."
    return None


def _matches(pattern: re.Pattern[str], value: Any) -> bool:
    return isinstance(value, str) and pattern.fullmatch(value) is not None
