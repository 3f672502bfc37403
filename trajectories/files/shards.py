"""One trajectory in one safetensors file: written atomically and reproducibly, read with checks.

The container is plain safetensors and is read with that library. The header is laid out here
because `safetensors.torch.save_file` (0.8) writes metadata keys in random order, so equal content
gives different bytes; it reports a full disk without an error number; and a killed save leaves a
file under a random name. Every tensor has its own xxh3-128 in the metadata, so that reading a few
small tensors of a large shard is checked without hashing the whole file.
"""

import errno
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

from foreseer.checkpoints.strict import DTYPE_CODES as DTYPE_CODES
from foreseer.checkpoints.strict import MAX_HEADER_BYTES as MAX_HEADER_BYTES
from foreseer.checkpoints.strict import MAX_TENSORS as MAX_TENSORS
from foreseer.checkpoints.strict import MalformedFile, read_header
from foreseer.errors import RecordingError

HASHES_KEY = "tensor_xxh3"
NO_LINKS = (errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK)


class CorruptShard(RecordingError):
    """A shard that cannot be trusted; the message names the file, the item and the way out."""

    def __init__(self, path: str | Path, item: int | None, problem: str) -> None:
        where = f"shard {path}" + ("" if item is None else f" (item {item})")
        super().__init__(
            f"{where}: {problem}. To redo the item, run `foreseer verify --repair` on the "
            "recording, then the same record command again."
        )


class ShardDigest(NamedTuple):
    """Size in bytes and xxh3-128 (32 hexadecimal digits) of a finished file."""

    bytes: int
    xxh3: str


def write_shard(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> ShardDigest:
    """Write one read-only safetensors file that appears whole or not at all.

    Args:
        path: final path; its folder exists. An older file of that name is replaced.
        tensors: CPU tensors by name, at most `MAX_TENSORS`.
        metadata: strings by key; stored sorted, next to the hash of every tensor.

    Returns:
        Size and hash of the file.

    Raises:
        ValueError: too many tensors, a dtype outside `DTYPE_CODES`, or a header over the limit.
        OSError: the disk refused; nothing is left behind.
    """
    if len(tensors) > MAX_TENSORS:
        raise ValueError(
            f"{path}: {len(tensors)} tensors, but a shard holds at most {MAX_TENSORS}."
        )
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPE_CODES:
            raise ValueError(
                f"tensor {name!r} has dtype {tensor.dtype}; a shard holds {list(DTYPE_CODES)}."
            )
    # Widest elements first keeps every tensor aligned to its element size.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    buffers = {name: _buffer(tensors[name]) for name in names}
    header = _header(tensors, buffers, metadata)
    if len(header) > MAX_HEADER_BYTES:
        raise ValueError(
            f"{path}: header of {len(header)} bytes is over the limit of {MAX_HEADER_BYTES}; "
            "shorten the metadata."
        )
    return write_atomically(path, (header, *buffers.values()), mode=0o444)


def copy_shard(source: Path, path: Path, item: int, expected: ShardDigest) -> ShardDigest:
    """Give a shard a second place: a link to the same bytes where it is possible, else a copy.

    Shards are never written to again, so a link is as good as a copy and takes no room.

    Args:
        source: the shard.
        path: its new place, on any disk; its folder exists.
        item: item number for the error message.
        expected: size and hash it must have.

    Raises:
        CorruptShard: it is not what is expected; nothing is left at `path`.
    """
    shard_names(source, item, expected.bytes)
    if (found := hash_shard(source)) != expected:
        raise CorruptShard(source, item, f"hash {found.xxh3}, expected {expected.xxh3}")
    path.unlink(missing_ok=True)  # what a killed recorder left without a line
    try:
        os.link(source.resolve(), path)
        sync_folder(path.parent)
        return found
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
    with open(source, "rb") as file:
        copied = write_atomically(path, iter(lambda: file.read(1 << 20), b""), mode=0o444)
    if copied != expected:
        path.unlink()
        raise CorruptShard(source, item, f"hash {copied.xxh3}, expected {expected.xxh3}")
    return copied


def write_atomically(path: Path, chunks: Iterable[bytes | memoryview], mode: int) -> ShardDigest:
    """Write `chunks` under a temporary name, fsync, rename to `path`, fsync the folder."""
    partial = path.with_name(f".{path.name}.partial")
    digest = xxhash.xxh3_128()
    try:
        partial.unlink(missing_ok=True)
        with open(partial, "xb") as file:
            for chunk in chunks:
                file.write(chunk)
                digest.update(chunk)
            file.flush()
            partial.chmod(mode)
            os.fsync(file.fileno())
            size = file.tell()
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)
    return ShardDigest(size, digest.hexdigest())


def sync_folder(folder: Path) -> None:
    """Make renames and new names inside `folder` survive a power loss."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def hash_shard(path: Path) -> ShardDigest:
    """Size and xxh3-128 of a whole file."""
    digest = xxhash.xxh3_128()
    size = 0
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
            size += len(chunk)
    return ShardDigest(size, digest.hexdigest())


def shard_names(path: Path, item: int | None = None, size: int | None = None) -> list[str]:
    """Sorted tensor names of a shard, after the checks of its header.

    Args:
        path: the shard.
        item: item number for the error message.
        size: size in bytes the manifest promises; None checks against the header only.

    Raises:
        CorruptShard: the file is missing, cut short, too long, or its header is not acceptable.
    """
    try:
        return list(read_header(path, size))
    except MalformedFile as error:
        raise CorruptShard(path, item, str(error)) from error


def read_shard(
    path: Path, names: Sequence[str] | None = None, item: int | None = None, size: int | None = None
) -> dict[str, Tensor]:
    """Read tensors and check each against the hash stored when it was written.

    Args:
        path: the shard.
        names: tensors to read; None reads all.
        item: item number for the error message.
        size: size in bytes the manifest promises.

    Raises:
        CorruptShard: a check of the header or of a tensor's hash failed.
        ValueError: a name is not in the shard.
    """
    with _opened(path, names, item, size) as (file, wanted):
        try:
            hashes = json.loads((file.metadata() or {})[HASHES_KEY])
            tensors = {name: file.get_tensor(name) for name in wanted}
            damaged = [
                n for n, t in tensors.items() if hashes.get(n) != _tensor_hash(t, _buffer(t))
            ]
        except (ValueError, KeyError, AttributeError, RecursionError, SafetensorError) as error:
            raise CorruptShard(path, item, f"no readable tensor hashes ({error!r})") from error
    if damaged:
        raise CorruptShard(path, item, f"tensors {damaged} do not match their hash (flipped bits)")
    return tensors


def shard_metadata(path: Path) -> dict[str, str]:
    """The strings a shard was written with.

    Raises:
        CorruptShard: the header is not acceptable.
    """
    with _opened(path, [], None, None) as (file, _):
        return dict(file.metadata() or {})


def read_slice(
    path: Path, name: str, index: Any, item: int | None = None, size: int | None = None
) -> Tensor:
    """Read `tensor[index]` without reading the rest; the header is checked, the values are not."""
    with _opened(path, [name], item, size) as (file, _):
        return file.get_slice(name)[index]


@contextmanager
def _opened(
    path: Path, names: Sequence[str] | None, item: int | None, size: int | None
) -> Iterator[tuple[Any, list[str]]]:
    """The checked, open file and the names to read from it."""
    present = shard_names(path, item, size)
    wanted = present if names is None else list(names)
    if missing := [name for name in wanted if name not in present]:
        raise ValueError(f"shard {path} (item {item}) has no tensor {missing}; it holds {present}.")
    with safe_open(path, framework="pt") as file:
        stored = (file.metadata() or {}).get("item")
        if item is not None and stored is not None and stored != str(item):
            raise CorruptShard(path, item, f"the shard holds item {stored}")
        yield file, wanted


def _header(
    tensors: Mapping[str, Tensor], buffers: Mapping[str, memoryview], metadata: Mapping[str, str]
) -> bytes:
    """The safetensors header: its length as 8 little-endian bytes, then JSON padded to 8 bytes."""
    hashes = {name: _tensor_hash(tensors[name], buffers[name]) for name in sorted(buffers)}
    strings = {**metadata, HASHES_KEY: json.dumps(hashes, separators=(",", ":"))}
    entries: dict[str, Any] = {"__metadata__": dict(sorted(strings.items()))}
    start = 0
    for name, buffer in buffers.items():
        end = start + buffer.nbytes
        code = DTYPE_CODES[tensors[name].dtype]
        shape = list(tensors[name].shape)
        entries[name] = {"dtype": code, "shape": shape, "data_offsets": [start, end]}
        start = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _buffer(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in row-major order; numpy has no bfloat16, so as unsigned bytes."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _tensor_hash(tensor: Tensor, buffer: memoryview) -> str:
    """xxh3-128 over dtype, shape and bytes."""
    digest = xxhash.xxh3_128(f"{tensor.dtype}{list(tensor.shape)}".encode())
    digest.update(buffer)
    return digest.hexdigest()
