"""What tokens say that are computed alone, on the states of full runs; written to a page's table.

    python benchmarks/jit_open_loop.py

Relative errors of the stream that enters the head, in the middle of the gaps between anchors, mean
over gaps: of the computed tokens, with attention among themselves alone (JiT) or with its output
forecast; and of the others, interpolated, forecast, or both. `least` are the best sums of the named
terms there are for these very samples: a bound on what a fit could reach. Eight samples of the
readouts' calibration, 50 steps, guidance 3, both bundled models. Writes
`benchmarks/results/jit_open_loop.json`.
"""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foreseer.integration.host.hook import replacing
from foreseer.integration.host.taps import capturing
from foreseer.integration.host.trunk import TrunkTracer
from foreseer.integration.pipelines.load import load_pipeline
from foreseer.integration.token_runner import PartialTrunk
from foreseer.predictors.lattice_policy import LatticePolicy
from foreseer.trajectories.prompts import asked_items, generate_batch

RESULT = Path("benchmarks/results/jit_open_loop.json")
PROMPTS = {"fashion_dit": None, "emoji_flux": "benchmarks/emoji_calibration.txt"}
NUM_SAMPLES, FIRST, STEPS, GRID = 8, 3000, 50, (1, 8, 8)


class FullRun:
    """Every call of a full run, the stream that entered its head, and all attention outputs.

    Args:
        name: of a bundled model.
    """

    def __init__(self, name: str) -> None:
        pipe = load_pipeline(f"zoo:{name}")
        self.host = pipe.transformer
        items = asked_items(pipe, PROMPTS[name], NUM_SAMPLES, FIRST)
        self.calls: list[tuple[tuple, dict[str, Any]]] = []
        handle: Any = self.host.register_forward_pre_hook(
            lambda _, args, kwargs: self.calls.append((args, kwargs)), with_kwargs=True
        )
        generate_batch(
            pipe, items, guidance_scale=3.0, num_inference_steps=STEPS, output_type="latent"
        )
        handle.remove()
        with TrunkTracer(self.host) as tracer:
            self.host(*self.calls[0][0], **self.calls[0][1])
        self.trunk = tracer.trunk()
        self.partial = PartialTrunk(self.host, self.trunk)
        self.hidden: list[Tensor] = []
        self.attention: list[dict[str, Tensor]] = []
        for args, kwargs in self.calls:
            with self.partial.capturing() as kept:
                with capturing(self.host, self.trunk, {"hidden"}) as found:
                    self.host(*args, **kwargs)
            self.hidden.append(found["hidden"])
            self.attention.append(kept)

    def alone(self, step: int, chosen: Tensor) -> Tensor:
        """The chosen tokens, which attend to themselves and the text only."""
        args, kwargs = self.calls[step]
        if "img_ids" in kwargs:
            kwargs = kwargs | {"img_ids": kwargs["img_ids"][chosen]}
            with capturing(self.host, self.trunk, {"hidden"}) as found:
                self.host(args[0][:, chosen], *args[1:], **kwargs)
            return found["hidden"]
        seen: list[Tensor] = []
        handles: list[Any] = [
            self.partial.first.register_forward_pre_hook(
                replacing(lambda stream: stream[:, chosen]), with_kwargs=True
            ),
            self.partial.head.register_forward_pre_hook(
                replacing(lambda rows: seen.append(rows) or self.hidden[step]), with_kwargs=True
            ),
        ]
        try:
            self.host(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        return seen[0]

    def given(self, step: int, chosen: Tensor, attention: dict[str, Tensor]) -> Tensor:
        """The chosen tokens on given attention outputs."""
        seen: list[Tensor] = []
        self.partial(
            self.host.forward,
            *self.calls[step],
            chosen.repeat(len(self.hidden[0]), 1),
            lambda name, pick: pick(attention[name]),
            lambda rows: seen.append(rows) or self.hidden[step],
        )
        return seen[0]


def errors_at(run: FullRun, step: int, older: int, newer: int, share: float) -> dict[str, float]:
    """All errors at one step, from two anchors before it."""
    policy = LatticePolicy(share)
    policy.lay_out(GRID)
    chosen, others = policy.computed, policy.others
    selected = chosen.repeat(len(run.hidden[0]), 1)
    ahead = (step - newer) / (newer - older)

    def line(late: Tensor, early: Tensor) -> Tensor:
        return late + ahead * (late - early)

    truth, late, early = run.hidden[step], run.hidden[newer], run.hidden[older]
    extrapolated = {
        name: line(each, run.attention[older][name]) for name, each in run.attention[newer].items()
    }
    fresh = run.given(step, chosen, extrapolated)
    taylor = line(late, early)
    own, near, own_near = policy.beside(taylor, fresh, selected)
    _, _, near_late = policy.beside(late, fresh, selected)
    _, _, near_early = policy.beside(early, fresh, selected)
    there, rest = truth[:, chosen], truth[:, others]
    past = late[:, others], early[:, others]
    reused = run.given(step, chosen, run.attention[newer])
    return {
        "computed, attention among themselves": relative(run.alone(step, chosen), there),
        "computed, attention reused": relative(reused, there),
        "computed, attention extrapolated": relative(fresh, there),
        "others, interpolated (JiT)": relative(near, rest),
        "others, own past extrapolated": relative(own, rest),
        "others, moved by the whole change": relative(own + near - own_near, rest),
        "others, least of own past": least(rest, past),
        "others, least of own past and change": least(rest, (*past, near, near_late, near_early)),
    }


def relative(found: Tensor, truth: Tensor) -> float:
    """Norm of the error by the norm of the truth."""
    return float((found - truth).norm() / truth.norm())


def least(truth: Tensor, terms: tuple[Tensor, ...]) -> float:
    """The relative error of the best sum of the terms."""
    columns = torch.stack([term.flatten() for term in terms], 1).double()
    target = truth.flatten()[:, None].double()
    return relative(columns @ torch.linalg.lstsq(columns, target).solution, target)


@torch.no_grad()
def main() -> None:
    """Measure and write."""
    torch.set_num_threads(1)
    rows = []
    for name in PROMPTS:
        run = FullRun(name)
        for gap in (4, 8):
            for share in (0.25, 0.5):
                sums: dict[str, list[float]] = defaultdict(list)
                for step in range(2 * gap + gap // 2, STEPS - 2, gap):
                    newer = step - gap // 2
                    for what, error in errors_at(run, step, newer - gap, newer, share).items():
                        sums[what].append(error)
                row: dict[str, Any] = {"host": name, "anchors_every": gap, "share": share}
                row |= {what: round(sum(each) / len(each), 4) for what, each in sums.items()}
                print(row, flush=True)
                rows.append(row)
    RESULT.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
