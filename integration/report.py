"""What a session did: which steps ran, what they cost, what is cached."""

import html
from collections import Counter
from dataclasses import dataclass, field
from statistics import median
from typing import Literal

Kind = Literal["anchor", "forecast", "partial", "shallow"]


@dataclass
class Report:
    """Account of the latest run of a session; `str(report)` is made to be read.

    Attributes:
        num_steps: steps of the run.
        anchors: steps at which the network ran.
        forecasts: steps that were forecast.
        state_bytes: largest size of the cached features, in bytes.
        predicted_bytes: largest size they could reach, known after the first step; they reach it
            unless the schedule decides on its way or guidance stops.
        checked: forecasts that were checked, counted per sample.
        accepted: those of them that were accepted.
        others: calls of networks that are not forecast (a ControlNet), by name.
        evaluations: steps computed for each sample, where samples have anchors of their own.
        seconds: wall-clock seconds of every call of the transformer, by kind of step.
        steps: wall-clock seconds of every step, from the end of the one before it.
        partials: steps, of those forecast, at which some tokens were computed.
        partial_seconds: wall-clock seconds of their calls; `seconds` holds the others.
        shallow: steps at which the outer blocks ran on a forecast of what lies between them.
        shallow_seconds: wall-clock seconds of their calls.
        resets: steps at which what was computed before was given up, and why.
        groups: share of the tokens in every token group, by name.
    """

    num_steps: int = 0
    anchors: list[int] = field(default_factory=list)
    forecasts: list[int] = field(default_factory=list)
    state_bytes: int = 0
    predicted_bytes: int = 0
    checked: int = 0
    accepted: int = 0
    evaluations: list[int] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    steps: list[float] = field(default_factory=list)
    partials: list[int] = field(default_factory=list)
    partial_seconds: list[float] = field(default_factory=list)
    shallow: list[int] = field(default_factory=list)
    shallow_seconds: list[float] = field(default_factory=list)
    resets: list[tuple[int, str]] = field(default_factory=list)
    groups: dict[str, float] = field(default_factory=dict)

    def open(self) -> None:
        """Start over for a new run."""
        self.num_steps = 0
        self.anchors, self.forecasts = [], []
        self.state_bytes, self.predicted_bytes = 0, 0
        self.checked, self.accepted, self.evaluations = 0, 0, []
        self.others = Counter()
        self.seconds = {"anchor": [], "forecast": []}
        self.steps = []
        self.partials, self.partial_seconds, self.resets = [], [], []
        self.shallow, self.shallow_seconds = [], []
        self.groups = {}

    def count(self, step_index: int, kind: Kind, seconds: float) -> None:
        """Add one call of the transformer; `partial` is a forecast with some tokens computed."""
        own = {"anchor": self.anchors, "shallow": self.shallow}.get(kind, self.forecasts)
        steps = [own, self.partials] if kind == "partial" else [own]
        for listed in steps:
            if not listed or listed[-1] != step_index:
                listed.append(step_index)
        apart = {"partial": self.partial_seconds, "shallow": self.shallow_seconds}
        (apart[kind] if kind in apart else self.seconds[kind]).append(seconds)

    @property
    def shallow_share(self) -> float:
        """Seconds of a shallow step in those of a full one, medians; 0 where there was none."""
        if not self.shallow_seconds:
            return 0.0
        return median(self.shallow_seconds) / median(self.seconds["anchor"])

    @property
    def cost(self) -> float:
        """Full steps that full and shallow ones came to, A + share * number of shallow ones."""
        return len(self.anchors) + self.shallow_share * len(self.shallow)

    @property
    def fewer(self) -> float | None:
        """Steps per full step's cost, S / A where none is shallow; None before a run."""
        return self.num_steps / self.cost if self.anchors else None

    @property
    def faster(self) -> float | None:
        """How many times faster the denoising loop was than one that computes every step.

            S min(a) / (A median(a) + sum(f))

        a and f are the wall-clock seconds of the A computed and the other steps, from the end of a
        step to the end of the next, which wait for the device at computed steps only. The least a
        stands for a step of the full run, so that work which a GPU still owes from forecast steps
        is not counted for it; the median leaves out the warm-up of the first. Text encoders and
        decoding come on top in both. `foreseer generate --compare` times both runs for real.
        """
        computed = [s for i, s in enumerate(self.steps) if i in self.anchors]
        if not computed or len(computed) == len(self.steps):
            return None
        forecast = sum(self.steps) - sum(computed)
        spent = len(computed) * median(computed) + forecast
        return len(self.steps) * min(computed) / spent if spent > 0 else None

    def headline(self) -> str:
        """What it came to, in one line."""
        if self.fewer is None:
            return "no run yet"
        told = f"{len(self.forecasts)} of {self.num_steps} steps forecast"
        if self.shallow:
            told = f"{len(self.shallow)} of {self.num_steps} steps shallow, " + (
                f"{len(self.forecasts)} forecast" if self.forecasts else "none forecast"
            )
        elif not self.forecasts:
            return told
        times = "" if self.faster is None else f", {self.faster:.1f} x faster"
        return f"{told}: {self.fewer:.1f} x fewer evaluations{times}"

    def _repr_html_(self) -> str:
        """The same for a notebook."""
        first, *others = (html.escape(line) for line in str(self).splitlines())
        return f"<b>{first}</b><br>" + "<br>".join(others)

    def __str__(self) -> str:
        """A few lines for a person."""
        lines = [self.headline(), f"{len(self.anchors)} network evaluations"]
        begun = len({*self.anchors, *self.shallow, *self.forecasts})
        if begun < self.num_steps:
            lines.append(f"broken off: {begun} of {self.num_steps} steps were begun")
        lines += [f"reset at step {step}: {reason}" for step, reason in self.resets]
        calls = {kind: len(values) for kind, values in self.seconds.items()}
        if sum(calls.values()) > len(self.anchors) + len(self.forecasts):
            lines.append(
                f"calls of the network: {calls['anchor']} computed, {calls['forecast']} forecast"
            )
        lines += [f"never forecast: {count} calls of {name}" for name, count in self.others.items()]
        if self.checked:
            mean = sum(self.evaluations) / len(self.evaluations)
            lines.append(
                f"checked {self.checked} forecasts, accepted {self.accepted / self.checked:.0%}; "
                f"{mean:.1f} evaluations per sample ({min(self.evaluations)} to "
                f"{max(self.evaluations)})"
            )
        lines += [
            f"anchors: {' '.join(map(str, self.anchors))}",
            f"cached features: {self.state_bytes / 1024:.1f} KiB",
        ]
        if self.groups:
            told = ", ".join(f"{name} {share:.0%}" for name, share in self.groups.items())
            lines.append(f"token groups: {told}")
        cost = {kind: median(values) for kind, values in self.seconds.items() if values}
        for kind, value in cost.items():
            lines.append(f"median {kind} step: {1000 * value:.2f} ms")
        if len(cost) == 2:
            lines.append(f"a forecast costs {cost['forecast'] / cost['anchor']:.2%} of an anchor")
        if self.shallow:
            lines.append(f"shallow steps: {' '.join(map(str, self.shallow))}")
            lines.append(
                f"a shallow step costs {self.shallow_share:.2%} of an anchor; full and shallow "
                f"steps cost {self.cost:.1f} full steps"
            )
        if self.partials:
            partial = median(self.partial_seconds)
            lines.append(f"tokens computed at: {' '.join(map(str, self.partials))}")
            lines.append(
                f"median partial step: {1000 * partial:.2f} ms, {partial / cost['anchor']:.2%} of "
                "an anchor"
            )
        return "\n".join(lines)
