"""Recordings made apart join to the one a single recorder would have written."""

from pathlib import Path

import pytest
from recording_cases import record, small_header, trajectory

from foreseer.cli import main
from foreseer.trajectories.files.header import RecordingError
from foreseer.trajectories.files.repair import merge
from foreseer.trajectories.files.writer import RecordingWriter
from foreseer.trajectories.recording import CorruptShard, Recording


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    """Three recordings with items in common, as of three machines with disks of their own."""
    for rank, items in enumerate(([0, 3, 6], [1, 4], [2, 4, 5])):
        record(tmp_path / f"part-{rank}", items, rank=rank)
    return [tmp_path / f"part-{rank}" for rank in range(3)]


def facts(folder: Path | str) -> dict[int, tuple]:
    entries = Recording(folder).entries
    return {item: (e.xxh3, e.bytes, e.meta) for item, e in entries.items()}


def test_the_whole_is_what_one_recorder_writes_in_any_order(
    parts: list[Path], tmp_path: Path
) -> None:
    record(tmp_path / "whole", range(7))
    assert merge(tmp_path / "forth", parts) == 7
    assert merge(tmp_path / "back", parts[::-1]) == 7
    for name in ("forth", "back"):
        assert facts(tmp_path / name) == facts(tmp_path / "whole")
        assert Recording(tmp_path / name).verify() == []


def test_merging_again_adds_what_is_new_only(parts: list[Path], tmp_path: Path) -> None:
    assert merge(tmp_path / "all", parts[:2]) == 5
    assert merge(tmp_path / "all", parts) == 2
    assert merge(tmp_path / "all", [*parts, tmp_path / "all"]) == 0
    record(tmp_path / "all", [7])  # recording goes on in the merged folder
    assert Recording(tmp_path / "all").items == list(range(8))


def test_shards_are_linked_on_one_disk(parts: list[Path], tmp_path: Path) -> None:
    merge(tmp_path / "all", parts)
    here, there = (f / "shards/00000/item-000003.safetensors" for f in (tmp_path / "all", parts[0]))
    assert here.samefile(there)


def test_they_are_copied_where_links_are_not_possible(
    parts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr("os.link", refuse)
    assert merge(tmp_path / "all", parts) == 7
    here, there = (f / "shards/00000/item-000003.safetensors" for f in (tmp_path / "all", parts[0]))
    assert not here.samefile(there) and here.read_bytes() == there.read_bytes()


def test_to_and_from_urls(
    parts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORESEER_CACHE", str(tmp_path / "cache"))
    url = f"memory://{tmp_path.name}"
    assert merge(url, parts) == 7
    assert merge(tmp_path / "back", [url]) == 7
    assert facts(tmp_path / "back") == facts(url)


def test_another_recipe_is_not_mixed_in(parts: list[Path], tmp_path: Path) -> None:
    other = small_header(recipe={"guidance_scale": 5.0})
    with RecordingWriter(tmp_path / "other", other) as writer:
        writer.write(9, trajectory(9), {})
    with pytest.raises(RecordingError, match="part-0 was recorded|other was recorded"):
        merge(tmp_path / "all", [parts[0], tmp_path / "other"])
    assert not (tmp_path / "all").exists()
    merge(tmp_path / "all", parts)
    with pytest.raises(RecordingError, match="all was recorded with another recipe"):
        merge(tmp_path / "all", [tmp_path / "other"])


def test_one_item_with_two_contents_is_named_and_nothing_of_it_added(
    parts: list[Path], tmp_path: Path
) -> None:
    merge(tmp_path / "all", parts[:1])
    with RecordingWriter(tmp_path / "other", small_header()) as writer:
        writer.write(8, trajectory(8), {})
        writer.write(3, trajectory(33), {})
    with pytest.raises(RecordingError, match=r"hold the items \[3\] with different content"):
        merge(tmp_path / "all", [tmp_path / "other"])
    assert Recording(tmp_path / "all").items == [0, 3, 6]


def test_a_damaged_shard_is_named_and_what_came_before_it_stays(
    parts: list[Path], tmp_path: Path
) -> None:
    path = parts[1] / "shards/00001/item-000004.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.chmod(0o644)
    path.write_bytes(content)
    with pytest.raises(CorruptShard, match=r"item-000004\.safetensors \(item 4\)"):
        merge(tmp_path / "all", parts)
    assert Recording(tmp_path / "all").items == [0, 1, 3, 6]
    merge(tmp_path / "all", [parts[0], parts[2]])  # whose item 4 is whole
    assert Recording(tmp_path / "all").items == list(range(7))


def test_the_command_tells_what_it_added(
    parts: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = "[" + ",".join(map(str, parts)) + "]"
    main(["merge", "--out", str(tmp_path / "all"), "--recordings", given])
    assert "7 trajectories added from 3 recordings, 7 in all" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no recordings were given"):
        merge(tmp_path / "all", [])
