"""Rows of a call's arguments: which belong to which sample and guidance branch.

Hosts take a tensor with a row per sample, or a list with a tensor per sample; what else they are
given is shared by all rows.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Path = tuple[int | str, ...]  # where an argument is found
Rows = Tensor | list[Tensor]  # an argument with a row per sample and branch


def take_rows(value: Any, rows: Sequence[int], num_rows: int, listed: bool = False) -> Any:
    """`value` with every argument of `num_rows` rows cut down to `rows`; others are kept.

    Args:
        value: arguments of a call, nested in lists, tuples and dicts.
        rows: numbers of the rows to keep.
        num_rows: rows of the call.
        listed: whether the host takes lists with a tensor per row.
    """
    if isinstance(value, Tensor) and value.ndim and len(value) == num_rows:
        return value[torch.as_tensor(rows, device=value.device)]
    if isinstance(value, list | tuple):
        if listed and _is_listed(value, num_rows):
            return type(value)(value[row] for row in rows)
        return type(value)(take_rows(entry, rows, num_rows, listed) for entry in value)
    if isinstance(value, dict):
        return {k: take_rows(entry, rows, num_rows, listed) for k, entry in value.items()}
    return value


def _is_listed(value: Sequence[Any], num_rows: int) -> bool:
    return len(value) == num_rows and all(isinstance(entry, Tensor) for entry in value)


def _leaves(value: Any, listed: bool, path: Path = ()) -> Iterator[tuple[Path, Rows]]:
    """The tensors of a call with their places; where a host takes lists, those of a row each."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, list | tuple) and listed and _is_listed(value, len(value)):
        yield path, list(value)
    elif isinstance(value, list | tuple | dict):
        for key, entry in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(entry, listed, (*path, key))


def _block(value: Rows, count: int, place: int) -> Rows:
    """One of `count` equal parts of the rows."""
    size = len(value) // count
    return value[place * size : (place + 1) * size]


def _shape(value: Rows) -> Any:
    return value.shape if isinstance(value, Tensor) else [entry.shape for entry in value]


def _equal(first: Rows, second: Rows) -> bool:
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return torch.equal(first, second)
    return len(first) == len(second) and all(map(torch.equal, first, second))


@dataclass(frozen=True)
class Narrowed:
    """A call that holds some of the guidance branches that another call held before.

    Args:
        places: which of its equal parts they are, in the order of this call.
        branches: their numbers.
        count: equal parts that it had.
        rows: rows that it had.
    """

    places: tuple[int, ...]
    branches: tuple[int, ...]
    count: int
    rows: int

    def take(self, tensor: Tensor) -> Tensor:
        """The rows of this call out of a tensor of the other's, or of its samples."""
        return torch.cat([tensor.chunk(self.count)[place] for place in self.places])

    def shape(self, shape: torch.Size) -> torch.Size:
        """The shape in this call of a tensor of the other's."""
        if not shape or shape[0] != self.rows:
            return shape
        return torch.Size((self.rows // self.count * len(self.places), *shape[1:]))


class Conditions:
    """What tells the guidance branches of one call apart, so that they are known in a smaller one.

    Args:
        arguments: of the call, positional and named.
        count: branches it holds, more than one.
        rows: its rows.
        listed: whether the host takes lists with a tensor per row.
    """

    def __init__(self, arguments: Any, count: int, rows: int, listed: bool) -> None:
        self.count, self.rows, self.listed = count, rows, listed
        self.shared: dict[Path, Any] = {}  # shapes of what all rows share
        self.shapes: dict[Path, list[Any]] = {}  # by branch, of what has rows
        self.telling: dict[Path, list[Rows]] = {}  # by branch, where it differs between them
        for path, value in _leaves(arguments, listed):
            if not len(_shape(value)) or len(value) != rows:
                self.shared[path] = _shape(value)
                continue
            blocks = [_block(value, count, place) for place in range(count)]
            self.shapes[path] = [_shape(block) for block in blocks]
            if not all(_equal(blocks[0], block) for block in blocks[1:]):
                self.telling[path] = blocks

    def find(self, arguments: Any) -> tuple[int, ...] | None:
        """Which of the branches a call of fewer rows holds; None where that is not certain.

        Args:
            arguments: of the call, positional and named.
        """
        found = dict(_leaves(arguments, self.listed))
        if found.keys() != self.shared.keys() | self.shapes.keys():
            return None
        if any(_shape(found[path]) != shape for path, shape in self.shared.items()):
            return None
        lengths = {len(found[path]) if len(_shape(found[path])) else 0 for path in self.shapes}
        size = self.rows // self.count
        if len(lengths) != 1 or not self.telling:
            return None
        (length,) = lengths
        if length % size or not 0 < length < self.rows:
            return None
        places = [self._place(found, length // size, place) for place in range(length // size)]
        known = [place for place in places if place is not None]
        return tuple(known) if len(set(known)) == len(places) else None

    def _place(self, found: dict[Path, Rows], count: int, place: int) -> int | None:
        """The branch that one of `count` equal parts of a call is, if there is one such."""
        fits = [
            branch
            for branch in range(self.count)
            if all(
                _shape(_block(found[path], count, place)) == shapes[branch]
                for path, shapes in self.shapes.items()
            )
            and all(
                _equal(_block(found[path], count, place), blocks[branch])
                for path, blocks in self.telling.items()
            )
        ]
        return fits[0] if len(fits) == 1 else None
