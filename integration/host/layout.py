"""Which elements of a network's output each token of its head's input decides, and the grid.

A head (norm, projection, unpatchify) works on each token alone, so what is read off a token's
hidden state has its place in the output: the token's patch. No fact about the host is needed:
hidden states are exchanged at the tokens whose number has bit k set, and the elements that change
have bit k in the number of their token. The grid of the tokens is read off the output where it is
an array over space, else off the positions that the call gives the tokens.
Shapes: B rows, N tokens of the head's input, M tokens that enter the output, D channels, P elements
of a token, E elements of a row of the output.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from foreseer.integration.host.trunk import UnsupportedHost
from foreseer.predictors.base import Grid

MAX_DRAWS = 6  # of exchanged hidden states: in bfloat16 an element may come out the same by chance


@dataclass(frozen=True)
class Layout:
    """Where the tokens of a hidden state lie in the output.

    Args:
        tokens: numbers of the tokens that enter the output, row by row; text and padding do not.
        elements: flat numbers of the elements that each of them decides, the same in every row.
        shape: of a row of the output.
        grid: frames (or 1), height and width in tokens, whose product is M, token by token in
            reading order; None where it is not known.
    """

    tokens: Int[Tensor, "B M"]
    elements: Int[Tensor, "M P"]
    shape: tuple[int, ...]
    grid: Grid | None = None

    def hidden(self, hidden: Float[Tensor, "B *N D"]) -> Float[Tensor, "B M D"]:
        """The hidden states of the tokens that enter the output."""
        flat = hidden.flatten(1, -2)
        return flat.gather(1, self.tokens[..., None].expand(-1, -1, flat.shape[-1]))

    def place(self, values: Float[Tensor, "B M P"]) -> Float[Tensor, " B *shape"]:
        """Values of tokens as an output.

        Raises:
            ValueError: there are others than the output has.
        """
        if values.shape[1:] != self.elements.shape:
            raise ValueError(
                f"found {values.shape[2]} elements for each of {values.shape[1]} tokens, and "
                f"{self.elements.shape[0]} tokens decide {self.elements.shape[1]} elements each of "
                "this host's output: another host. Record and fit for this one."
            )
        flat = values.new_zeros(len(values), math.prod(self.shape))
        flat[:, self.elements.flatten()] = values.flatten(1)
        return flat.unflatten(1, self.shape)

    def of_sample(self, size: int) -> "Layout":
        """Of the tokens that come first, where a prediction has others after the sample's.

        Editing models (FLUX Kontext, Qwen-Image-Edit) append a source picture to the network's
        input, and their pipelines cut its tokens off the prediction.

        Args:
            size: elements of a sample.
        """
        inside = (self.elements < size).all(1)
        count = int(inside.sum())
        if count == len(inside) or count * self.elements.shape[1] != size:
            return self
        grid = self.grid
        if grid is not None:
            frames = count // (grid[1] * grid[2])
            grid = (frames, *grid[1:]) if frames * grid[1] * grid[2] == count else None
        return Layout(self.tokens[:, inside], self.elements[inside], self.shape, grid)

    def numbers(self, groups: Int[Tensor, "B N"]) -> Int[Tensor, "B M"]:
        """Group numbers of the tokens that enter the output.

        Args:
            groups: of all tokens of the output, (B, N, D).

        Raises:
            ValueError: the output is no tokens, or has another number of them.
        """
        if len(self.shape) != 2 or self.shape[0] != groups.shape[1]:
            raise ValueError(
                f"the token groups are for {groups.shape[1]} tokens, and a row of the output has "
                f"the shape {self.shape}, expected ({groups.shape[1]}, channels)."
            )
        return groups[:, self.elements[:, 0] // self.shape[1]]

    def pick(self, output: Float[Tensor, " B *shape"]) -> Float[Tensor, "B M P"]:
        """The elements of an output, or of latents of its shape, token by token."""
        return output.flatten(1)[:, self.elements]


@torch.no_grad()
def find_layout(
    head: Callable[[Tensor], Tensor], hidden: Float[Tensor, "B *N D"], what: str
) -> Layout:
    """Probe a head, which runs about log2 N times.

    Args:
        head: the output for a hidden state.
        hidden: what entered the head.
        what: the host's name, for errors.

    Returns:
        The layout; tokens are in the order of their first element, elements in rising order.

    Raises:
        UnsupportedHost: tokens do not decide equally many elements each, or share some.
    """
    flat = hidden.flatten(1, -2)
    num_rows, num_tokens = flat.shape[:2]
    numbers = torch.arange(1, num_tokens + 1, device=hidden.device)  # 0 is left for no token
    generator = torch.Generator().manual_seed(0)
    before = head(hidden)
    found = torch.zeros_like(before, dtype=torch.long).flatten(1)
    layout = None
    for _ in range(MAX_DRAWS):
        drawn = torch.randn(flat.shape, generator=generator).to(flat)
        other = flat + flat.std() * drawn
        for bit in range(num_tokens.bit_length()):
            chosen = (numbers >> bit & 1).bool()[:, None]
            found |= _changed(head, before, flat, other, chosen, hidden.shape).long() << bit
        layout = _layout(found, num_tokens, tuple(before.shape[1:]))
        if layout is not None:
            break
    if layout is None or not _holds(layout, head, before, flat, other, hidden.shape):
        raise UnsupportedHost(
            f"the tokens that enter the head of {what} ({num_tokens}) do not each decide an equal "
            f"share of the {found.shape[1]} elements of its output, so nothing can be read off "
            "them for the output; use a predictor without a readout, such as L2P."
        )
    return layout


def _changed(
    head: Callable[[Tensor], Tensor],
    before: Tensor,
    flat: Float[Tensor, "B N D"],
    other: Float[Tensor, "B N D"],
    chosen: Tensor,
    shape: torch.Size,
) -> Tensor:
    """Which elements change when the hidden states of the chosen tokens are exchanged."""
    return (head(torch.where(chosen, other, flat).reshape(shape)) != before).flatten(1)


def _layout(found: Int[Tensor, "B E"], num_tokens: int, shape: tuple[int, ...]) -> Layout | None:
    """The layout of numbers found for every element, or None where they make no sense."""
    owner = found[0]
    tokens, counts = owner.unique(return_counts=True)
    even = bool((counts == counts[0]).all()) and int(tokens[0]) > 0
    if not even or int(tokens[-1]) > num_tokens:
        return None
    elements = owner.argsort(stable=True).view(len(tokens), -1)
    elements = elements[elements[:, 0].argsort()]
    grouped = found[:, elements]  # (B, M, P)
    if not torch.equal(grouped, grouped[..., :1].expand_as(grouped)):
        return None
    return Layout(grouped[..., 0] - 1, elements, shape)


def _holds(
    layout: Layout,
    head: Callable[[Tensor], Tensor],
    before: Tensor,
    flat: Float[Tensor, "B N D"],
    other: Float[Tensor, "B N D"],
    shape: torch.Size,
) -> bool:
    """Whether exchanging every third token changes their elements and no others."""
    chosen = (torch.arange(flat.shape[1], device=flat.device) % 3 == 0)[:, None]
    changed = _changed(head, before, flat, other, chosen, shape)[:, layout.elements].any(-1)
    return torch.equal(changed, chosen[:, 0][layout.tokens])


def find_grid(layout: Layout, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Grid | None:
    """Frames, height and width of the picture in tokens.

    Args:
        layout: of a call.
        args: positional arguments of the call. Hosts that take their latents as tokens are given
            rotary positions (`img_ids`) or the grid itself (`img_shapes`, or `height` and `width`).
        kwargs: its keyword arguments.

    Returns:
        The grid, or None where nothing tells it.
    """
    count = len(layout.elements)
    if len(layout.shape) > 2:
        return _of_places(torch.stack(torch.unravel_index(layout.elements[:, 0], layout.shape), 1))
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.ndim >= 2 and not value.is_complex():
            places = value if value.ndim == 2 else value[0]
            if places.ndim == 2 and len(places) >= count:
                found = _of_places(places[-count:])
                if found is not None and found[1] > 1:
                    return found
        found = _of_list(value, count)
        if found is not None:
            return found
    return _of_list(tuple(kwargs.get(name, 1) for name in ("num_frames", "height", "width")), count)


def _of_places(places: Tensor) -> Grid | None:
    """The grid of tokens whose coordinates, one column each, are in reading order."""
    columns = [column.unique(return_inverse=True) for column in places.unbind(1)]
    moving = [(len(values), number) for values, number in columns if len(values) > 1]
    sizes = [size for size, _ in moving]
    if not moving or len(moving) > 3 or math.prod(sizes) != len(places):
        return None
    order = torch.zeros(len(places), dtype=torch.long, device=places.device)
    for size, number in moving:
        order = order * size + number
    if not torch.equal(order, torch.arange(len(places), device=places.device)):
        return None
    frames, height, width = [1] * (3 - len(sizes)) + sizes
    return frames, height, width


def _of_list(value: Any, count: int) -> Grid | None:
    """The grid in a nested list such as `img_shapes`, [[(frames, height, width)], ...]."""
    while isinstance(value, list) and value:
        value = value[0]
    whole = isinstance(value, tuple) and len(value) == 3 and all(isinstance(n, int) for n in value)
    return value if whole and math.prod(value) == count else None
