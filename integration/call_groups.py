"""Token groups that arrive with a call: a number per sample and token, checked as the run goes on.

Shapes: B samples, M = branches * B rows of a network's call, N tokens.
"""

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from types import FrameType
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from foreseer.integration.host.caller import arguments_of

Groups = Tensor | Callable[[Mapping[str, Any]], Tensor]
"""Group numbers, `(B, N)`; or what makes them of a pipeline call's arguments, asked once a run."""


class CallGroups:
    """The token groups of the run under way; guidance branches of a sample share them.

    Args:
        given: the numbers, or what makes them.
        names: of the groups.
        taps: whose tokens they number.

    Raises:
        ValueError: neither a tensor nor a function was given.
    """

    def __init__(self, given: Groups, names: Sequence[str], taps: Collection[str]) -> None:
        if not isinstance(given, Tensor) and not callable(given):
            raise ValueError(
                f"groups is a {type(given).__name__}, expected a tensor (samples, tokens) of group "
                "numbers, or a function that makes one of the call's arguments."
            )
        self.given = given
        self.names, self.taps = tuple(names), frozenset(taps)
        self.numbers: Tensor = torch.empty(0)
        self._placed: dict[tuple[int, torch.device], Tensor] = {}

    def open(self, call: FrameType | None) -> None:
        """Take the groups of a run.

        Args:
            call: the pipeline call, whose arguments a function is given; None in a loop.

        Raises:
            ValueError: they are no whole numbers (B, N), or one has no name.
        """
        given = self.given
        if not isinstance(given, Tensor):
            given = given({} if call is None else arguments_of(call))
        is_tensor = isinstance(given, Tensor)
        found = f"{tuple(given.shape)} of {given.dtype}" if is_tensor else type(given).__name__
        whole = is_tensor and given.dtype != torch.bool and not given.is_floating_point()
        if not whole or given.ndim != 2 or not given.numel() or given.is_complex():
            raise ValueError(
                f"the token groups are {found}, expected whole numbers (samples, tokens), such as "
                "region_groups makes of a mask."
            )
        low, high = int(given.min()), int(given.max())
        if low < 0 or high >= len(self.names):
            raise ValueError(
                f"the token groups run from {low} to {high}, expected 0 to {len(self.names) - 1}: "
                + ", ".join(f"{number} {name}" for number, name in enumerate(self.names))
                + "."
            )
        self.numbers, self._placed = given.long(), {}

    def rows(self, num_rows: int, device: torch.device) -> Int[Tensor, "M N"]:
        """The groups of a call's rows, branch after branch.

        Raises:
            ValueError: the rows are no multiple of the samples.
        """
        key = num_rows, device
        if key not in self._placed:
            if num_rows % len(self.numbers):
                raise ValueError(self._other_batch(f"a call of {num_rows} rows"))
            times = num_rows // len(self.numbers)
            self._placed[key] = self.numbers.to(device).repeat(times, 1)
        return self._placed[key]

    def check_samples(self, samples: int) -> None:
        """Raise unless a run has a row of groups per sample, now that a step tells its samples.

        Raises:
            ValueError: it has another number.
        """
        if samples != len(self.numbers):
            raise ValueError(self._other_batch(f"a run of {samples} samples"))

    def _other_batch(self, found: str) -> str:
        return (
            f"the token groups have {len(self.numbers)} rows, found {found}; give one row per "
            "sample (as many as prompts times num_images_per_prompt): guidance branches share it."
        )

    def check_tokens(self, computed: Mapping[str, Tensor]) -> None:
        """Raise unless the features of a call have as many tokens.

        Args:
            computed: features by tap.

        Raises:
            ValueError: one has others, or none.
        """
        count = self.numbers.shape[1]
        for tap in sorted(self.taps & computed.keys()):
            shape = tuple(computed[tap].shape)
            if len(shape) != 3 or shape[1] != count:
                tokens = "no tokens" if len(shape) != 3 else f"{shape[1]} tokens"
                raise ValueError(
                    f"the token groups are for {count} tokens, and the tap {tap!r} has {tokens} "
                    f"(shape {shape}): a mask of another grid, or without the tokens of a source "
                    "picture. Make them for this size; where the tap has no tokens, use 'hidden'."
                )

    def shares(self) -> dict[str, float]:
        """Share of all tokens by group name."""
        counts = Counter(self.numbers.flatten().tolist())
        total = self.numbers.numel()
        return {name: counts[number] / total for number, name in enumerate(self.names)}

    def close(self) -> None:
        """The run is over: let go of its tensors."""
        self._placed = {}
