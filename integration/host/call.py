"""One call of a transformer: its arguments and their rows, and its return value as one tensor.

Everything that running it again, on some of its rows or without its trunk, takes. Hosts take a
tensor with a row per sample, or a list with a tensor per sample; what else they are given is shared
by all rows.
"""

import functools
import inspect
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from foreseer.integration.host.trunk import TIME_ARGUMENTS, UnsupportedHost, first_tensor

DEVICES = ("cpu", "cuda")  # that autocast is asked of
TIME_FORMS = ((0.0, 1000.0), (0.0, 1.0), (1.0, -1.0), (1000.0, -1000.0))
"""How networks are told flow time sigma, as a + b sigma: those of diffusers, then Lumina's kind."""
TIME_ROUNDING = 4e-3  # relative, of a time in bfloat16


def prediction(output: Any) -> Tensor:
    """The prediction in a transformer's return value, a row per sample.

    Raises:
        UnsupportedHost: the return value holds no single tensor, nor a list of equal ones.
    """
    sample = output if isinstance(output, Tensor) else _sample(output)
    if isinstance(sample, Tensor):
        return sample
    if isinstance(sample, list) and sample and all(isinstance(each, Tensor) for each in sample):
        if len({each.shape for each in sample}) == 1:
            return torch.stack(sample)
        shapes = [tuple(each.shape) for each in sample]
        raise UnsupportedHost(
            f"the samples of one call have the shapes {shapes}, expected one size per call; draw "
            "samples of another size in a call of their own."
        )
    found = type(output).__name__
    found = f"a tuple of {len(output)}" if isinstance(output, tuple) else found
    raise UnsupportedHost(
        f"the transformer returned {found}, expected a tensor, a tuple of one, a list of tensors, "
        "or an object with `sample` or `logits` and nothing else."
    )


def form_of(output: Any) -> Callable[[Tensor], Any]:
    """What puts a prediction back into the form of this return value."""
    if isinstance(output, Tensor):
        return _itself
    listed = isinstance(_sample(output), list)
    kind, names = type(output), hasattr(output, "logits")

    def wrap(sample: Tensor) -> Any:
        content: Any = list(sample.unbind()) if listed else sample
        if kind is list:
            return content
        if kind is tuple:
            return (content,)
        return kind(logits=content) if names else kind(content)

    return wrap


def _itself(sample: Tensor) -> Tensor:
    return sample


def _sample(output: Any) -> Any:
    only = output[0] if isinstance(output, tuple) and len(output) == 1 else output
    if hasattr(only, "logits"):
        return only.logits if _is_alone(only) else only
    return getattr(only, "sample", only)


def _is_alone(output: Any) -> bool:
    """Whether logits are all that is returned; forecasts could not give the rest."""
    fields = output._asdict() if hasattr(output, "_asdict") else vars(output)
    return all(value is None for name, value in fields.items() if name != "logits")


def retold(time: Tensor, sigma: float, told: float) -> Tensor:
    """Another flow time in the form in which a network was told its own.

    Entries of another time stay, such as the 0 of frames that are given.

    Args:
        time: what the network was told.
        sigma: its flow time.
        told: the other.

    Raises:
        UnsupportedHost: nothing in it is a known form of sigma, or several are.
    """
    if sigma == 0:
        raise UnsupportedHost(
            "at flow time 0, where an inversion begins, sigma and 1000 sigma are the same number, "
            "so nothing tells how to say another time to the network; fit with first_times=0."
        )
    wide, whole = time.double(), not time.is_floating_point()
    for offset, factor in TIME_FORMS:
        if whole and abs(factor) == 1.0:
            continue  # the same number whatever the time
        own = torch.full_like(wide, offset + factor * sigma)
        same = torch.isclose(wide, own, rtol=TIME_ROUNDING, atol=1e-6)
        if same.any():
            # rounded as by loops that hold their sigmas in float32
            new = offset + factor * torch.tensor(told, dtype=torch.float32)
            other = torch.where(same, new.double(), wide)
            return (other.round() if whole else other).to(time.dtype)
    raise UnsupportedHost(
        f"the network is told {float(wide.flatten()[0]):g} at flow time {sigma:g}, expected one of "
        "sigma, 1000 sigma, 1 - sigma and 1000 (1 - sigma), to tell it another time by; fit with "
        "first_times=0."
    )


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


@dataclass(frozen=True)
class Call:
    """One call of a transformer, to be run, repeated or replaced.

    Args:
        transformer: the host.
        forward: its own forward.
        args: positional arguments of the call.
        kwargs: keyword arguments of the call.
    """

    transformer: nn.Module
    forward: Callable
    args: tuple
    kwargs: dict[str, Any]

    def run(self) -> Any:
        """What the host itself returns."""
        return self.forward(*self.args, **self.kwargs)

    @property
    def x_t(self) -> Tensor | None:
        """The network's input; None where it is no tensor, as in hosts that take lists."""
        found = self._input()
        return found if isinstance(found, Tensor) else None

    @property
    def num_rows(self) -> int:
        """Rows of the network's input."""
        return len(self._input())

    @property
    def device(self) -> torch.device:
        """Where the network's input is."""
        found: Tensor = self._input()[0]
        return found.device

    @property
    def form(self) -> Hashable:
        """The kinds of its arguments, see `form_of_call`."""
        return form_of_call(self.args, self.kwargs)

    @property
    def listed(self) -> bool:
        """Whether the host takes lists with a tensor per row."""
        return isinstance(self._input(), list)

    def rows(self, rows: Sequence[int], num_rows: int) -> "Call":
        """The call with some of its rows only.

        Args:
            rows: their numbers.
            num_rows: how many it has.
        """
        args, kwargs = take_rows((self.args, self.kwargs), rows, num_rows, self.listed)
        return replace(self, args=args, kwargs=kwargs)

    @property
    def outline(self) -> tuple[tuple[int, ...], ...]:
        """The shapes of all tensors that the network is given, in order."""
        return tuple(_shapes((self.args, self.kwargs)))

    @property
    def time(self) -> Tensor | None:
        """The time the network is told; None where its arguments do not show it."""
        place = self._time_place()
        return None if place is None else _as_time(self._at(place))

    def at_time(self, sigma: float, told: float) -> "Call":
        """The call with another time for the network.

        Args:
            sigma: flow time of the call.
            told: flow time that the network is told instead.

        Raises:
            UnsupportedHost: its arguments do not show a time, or one that is not the call's.
        """
        place = self._time_place()
        if place is None:
            raise UnsupportedHost(
                f"the arguments of {type(self.transformer).__name__} show no time, and the "
                "predictor tells the network another one at step 0; fit with first_times=0."
            )
        own = self._at(place)
        time: Any = retold(_as_time(own), sigma, told)
        if not isinstance(own, Tensor):
            time = time.item()
        if isinstance(place, str):
            return replace(self, kwargs=self.kwargs | {place: time})
        return replace(self, args=(*self.args[:place], time, *self.args[place + 1 :]))

    def _time_place(self) -> int | str | None:
        """Number or name of the argument that holds the time, where that is a tensor or number."""
        kind: Any = type(self.transformer)
        numbers = {n: at for n, at in time_places(kind).items() if at < len(self.args)}
        places: dict[str, int | str] = {**{name: name for name in self.kwargs}, **numbers}
        place = next((places[name] for name in TIME_ARGUMENTS if name in places), None)
        shown = place is not None and isinstance(self._at(place), Tensor | float | int)
        return place if shown else None

    def _at(self, place: int | str) -> Any:
        return self.kwargs[place] if isinstance(place, str) else self.args[place]

    def _input(self) -> Any:
        if self.args:
            return self.args[0]
        return self.kwargs.get("hidden_states", first_tensor((), self.kwargs))


def _as_time(value: Any) -> Tensor:
    """A time as a tensor; a number is float64, or int64."""
    if isinstance(value, Tensor):
        return value
    return torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None)


@functools.cache
def time_places(kind: Any) -> dict[str, int]:
    """Where a class of networks takes its time among the positional arguments, by name."""
    names = list(inspect.signature(kind.forward).parameters)[1:]
    return {name: place for place, name in enumerate(names) if name in TIME_ARGUMENTS}


def _shapes(value: Any) -> Iterator[tuple[int, ...]]:
    if isinstance(value, Tensor):
        yield value.shape
    elif isinstance(value, list | tuple | dict):
        for entry in value.values() if isinstance(value, dict) else value:
            yield from _shapes(entry)


def form_of_call(args: tuple, kwargs: dict[str, Any]) -> Hashable:
    """What kinds of arguments a call has: other shapes, times and prompts make the same form."""
    return _kind(args), _kind(kwargs), tuple(map(torch.is_autocast_enabled, DEVICES))


def _kind(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.dtype, value.device, value.ndim
    if isinstance(value, dict):
        return tuple((name, _kind(each)) for name, each in sorted(value.items()))
    if isinstance(value, tuple):
        return tuple(map(_kind, value))
    if isinstance(value, list):
        return frozenset(map(_kind, value))  # a list has an entry per sample
    return value if value is None or isinstance(value, bool | str) else type(value)
