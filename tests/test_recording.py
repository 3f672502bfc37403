"""A recording returns what was written, over all ranks, and names what does not belong in it."""

import json
import pickle
from collections.abc import Iterator
from pathlib import Path

import jaxtyping
import pytest
import torch
from recording_cases import STEPS, record, small_header, trajectory

from foreseer.trajectories.recording import (
    Header,
    Recording,
    RecordingError,
    RecordingWriter,
    split,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    record(tmp_path / "run", range(4))
    return tmp_path / "run"


@pytest.fixture
def as_users_run_it() -> Iterator[None]:
    """Without the type checks of the test run, which would come before the package's own."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def rewrite_header(folder: Path, **changes: object) -> None:
    path = folder / "recording.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def rewrite_line(folder: Path, **changes: object) -> None:
    path = folder / "manifest.00000.jsonl"
    first, rest = path.read_text().split("\n", 1)
    path.write_text(json.dumps({**json.loads(first), **changes}) + "\n" + rest)


def test_what_was_written_is_read_back_bit_for_bit(folder: Path) -> None:
    recording = Recording(folder)
    assert recording.items == [0, 1, 2, 3] and len(recording) == 4
    assert recording.header == small_header() and recording.header.num_steps == STEPS
    for item in recording.items:
        expected = trajectory(item)
        assert recording.meta(item) == {"seed": 1000 + item, "prompt": f"cat {item}"}
        assert recording.names(item) == sorted(expected)
        loaded = recording.load(item)
        assert all(torch.equal(loaded[name], expected[name]) for name in expected)
        assert all(loaded[name].dtype == expected[name].dtype for name in expected)
    assert recording.verify() == []


def test_several_ranks_read_as_one_recording(tmp_path: Path) -> None:
    for rank in range(3):
        record(tmp_path, range(rank, 10, 3), rank=rank)
    one = tmp_path / "one"
    record(one, range(10))
    merged, single = Recording(tmp_path), Recording(one)
    assert merged.items == single.items == list(range(10))
    assert torch.equal(merged.stack("gram/output"), single.stack("gram/output"))
    hashes = [[entry.xxh3 for entry in r.entries.values()] for r in (merged, single)]
    assert hashes[0] == hashes[1]


def test_an_item_two_ranks_recorded_alike_counts_once(folder: Path) -> None:
    line = (folder / "manifest.00000.jsonl").read_text().split("\n")[0]
    (folder / "manifest.00001.jsonl").write_text(line + "\n")
    assert Recording(folder).items == [0, 1, 2, 3]


def test_a_finished_item_is_not_written_twice(folder: Path) -> None:
    with RecordingWriter(folder, small_header(), rank=1) as writer:
        assert writer.done() == {0, 1, 2, 3}
        with pytest.raises(ValueError, match="item 2 is already recorded"):
            writer.write(2, trajectory(2), {})


def test_stack_follows_the_order_of_items(folder: Path) -> None:
    stacked = Recording(folder).stack("final", [3, 1])
    assert torch.equal(stacked, torch.stack([trajectory(3)["final"], trajectory(1)["final"]]))


def test_stack_refuses_different_shapes_and_missing_names(folder: Path) -> None:
    with RecordingWriter(folder, small_header()) as writer:
        writer.write(4, trajectory(4, tokens=9), {})
    recording = Recording(folder)
    with pytest.raises(ValueError, match=r"\(9,\) \(as in item 4\)"):
        recording.stack("tokens")
    with pytest.raises(ValueError, match="it holds .*gram/output"):
        recording.stack("gram/hidden")
    with pytest.raises(ValueError, match="no items"):
        recording.stack("final", [])


def test_a_slice_equals_the_slice_of_the_whole(folder: Path) -> None:
    part = Recording(folder).load_slice(2, "states", slice(1, 3))
    assert torch.equal(part, trajectory(2)["states"][1:3])


def test_an_unknown_item_lists_the_known_ones(folder: Path) -> None:
    with pytest.raises(RecordingError, match=r"item 9 is not recorded.*\[0, 1, 2, 3\]"):
        Recording(folder).load(9)


def test_a_recording_survives_pickling(folder: Path) -> None:
    copy = pickle.loads(pickle.dumps(Recording(folder)))
    assert torch.equal(copy.load(1)["final"], trajectory(1)["final"])


def test_a_folder_without_recording_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path, message in ((tmp_path / "file", "not a folder"), (tmp_path, "no recording.json")):
        with pytest.raises(RecordingError, match=message):
            Recording(path)
    with (
        pytest.raises(RecordingError, match="is a file"),
        RecordingWriter(tmp_path / "file", small_header()),
    ):
        pass


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema_version": 9}, "schema_version 9, this release reads 1 to 4; upgrade"),
        ({"schema_version": "4"}, "schema_version: found '4', expected 4"),
        ({"colour": 1}, r"unknown keys \['colour'\]"),
        ({"sigmas": "x"}, "sigmas: found 'x', expected a list"),
        ({"sigmas": [1.0, float("nan")]}, "NaN is no finite number"),
        ({"num_branches": 0}, "num_branches: found 0"),
        ({"features": "some"}, "features: found 'some'"),
        ({"taps": ["a", "a"]}, "taps"),
        ({"states": 1}, "states"),
        ({"latent_shape": [3, -2]}, "latent_shape"),
        ({"recipe": {"guidance_scale": 9.0}}, "recipe_hash"),
    ],
)
@pytest.mark.usefixtures("as_users_run_it")
def test_a_header_with_a_wrong_field_is_refused_by_name(
    folder: Path, changes: dict, message: str
) -> None:
    rewrite_header(folder, **changes)
    with pytest.raises(RecordingError, match=message):
        Recording(folder)


def test_a_header_that_lacks_a_field_or_is_no_json_is_refused(folder: Path) -> None:
    path = folder / "recording.json"
    values = json.loads(path.read_text())
    del values["sigmas"]
    path.write_text(json.dumps(values))
    with pytest.raises(RecordingError, match=r"lacks the keys \['sigmas'\]"):
        Recording(folder)
    for text in ("{", "[]", "\x00"):
        path.write_text(text)
        with pytest.raises(RecordingError, match="recording.json"):
            Recording(folder)


def test_the_recipe_hash_ignores_the_order_of_keys() -> None:
    recipe = small_header().recipe
    turned = dict(reversed(recipe.items()))
    assert small_header(recipe=turned).recipe_hash == small_header().recipe_hash
    assert small_header(recipe={**recipe, "x": 1}).recipe_hash != small_header().recipe_hash


def test_a_header_takes_only_plain_values() -> None:
    with pytest.raises(ValueError, match="plain JSON"):
        small_header(host={"weights": torch.zeros(1)})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recipe": {"guidance_scale": 5.0}}, r"guidance_scale: found 3\.0, expected 5\.0"),
        ({"host": {"class": "Other"}}, "host: found .*TinyTransformer.*expected .*Other"),
        ({"sigmas": [1.0]}, "sigmas"),
    ],
)
def test_another_recipe_or_host_is_not_mixed_in(folder: Path, changes: dict, message: str) -> None:
    with (
        pytest.raises(RecordingError, match=message + ".*new folder"),
        RecordingWriter(folder, small_header(**changes)),
    ):
        pass
    record(folder, range(5))  # the lock is free and the folder as before
    assert Recording(folder).items == [0, 1, 2, 3, 4]


def test_manifests_without_a_header_are_not_adopted(folder: Path) -> None:
    (folder / "recording.json").unlink()
    with pytest.raises(RecordingError, match="manifests but no recording.json"):
        record(folder, range(5))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"item": -1}, "item is -1"),
        ({"item": True}, "item is True"),
        ({"bytes": "9"}, "bytes is '9'"),
        ({"xxh3": "0"}, "32 hexadecimal"),
        ({"extra": 1}, "expected the keys"),
        ({"meta": {"seed": [1]}}, "meta"),
        ({"item": 1}, "item 1 was recorded twice in .* with different content"),
    ],
)
def test_a_manifest_line_with_a_wrong_value_is_refused(
    folder: Path, changes: dict, message: str
) -> None:
    rewrite_line(folder, **changes)
    with pytest.raises(RecordingError, match=message):
        Recording(folder)


@pytest.mark.parametrize("name", ["", "a b", "../x", "gram/", "/gram", "__metadata__", "a\n"])
def test_a_bad_tensor_name_is_refused(tmp_path: Path, name: str) -> None:
    with RecordingWriter(tmp_path, small_header()) as writer:
        with pytest.raises(ValueError, match="item 0"):
            writer.write(0, {name: torch.zeros(2)}, {})
        with pytest.raises(ValueError, match=r"no recorded tap; they are \['output'"):
            writer.write(0, {"gram/hidden": torch.zeros(2)}, {})
        assert writer.done() == set()


@pytest.mark.parametrize("meta", [{"item": 1}, {"": 1}, {"a": None}, {"a": True}, {"a": 1e999}])
@pytest.mark.usefixtures("as_users_run_it")
def test_meta_holds_only_plain_values_under_free_keys(tmp_path: Path, meta: dict) -> None:
    with RecordingWriter(tmp_path, small_header()) as writer:
        with pytest.raises(ValueError, match="item 0: meta"):
            writer.write(0, trajectory(0), meta)


def test_writing_without_the_lock_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="with RecordingWriter"):
        RecordingWriter(tmp_path, small_header()).write(0, trajectory(0), {})


def test_split_gives_every_part_its_share_and_at_least_one() -> None:
    for count in (3, 4, 8, 9, 64, 1000):
        for held in (0.05, 0.2, 0.25, 0.5):
            parts = split(range(count), (1 - held, held / 2, held / 2), seed=3)
            assert sorted(item for part in parts for item in part) == list(range(count))
            assert [len(part) for part in parts[1:]] == [max(1, round(count * held / 2))] * 2
    assert split(range(400), (0.75, 0.25), seed=4) != split(range(400), (0.75, 0.25), seed=3)
    assert split([5, 3, 9, 4], (0.5, 0.5)) == split((9, 4, 5, 3), (0.5, 0.5))  # in any order
    assert split(range(9), (1.0, 0.0)) == [list(range(9)), []]
    assert split([7], (0.5, 0.5)) == [[], [7]]


def test_split_moves_few_items_where_some_are_added() -> None:
    old, new = (split(range(count), (0.75, 0.25), seed=3) for count in (400, 440))
    stayed = [set(before) & set(after) for before, after in zip(old, new, strict=True)]
    assert sum(map(len, stayed)) >= 385


@pytest.mark.parametrize("fractions", [(), (0.5, 0.4), (1.5, -0.5)])
def test_split_refuses_fractions_that_are_not_shares(fractions: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="sum to 1"):
        split(range(4), fractions)


def test_header_is_frozen() -> None:
    header: Header = small_header()
    with pytest.raises(AttributeError):
        header.dtype = "float32"  # type: ignore[misc]
