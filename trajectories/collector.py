"""What a recorder keeps of the run in progress, and what of it is stored.

Shapes: B batch, S sampling steps, N tokens, D channels.

Guidance gives it v = u + s (c - u) with s > 1 (Ho & Salimans, arXiv 2207.12598): v's coefficients
on the branches' outputs, s and 1 - s, have opposite signs, and the conditional one's is the larger,
also where v is rescaled or negated afterwards.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from foreseer.checkpoints.spec import Setting
from foreseer.integration.observers import CallRecord, Observer, StepRecord
from foreseer.predictors.partition import Partition
from foreseer.trajectories.gram import gram

ALIKE = 1e-9
"""Relative determinant of the branches' Gram below which they do not differ."""


def first_branch(v: Tensor, first: Tensor, second: Tensor) -> str:
    """The kind of the first branch: `conditional`, `unconditional`, or empty where v does not tell.

    Args:
        v: what the scheduler was given.
        first: output of the branch that the pipeline runs first.
        second: output of the other.
    """
    if not v.numel() == first.numel() == second.numel():
        return ""
    branches = torch.stack([first.flatten(), second.flatten()]).double()
    products = branches @ branches.T
    if torch.linalg.det(products) <= ALIKE * products[0, 0] * products[1, 1]:
        return ""
    one, other = torch.linalg.solve(products, branches @ v.flatten().double()).tolist()
    if one * other >= 0:
        return ""
    return "conditional" if abs(one) > abs(other) else "unconditional"


class Recorder(Observer):
    """Keep the taps and states of the run in progress.

    A branch that ends in mid-run, as truncated guidance does, keeps its last feature from there on:
    its Gram repeats, and predictors never use the rows of those steps.

    Args:
        taps: taps to keep; `blocks.*` stands for the residual stream after every block.
        partitions: partitions by `<tap>/<name>`, whose Grams are stored beside the tap's.
    """

    wants_image_tokens = True
    to_need_less = "record fewer taps"

    def __init__(
        self, taps: Sequence[str], partitions: Mapping[str, Partition] | None = None
    ) -> None:
        self.taps = frozenset(taps)
        self.partitions = dict(partitions or {})
        self._begin([])

    def _begin(self, sigmas: Sequence[float]) -> None:
        """Forget the last run."""
        self.sigmas = list(sigmas)
        self.opening: Mapping[str, float | None] = {}  # settings as the run began
        self.settings: list[Mapping[str, float | None]] = []  # of every step
        self.features: dict[str, list[dict[int, Tensor]]] = {}
        self.experts: list[int] = []  # the one that ran at every step
        self.masks: dict[int, Bool[Tensor, "B N"]] = {}  # image tokens of each branch
        self.groups: dict[int, Int[Tensor, "B N"]] = {}  # token groups of each branch
        self.with_source = (0, 0)  # tokens of the prediction, and of the sample, where it has fewer
        self.states: list[Tensor] = []
        self.final: Tensor | None = None
        self.first_branch = ""  # its kind, once a step tells

    def on_step(self, record: StepRecord) -> None:
        """Keep the features of a step, the state it started from and the one it ended at.

        Raises:
            ValueError: a feature changed its shape in mid-run.
        """
        if record.index == 0:
            self._begin(record.sigmas)
            self.opening = record.opening
        for call in record.calls:
            self._keep(call)
            self._see_source(call, record.v)
        self.settings.append(record.settings)
        self.states.append(record.before.detach().float())
        self.final = record.after.detach().float()
        outputs = self.features.get("output", [])[record.index :]
        if not self.first_branch and outputs and len(outputs[0]) == 2:
            parts = (outputs[0][number] for number in sorted(outputs[0]))
            self.first_branch = first_branch(record.v, *parts)

    def _keep(self, call: CallRecord) -> None:
        """Keep one call's features, one entry per branch."""
        step = call.step
        assert call.taps is not None  # every step runs
        if len(self.experts) == step.index:
            self.experts.append(step.expert)
        if call.image_tokens is not None:
            parts = call.image_tokens.chunk(len(step.branches))
            self.masks.update(zip(step.branches, parts, strict=True))
        if step.groups is not None:
            parts = step.groups.chunk(len(step.branches))
            self.groups.update(zip(step.branches, parts, strict=True))
        for tap in self.taps:
            steps = self.features.setdefault(tap, [])
            while len(steps) <= step.index:
                steps.append({})
            parts = call.taps[tap].chunk(len(step.branches))
            _check_shapes(steps, zip(step.branches, parts, strict=True), tap, step.index)
            steps[step.index].update(zip(step.branches, parts, strict=True))

    def _see_source(self, call: CallRecord, v: Tensor) -> None:
        """Note where a prediction has tokens after those of the sample.

        Editing models (FLUX Kontext, Qwen-Image-Edit) append a source picture to the network's
        input, and their pipelines cut its tokens off the prediction.
        """
        output = None if call.taps is None else call.taps.get("output")
        if output is not None and output.ndim == v.ndim == 3 and output.shape[1] > v.shape[1]:
            self.with_source = output.shape[1], v.shape[1]

    @property
    def guidance_scale(self) -> float | None:
        """As the run began; None where the call has none."""
        return self.opening.get("guidance_scale")

    @property
    def num_branches(self) -> int:
        """Guidance branches of the first step, which has them all."""
        return len(self._steps()[0])

    @property
    def guidance(self) -> dict[str, Setting]:
        """What the pipeline call set, a value per step where it changed on the way.

        Raises:
            ValueError: the settings of a step have other names, as where a list became longer.
        """
        for index, step in enumerate(self.settings):
            if differing := sorted(step.keys() ^ self.settings[0].keys()):
                raise ValueError(
                    f"step {index} has other settings than the first: {', '.join(differing)}; "
                    "a recorded run must keep its arguments and adapters."
                )
        steps = {name: tuple(step[name] for step in self.settings) for name in self.settings[0]}
        return {n: each[0] if len(set(each)) == 1 else each for n, each in steps.items()}

    @property
    def dtype(self) -> str:
        """Dtype of the taps, such as `float32`."""
        return str(next(iter(self._steps()[0].values())).dtype).removeprefix("torch.")

    @property
    def branch_steps(self) -> list[int]:
        """Steps each branch lasts; empty where all last to the end.

        Raises:
            ValueError: a branch starts, or starts again, in mid-run.
        """
        steps = self._steps()
        lasting = [sum(branch in step for step in steps) for branch in sorted(steps[0])]
        for index, step in enumerate(steps):
            expected = {branch for branch, last in enumerate(lasting) if index < last}
            if set(step) != expected:
                raise ValueError(
                    f"step {index} has the guidance branches {sorted(step)}, expected "
                    f"{sorted(expected)}: a branch that starts in mid-run (skip-layer guidance) "
                    "has nothing to be forecast from there, so learned predictors have no rows for "
                    "it. Record without it; the fixed formulas forecast it as it comes."
                )
        return [] if set(lasting) == {len(steps)} else lasting

    @property
    def expert_steps(self) -> list[int]:
        """First step of each transformer.

        Raises:
            ValueError: they do not take turns in order.
        """
        if self.experts != sorted(self.experts) or self.experts[:1] != [0]:
            raise ValueError(
                f"the transformers ran in the order {self.experts}, expected all steps of the "
                "first, then all of the second."
            )
        return [self.experts.index(expert) for expert in sorted(set(self.experts))]

    def _steps(self) -> list[dict[int, Tensor]]:
        return next(iter(self.features.values()))

    def state_bytes(self) -> int:
        """Bytes of the features kept of the run so far."""
        steps = [step for steps in self.features.values() for step in steps]
        return sum(t.numel() * t.element_size() for step in steps for t in step.values())

    def most_bytes(self, index: int, num_steps: int) -> int:
        """All steps keep what the first one keeps: a Gram's rows need all earlier features."""
        return self.state_bytes() * num_steps // (index + 1)

    def trajectory(self, sample: int, tap: str) -> list[Tensor]:
        """The features of one sample at one tap, `(S, *shape)` of every branch.

        Branches may differ in their number of tokens where the tap holds the text's.
        """
        steps = self.features[tap]
        found: list[Tensor] = []
        for branch in sorted(steps[0]):
            own = [step[branch][sample] for step in steps if branch in step]
            found.append(torch.stack(own + [own[-1]] * (len(steps) - len(own))))
        return found

    def image_trajectory(self, sample: int, tap: str) -> list[Tensor]:
        """The same, without tokens that never enter the picture: text and padding."""
        found = self.trajectory(sample, tap)
        return [self._image(tokens, branch, sample) for branch, tokens in enumerate(found)]

    def _image(self, tokens: Tensor, branch: int, sample: int) -> Tensor:
        """The image's tokens of a branch's features or groups, which are tokens of axis 1."""
        mask, (count, shown) = self.masks.get(branch), self.with_source
        if tokens.ndim not in (2, 3):
            return tokens
        if mask is not None and tokens.shape[1] == mask.shape[1]:
            tokens = tokens[:, mask[sample]]
        return tokens[:, :shown] if tokens.shape[1] == count else tokens

    def _part_grams(self, image: list[Tensor], partition: Partition, sample: int) -> Tensor:
        """Grams of the parts, `(branches, P, S, S)`; token groups are those of the sample."""
        own: list[Tensor | None] = [None] * len(image)
        for branch, groups in self.groups.items():
            own[branch] = self._image(groups[sample][None], branch, sample)
        pairs = zip(image, own, strict=True)
        return torch.stack([partition.at(groups).grams(features) for features, groups in pairs])

    def tensors(
        self, sample: int, features: str, num_tokens: int, states: bool
    ) -> dict[str, Tensor]:
        """What is stored of one sample: Grams, and features and states as asked for.

        Grams and token samples are of the image's tokens; full features are of all, since that is
        what is forecast.
        """
        if self.final is None:
            raise ValueError("no step was recorded: the pipeline never called scheduler.step.")
        stored = {"final": self.final[sample]}
        if states:
            stored["states"] = torch.stack([*(s[sample] for s in self.states), self.final[sample]])
        for tap in sorted(self.features):
            image = self.image_trajectory(sample, tap)
            stored[f"gram/{tap}"] = torch.stack([gram(branch.flatten(1)) for branch in image])
            for name, partition in self.partitions.items():
                if name.partition("/")[0] == tap:
                    _stacked(image, tap)  # which refuses branches of other shapes
                    stored[f"gram/{name}"] = self._part_grams(image, partition, sample)
            if features == "full":
                stored[f"feature/{tap}"] = _stacked(self.trajectory(sample, tap), tap)
            elif features == "tokens" and image[0].ndim == 3:  # (S, N, D)
                shown = _stacked(image, tap)
                tokens = torch.linspace(0, shown.shape[2] - 1, num_tokens).round().long().unique()
                stored[f"feature/{tap}"] = shown[:, :, tokens]
                stored[f"tokens/{tap}"] = tokens
        return {name: tensor.cpu() for name, tensor in stored.items()}


def _check_shapes(
    steps: list[dict[int, Tensor]], parts: Iterable[tuple[int, Tensor]], tap: str, index: int
) -> None:
    """Raise unless every branch keeps the shape of its last feature."""
    for branch, part in parts:
        before = next((step[branch] for step in reversed(steps) if branch in step), part)
        if before.shape != part.shape:
            raise ValueError(
                f"the {tap} of branch {branch} changed shape from {tuple(before.shape)} to "
                f"{tuple(part.shape)} at step {index}; a recorded run must keep one shape. Record "
                "without what changes the latents in mid-run; the fixed formulas forecast it."
            )


def _stacked(branches: list[Tensor], tap: str) -> Tensor:
    """One tensor, branch by branch.

    Raises:
        ValueError: they differ in shape.
    """
    if len({branch.shape for branch in branches}) > 1:
        shapes = [tuple(branch.shape[1:]) for branch in branches]
        raise ValueError(
            f"the branches' features at the tap {tap} have the shapes {shapes}, since prompts of "
            "other lengths are among their tokens; record Grams only (features: none), or pad the "
            "prompts to one length."
        )
    return torch.stack(branches)
