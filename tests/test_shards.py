"""A shard gives back the exact bits, is the same file for the same content, and refuses damage."""

import json
import stat
from pathlib import Path

import pytest
import torch
from recording_cases import trajectory
from safetensors import safe_open
from safetensors.torch import load_file

from foreseer.trajectories.files.shards import (
    DTYPE_CODES,
    MAX_HEADER_BYTES,
    MAX_TENSORS,
    CorruptShard,
    hash_shard,
    read_shard,
    read_slice,
    shard_names,
    write_shard,
)


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    as_bytes = [t.contiguous().reshape(-1).view(torch.uint8) for t in (left, right)]
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(*as_bytes)


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    path = tmp_path / "item-000003.safetensors"
    write_shard(path, trajectory(3), {"item": "3"})
    return path


@pytest.mark.parametrize("dtype", DTYPE_CODES)
def test_every_dtype_comes_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(0)
    values = (torch.randn(7, 5, generator=random) * 50).to(dtype)
    tensors = {"table": values, "turned": values.T, "one": values[0, 0], "none": values[:0]}
    write_shard(tmp_path / "a.safetensors", tensors, {})
    read = read_shard(tmp_path / "a.safetensors")
    assert read.keys() == tensors.keys()
    assert all(same_bits(read[name], tensors[name]) for name in tensors)


def test_the_safetensors_library_reads_our_files(shard: Path) -> None:
    expected = trajectory(3)
    read = load_file(shard)
    assert read.keys() == expected.keys()
    assert all(same_bits(read[name], expected[name]) for name in expected)
    with safe_open(shard, framework="pt") as file:
        assert file.metadata()["item"] == "3"


def test_equal_content_gives_equal_bytes_whatever_the_order(tmp_path: Path) -> None:
    tensors, metadata = trajectory(1), {key: key for key in "hgfedcba"}
    first = write_shard(tmp_path / "a", tensors, metadata)
    turned = dict(reversed(tensors.items())), dict(reversed(metadata.items()))
    second = write_shard(tmp_path / "b", *turned)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert first == second == hash_shard(tmp_path / "a")


def test_tensors_are_aligned_to_their_element_size(shard: Path) -> None:
    content = shard.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    for name, tensor in trajectory(3).items():
        assert (8 + length + header[name]["data_offsets"][0]) % tensor.element_size() == 0


def test_a_finished_shard_is_read_only_and_alone_in_its_folder(shard: Path) -> None:
    assert stat.S_IMODE(shard.stat().st_mode) == 0o444
    assert list(shard.parent.iterdir()) == [shard]


def test_changing_a_loaded_tensor_leaves_the_file_alone(shard: Path) -> None:
    before = hash_shard(shard)
    read_shard(shard)["states"].add_(1)
    assert hash_shard(shard) == before


def test_a_slice_equals_the_slice_of_the_whole(shard: Path) -> None:
    whole = trajectory(3)["feature/output"]
    assert same_bits(read_slice(shard, "feature/output", (1, slice(2, 4))), whole[1, 2:4])


def test_a_missing_name_lists_what_is_there(shard: Path) -> None:
    with pytest.raises(ValueError, match=r"no tensor \['gram/hidden'\].*gram/output"):
        read_shard(shard, ["gram/hidden"])


def test_an_unsupported_dtype_is_refused_before_writing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="complex64"):
        write_shard(tmp_path / "a", {"wave": torch.zeros(2, dtype=torch.complex64)}, {})
    assert not list(tmp_path.iterdir())


@pytest.mark.fault
@pytest.mark.parametrize("keep", [0, 7, 8, 100, -1000, -1])
def test_a_truncated_shard_is_refused_with_file_and_item(shard: Path, keep: int) -> None:
    content = shard.read_bytes()[:keep]
    shard.unlink()
    shard.write_bytes(content)
    with pytest.raises(CorruptShard, match=r"item-000003\.safetensors \(item 3\): truncated"):
        read_shard(shard, item=3)


@pytest.mark.fault
def test_trailing_bytes_are_refused(shard: Path) -> None:
    content = shard.read_bytes() + b"\0"
    shard.unlink()
    shard.write_bytes(content)
    with pytest.raises(CorruptShard, match="trailing bytes"):
        read_shard(shard, item=3)


@pytest.mark.fault
@pytest.mark.parametrize("length", [MAX_HEADER_BYTES + 1, 2**63, 2**64 - 1])
def test_a_huge_header_is_refused_before_it_is_read(tmp_path: Path, length: int) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + b" " * (MAX_HEADER_BYTES + 100))
    with pytest.raises(CorruptShard, match=f"header claims {length} bytes"):
        shard_names(path)


def with_header(path: Path, text: bytes, body: bytes = b"") -> Path:
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)
    return path


@pytest.mark.fault
def test_too_many_tensors_are_refused(tmp_path: Path) -> None:
    one = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
    text = json.dumps({str(n): one for n in range(MAX_TENSORS + 1)}).encode()
    with pytest.raises(CorruptShard, match="lists 4097 tensors"):
        shard_names(with_header(tmp_path / "a", text))


@pytest.mark.fault
@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"a":1}',
        b'{"a":{"dtype":"U8","shape":[0]}}',
        b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,NaN]}}',
        b'{"a":{"dtype":"U9","shape":[0],"data_offsets":[0,0]}}',
        b'{"a":{"dtype":"U8","shape":[5],"data_offsets":[0,0]}}',
        b'{"a":{"dtype":"U8","shape":[-1],"data_offsets":[0,0]}}',
    ],
)
def test_a_malformed_header_is_refused(tmp_path: Path, text: bytes) -> None:
    with pytest.raises(CorruptShard):
        read_shard(with_header(tmp_path / "a", text))


@pytest.mark.fault
def test_a_repeated_name_is_refused(tmp_path: Path) -> None:
    one = b'"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    with pytest.raises(CorruptShard, match="twice"):
        shard_names(with_header(tmp_path / "a", b"{" + one + b"," + one + b"}"))


@pytest.mark.fault
def test_no_flipped_bit_ever_changes_a_loaded_tensor(shard: Path) -> None:
    expected, content = trajectory(3), shard.read_bytes()
    random = torch.Generator().manual_seed(1)
    places = torch.randint(0, 8 * len(content), (400,), generator=random).tolist()
    header = range(0, 8 * 1200, 17)
    refused = 0
    shard.chmod(0o644)
    for place in [*header, *places]:
        damaged = bytearray(content)
        damaged[place // 8] ^= 1 << place % 8
        shard.write_bytes(damaged)
        try:
            read = read_shard(shard, item=3, size=len(content))
        except CorruptShard:
            refused += 1
            continue
        assert read.keys() == expected.keys()
        assert all(same_bits(read[name], expected[name]) for name in expected)
    assert refused > 0.95 * (len(header) + len(places))


@pytest.mark.fault
def test_a_shard_of_another_item_is_refused(shard: Path) -> None:
    with pytest.raises(CorruptShard, match=r"\(item 4\): the shard holds item 3"):
        read_shard(shard, item=4)
