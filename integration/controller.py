"""What a session asks for decisions."""

from collections.abc import Mapping

from torch import Tensor

from foreseer.integration.host.call_rows import Narrowed
from foreseer.integration.host.layout import Layout
from foreseer.integration.report import Report
from foreseer.predictors.base import Step


class Controller:
    """What a session asks for decisions; `Forecaster` and `Recorder` are the two there are.

    Attributes:
        taps: the taps to capture at anchors.
        probe: what to look at in the first block where `action` says `look`; None for nothing.
        needs: `Step` fields that forecasts need and that exist only inside the forward: `tokens`,
            `modulation`.
        wants_image_tokens: whether the session shall find out which tokens of the head's input
            enter the picture.
        image_tokens: those tokens, `(rows, tokens)` of bool, of every call that has others too.
        wants_layout: whether the session shall find out where the head's tokens lie in the output.
        layouts: that, by call key.
        memory_budget: bytes that cached features may take; None for what the device has.
        to_need_less: what a user can do, besides fewer samples, when that is too little.
        settings: what the pipeline call in progress sets that changes the function (see
            `CallSettings`); read before `open`, and again before every `close`.
    """

    taps: frozenset[str] = frozenset()
    needs: frozenset[str] = frozenset()
    probe: str | None = None
    wants_image_tokens: bool = False
    image_tokens: Mapping[str, Tensor] = {}
    wants_layout: bool = False
    layouts: Mapping[str, Layout] = {}
    settings: Mapping[str, float | None] = {}
    memory_budget: int | None = None
    to_need_less: str = (
        "use a predictor that looks at fewer anchors (Reuse at 1, Taylor(1) at 2); memory_budget "
        "sets another limit"
    )

    def open(self, sigmas: list[float]) -> None:
        """A new run starts on this grid of sigmas; forget the last one."""

    def is_anchor(self, step: Step) -> bool:
        """Whether the network runs at this step."""
        return True

    def action(self, step: Step) -> str:
        """What to do at this call: `anchor`, `forecast`, `look` (first block) or `check` (last)."""
        return "anchor" if self.is_anchor(step) else "forecast"

    def judge(self, step: Step, statistic: Tensor) -> bool:
        """Whether the network runs at this step, given the first block's statistic."""
        raise NotImplementedError

    def check_inputs(self, key: str, step: Step) -> list[Tensor]:
        """Forecasts of what enters the last block, one per stream."""
        raise NotImplementedError

    def check(self, key: str, step: Step, computed: Tensor) -> Tensor:
        """What enters the head, given what the last block made of its forecast input."""
        raise NotImplementedError

    def rejected(self, step: Step) -> list[int]:
        """Samples whose forecast at this step was refused and which must be computed."""
        return []

    def observe(self, key: str, call: int, step: Step, taps: dict[str, Tensor]) -> None:
        """The taps of a call at an anchor, once the number of its branches is known."""

    def adopt(self, key: str, narrowed: Narrowed) -> None:
        """A call goes on with some of the branches of an earlier one: guidance has stopped.

        Args:
            key: of the call, not seen before.
            narrowed: the earlier call, and which rows of its tensors are this one's.

        Raises:
            ValueError: the controller cannot go on.
        """
        raise ValueError(
            f"guidance stops in mid-run, which {type(self).__name__} cannot follow; record without "
            "truncated guidance, or use a fit on Grams (L2PLeastSquares, L2PAdam)."
        )

    def knows(self, key: str) -> bool:
        """Whether a call can be forecast; one that cannot is computed at every step."""
        return True

    def forecast(self, key: str, step: Step) -> tuple[str, Tensor]:
        """The tap to put back (`output`, `hidden` or `residual`) and its forecast."""
        raise NotImplementedError

    def close(self, step_index: int, v: Tensor, before: Tensor, after: Tensor) -> None:
        """A step is over: the guided prediction `v` took the latents from `before` to `after`."""

    def state_bytes(self) -> int:
        """Bytes of cached features."""
        return 0

    def most_bytes(self, index: int, num_steps: int) -> int:
        """Bytes of cached features at most by the end of the run, known after a step `index`."""
        return 0

    def forget(self) -> None:
        """The run is over, finished or not: let go of what only its own steps could read."""

    def finish(self, report: Report) -> None:
        """The run is over; add to its report what only the controller knows."""
