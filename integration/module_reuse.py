"""Reuse inside a network: named modules computed at steps of their own, their last output between.

Fixed rules of action heads cache the outputs of attention and MLP, not the network's: everything
around them, such as modulation and gates, still runs at every step. They are rivals of a forecast
and learn nothing.

Shapes: M modules, S steps, N elements of an output.
Source: EfficientVLA, arXiv 2506.10100, section 3.3 (one interval for all modules); BAC (Block-wise
Adaptive Caching), arXiv 2506.13456, section 4 (steps of every module's own).
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from foreseer.integration.host.hook import ReplacedMethod, replace_method, restore_method


def every(interval: int, num_steps: int) -> list[int]:
    """EfficientVLA's steps: 0, N, 2 N, ...

    Args:
        interval: N.
        num_steps: S.

    Raises:
        ValueError: the interval is below 1.
    """
    if interval < 1:
        raise ValueError(f"the interval is {interval}, expected at least 1: 1 computes every step.")
    return list(range(0, num_steps, interval))


class ModuleReuse:
    """A `with` block in which modules return their last output at all steps but their own.

    The loop says which step it is in: `reuse.at(step)` before it calls the network. Step 0 begins a
    run, and what was kept of the last one is forgotten.

    Args:
        network: whose modules they are.
        steps: by the name of a module, the steps at which it is computed, starting with 0.

    Raises:
        ValueError: there is no such module, or it is not computed at step 0.
    """

    def __init__(self, network: nn.Module, steps: Mapping[str, Sequence[int]]) -> None:
        known = dict(network.named_modules())
        for name, own in steps.items():
            if name not in known:
                raise ValueError(f"{type(network).__name__} has no module {name!r}.")
            if 0 not in own:
                raise ValueError(
                    f"{name} is computed at {list(own)}, expected 0 among them: before it there is "
                    "nothing to reuse."
                )
        self.modules = {name: known[name] for name in steps}
        self.steps = {name: frozenset(own) for name, own in steps.items()}
        self.computed = 0
        self._replaced: dict[str, ReplacedMethod] = {}
        self._kept: dict[str, Any] = {}
        self._step: int | None = None

    def __enter__(self) -> "ModuleReuse":
        for name, module in self.modules.items():
            through = functools.partial(self._call, name)
            self._replaced[name] = replace_method(module, "forward", through)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for name, replaced in self._replaced.items():
            restore_method(self.modules[name], "forward", replaced)
        self._replaced, self._kept, self._step = {}, {}, None

    def at(self, step: int) -> None:
        """The loop is at a step.

        Args:
            step: counted from 0, which begins a run.

        Raises:
            ValueError: a run goes on that did not begin, or goes back.
        """
        if step and (self._step is None or step <= self._step):
            raise ValueError(
                f"step {step} follows {self._step}; expected steps upward from 0: what is kept is "
                "of the run before."
            )
        if step == 0:
            self._kept, self.computed = {}, 0
        self._step = step

    def _call(self, name: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._step is None:
            raise ValueError(f"{name} was called before the loop said at(0).")
        if self._step in self.steps[name] or name not in self._kept:
            self._kept[name] = forward(*args, **kwargs)
            self.computed += 1
        return self._kept[name]


def held_similarity(features: Float[Tensor, "S N"]) -> Float[Tensor, "S S"]:
    """Cosine of every step's output with every other's, over the samples joined.

    Args:
        features: outputs of one module by step, flattened.
    """
    unit = nn.functional.normalize(features.double(), dim=1)
    return unit @ unit.T


def update_steps(similarity: Float[Tensor, "S S"], count: int) -> list[int]:
    """BAC's steps of one module: those of most similarity between what is held and what it is for.

    `DP[m][j] = max_i DP[m-1][i] + phi(i, j)`, `phi(i, j) = sum_{i < k < j} similarity[i, k]`: the
    output of step i is held until the next update j; the last is held until the end.

    Args:
        similarity: see `held_similarity`.
        count: updates, the one at step 0 included.

    Raises:
        ValueError: there are not so many steps.
    """
    num_steps = len(similarity)
    if not 1 <= count <= num_steps:
        raise ValueError(f"found {count} updates, expected 1 to the {num_steps} steps.")
    sums = similarity.double().cumsum(1)  # phi(i, j) = sums[i, j - 1] - sums[i, i]
    best = {0: (0.0, [0])}  # by the latest update: similarity so far, and the updates
    for _ in range(count - 1):
        longer: dict[int, tuple[float, list[int]]] = {}
        for start, (total, steps) in best.items():
            for step in range(start + 1, num_steps):
                reached = total + float(sums[start, step - 1] - sums[start, start])
                if step not in longer or reached > longer[step][0]:
                    longer[step] = reached, [*steps, step]
        best = longer
    ends = {j: total + float(sums[j, -1] - sums[j, j]) for j, (total, _) in best.items()}
    return best[max(ends, key=ends.__getitem__)][1]


def drift(features: Float[Tensor, "S N"]) -> float:
    """Mean distance of an element of a module's output between two steps, over all pairs of steps.

    Args:
        features: outputs of one module by step, flattened.
    """
    return float(torch.cdist(features, features, p=1).mean()) / features.shape[1]


def bubbled(
    steps: Mapping[str, Sequence[int]], drifts: Mapping[str, float], mlps: Sequence[str], top: int
) -> dict[str, list[int]]:
    """BAC's bubbling union: MLPs of most drift are also computed whenever a later MLP is.

    An MLP computed on what an earlier one did not correct passes the error on.

    Args:
        steps: by module, see `update_steps`.
        drifts: of the MLPs.
        mlps: their names, in the order in which they run.
        top: how many of them.
    """
    found = {name: sorted(own) for name, own in steps.items()}
    chosen = sorted(mlps, key=lambda name: -drifts[name])[:top]
    for place in range(len(mlps) - 1, -1, -1):
        if mlps[place] in chosen:
            later = [step for name in mlps[place + 1 :] for step in found[name]]
            found[mlps[place]] = sorted({*found[mlps[place]], *later})
    return found
