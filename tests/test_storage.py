"""A recording behind a URL reads and is written as one in a folder, through a cache of shards."""

import http.server
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from recording_cases import record, small_header, trajectory
from torch.utils.data import DataLoader

from foreseer.trajectories.dataset import TrajectoryDataset, trajectory_index, trajectory_stream
from foreseer.trajectories.files.header import RecordingError
from foreseer.trajectories.files.storage import STALE_S, Remote, is_url, storage
from foreseer.trajectories.files.writer import RecordingWriter, UploadingWriter, open_writer
from foreseer.trajectories.recording import CorruptShard, Recording


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own for every test."""
    monkeypatch.setenv("FORESEER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    record(tmp_path / "run", range(4))
    record(tmp_path / "run", [4, 5], rank=1)
    return tmp_path / "run"


@pytest.fixture
def served(folder: Path) -> Iterator[str]:
    """The same folder behind a web server."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    handler = partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def cached(cache: Path) -> list[Path]:
    return sorted(path for path in cache.glob("shards/*/*") if not path.name.startswith("."))


def write(url: str, items: range, rank: int = 0) -> None:
    with open_writer(url, small_header(), rank) as writer:
        for item in sorted(set(items) - writer.done()):
            writer.write(item, trajectory(item), {"seed": 1000 + item, "prompt": f"cat {item}"})


def test_a_web_server_gives_what_the_folder_gives(folder: Path, served: str, cache: Path) -> None:
    near, far = Recording(folder), Recording(served)
    assert far.header == near.header and far.entries == near.entries
    assert cached(cache) == []
    for item in near.items:
        for name, tensor in near.load(item).items():
            assert torch.equal(far.load(item)[name], tensor)
    assert [path.stem for path in cached(cache)] == sorted(e.xxh3 for e in near.entries.values())
    assert torch.equal(far.stack("gram/output"), near.stack("gram/output"))
    assert far.verify() == []


def test_a_cached_shard_is_not_fetched_again(folder: Path, served: str) -> None:
    far = Recording(served)
    expected = far.load(2)["final"]
    for path in folder.glob("shards/*/*"):
        path.unlink()
    assert torch.equal(far.load(2)["final"], expected)
    with pytest.raises(CorruptShard, match=r"item-000001.safetensors \(item 1\): .*missing"):
        far.load(1)
    assert len(far.verify()) == 6  # past the cache


def test_worker_processes_read_through_one_cache(folder: Path, served: str, cache: Path) -> None:
    names = ["gram/output"]
    dataset = TrajectoryDataset(served, names)
    dataset[0]  # the network is in use before the workers fork
    loaded = list(DataLoader(dataset, batch_size=None, num_workers=2))
    for near, far in zip(TrajectoryDataset(folder, names), loaded, strict=True):
        assert near["item"] == far["item"]
        assert torch.equal(near["gram/output"], far["gram/output"])
    assert len(cached(cache)) == 6
    assert pickle.loads(pickle.dumps(Recording(served))).items == Recording(folder).items


def test_tables_and_streams_take_urls(folder: Path, served: str) -> None:
    assert trajectory_index(served).to_list() == trajectory_index(folder).to_list()
    near = list(trajectory_stream(folder, ["gram/output"]))
    far = list(trajectory_stream(served, ["gram/output"]))
    assert [e["item"] for e in near] == [e["item"] for e in far]
    assert all((a["gram/output"] == b["gram/output"]).all() for a, b in zip(near, far, strict=True))


def test_the_index_streams_over_the_network_in_shards(served: str) -> None:
    stream = trajectory_index(served).to_iterable_dataset(num_shards=3)
    few = stream.filter(lambda row: row["seed"] >= 1002).take(2)
    assert [row["item"] for row in few] == [2, 3]


@pytest.mark.parametrize("change", ["flip", "cut", "grow"])
def test_a_damaged_object_is_named_and_never_cached(
    folder: Path, served: str, cache: Path, change: str
) -> None:
    path = folder / "shards/00000/item-000001.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.chmod(0o644)
    path.write_bytes({"flip": content, "cut": content[:-9], "grow": content + b"x"}[change])
    with pytest.raises(CorruptShard, match=r"127.*item-000001\.safetensors \(item 1\): .*manifest"):
        Recording(served).load(1)
    assert list(cache.glob("shards/*/.*")) == [] == cached(cache)
    assert len(Recording(served).verify()) == 1


def test_a_download_that_was_killed_is_no_hit_and_is_cleared_away(
    folder: Path, served: str, cache: Path
) -> None:
    far = Recording(served)
    place = Remote(served).cached(far.entries[1]).parent
    place.mkdir(parents=True)
    old, young = place / ".old.partial", place / ".young.partial"
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (0, os.stat(young).st_mtime - STALE_S - 1))
    assert torch.equal(far.load(1)["final"], trajectory(1)["final"])
    assert (old.exists(), young.exists()) == (False, True)


def test_a_full_cache_says_how_to_move_it(served: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = 10

    far = Recording(served)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: Usage)
    with pytest.raises(OSError, match="cache's disk .* has 10 free; .*set FORESEER_CACHE"):
        far.load(0)


def test_recording_to_a_url_equals_recording_to_a_folder(tmp_path: Path, cache: Path) -> None:
    far, near = f"file://{tmp_path / 'far'}", tmp_path / "near"
    write(far, range(3))
    write(far, range(3, 5), rank=1)
    record(near, range(3))
    record(near, [3, 4], rank=1)
    for path in near.glob("**/*.*"):
        if path.suffix != ".lock" and path.is_file():
            assert (tmp_path / "far" / path.relative_to(near)).read_bytes() == path.read_bytes()
    assert not list(cache.glob("staging/*/*/shards/*/*"))  # one trajectory at a time
    assert Recording(far).verify() == []


def test_another_machine_goes_on_from_what_is_behind_the_url(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    url = f"memory://{tmp_path.name}"
    write(url, range(2))
    monkeypatch.setenv("FORESEER_CACHE", str(tmp_path / "another machine"))
    write(url, range(4))
    assert Recording(url).items == [0, 1, 2, 3] and Recording(url).verify() == []
    with pytest.raises(RecordingError, match="memory:.* recorded with another recipe"):
        with open_writer(url, small_header(recipe={"guidance_scale": 5.0}), 0):
            pass


@pytest.mark.parametrize("stage", ["upload", "replace"])
def test_a_network_that_fails_loses_one_item_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    url = f"file://{tmp_path / 'far'}"
    write(url, range(2))

    def broken(*_: object) -> None:
        raise ConnectionError("the network is gone")

    with UploadingWriter(url, small_header()) as writer:
        with monkeypatch.context() as patch:
            patch.setattr(Remote, stage, broken)
            with pytest.raises(ConnectionError):
                writer.write(2, trajectory(2), {})
        assert Recording(url).items == [0, 1]
        writer.write(3, trajectory(3), {})  # the failed item's line is not sent along
    assert Recording(url).items == [0, 1, 3] and Recording(url).verify() == []
    write(url, range(4))
    assert Recording(url).items == [0, 1, 2, 3] and Recording(url).verify() == []


def test_a_second_recorder_elsewhere_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"file://{tmp_path / 'far'}"
    with open_writer(url, small_header(), 0) as first:
        first.write(0, trajectory(0), {})
        monkeypatch.setenv("FORESEER_CACHE", str(tmp_path / "elsewhere"))
        write(url, range(1, 2))
        with pytest.raises(RuntimeError, match="another recorder is at work as rank 0"):
            first.write(2, trajectory(2), {})
    assert Recording(url).items == [0, 1] and Recording(url).verify() == []


def test_a_killed_recorder_s_half_of_an_upload_is_redone(tmp_path: Path) -> None:
    url = f"file://{tmp_path / 'far'}"
    write(url, range(2))
    orphan = tmp_path / "far/shards/00000/item-000002.safetensors"
    orphan.write_bytes(b"half")
    write(url, range(3))
    assert Recording(url).items == [0, 1, 2] and Recording(url).verify() == []


def test_places_are_told_apart_and_mistakes_named(tmp_path: Path) -> None:
    for url in ("s3://b/run", "hf://datasets/o/n", "simplecache::s3://b/run", "file:///x"):
        assert is_url(url)
    for place in ("runs/a", "C:/runs", "/abs", Path("runs")):
        assert not is_url(place)
    with pytest.raises(RecordingError, match="s3:/b/run is a URL turned into a Path"):
        storage(Path("s3://b/run"))
    with pytest.raises(RecordingError, match="cannot open nosuch://b"):
        Recording("nosuch://b")
    with pytest.raises(RecordingError, match="memory://empty has no recording.json"):
        Recording("memory://empty")


def test_a_folder_needs_no_network_package(folder: Path) -> None:
    code = (
        "import sys\nfrom foreseer.trajectories.recording import Recording\n"
        f"print(len(Recording({str(folder)!r}).load(0)), 'aiohttp' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([p for p in sys.path if p])}
    run = [sys.executable, "-c", code]
    found = subprocess.run(run, capture_output=True, text=True, env=environment, check=True)
    assert found.stdout.split() == ["5", "False"]


def test_the_writer_of_a_folder_is_the_plain_one(tmp_path: Path) -> None:
    assert type(open_writer(tmp_path / "r", small_header(), 0)) is RecordingWriter
