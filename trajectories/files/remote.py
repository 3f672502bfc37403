"""A recording behind a URL that fsspec opens, with a local cache of whole shards.

Shards are downloaded whole, once, and kept under their hash, so that a cached file can neither be
stale nor half. fsspec's own file cache writes in place: a killed download stays behind as a hit
(fsspec 2026.9, `implementations/cached.py`).
"""

import os
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
    RecordingError,
    check_size,
)
from foreseer.trajectories.files.manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, Entry
from foreseer.trajectories.files.shards import CorruptShard, ShardDigest, hash_shard

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
