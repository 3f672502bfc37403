"""Mend a recording whose files were damaged or lost, and merge recordings.

Nothing is deleted that might be wanted: shards and lines that are taken out lie in `damaged/`
afterwards. What was taken out is no longer finished, so the same record command redoes it.
"""

import contextlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from foreseer.trajectories.files.header import RecordingError
from foreseer.trajectories.files.manifest import (
    Entry,
    append_entry,
    cut_half_line,
    manifest_path,
    meta_problem,
    parse_line,
)
from foreseer.trajectories.files.shards import (
    CorruptShard,
    hash_shard,
    read_shard,
    shard_metadata,
    sync_folder,
    write_atomically,
)
from foreseer.trajectories.files.storage import Folder, is_url, read_header, refuse_links, storage
from foreseer.trajectories.files.writer import open_writer
from foreseer.trajectories.recording import Recording


def merge(out: str | Path, recordings: Sequence[str | Path]) -> int:
    """Add the trajectories of `recordings` to the one at `out`; run it again to resume.

    Shards are checked against their hash and linked, where the disk is the same, or copied. An item
    that is there already with the same content is skipped.

    Args:
        out: folder or URL, new or a recording with the same header.
        recordings: folders or URLs, all with the same header.

    Returns:
        Number of trajectories added.

    Raises:
        RecordingError: the headers differ, or an item is there with different content; nothing of
            that recording is added.
        CorruptShard: a shard is damaged; what was added before stays.
    """
    if not recordings:
        raise ValueError("no recordings were given; name the folders to merge.")
    sources = [Recording(place) for place in recordings]
    header = sources[0].header
    for source in sources[1:]:
        header.check_same(source.header, source.folder)
    added = 0
    with open_writer(out, header, rank=0) as writer:
        there = writer.entries()
        for source in sources:
            differing = [
                item
                for item, entry in source.entries.items()
                if item in there and there[item].xxh3 != entry.xxh3
            ]
            if differing:
                raise RecordingError(
                    f"{source.folder} and {out} hold the items {differing[:8]} with different "
                    "content; expected items recorded once, or twice alike. Record one of them "
                    "with another --first_item."
                )
            new = [entry for item, entry in source.entries.items() if item not in there]
            for entry in tqdm(new, desc=f"merge {source.folder}", unit="shard", delay=2):
                writer.adopt(entry, source.store.shard(entry))
                there[entry.item] = entry
            added += len(new)
    return added


DAMAGED = "damaged"
RANK_FOLDER = re.compile(r"[0-9]{5,}")
SHARD_FILE = re.compile(r"item-[0-9]{6,}\.safetensors")


def repair(folder: str | Path) -> list[str]:
    """Repair a recording in place; a second call finds nothing to do.

    Lines that are malformed, that name a damaged or missing shard, or that repeat an item are taken
    out, and the shards with them; whole shards that a killed recorder left without a line get
    theirs; half-written files are removed.

    Args:
        folder: folder of the recording.

    Returns:
        One line per change.

    Raises:
        RecordingError: it is no recording, its header is damaged, a folder in it is a link, or it
            is behind a URL.
        RuntimeError: a recorder is at work on it.
    """
    store = storage(folder)
    if is_url(folder) or not isinstance(store, Folder):
        raise RecordingError(
            f"{folder} is a URL, expected a folder; copy the recording to this machine and repair "
            "the copy."
        )
    read_header(store)
    refuse_links(store.path)
    with _all_ranks(store.path):
        changes = [f"removed the half-written {path}" for path in _remove_partials(store.path)]
        listed: dict[int, Entry] = {}
        for name in store.manifests():
            changes += _repair_manifest(store, store.path / name, listed)
        changes += _adopt_unlisted(store.path, listed)
    return changes


def leftovers(folder: str | Path, entries: Iterable[Entry]) -> list[Path]:
    """Files of a recording that no line names: of killed recorders, at work, or half-written."""
    named = {entry.file for entry in entries}
    found = sorted(Path(folder).glob("shards/*/*"))
    return [path for path in found if path.relative_to(folder).as_posix() not in named]


@contextlib.contextmanager
def _all_ranks(folder: Path) -> Iterator[None]:
    """Hold the lock of every rank that has written to a recording."""
    names = [path.name for path in folder.glob("shards/*") if RANK_FOLDER.fullmatch(path.name)]
    ranks = {int(name) for name in names}
    ranks |= {int(name.split(".")[1]) for name in Folder(folder).manifests()}
    locks = folder.glob("rank-*.lock")
    ranks |= {int(path.stem[5:]) for path in locks if RANK_FOLDER.fullmatch(path.stem[5:])}
    with contextlib.ExitStack() as stack:
        for rank in sorted(ranks):
            try:
                stack.enter_context(FileLock(folder / f"rank-{rank:05d}.lock", timeout=0))
            except Timeout as error:
                raise RuntimeError(
                    f"a recorder is at work on {folder} as rank {rank}; repair it afterwards."
                ) from error
        yield


def _remove_partials(folder: Path) -> list[Path]:
    partials = [*folder.glob(".*.partial"), *folder.glob("shards/*/.*.partial")]
    for path in partials:
        path.unlink()
    return partials


def _repair_manifest(store: Folder, manifest: Path, listed: dict[int, Entry]) -> list[str]:
    """Keep the lines that are worth it, adding their entries to `listed`; say what was dropped."""
    cut_half_line(manifest)
    kept: list[bytes] = []
    dropped: list[bytes] = []
    changes: list[str] = []
    lines = manifest.read_bytes().split(b"\n")[:-1]
    for number, line in enumerate(tqdm(lines, desc=f"repair {manifest.name}", delay=2), start=1):
        if problem := _problem(store, line, f"{manifest}, line {number}", listed):
            dropped.append(line)
            changes.append(f"dropped line {number} of {manifest.name}: {problem}")
        else:
            kept.append(line)
    if dropped:
        folder = store.path / DAMAGED
        folder.mkdir(exist_ok=True)
        with open(folder / manifest.name, "ab") as file:
            file.writelines(line + b"\n" for line in dropped)
            os.fsync(file.fileno())
        write_atomically(manifest, [line + b"\n" for line in kept], mode=0o644)
    return changes


def _problem(store: Folder, line: bytes, where: str, listed: dict[int, Entry]) -> str | None:
    """Why a line is dropped, its damaged shard set aside; None keeps it."""
    try:
        entry = parse_line(line, where)
    except RecordingError as error:
        return str(error)
    first = listed.get(entry.item)
    if first == entry:
        return f"item {entry.item} is listed twice"
    if first is not None:
        if first.file != entry.file:
            _set_aside(store.path, store.path / entry.file)
        return f"item {entry.item} is listed before, as {first.file}"
    try:
        found = store.digest(entry)
        if found.xxh3 != entry.xxh3:
            raise CorruptShard(entry.file, entry.item, "hash differs (flipped bits)")
    except RecordingError as error:
        _set_aside(store.path, store.path / entry.file)
        return str(error)
    listed[entry.item] = entry
    return None


def _adopt_unlisted(folder: Path, listed: dict[int, Entry]) -> list[str]:
    """Give whole shards without a line theirs, and set the others aside."""
    named = {entry.file for entry in listed.values()}
    changes = []
    for path in sorted(folder.glob("shards/*/*")):
        file = path.relative_to(folder).as_posix()
        if file in named or not RANK_FOLDER.fullmatch(path.parent.name):
            continue
        try:
            entry = _own_entry(path, file)
            if entry.item in listed:
                raise CorruptShard(path, entry.item, "the item is listed with another shard")
        except CorruptShard as error:
            _set_aside(folder, path)
            changes.append(f"set {file} aside: {error}")
        else:
            append_entry(manifest_path(folder, int(path.parent.name)), entry)
            listed[entry.item] = entry
            changes.append(f"adopted {file} as item {entry.item}")
    return changes


def _own_entry(path: Path, file: str) -> Entry:
    """The line of a shard, from what it says of itself once every tensor matches its hash.

    Raises:
        CorruptShard: it is damaged, or says nothing of the kind.
    """
    if path.is_symlink() or not SHARD_FILE.fullmatch(path.name):
        raise CorruptShard(path, None, "no shard that `record` wrote")
    read_shard(path)
    told = shard_metadata(path)
    try:
        item, meta = int(told["item"]), json.loads(told["meta"])
    except (KeyError, ValueError, RecursionError) as error:
        raise CorruptShard(path, None, f"does not say which item it is ({error!r})") from error
    if (problem := meta_problem(meta)) or item != int(path.stem.removeprefix("item-")):
        raise CorruptShard(path, item, problem or "its name is of another item")
    digest = hash_shard(path)
    return Entry(item=item, file=file, xxh3=digest.xxh3, bytes=digest.bytes, meta=meta)


def _set_aside(folder: Path, path: Path) -> None:
    """Move a file out of the recording's sight, without overwriting an earlier one."""
    if not path.is_symlink() and not path.exists():
        return
    target = folder / DAMAGED / path.relative_to(folder)
    target.parent.mkdir(parents=True, exist_ok=True)
    number = 0
    while (free := target.with_name(f"{target.name}{f'.{number}' if number else ''}")).exists():
        number += 1
    os.replace(path, free)
    sync_folder(path.parent)
