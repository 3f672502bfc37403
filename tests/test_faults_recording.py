"""A recording survives kills, full disks and bad values, and never trusts a damaged folder."""

import errno
import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from recording_cases import STEPS, record, small_header, trajectory

from foreseer.trajectories.files import shards
from foreseer.trajectories.recording import CorruptShard, Recording, RecordingError, RecordingWriter

pytestmark = pytest.mark.fault


def contents(folder: Path) -> dict[str, bytes]:
    """Bytes of every shard, and the manifest lines in item order."""
    files = {p.name: p.read_bytes() for p in folder.glob("shards/*/*")}
    lines = (folder / "manifest.00000.jsonl").read_bytes().splitlines()
    return {**files, "lines": b"\n".join(sorted(lines, key=lambda line: json.loads(line)["item"]))}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The same items recorded in one go."""
    from recording_crash import record_rest

    folder = tmp_path_factory.mktemp("whole")
    record_rest(folder)
    return contents(folder)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    record(tmp_path / "run", range(4))
    return tmp_path / "run"


@pytest.fixture(scope="module")
def crashed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict]]:
    """Recordings that were killed and resumed, and what was seen after each kill."""
    folder = tmp_path_factory.mktemp("crashed")
    script = Path(__file__).with_name("recording_crash.py")
    command = [sys.executable, str(script), str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return folder, json.loads(result.stdout)


def test_ten_kills_at_random_moments_change_nothing(
    crashed: tuple[Path, dict[str, dict]], uninterrupted: dict[str, bytes]
) -> None:
    folder, report = crashed
    seen = [state for name, state in report.items() if name.startswith("random")]
    assert len(seen) == 10
    assert any(state["partial"] or state["unlisted"] or state["half_line"] for state in seen)
    assert max(state["finished"] for state in seen) > 0
    for resumed in folder.glob("random-*"):
        assert contents(resumed) == uninterrupted
        assert Recording(resumed).verify() == []


@pytest.mark.parametrize(
    ("stage", "left"),
    [
        ("before_rename", {"partial": 1, "unlisted": 0, "half_line": 0}),
        ("before_folder_sync", {"partial": 0, "unlisted": 1, "half_line": 0}),
        ("before_line", {"partial": 0, "unlisted": 1, "half_line": 0}),
        ("in_line", {"partial": 0, "unlisted": 1, "half_line": 1}),
    ],
)
def test_a_kill_at_each_stage_of_writing_is_repaired(
    crashed: tuple[Path, dict[str, dict]],
    uninterrupted: dict[str, bytes],
    stage: str,
    left: dict[str, int],
) -> None:
    folder, report = crashed
    assert report[stage] == {"killed": True, **left, "finished": 2}
    assert contents(folder / stage) == uninterrupted


def test_a_half_written_line_is_not_read_and_its_item_redone(folder: Path) -> None:
    before, manifest = contents(folder), folder / "manifest.00000.jsonl"
    manifest.write_bytes(manifest.read_bytes()[:-20])
    assert Recording(folder).items == [0, 1, 2]
    record(folder, range(4))
    assert contents(folder) == before


def test_a_second_recorder_of_the_same_rank_is_refused(folder: Path) -> None:
    with RecordingWriter(folder, small_header()) as first:
        with (
            pytest.raises(RuntimeError, match="another recorder is at work on .* as rank 0"),
            RecordingWriter(folder, small_header()),
        ):
            pass
        first.write(4, trajectory(4), {})
        record(folder, [5], rank=1)
    record(folder, [6])
    assert Recording(folder).items == [0, 1, 2, 3, 4, 5, 6]


def test_another_process_is_refused_too_and_a_kill_frees_the_lock(folder: Path) -> None:
    code = (
        "import sys, os, signal\nfrom recording_cases import *\n"
        "with RecordingWriter(sys.argv[1], small_header()):\n"
        "    print('locked', flush=True); sys.stdin.read()\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([p for p in sys.path if p])}
    with subprocess.Popen(
        [sys.executable, "-c", code, str(folder)],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "locked\n"
        with pytest.raises(RuntimeError, match="another recorder"):
            record(folder, [4])
        holder.kill()
        holder.wait()
    record(folder, [4])
    assert Recording(folder).items == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("keep", [0, 7, 500, -8])
def test_a_truncated_shard_is_named_and_the_others_stay_readable(folder: Path, keep: int) -> None:
    path = folder / "shards/00000/item-000002.safetensors"
    content = path.read_bytes()[:keep]
    path.unlink()
    path.write_bytes(content)
    recording = Recording(folder)
    with pytest.raises(CorruptShard, match=r"item-000002\.safetensors \(item 2\): truncated"):
        recording.load(2)
    assert len(recording.verify()) == 1 and "(item 2): truncated" in recording.verify()[0]
    assert torch.equal(recording.load(1)["final"], trajectory(1)["final"])


def test_a_missing_shard_is_named(folder: Path) -> None:
    (folder / "shards/00000/item-000002.safetensors").unlink()
    with pytest.raises(CorruptShard, match=r"\(item 2\): the file is missing"):
        Recording(folder).load(2)


def test_the_advice_for_a_corrupt_shard_works(folder: Path) -> None:
    before, manifest = contents(folder), folder / "manifest.00000.jsonl"
    path = folder / "shards/00000/item-000002.safetensors"
    path.chmod(0o644)
    path.write_bytes(b"")
    lines = manifest.read_text().splitlines(keepends=True)
    manifest.write_text("".join(line for line in lines if json.loads(line)["item"] != 2))
    record(folder, range(4))
    assert contents(folder) == before


@pytest.mark.parametrize("place", [30, 1500, -1])
def test_a_flipped_bit_is_found_by_verify(folder: Path, place: int) -> None:
    path = folder / "shards/00000/item-000001.safetensors"
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.chmod(0o644)
    path.write_bytes(content)
    problems = Recording(folder).verify()
    assert len(problems) == 1 and "(item 1)" in problems[0]


@pytest.mark.parametrize(
    "name",
    [
        "../outside.safetensors",
        "shards/../../outside.safetensors",
        "shards/./x",
        "shards//x",
        "/etc/passwd",
        "C:/x",
        "shards/C:x",
        "shards\\x",
        "shards/a\\..\\x",
        "shards/a\0b",
        "shards/a\n",
        "shards",
        "recording.json",
        "",
        7,
    ],
)
def test_a_manifest_cannot_point_outside_the_shards(folder: Path, name: str) -> None:
    (folder.parent / "outside.safetensors").write_bytes(b"secret")
    entry = {"item": 9, "file": name, "xxh3": "0" * 32, "bytes": 6, "meta": {}}
    (folder / "manifest.00007.jsonl").write_text(json.dumps(entry) + "\n")
    with pytest.raises(RecordingError, match="line 1: file is .* plain path under shards/"):
        Recording(folder)


def test_a_link_that_leaves_the_folder_is_refused(folder: Path) -> None:
    path = folder / "shards/00000/item-000001.safetensors"
    path.rename(folder.parent / "elsewhere")
    path.symlink_to(folder.parent / "elsewhere")
    with pytest.raises(RecordingError, match="item 1: .* is a link out of the recording"):
        Recording(folder)


@pytest.mark.parametrize("line", ["{", "[]", "null", "{}", '{"item": 1}', "[" * 100_000, "\0" * 40])
def test_a_malformed_line_is_refused_with_its_number(folder: Path, line: str) -> None:
    with open(folder / "manifest.00000.jsonl", "a") as file:
        file.write(line + "\n")
    with pytest.raises(RecordingError, match=r"manifest\.00000\.jsonl, line 5"):
        Recording(folder)


@pytest.mark.parametrize(
    ("name", "place", "message"),
    [
        ("feature/output", (1, 3, 2, 0), "first at step 3"),
        ("states", (5, 0, 1, 1), "first at step 5"),
        ("final", (2, 0, 1), r"first at index \(2, 0, 1\)"),
    ],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_value_names_tensor_item_and_step(
    folder: Path, name: str, place: tuple[int, ...], message: str, value: float
) -> None:
    tensors = trajectory(4)
    tensors[name][place] = value
    before = contents(folder)
    with RecordingWriter(folder, small_header()) as writer:
        with pytest.raises(
            ValueError, match=f"item 4: tensor '{name}' holds NaN or Inf, {message}"
        ):
            writer.write(4, tensors, {})
        assert contents(folder) == before
        writer.write(5, trajectory(5), {})
    assert Recording(folder).items == [0, 1, 2, 3, 5]


def test_a_bad_feature_is_dated_by_its_gram(folder: Path) -> None:
    feature = torch.randn(2, STEPS, 24, dtype=torch.float64)
    feature[1, 3] = float("nan")
    gram = torch.einsum("bik,bjk->bij", feature, feature)
    with RecordingWriter(folder, small_header()) as writer:
        with pytest.raises(ValueError, match="'gram/output' .*first at step 3"):
            writer.write(4, {"gram/output": gram}, {})


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A 1 MB file system."""
    mount = tmp_path / "disk"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mount)]
    try:
        made = subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        made = False
    if not made:
        pytest.skip("mounting a small file system needs root")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


def test_a_full_disk_stops_cleanly_and_the_same_command_resumes(tiny_disk: Path) -> None:
    folder = tiny_disk / "run"
    record(folder, range(2))
    filler = tiny_disk / "filler"
    with RecordingWriter(folder, small_header()) as writer:
        filler.write_bytes(b"\0" * (os.statvfs(tiny_disk).f_bavail * 4096 - 8192))
        with pytest.raises(OSError, match="2 finished items are safe.*same command") as caught:
            writer.write(2, trajectory(2, tokens=2000), {})
    assert caught.value.errno == errno.ENOSPC
    assert sorted(p.name[:11] for p in folder.glob("shards/*/*")) == ["item-000000", "item-000001"]
    filler.unlink()
    record(folder, range(3))
    assert Recording(folder).items == [0, 1, 2] and Recording(folder).verify() == []


@pytest.mark.parametrize("stage", ["rename", "manifest"])
def test_a_disk_that_fills_at_a_later_stage_leaves_nothing_either(
    folder: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    # Simulated: a real disk cannot be made to fill between two system calls.
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = contents(folder)
    with RecordingWriter(folder, small_header()) as writer:
        with monkeypatch.context() as patch:
            if stage == "rename":
                patch.setattr(shards.os, "replace", full)
            else:
                patch.setattr("foreseer.trajectories.files.writer.append_entry", full)
            with pytest.raises(OSError, match="4 finished items are safe"):
                writer.write(4, trajectory(4), {})
        assert contents(folder) == before
        assert not list(folder.glob("shards/*/.*"))
        writer.write(4, trajectory(4), {})
    assert Recording(folder).verify() == []


def test_a_manifest_line_that_does_not_fit_is_taken_back(folder: Path) -> None:
    manifest = folder / "manifest.00000.jsonl"
    before, limits = manifest.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    with RecordingWriter(folder, small_header()) as writer:
        # The shard is smaller than the manifest already is; half of the new line fits.
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 50, limits[1]))
        try:
            with pytest.raises(OSError, match="File too large"):
                writer.write(4, {"final": torch.zeros(1)}, {})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert manifest.read_bytes() == before
        assert not list(folder.glob("shards/*/*item-000004*"))
        writer.write(4, {"final": torch.zeros(1)}, {})
    assert Recording(folder).items == [0, 1, 2, 3, 4]


def test_only_the_stale_files_of_the_own_rank_are_removed(folder: Path) -> None:
    record(folder, [4], rank=1)
    stale = [folder / f"shards/0000{rank}/.item-000099.safetensors.partial" for rank in (0, 1)]
    for path in stale:
        path.write_bytes(b"half")
    record(folder, [5])
    assert [path.exists() for path in stale] == [False, True]
