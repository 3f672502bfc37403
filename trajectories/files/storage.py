"""Where a recording lies: a folder of this machine, or a URL.

Both give the same four things: the header's bytes, the manifests' bytes, a local path per shard and
the hash of what is really there.
"""

import re
from pathlib import Path

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
from foreseer.trajectories.files.remote import Remote
from foreseer.trajectories.files.shards import ShardDigest, hash_shard, shard_names

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
