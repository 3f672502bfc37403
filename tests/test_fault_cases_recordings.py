"""What happens to recordings: each test is one case of the list of faults in docs/faults.md.

The parts of a case that have a test of their own elsewhere are named there.
"""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from recording_cases import STEPS, record, small_header, trajectory
from tiny_pipelines import tiny_pipeline

from foreseer.cli import main
from foreseer.trajectories.files.repair import repair
from foreseer.trajectories.files.writer import RecordingWriter
from foreseer.trajectories.gram import sum_grams
from foreseer.trajectories.recording import CorruptShard, Recording, RecordingError

pytestmark = pytest.mark.fault
HERE = Path(__file__).parent


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    record(tmp_path / "run", range(4))
    return tmp_path / "run"


def spoil(path: Path, content: bytes) -> None:
    path.chmod(0o644)
    path.write_bytes(content)


def run_script(name: str, *words: object) -> dict:
    """The JSON a script beside this file prints, run on its own."""
    paths = os.pathsep.join([str(HERE), *(p for p in sys.path if p)])
    prefix = [] if os.geteuid() == 0 or name != "full_disk.py" else ["unshare", "-rm"]
    result = subprocess.run(
        [*prefix, sys.executable, str(HERE / name), *map(str, words)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("keep", [0, 7, 300, -1, None], ids=str)
def test_case_01_truncated_shard(folder: Path, keep: int | None) -> None:
    path = folder / "shards/00000/item-000002.safetensors"
    content = path.read_bytes()
    spoil(path, content + b"\0" if keep is None else content[:keep])
    problem = "has trailing bytes" if keep is None else "truncated"
    with pytest.raises(CorruptShard, match=rf"item-000002\.safetensors \(item 2\): {problem}"):
        Recording(folder).load(2)
    assert "line 3" in repair(folder)[0]
    record(folder, range(4))
    assert path.read_bytes() == content and Recording(folder).verify() == []


def test_case_02_flipped_bit(folder: Path) -> None:
    path = folder / "shards/00000/item-000002.safetensors"
    content = path.read_bytes()
    for place in range(0, len(content), 97):
        flipped = bytearray(content)
        flipped[place] ^= 1 << place % 8
        spoil(path, flipped)
        problems = Recording(folder).verify()
        assert len(problems) == 1 and "(item 2)" in problems[0], place
    with pytest.raises(CorruptShard, match=r"\(item 2\): tensors .*flipped bits"):
        Recording(folder).load(2)  # the last flip lies in a tensor: found on the first read


def test_case_04_path_traversal(folder: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret.safetensors"
    secret.write_bytes((folder / "shards/00000/item-000001.safetensors").read_bytes())
    line = json.loads((folder / "manifest.00000.jsonl").read_text().splitlines()[1])
    (folder / "shards/00000/link").symlink_to(tmp_path)
    names = [
        "../secret.safetensors",
        str(secret),
        "shards/../../secret.safetensors",
        "C:\\secret.safetensors",
        "shards/\0secret.safetensors",
        "shards/00000/link/secret.safetensors",
    ]
    for name in names:
        entry = json.dumps({**line, "item": 9, "file": name})
        (folder / "manifest.00009.jsonl").write_text(entry + "\n")
        with pytest.raises(RecordingError, match="plain path under shards/|link out of the record"):
            Recording(folder)
    (folder / "manifest.00009.jsonl").unlink()
    for name in ("recording.json", "manifest.00000.jsonl"):
        (folder / name).rename(tmp_path / name)
        (folder / name).symlink_to(tmp_path / name)
        with pytest.raises(RecordingError, match=f"{name} is a link out of the recording"):
            Recording(folder)
        (folder / name).unlink()
        (tmp_path / name).rename(folder / name)
    os.mkfifo(folder / "manifest.00008.jsonl")  # reading it would wait for ever
    with pytest.raises(RecordingError, match="no plain file"):
        Recording(folder)


@pytest.mark.parametrize("kind", ["folder", "url"])
def test_case_12_kill_during_record(tmp_path: Path, kind: str) -> None:
    seen = run_script("two_recorders.py", tmp_path, 60, 12, kind)
    kills = seen["kills"]
    assert seen["problems"] == [] and seen["left"] == 0
    assert len(kills) >= 60 and seen["rounds"] >= 3
    assert {kill["rank"] for kill in kills} == {0, 1}
    assert sum(kill["beside"] for kill in kills) > 10  # the other recorder was at work
    # Kills fell into writes, which left half-written files or whole shards without their line.
    assert any(kill["partial"] or kill["unlisted"] for kill in kills)
    assert any(0 < kill["finished"] < 16 for kill in kills)


@pytest.mark.slow
def test_case_13_disk_full(tmp_path: Path) -> None:
    tiny_pipeline().save_pretrained(tmp_path / "pipeline")
    seen = run_script("full_disk.py", tmp_path, tmp_path / "pipeline")
    if not seen["mounted"]:
        pytest.skip("this machine allows no mounts, not even in a name space of its own")
    stopped = [run for run in seen["runs"] if run["code"]]
    assert stopped and all(f"[Errno {errno.ENOSPC}]" in run["error"][0] for run in stopped)
    assert all("finished items are safe" in run["error"][0] for run in stopped)
    assert 0 < seen["finished"] < 40 and seen["damaged"] == []
    assert seen["left"] == [] and seen["unlisted"] == 0
    assert seen["free_bytes"] < 2 * seen["bytes_each"]  # it was really full
    assert [run["code"] for run in seen["resumed"]] == [0, 0]
    assert seen["items"] == list(range(40)) and seen["damaged_after"] == []


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")], ids=str)
def test_case_14_bad_values_in_features(folder: Path, bad: float) -> None:
    tensors = trajectory(4)
    tensors["feature/output"][1, 3, 0, 0] = bad
    with RecordingWriter(folder, small_header()) as writer:
        with pytest.raises(
            ValueError, match=r"item 4: .*'feature/output' .*first at step 3.* 4 finished items are"
        ):
            writer.write(4, tensors, {})
        writer.write(5, trajectory(5), {})
    recording = Recording(folder)
    assert recording.items == [0, 1, 2, 3, 5]
    total = sum_grams(recording, ["gram/output"], recording.items)["gram/output"]
    assert total.isfinite().all()


def test_case_15_two_recorders_of_one_rank(folder: Path) -> None:
    with RecordingWriter(folder, small_header(), rank=1) as first:
        with pytest.raises(RuntimeError, match="another recorder is at work on .* as rank 1"):
            record(folder, [9], rank=1)
        first.write(5, trajectory(5), {})
        record(folder, [6], rank=2)  # another rank is free
    record(folder, [7], rank=1)
    assert Recording(folder).items == [0, 1, 2, 3, 5, 6, 7]


def test_case_16_recipe_changed_between_runs(tmp_path: Path) -> None:
    tiny_pipeline().save_pretrained(tmp_path / "pipeline")
    words = ["record", "--pipeline", str(tmp_path / "pipeline"), "--out", str(tmp_path / "run")]
    words += ["--num_trajectories", "2", "--num_inference_steps", "4"]
    main(words)
    before = Recording(tmp_path / "run").entries
    for change in ("--guidance_scale", "5"), ("--num_inference_steps", "5"), ("--taps", "[hidden]"):
        with pytest.raises(SystemExit, match="another recipe: .*another folder"):
            main([*words, *change])
    main([*words, "--num_trajectories", "3"])  # more of the same is no other recipe
    entries = Recording(tmp_path / "run").entries
    assert {item: entries[item] for item in before} == before and len(entries) == 3


def test_case_21_shard_replaced_while_open(folder: Path) -> None:
    path = folder / "shards/00000/item-000002.safetensors"
    assert path.stat().st_mode & 0o222 == 0  # nobody truncates it by accident
    before = Recording(folder).load(2)
    view = Recording(folder).load_slice(2, "feature/output", slice(None))
    path.unlink()
    record(folder.parent / "other", [2])
    os.replace(folder.parent / "other/shards/00000/item-000002.safetensors", path)
    assert torch.equal(view, before["feature/output"])  # the old file lives as long as its reader
    assert Recording(folder).verify() == [] and view.shape[1] == STEPS
