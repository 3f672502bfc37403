"""Where a recording lies: a folder of this machine, or a URL.

Both give the same four things: the header's bytes, the manifests' bytes, a local path per shard and
the hash of what is really there.

Shards are downloaded whole, once, and kept under their hash, so that a cached file can neither be
stale nor half. fsspec's own file cache writes in place: a killed download stays behind as a hit
(fsspec 2026.9, `implementations/cached.py`).
"""

import os
import re
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import fsspec
import xxhash

from foreseer.trajectories.files.header import (
    HEADER_FILE,
    MAX_RECORDING_JSON_BYTES,
    Header,
    RecordingError,
    check_size,
)
from foreseer.trajectories.files.manifest import (
    MANIFEST_NAME,
    MAX_MANIFEST_BYTES,
    Entry,
    merge_manifests,
)
from foreseer.trajectories.files.shards import CorruptShard, ShardDigest, hash_shard, shard_names

CACHE_VARIABLE = "FORESEER_CACHE"
STALE_S = 24 * 3600  # a download that has not moved for a day belongs to a killed process
CHUNK = 1 << 20


def cache_folder() -> Path:
    """`$FORESEER_CACHE`, else `foreseer` in the user's cache folder; its files may be deleted."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get(CACHE_VARIABLE) or base / "foreseer")


class Remote:
    """A recording behind a URL; needs the network for its header, manifests and new shards.

    Holds no connection, so it can be pickled and used after a fork.

    Args:
        url: address of the recording's folder.
    """

    def __init__(self, url: str) -> None:
        self.url = self.name = url.rstrip("/")

    @property
    def _system(self) -> tuple[Any, str]:
        """File system (fsspec keeps one per process and thread) and the folder's path in it."""
        try:
            return fsspec.core.url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            raise RecordingError(f"cannot open {self.url}: {error}") from error

    def header(self) -> bytes | None:
        """`recording.json`; None where there is none."""
        system, root = self._system
        path = f"{root}/{HEADER_FILE}"
        return self._read(path, MAX_RECORDING_JSON_BYTES) if system.isfile(path) else None

    def manifests(self) -> dict[str, bytes]:
        """Every manifest by file name, sorted."""
        system, root = self._system
        if not system.isdir(root):
            return {}
        listed = system.ls(root, detail=False, refresh=True)
        names = sorted({str(path).rstrip("/").rsplit("/", 1)[-1] for path in listed})
        found = [name for name in names if MANIFEST_NAME.fullmatch(name)]
        return {name: self._read(f"{root}/{name}", MAX_MANIFEST_BYTES) for name in found}

    def shard(self, entry: Entry) -> Path:
        """The shard in the local cache, downloaded whole if it is not there.

        Raises:
            CorruptShard: it is missing, or not what the manifest says.
            OSError: the cache's disk is full, or the network failed.
        """
        path = self.cached(entry)
        if not path.exists():
            self._download(entry, path)
        return path

    def cached(self, entry: Entry) -> Path:
        """Where the cache keeps the shard of an entry, be it there or not."""
        return cache_folder() / "shards" / entry.xxh3[:2] / f"{entry.xxh3}.safetensors"

    def digest(self, entry: Entry) -> ShardDigest:
        """Size and hash of the shard as it is behind the URL now, past the cache.

        Raises:
            CorruptShard: it is missing.
        """
        system, root = self._system
        digest, size = xxhash.xxh3_128(), 0
        try:
            with system.open(f"{root}/{entry.file}", "rb") as file:
                while chunk := file.read(CHUNK):
                    digest.update(chunk)
                    size += len(chunk)
        except FileNotFoundError as error:
            raise self._corrupt(entry, "the file is missing") from error
        return ShardDigest(size, digest.hexdigest())

    def upload(self, path: Path, name: str) -> None:
        """Store a local file under a name of the recording; it counts by its manifest line."""
        system, root = self._system
        system.makedirs(f"{root}/{name}".rsplit("/", 1)[0], exist_ok=True)
        system.put_file(str(path), f"{root}/{name}")

    def replace(self, path: Path, name: str) -> None:
        """Store a local file under a name that may exist; readers see the old or the new one."""
        system, root = self._system
        partial = f"{root}/.{name}.partial"
        self.upload(path, f".{name}.partial")
        system.mv(partial, f"{root}/{name}")

    def size(self, name: str) -> int:
        """Bytes of a file of the recording as it is now; 0 where there is none."""
        system, root = self._system
        system.invalidate_cache(root)
        return int(system.size(f"{root}/{name}")) if system.isfile(f"{root}/{name}") else 0

    def _read(self, path: str, limit: int) -> bytes:
        system, _ = self._system
        system.invalidate_cache(path.rsplit("/", 1)[0])
        check_size(int(system.size(path) or 0), limit, path)
        content = bytes(system.cat_file(path))
        check_size(len(content), limit, path)  # servers need not tell the size before
        return content

    def _download(self, entry: Entry, path: Path) -> None:
        """Fetch a shard under a temporary name, check it, and give it its name."""
        system, root = self._system
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(path.parent)
        if (free := shutil.disk_usage(path.parent).free) < entry.bytes:
            raise OSError(
                f"shard {self.url}/{entry.file} has {entry.bytes} bytes, the cache's disk "
                f"{path.parent} has {free} free; delete cached shards, or set {CACHE_VARIABLE} to "
                "a folder on another disk."
            )
        descriptor, name = tempfile.mkstemp(prefix=".", suffix=".partial", dir=path.parent)
        os.close(descriptor)
        partial = Path(name)
        try:
            remote = f"{root}/{entry.file}"
            if not system.isfile(remote):
                raise self._corrupt(entry, "the file is missing")
            if (size := int(system.size(remote) or entry.bytes)) != entry.bytes:
                raise self._corrupt(entry, f"{size} bytes, the manifest says {entry.bytes}")
            system.get_file(remote, name)
            found = hash_shard(partial)
            if found != ShardDigest(entry.bytes, entry.xxh3):
                problem = f"{found.bytes} bytes with the hash {found.xxh3}"
                raise self._corrupt(
                    entry, f"{problem}, the manifest says {entry.bytes} with {entry.xxh3}"
                )
            partial.chmod(0o444)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    def _corrupt(self, entry: Entry, problem: str) -> CorruptShard:
        return CorruptShard(f"{self.url}/{entry.file}", entry.item, problem)


def _remove_stale(folder: Path) -> None:
    """Remove downloads that killed processes left in a folder of the cache."""
    for partial in folder.glob(".*.partial"):
        try:
            if time.time() - partial.stat().st_mtime > STALE_S:
                partial.unlink()
        except FileNotFoundError:
            continue  # another process has removed it


URL = re.compile(r"[a-z][a-z0-9+.-]*(::[a-z][a-z0-9+.-]*)*://", re.IGNORECASE)


def is_url(place: str | Path) -> bool:
    """Whether a recording's place is for fsspec rather than a folder of this machine."""
    return isinstance(place, str) and URL.match(place) is not None


def storage(place: str | Path) -> "Folder | Remote":
    """The storage of a recording.

    Args:
        place: a folder, or a URL such as `s3://bucket/run`; the package of its protocol (s3fs,
            gcsfs, ...) must be installed.

    Raises:
        RecordingError: a URL that has lost a slash by being made a `Path`.
    """
    if is_url(place):
        return Remote(str(place))
    if isinstance(place, Path) and re.match(r"[a-z][a-z0-9+.-]+:/", str(place)):
        raise RecordingError(f"{place} is a URL turned into a Path; expected a string.")
    return Folder(Path(place))


def exists(place: str | Path) -> bool:
    """Whether there is a recording, begun at least."""
    return storage(place).header() is not None


def read_header(store: "Folder | Remote") -> Header:
    """The header of a recording.

    Raises:
        RecordingError: there is none, it is of a newer schema, or malformed.
    """
    content = store.header()
    if content is None:
        raise RecordingError(
            f"{store.name} has no {HEADER_FILE}; expected a recording, as `foreseer record` writes."
        )
    return Header.parse(content, f"{store.name}/{HEADER_FILE}")


def read_entries(store: "Folder | Remote") -> dict[int, Entry]:
    """Entries of all writers by item; see `manifest.merge_manifests`."""
    return merge_manifests(store.manifests(), store.name)


def refuse_links(folder: Path) -> None:
    """Raise before a folder in which a link could lead writing, moving or removing elsewhere.

    Raises:
        RecordingError: `shards`, a folder in it, or `damaged` is a symbolic link.
    """
    inside = [path for path in folder.glob("shards/**/*") if path.is_dir() or path.is_symlink()]
    for path in (folder / "shards", folder / "damaged", *inside):
        if path.is_symlink() and path.is_dir():
            raise RecordingError(
                f"{path} is a link to another folder, expected a plain one; nothing was changed. "
                "Copy what it leads to into the recording."
            )


class Folder:
    """A recording on a disk of this machine.

    Args:
        path: its folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = str(path)

    def header(self) -> bytes | None:
        """`recording.json`; None where there is none.

        Raises:
            RecordingError: the folder is a file.
        """
        if self.path.exists() and not self.path.is_dir():
            raise RecordingError(f"{self.path} is not a folder; expected one `record` wrote.")
        path = self.path / HEADER_FILE
        return self._read(path, MAX_RECORDING_JSON_BYTES) if path.is_file() else None

    def manifests(self) -> dict[str, bytes]:
        """Every manifest by file name, sorted."""
        found = sorted(p for p in self.path.glob("manifest.*") if MANIFEST_NAME.fullmatch(p.name))
        return {path.name: self._read(path, MAX_MANIFEST_BYTES) for path in found}

    def shard(self, entry: Entry) -> Path:
        """Where the shard of an entry lies, be it there or not.

        Raises:
            RecordingError: a symbolic link leads out of the folder.
        """
        path = self.path / entry.file
        if not path.resolve().is_relative_to(self.path.resolve() / "shards"):
            raise RecordingError(
                f"item {entry.item}: {path} is a link out of the recording; expected a plain file "
                "under shards/. Copy the shard into the recording."
            )
        return path

    def digest(self, entry: Entry) -> ShardDigest:
        """Size and hash of the shard as it is now, after the checks of its header.

        Raises:
            CorruptShard: the file is missing, cut, too long, or its header is not acceptable.
        """
        path = self.shard(entry)
        shard_names(path, entry.item, entry.bytes)
        return hash_shard(path)

    def _read(self, path: Path, limit: int) -> bytes:
        """The bytes of a file of this folder.

        Raises:
            RecordingError: it is a link out of the folder, no plain file, or over the limit.
        """
        if not path.resolve().is_relative_to(self.path.resolve()):
            raise RecordingError(f"{path} is a link out of the recording; expected a plain file.")
        if not path.is_file():
            raise RecordingError(f"{path} is no plain file; it was not written by `record`.")
        check_size(path.stat().st_size, limit, path)
        return path.read_bytes()
