"""`verify --repair` leaves whole trajectories only, deletes nothing, and the rest is redone."""

import json
from pathlib import Path

import pytest
from recording_cases import record, small_header
from test_faults_recording import contents

from foreseer.cli import main
from foreseer.trajectories.files.header import RecordingError
from foreseer.trajectories.files.repair import leftovers, repair
from foreseer.trajectories.files.writer import RecordingWriter
from foreseer.trajectories.recording import Recording

pytestmark = pytest.mark.fault


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    record(tmp_path / "run", range(4))
    return tmp_path / "run"


def shard(folder: Path, item: int) -> Path:
    return folder / f"shards/00000/item-{item:06d}.safetensors"


def spoil(path: Path, content: bytes) -> None:
    path.chmod(0o644)
    path.write_bytes(content)


def drop_line(folder: Path, item: int) -> None:
    manifest = folder / "manifest.00000.jsonl"
    lines = manifest.read_text().splitlines(keepends=True)
    manifest.write_text("".join(line for line in lines if json.loads(line)["item"] != item))


def test_an_intact_recording_is_left_alone(folder: Path) -> None:
    before = contents(folder)
    assert repair(folder) == []
    assert contents(folder) == before and not (folder / "damaged").exists()


def test_damaged_and_missing_shards_are_taken_out_and_redone(folder: Path) -> None:
    before = contents(folder)
    spoil(shard(folder, 1), shard(folder, 1).read_bytes()[:-9])
    flipped = bytearray(shard(folder, 2).read_bytes())
    flipped[-1] ^= 1
    spoil(shard(folder, 2), flipped)
    shard(folder, 3).unlink()
    changes = repair(folder)
    assert ["dropped line"] * 3 == [change[:12] for change in changes]
    assert Recording(folder).items == [0] and Recording(folder).verify() == []
    aside = folder / "damaged/shards/00000"
    assert {p.name for p in aside.glob("*")} == {shard(folder, 1).name, shard(folder, 2).name}
    assert len((folder / "damaged/manifest.00000.jsonl").read_text().splitlines()) == 3
    assert repair(folder) == []
    record(folder, range(4))
    assert contents(folder) == before


def test_a_whole_shard_without_a_line_is_adopted_with_its_meta(folder: Path) -> None:
    before = contents(folder)
    drop_line(folder, 2)
    assert leftovers(folder, Recording(folder).entries.values()) == [shard(folder, 2)]
    assert repair(folder) == [
        "adopted shards/00000/item-000002.safetensors as item 2",
    ]
    assert contents(folder) == before
    assert Recording(folder).meta(2) == {"seed": 1002, "prompt": "cat 2"}


@pytest.mark.parametrize(
    "line", ["{", "null", '{"item":1}', '{"item":1,"item":1}', "\0", "x" * 99999]
)
def test_malformed_lines_are_taken_out_and_their_shards_adopted(folder: Path, line: str) -> None:
    before = contents(folder)
    manifest = folder / "manifest.00000.jsonl"
    lines = manifest.read_text().splitlines()
    manifest.write_text("\n".join([lines[0], line, *lines[2:]]) + "\n")
    with pytest.raises(RecordingError, match="line 2"):
        Recording(folder)
    assert len(repair(folder)) == 2
    assert contents(folder) == before


def test_an_item_listed_twice_keeps_its_first_shard(folder: Path) -> None:
    before = contents(folder)
    record(folder.parent / "other", [5], rank=1)
    other = folder.parent / "other/shards/00001/item-000005.safetensors"
    target = folder / "shards/00001/item-000001.safetensors"
    target.parent.mkdir()
    target.write_bytes(other.read_bytes())
    entry = json.loads((folder.parent / "other/manifest.00001.jsonl").read_text())
    entry |= {"item": 1, "file": target.relative_to(folder).as_posix()}
    (folder / "manifest.00001.jsonl").write_text(json.dumps(entry) + "\n")
    with pytest.raises(RecordingError, match="item 1 was recorded twice"):
        Recording(folder)
    assert "listed before, as shards/00000" in repair(folder)[0]
    assert not target.exists()
    target.parent.rmdir()
    assert contents(folder) == before


def test_strange_files_and_half_written_ones_are_put_away(folder: Path) -> None:
    before = contents(folder)
    place = folder / "shards/00000"
    (place / ".item-000009.safetensors.partial").write_bytes(b"half")
    (folder / ".recording.json.partial").write_bytes(b"half")
    (place / "notes.txt").write_text("mine")
    (place / "item-000001.safetensors.bak").write_bytes(b"")
    (place / "item-000008.safetensors").symlink_to(folder / "recording.json")
    changes = repair(folder)
    assert len(changes) == 5
    assert (folder / "damaged/shards/00000/notes.txt").read_text() == "mine"
    assert contents(folder) == before and repair(folder) == []


def test_a_recorder_at_work_is_not_repaired_under_its_hands(folder: Path) -> None:
    with RecordingWriter(folder, small_header(), rank=3):
        with pytest.raises(RuntimeError, match="a recorder is at work on .* as rank 3"):
            repair(folder)
    assert repair(folder) == []


def test_what_cannot_be_repaired_says_so(folder: Path) -> None:
    with pytest.raises(RecordingError, match="s3://b/run is a URL, expected a folder"):
        repair("s3://b/run")
    (folder / "recording.json").write_text("{")
    with pytest.raises(RecordingError, match="recording.json is not JSON"):
        repair(folder)


def test_the_command_repairs_reports_and_exits_well(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(shard(folder, 1), b"")
    drop_line(folder, 3)
    with pytest.raises(SystemExit, match="1"):
        main(["verify", str(folder)])
    printed = capsys.readouterr().out
    assert "1 of 3 trajectories damaged" in printed and "1 files belong to no finished" in printed
    main(["verify", "--repair", str(folder)])
    printed = capsys.readouterr().out
    assert "dropped line 2 of manifest.00000.jsonl" in printed and "adopted" in printed
    assert (
        "changes made: 2" in printed
        and "lies in" in printed
        and "0 of 3 trajectories damaged" in printed
    )


@pytest.mark.parametrize("words", [["--repair"], ["--repair", "true"], ["--repair=true"]])
def test_repair_needs_no_value(folder: Path, words: list[str]) -> None:
    spoil(shard(folder, 1), b"")
    main(["verify", str(folder), *words])
    assert Recording(folder).items == [0, 2, 3]


def test_repair_can_be_switched_off(folder: Path) -> None:
    spoil(shard(folder, 1), b"")
    with pytest.raises(SystemExit):
        main(["verify", str(folder), "--repair", "false"])


def test_a_link_leads_neither_repair_nor_record_out_of_the_folder(folder: Path) -> None:
    mine = folder.parent / "mine"
    mine.mkdir()
    for name in (".notes.partial", "item-000009.safetensors"):
        (mine / name).write_text("mine")
    line = json.loads((folder / "manifest.00000.jsonl").read_text().splitlines()[0])
    line |= {"item": 9, "file": "shards/00007/item-000009.safetensors"}
    (folder / "manifest.00007.jsonl").write_text(json.dumps(line) + "\n")
    for place in ("shards/00007", "shards/00000/deeper", "damaged"):
        (folder / place).symlink_to(mine)
        with pytest.raises(RecordingError, match="is a link to another folder"):
            repair(folder)
        (folder / "manifest.00007.jsonl").rename(folder.parent / "aside")
        with pytest.raises(RecordingError, match="is a link to another folder"):
            record(folder, [10], rank=7)
        (folder.parent / "aside").rename(folder / "manifest.00007.jsonl")
        (folder / place).unlink()
    assert {p.name: p.read_text() for p in mine.iterdir()} == {
        ".notes.partial": "mine",
        "item-000009.safetensors": "mine",
    }


def test_a_strange_manifest_name_is_no_manifest(folder: Path) -> None:
    (folder / "manifest.mine.jsonl").write_text("notes")
    assert repair(folder) == [] and len(Recording(folder)) == 4
