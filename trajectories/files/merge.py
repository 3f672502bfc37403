"""Join recordings that were made apart, on disks or machines of their own."""

from collections.abc import Sequence
from pathlib import Path

from tqdm.auto import tqdm

from foreseer.trajectories.files.header import RecordingError
from foreseer.trajectories.files.uploads import open_writer
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
