"""Read a recording: its header, its items, their tensors, and whether they are still intact."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor
from tqdm.auto import tqdm

from foreseer.trajectories.files.header import Header as Header
from foreseer.trajectories.files.header import RecordingError as RecordingError
from foreseer.trajectories.files.manifest import Entry
from foreseer.trajectories.files.shards import CorruptShard as CorruptShard
from foreseer.trajectories.files.shards import read_shard, read_slice, shard_names
from foreseer.trajectories.files.storage import Folder, read_entries, read_header, storage
from foreseer.trajectories.files.writer import RecordingWriter as RecordingWriter


class Recording:
    """The finished trajectories of a folder or URL, over the manifests of all ranks.

    Holds no open file, so it can be pickled and used from several processes. Items finished after
    it was opened are not seen. Of a URL, header and manifests are read now, and every shard is
    downloaded whole into the local cache when it is first asked for.

    Args:
        folder: a folder that `RecordingWriter` wrote, or the URL of one.

    Raises:
        RecordingError: not a recording, a newer schema, a malformed header or manifest, a shard
            outside the folder, or one item with two different contents.
    """

    def __init__(self, folder: str | Path) -> None:
        self.store = storage(folder)
        self.folder = self.store.name
        self.header = read_header(self.store)
        self.entries = read_entries(self.store)
        if isinstance(self.store, Folder):
            for entry in self.entries.values():
                self.store.shard(entry)

    def __repr__(self) -> str:
        """What it is of, and how much of it."""
        header = self.header
        taps = ", ".join(header.taps)
        return (
            f"Recording({str(self.folder)!r}: {len(self)} trajectories of {header.num_steps} "
            f"steps, {header.host.get('class', 'an unnamed host')}, taps {taps})"
        )

    def __len__(self) -> int:
        """Number of finished items."""
        return len(self.entries)

    @property
    def items(self) -> list[int]:
        """Numbers of the finished items, sorted."""
        return list(self.entries)

    def meta(self, item: int) -> dict[str, str | int | float]:
        """What was noted with an item (seed, prompt, ...)."""
        return dict(self._entry(item).meta)

    def names(self, item: int) -> list[str]:
        """Names of the tensors of an item, sorted."""
        path, size = self._locate(item)
        return shard_names(path, item, size)

    def load(self, item: int, names: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Tensors of one item, checked against their hashes.

        Args:
            item: number of the item.
            names: tensors to read; None reads all.

        Raises:
            CorruptShard: the file is missing, cut, too long, or a tensor does not match its hash.
            ValueError: the item or a name is not recorded; the message lists what is there.
        """
        path, size = self._locate(item)
        return read_shard(path, names, item, size)

    def load_slice(self, item: int, name: str, index: Any) -> Tensor:
        """`load(item)[name][index]`, reading only that part; its values are not hash-checked."""
        path, size = self._locate(item)
        return read_slice(path, name, index, item, size)

    def stack(self, name: str, items: Iterable[int] | None = None) -> Tensor:
        """One tensor over several items, stacked along a new first axis.

        Args:
            name: tensor name, as in "gram/output".
            items: which items, in this order; None takes all.

        Raises:
            ValueError: no items, an unknown item or name, or shapes that differ.
        """
        chosen = self.items if items is None else list(items)
        if not chosen:
            raise ValueError(f"no items to stack {name!r} over in {self.folder}.")
        tensors = [self.load(item, [name])[name] for item in chosen]
        shapes = {tuple(tensor.shape): item for item, tensor in zip(chosen, tensors, strict=True)}
        if len(shapes) > 1:
            found = ", ".join(f"{shape} (as in item {item})" for shape, item in shapes.items())
            raise ValueError(f"{name!r} cannot be stacked: found shapes {found}, expected one.")
        return torch.stack(tensors)

    def verify(self) -> list[str]:
        """Check size and hash of every shard, past the cache; a message per damaged item."""
        problems = []
        entries = tqdm(self.entries.values(), desc=f"verify {self.folder}", unit="shard", delay=2)
        for entry in entries:
            try:
                self._check(entry)
            except CorruptShard as error:
                problems.append(str(error))
        return problems

    def _check(self, entry: Entry) -> None:
        found = self.store.digest(entry)
        place = f"{self.folder}/{entry.file}"
        if found.bytes != entry.bytes:
            kind = "truncated" if found.bytes < entry.bytes else "has trailing bytes"
            raise CorruptShard(
                place, entry.item, f"{kind}: {found.bytes} bytes, expected {entry.bytes}"
            )
        if found.xxh3 != entry.xxh3:
            problem = f"hash {found.xxh3}, the manifest says {entry.xxh3} (flipped bits)"
            raise CorruptShard(place, entry.item, problem)

    def _entry(self, item: int) -> Entry:
        if item not in self.entries:
            known = self.items
            shown = known if len(known) <= 12 else f"{known[:6]} ... {known[-6:]}"
            raise RecordingError(
                f"item {item} is not recorded in {self.folder}; the {len(known)} items are {shown}."
            )
        return self.entries[item]

    def _locate(self, item: int) -> tuple[Path, int]:
        entry = self._entry(item)
        return self.store.shard(entry), entry.bytes


def split(items: Iterable[int], fractions: Sequence[float], seed: int = 0) -> list[list[int]]:
    """Deal items to parts of round(N * fraction), and at least one, by hashing item and seed.

    Whole trajectories are dealt, never single steps. The first part takes what the others leave;
    items that are added later move only those whose hash lies next to a part's end.

    Args:
        items: item numbers.
        fractions: share of each part, >= 0, summing to 1, as in (0.8, 0.2).
        seed: another seed deals differently.

    Returns:
        One sorted list of items per fraction; empty where its fraction is 0.

    Raises:
        ValueError: a negative fraction, or a sum other than 1.
    """
    if not fractions or min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-9:
        raise ValueError(f"fractions must be >= 0 and sum to 1, got {list(fractions)}.")
    rest = sorted(
        items, key=lambda item: xxhash.xxh3_64_intdigest(f"foreseer split {seed} {item}".encode())
    )
    total, parts = len(rest), []
    for fraction in reversed(fractions[1:]):
        count = max(1, round(total * fraction)) if fraction > 0 else 0
        place = max(0, len(rest) - count)
        rest, part = rest[:place], rest[place:]
        parts.append(sorted(part))
    return [sorted(rest), *reversed(parts)]
