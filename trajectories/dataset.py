"""Recordings as PyTorch and Hugging Face datasets; one example is one whole trajectory.

`TrajectoryDataset` gives tensors exactly as recorded and is what training uses. `trajectory_index`
is a table over the manifests to filter and select items with. `trajectory_stream` is for tools that
expect a Hugging Face dataset. Neither stores tensors: those stay in the safetensors shards.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from foreseer.extras import require
from foreseer.trajectories.recording import Recording

if TYPE_CHECKING:
    import datasets


class TrajectoryDataset(Dataset[dict[str, Any]]):
    """Map-style dataset of trajectories; example i is `{"item": int, name: tensor, ...}`.

    The recording is opened on first use in each process, so the dataset is cheap to pickle.

    Args:
        folder: folder or URL of the recording.
        names: tensors of each example, as in ["gram/output"].
        items: which items, in this order; None takes all.
    """

    def __init__(
        self, folder: str | Path, names: Sequence[str], items: Sequence[int] | None = None
    ) -> None:
        self.folder = folder
        self.names = list(names)
        self._items = None if items is None else list(items)
        self._opened: Recording | None = None

    @property
    def recording(self) -> Recording:
        """The recording, opened on first use."""
        if self._opened is None:
            self._opened = Recording(self.folder)
        return self._opened

    @property
    def items(self) -> list[int]:
        """Item number of each example."""
        if self._items is None:
            self._items = self.recording.items
        return self._items

    def __len__(self) -> int:
        """Number of trajectories."""
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One trajectory, as `Recording.load` gives it, with its item number."""
        item = self.items[index]
        return {"item": item, **self.recording.load(item, self.names)}

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the opened recording."""
        return {**self.__dict__, "_opened": None}


def trajectory_index(folder: str | Path) -> "datasets.Dataset":
    """Table over the manifests: item, file, bytes, xxh3, and one column per meta key.

    A meta value an item does not have is None; ints and floats under one key become floats.

    Raises:
        ValueError: a meta key holds text in one item and a number in another.
    """
    require("train", "trajectory_index")
    import datasets

    entries = list(Recording(folder).entries.values())
    features = {
        "item": datasets.Value("int64"),
        "file": datasets.Value("string"),
        "bytes": datasets.Value("int64"),
        "xxh3": datasets.Value("string"),
    }
    kinds: dict[str, set[type]] = {}
    for entry in entries:
        for key, value in entry.meta.items():
            kinds.setdefault(key, set()).add(type(value))
    for key, kind in sorted(kinds.items()):
        features[key] = datasets.Value(_column_type(key, kind))
    columns = {
        name: [getattr(e, name) if name in vars(e) else e.meta.get(name) for e in entries]
        for name in features
    }
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def trajectory_stream(
    folder: str | Path, names: Sequence[str], items: Sequence[int] | None = None
) -> "datasets.IterableDataset":
    """Stream of trajectories with described features, one shard of the stream per item.

    Arrays arrive as numpy in the described dtype, which `DataLoader` turns into tensors of the same
    dtype: float64 Grams stay exact. bfloat16, which neither Arrow nor numpy has, is widened to
    float32 without loss; tensors with one axis arrive as lists. Do not add `with_format("torch")`:
    it narrows float64 to float32. For bfloat16 as recorded take `TrajectoryDataset`.

    Args:
        folder: folder or URL of the recording.
        names: tensors of each example.
        items: which items, in this order; None takes all.

    Raises:
        ValueError: no items, an unknown name, a tensor with more than five axes, or (while reading)
            a shape unlike the first item's.
    """
    require("train", "trajectory_stream")
    import datasets

    recording = Recording(folder)
    chosen = recording.items if items is None else list(items)
    if not chosen:
        raise ValueError(f"{folder} has no items to stream.")
    first = {name: _to_numpy(t) for name, t in recording.load(chosen[0], names).items()}
    described = {name: _feature(name, array) for name, array in first.items()}
    described["item"] = datasets.Value("int64")
    shapes = {name: array.shape for name, array in first.items()}
    # `datasets` deals list arguments over workers: only the items may be a list.
    return datasets.IterableDataset.from_generator(
        _examples,
        features=datasets.Features(described),
        gen_kwargs={"folder": str(folder), "shapes": shapes, "items": chosen},
    )


def _examples(
    folder: str, shapes: dict[str, tuple[int, ...]], items: list[int]
) -> Iterator[dict[str, Any]]:
    recording = Recording(folder)
    for item in items:
        arrays = {n: _to_numpy(t) for n, t in recording.load(item, list(shapes)).items()}
        for name, array in arrays.items():
            if array.shape != shapes[name]:
                raise ValueError(
                    f"item {item}: {name!r} has shape {array.shape}, the stream began with "
                    f"{shapes[name]}; stream items of one shape, or use TrajectoryDataset."
                )
        yield {"item": item, **arrays}


def _to_numpy(tensor: Tensor) -> np.ndarray:
    """The array of a tensor; bfloat16 as float32, which holds every bfloat16 exactly."""
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _feature(name: str, array: np.ndarray) -> Any:
    """The `datasets` feature of an array."""
    import datasets

    dtype = str(array.dtype)
    if array.ndim == 0:
        return datasets.Value(dtype)
    if array.ndim == 1:
        return datasets.List(datasets.Value(dtype))
    by_ndim = {2: datasets.Array2D, 3: datasets.Array3D, 4: datasets.Array4D, 5: datasets.Array5D}
    if array.ndim not in by_ndim:
        raise ValueError(f"{name!r} has {array.ndim} axes; a stream holds at most 5.")
    return by_ndim[array.ndim](array.shape, dtype)


def _column_type(key: str, kinds: set[type]) -> str:
    if kinds == {str}:
        return "string"
    if kinds == {int}:
        return "int64"
    if kinds <= {int, float}:
        return "float64"
    raise ValueError(
        f"meta {key!r} is text in some items and a number in others; expected one kind."
    )
