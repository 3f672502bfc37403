"""Record straight to a URL: every trajectory is staged on this disk, sent, and removed again."""

import os
import shutil
from pathlib import Path

import xxhash

from foreseer.trajectories.files.header import HEADER_FILE, Header
from foreseer.trajectories.files.manifest import Entry, manifest_path
from foreseer.trajectories.files.remote import Remote, cache_folder
from foreseer.trajectories.files.storage import is_url
from foreseer.trajectories.files.writer import RecordingWriter


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
