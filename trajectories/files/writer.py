"""Append trajectories to a recording: resumable, one writer per rank, only whole items count."""

import errno
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import xxhash
from filelock import FileLock, Timeout
from torch import Tensor

from foreseer.trajectories.files.header import (
    HEADER_FILE,
    MAX_INT,
    Header,
    RecordingError,
    canonical_json,
)
from foreseer.trajectories.files.manifest import (
    Entry,
    append_entry,
    cut_half_line,
    manifest_path,
    meta_problem,
)
from foreseer.trajectories.files.shards import ShardDigest, copy_shard, sync_folder, write_shard
from foreseer.trajectories.files.storage import (
    Folder,
    Remote,
    cache_folder,
    is_url,
    read_entries,
    read_header,
    refuse_links,
)

TENSOR_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*")
TAP_PREFIXES = ("gram", "feature")
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


class RecordingWriter:
    """Context manager that adds finished trajectories to a recording folder.

    Several ranks may write to one folder at the same time, each with its own manifest and shard
    folder; no rank waits for another. After a kill the same call goes on where it stopped.

    Args:
        folder: recording folder; created when it does not exist.
        header: what is recorded; must equal that of an existing recording.
        rank: number of this writer, >= 0.

    Raises:
        ValueError: `rank` is negative.
    """

    def __init__(self, folder: str | Path, header: Header, rank: int = 0) -> None:
        if rank < 0:
            raise ValueError(f"rank must be >= 0, got {rank}.")
        self.folder = Path(folder)
        self.store: Folder | Remote = Folder(self.folder)
        self.header = header
        self.rank = rank
        self._shards = self.folder / "shards" / f"{rank:05d}"
        self._done: set[int] = set()
        self._lock = FileLock(self.folder / f"rank-{rank:05d}.lock", timeout=0)

    def __enter__(self) -> "RecordingWriter":
        """Lock the rank, claim the folder for this header and repair what a kill left.

        Raises:
            RuntimeError: another recorder is at work on this folder and rank.
            RecordingError: the folder holds another recording, or a damaged one.
        """
        if self.folder.exists() and not self.folder.is_dir():
            raise RecordingError(f"{self.folder} is a file; expected a folder to record into.")
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire()
        except Timeout as error:
            raise RuntimeError(
                f"another recorder is at work on {self.folder} as rank {self.rank}; wait for it, "
                "or give each recorder its own rank."
            ) from error
        try:
            self._prepare()
            self._done = self.done()
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        """Free the rank for the next recorder."""
        self._lock.release()

    def done(self) -> set[int]:
        """Items that are finished, over the manifests of all ranks."""
        return set(self.entries())

    def entries(self) -> dict[int, Entry]:
        """What the manifests of all ranks say of the finished items."""
        return read_entries(self.store)

    def write(
        self, item: int, tensors: Mapping[str, Tensor], meta: Mapping[str, str | int | float]
    ) -> None:
        """Store one trajectory; it counts once its manifest line is on disk.

        Args:
            item: number of the trajectory, >= 0, not recorded before.
            tensors: by name; `gram/<tap>` and `feature/<tap>` name a tap of the header, and
                `gram/<tap>/<name>` a partition of its recipe.
            meta: small facts (seed, prompt, ...) for the index.

        Raises:
            RuntimeError: the writer was not entered with `with`.
            ValueError: a bad or repeated item, name or meta value, or a tensor with NaN or Inf;
                nothing is written and earlier items are safe.
            OSError: the disk is full; nothing of this item is left.
        """
        self._check_item(item, dict(meta))
        for name, tensor in tensors.items():
            self._check_tensor(item, name, tensor)
        metadata = {"item": str(item), "meta": canonical_json(dict(meta))}
        on_cpu = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
        self._store(item, dict(meta), lambda path: write_shard(path, on_cpu, metadata))

    def adopt(self, entry: Entry, source: Path) -> None:
        """Add the finished trajectory of another recording; it counts as if written here.

        Args:
            entry: its line there.
            source: its shard; linked rather than copied where the disk is the same.

        Raises:
            RuntimeError: the writer was not entered with `with`.
            ValueError: the item is already recorded.
            CorruptShard: the shard is not what its line says; nothing is written.
            OSError: the disk is full; nothing of this item is left.
        """
        self._check_item(entry.item, entry.meta)
        expected = ShardDigest(entry.bytes, entry.xxh3)
        self._store(
            entry.item, entry.meta, lambda path: copy_shard(source, path, entry.item, expected)
        )

    def _store(
        self,
        item: int,
        meta: dict[str, str | int | float],
        make: Callable[[Path], ShardDigest],
    ) -> None:
        """Make the shard of an item, then its line; on failure nothing of it is left."""
        path = self._shards / f"item-{item:06d}.safetensors"
        try:
            digest = make(path)
            file = path.relative_to(self.folder).as_posix()
            entry = Entry(item=item, file=file, xxh3=digest.xxh3, bytes=digest.bytes, meta=meta)
            try:
                self._commit(path, entry)
            except BaseException:
                path.unlink()
                raise
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            raise OSError(
                error.errno,
                f"disk full while writing item {item}: {len(self._done)} finished items are safe "
                "and nothing half-written is left. Free some space and run the same command again "
                "to resume",
                str(self.folder),
            ) from error
        self._done.add(item)

    def _commit(self, path: Path, entry: Entry) -> None:
        """Make a shard count; on failure the manifest is as before."""
        append_entry(manifest_path(self.folder, self.rank), entry)

    def _prepare(self) -> None:
        """Claim the folder for the header and repair what a kill left; the rank is locked."""
        self._claim_folder()
        self._repair()

    def _claim_folder(self) -> None:
        """Write the header on first use; otherwise insist on the same one."""
        with FileLock(self.folder / "recording.lock"):  # ranks that start together
            if self.store.header() is not None:
                self.header.check_same(read_header(self.store), self.store.name)
            elif self.store.manifests():
                raise RecordingError(
                    f"{self.store.name} has manifests but no {HEADER_FILE}; restore that file, or "
                    "record into a new folder."
                )
            else:
                self._write_header()

    def _write_header(self) -> None:
        self.header.write(self.folder)

    def _repair(self) -> None:
        """Create this rank's files and remove what a killed recorder of this rank left.

        Raises:
            RecordingError: a folder in the recording is a link.
        """
        refuse_links(self.folder)
        self._shards.mkdir(parents=True, exist_ok=True)
        for stale in self._shards.glob(".*.partial"):
            stale.unlink()
        manifest = manifest_path(self.folder, self.rank)
        manifest.touch()
        cut_half_line(manifest)
        for folder in (self._shards.parent, self.folder):
            sync_folder(folder)

    def _check_item(self, item: int, meta: dict[str, str | int | float]) -> None:
        if not self._lock.is_locked:
            raise RuntimeError(
                "RecordingWriter holds no lock; use it as `with RecordingWriter(...)`."
            )
        if not 0 <= item < MAX_INT:
            raise ValueError(f"item must be >= 0, got {item}.")
        if item in self._done:
            raise ValueError(
                f"item {item} is already recorded in {self.store.name}; skip what done() lists."
            )
        if problem := meta_problem(meta):
            raise ValueError(f"item {item}: {problem}")

    def _check_tensor(self, item: int, name: str, tensor: Tensor) -> None:
        if not TENSOR_NAME.fullmatch(name) or name == "__metadata__":
            raise ValueError(
                f"item {item}: tensor name {name!r}; expected letters, digits, '_', '.', '-' and "
                "'/' between parts."
            )
        kind, _, tap = name.partition("/")
        known = [*self.header.taps, *self.header.recipe.get("partitions", {})]
        if kind in TAP_PREFIXES and tap not in known:
            raise ValueError(
                f"item {item}: tensor {name!r} names no recorded tap; they are {known}."
            )
        if tensor.is_floating_point() and not _all_finite(tensor):
            raise ValueError(
                f"item {item}: tensor {name!r} holds NaN or Inf, {_first_bad(kind, tensor)}. "
                f"Nothing of the item was written; {len(self._done)} finished items are safe."
            )


def _all_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or Inf: the extremes show both, 13 times as fast as `isfinite`."""
    return not tensor.numel() or all(bool(value.isfinite()) for value in tensor.aminmax())


def _first_bad(kind: str, tensor: Tensor) -> str:
    """Where a tensor with bad values goes wrong first: the step for the kinds that have one."""
    places = (~tensor.isfinite()).nonzero()
    if kind == "gram":  # entry (i, j) is bad if step i or step j is
        return f"first at step {int(places[:, 1:].amax(dim=1).min())}"
    if kind in ("feature", "states"):
        return f"first at step {int(places[:, 1 if kind == 'feature' else 0].min())}"
    return f"first at index {tuple(places[0].tolist())}"


def open_writer(out: str | Path, header: Header, rank: int) -> RecordingWriter:
    """The writer for a folder or a URL; see `RecordingWriter`."""
    if is_url(out):
        return UploadingWriter(str(out), header, rank)
    return RecordingWriter(out, header, rank)


class UploadingWriter(RecordingWriter):
    """A `RecordingWriter` for a URL; the disk holds one trajectory at a time.

    What is behind the URL is the truth: staged files of an earlier run are thrown away, and an item
    counts once its manifest line is there. The lock is this machine's, since object stores have
    none; a second recorder of the same rank elsewhere is noticed when the manifest has changed.

    Args:
        url: address of the recording.
        header: see `RecordingWriter`.
        rank: see `RecordingWriter`.
    """

    def __init__(self, url: str, header: Header, rank: int = 0) -> None:
        remote = Remote(url)
        name = xxhash.xxh3_64(remote.url.encode()).hexdigest()
        super().__init__(cache_folder() / "staging" / name / f"{rank:05d}", header, rank)
        self.store: Remote = remote
        self._manifest = manifest_path(self.folder, rank)
        self._sent = 0  # bytes of the manifest behind the URL

    def _prepare(self) -> None:
        """Start from what is behind the URL.

        Raises:
            RecordingError: there is another recording, or a damaged one.
        """
        for stale in (*self.folder.glob("manifest.*"), self.folder / HEADER_FILE):
            stale.unlink(missing_ok=True)
        shutil.rmtree(self.folder / "shards", ignore_errors=True)
        manifests = self.store.manifests()
        if (content := manifests.get(self._manifest.name)) is not None:
            self._manifest.write_bytes(content)
            self._sent = len(content)
        super()._prepare()

    def _write_header(self) -> None:
        super()._write_header()
        self.store.replace(self.folder / HEADER_FILE, HEADER_FILE)

    def _commit(self, path: Path, entry: Entry) -> None:
        """Send the shard, then the manifest with its line.

        Raises:
            RuntimeError: another recorder has changed the manifest meanwhile.
        """
        if (found := self.store.size(self._manifest.name)) != self._sent:
            raise RuntimeError(
                f"{self.store.url}/{self._manifest.name} has {found} bytes, expected {self._sent}: "
                f"another recorder is at work as rank {self.rank}; give each its own rank."
            )
        self.store.upload(path, entry.file)
        before = self._manifest.stat().st_size
        super()._commit(path, entry)
        try:
            self.store.replace(self._manifest, self._manifest.name)
        except BaseException:
            os.truncate(self._manifest, before)
            raise
        self._sent = self._manifest.stat().st_size
        path.unlink()
