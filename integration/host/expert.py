"""A transformer of a pipeline and what has been proven of it; most pipelines have one."""

import contextlib
import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from foreseer.integration.host.call import Call, Narrowed, form_of, prediction
from foreseer.integration.host.gate import FirstLook
from foreseer.integration.host.hook import TrunkSkipper
from foreseer.integration.host.layout import Layout, find_grid, find_layout
from foreseer.integration.host.outer import OuterBlocks, OuterLadder
from foreseer.integration.host.proof import HostFacts, Parts, check_rows, facts_of, prove
from foreseer.integration.host.taps import LAST_BLOCK, capturing, own, stream_tap
from foreseer.integration.host.trunk import Trunk, UnsupportedHost


class Expert:
    """A transformer at work in runs; its facts are there after the first call.

    Args:
        number: its turn, those for high noise first; networks of one step share it.
        name: its name in the pipeline.
        transformer: the module.
        taps: taps to capture where it runs, `last_block` where forecasts are checked.
        probe: what to look at in its first block; None for nothing.
    """

    def __init__(
        self,
        number: int,
        name: str,
        transformer: nn.Module,
        taps: frozenset[str],
        probe: str | None = None,
    ) -> None:
        self.number = number
        self.name = name
        self.transformer = transformer
        self.taps = taps
        self.probe = probe
        self.form: Callable[[Tensor], Any] | None = None  # puts a prediction as the host returns it
        self.trunk: Trunk | None = None
        self.skipper: TrunkSkipper | None = None
        self.first_look: FirstLook | None = None
        self.outer: Mapping[str, OuterBlocks | OuterLadder] = {}  # by the tap in between
        self.image_only = False  # whether the head is known to be given no text
        self._facts: HostFacts | None = None
        self.proven = not (taps - {"output"}) and probe is None
        self.rows_proven = LAST_BLOCK not in taps  # else checked on the first batch

    @property
    def facts(self) -> HostFacts:
        """What is known of the transformer, of earlier attachments too."""
        if self._facts is None:
            self._facts = facts_of(self.transformer)
        return self._facts

    def prove(self, call: Call) -> None:
        """Find the trunk on this call's inputs and check everything that is relied on.

        What was proven of this transformer before, on a call of this form, is not proven again.
        """
        taps, probe = set(self.taps), self.probe
        proof = (frozenset(taps - {"output"}), probe, call.form)
        if proof in self.facts.proven and self.facts.trunk is not None:
            parts = Parts.of(self.transformer, self.facts.trunk, taps, probe)
        else:
            self.facts.trunk, parts = prove(call, taps, probe)
            self.facts.proven.add(proof)
        self.trunk, self.skipper = self.facts.trunk, parts.skipper
        self.first_look, self.outer = parts.first_look, parts.outer
        self.proven = True

    def prove_rows(self, call: Call, output: Any) -> None:
        """Check, once, that rows computed alone are what they are in their batch."""
        sample = prediction(output) if not self.rows_proven else None
        if sample is not None and len(sample) > 1:
            proof = ("rows", call.form)
            if proof not in self.facts.proven:
                check_rows(call, sample)
                self.facts.proven.add(proof)
            self.rows_proven = True

    def capturing(
        self, without: str | None = None
    ) -> contextlib.AbstractContextManager[dict[str, Tensor]]:
        """Collect the taps of the call inside, but for one; see `taps.capturing`."""
        if self.trunk is None:
            return contextlib.nullcontext({})
        return capturing(self.transformer, self.trunk, set(self.taps) - {without})

    def complete(
        self, captured: dict[str, Tensor], output: Any, without: str | None = None
    ) -> dict[str, Tensor]:
        """All taps of a call that ran.

        Args:
            captured: what was collected inside.
            output: what the host returned.
            without: a tap that was not collected.

        Raises:
            UnsupportedHost: some were not produced.
        """
        self.form = form_of(output)
        taps = set(self.taps) - {without}
        if "output" in taps:
            captured["output"] = own(prediction(output))
        if LAST_BLOCK in taps and self.trunk is not None:
            taps.remove(LAST_BLOCK)
            taps |= {stream_tap(LAST_BLOCK, i) for i in range(len(self.trunk.entering(-1)))}
        kept = {tap: captured[tap] for tap in taps if tap in captured}
        if len(kept) < len(taps):
            raise UnsupportedHost(
                f"{type(self.transformer).__name__} produced the taps {sorted(kept)}, "
                f"expected {sorted(taps)}."
            )
        return kept

    def narrow(self, narrowed: Narrowed) -> None:
        """A call goes on with some of the branches of an earlier one."""
        if self.first_look is not None:
            self.first_look.narrow(narrowed)

    def skip(self, call: Call, entering: Callable[[Tensor], Tensor]) -> Any:
        """The call without its trunk, the head's input t replaced by `entering(t)`."""
        if self.skipper is None:
            raise UnsupportedHost("the trunk of this host was never traced; report this as a bug.")
        return self.skipper(call.forward, call.args, call.kwargs, entering)

    def image_tokens(
        self, call: Call, hidden: Float[Tensor, " B *shape"]
    ) -> Bool[Tensor, "B N"] | None:
        """Which tokens of the head's input enter the prediction: the others are text and padding.

        Those are the tokens that the prediction has a gradient in; the head runs once more. A host
        whose head once was given image tokens only is not asked again.

        Args:
            call: the call.
            hidden: what entered the head.

        Returns:
            True for every token of the image; None where all are.

        Raises:
            ValueError: gradients are out of reach, under `torch.inference_mode`.
        """
        if hidden.ndim != 3 or self.image_only:
            return None
        if torch.is_inference_mode_enabled():
            raise ValueError(
                "recording asks the head for a gradient, which torch.inference_mode forbids; "
                "record under torch.no_grad, as diffusers pipelines run by themselves."
            )
        with torch.enable_grad():
            leaf = hidden.detach().requires_grad_()
            output = prediction(self.skip(call, lambda came: leaf))
            (gradient,) = torch.autograd.grad(output, leaf, torch.ones_like(output))
        mask = gradient.abs().amax(-1) > 0
        self.image_only = bool(mask.all())
        return None if self.image_only else mask

    def layout(
        self, call: Call, hidden: Float[Tensor, "B *N D"], output: Float[Tensor, " B *shape"]
    ) -> Layout:
        """Where the tokens of the head's input lie in the output.

        The head runs once per bit of their number, once for every shape; where text or padding is
        among them, once more for every run.

        Args:
            call: the call.
            hidden: what entered the head.
            output: the prediction.

        Raises:
            UnsupportedHost: the head does not work on each token alone.
        """
        key = (hidden.shape, output.shape, hidden.device, call.form)
        layout = self.facts.layouts.get(key)
        if layout is None:
            head = functools.partial(self._head, call)
            layout = find_layout(head, hidden, type(self.transformer).__name__)
            if layout.tokens.shape[1] == hidden[0, ..., 0].numel():
                self.facts.layouts[key] = layout
        # latents that are tokens have one shape at 512 x 1024 and at 1024 x 512
        return replace(layout, grid=find_grid(layout, call.args, call.kwargs))

    def _head(self, call: Call, hidden: Tensor) -> Tensor:
        """The prediction for another hidden state."""
        return prediction(self.skip(call, functools.partial(_instead, hidden)))


def _instead(hidden: Tensor, came: Tensor) -> Tensor:
    return hidden
