"""What a soak draws from: pipelines, what is attached to them, calls, and ways to break one off."""

import contextlib
import copy
import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import FluxPipeline
from families import FAMILIES, MORE, call
from families.family import STEPS, silent
from lesa_cases import lesa, lesa_values
from tiny_hosts import pipeline, run, seeded
from torch import Tensor, nn

from foreseer.checkpoints.spec import PredictorMismatch, PredictorSpec
from foreseer.integration.forecasting import attach
from foreseer.integration.host.clock import Clock
from foreseer.integration.host.fingerprint import host_fingerprint
from foreseer.integration.host.trunk import modulation_width
from foreseer.integration.observers import Observer, StepRecord
from foreseer.integration.schedule import interval, mask_anchors, warped
from foreseer.integration.session import Session
from foreseer.predictors.any_anchors import L2PGram
from foreseer.predictors.base import Predictor
from foreseer.predictors.lattice_policy import LatticePolicy
from foreseer.predictors.linear import L2P
from foreseer.predictors.neural import DiscaPredictor
from foreseer.predictors.partition import ChannelGroups
from foreseer.predictors.per_part import FreqCa
from foreseer.predictors.pruning_policy import PruningPolicy
from foreseer.predictors.rules import HiCache, Newton, Reuse, Taylor
from foreseer.predictors.tokens import ClusterPolicy, RandomPolicy
from foreseer.schedules import FirstBlock, SpeCa, TeaCache
from foreseer.trajectories.collector import Recorder

ANCHORS = (0, 1, 4)
LISTS = {
    "few": (0, 3),
    "warped": warped(4, STEPS, 1.5),
    "interval": interval(STEPS, 3, 2),
    "mask": mask_anchors("11010010"),
}
BRANCHES = {"dit": 2, "sd3": 2}  # of a call as it is usually made; the others have one
GUIDANCE = {"dit": 3.0, "sd3": 5.0}
SHARING = ("flux", "flux_img2img", "flux_twin")  # pipelines around one transformer
SLOTS = ("dit", "sd3", *SHARING)


@dataclass(frozen=True)
class Call:
    """One call of a pipeline, with what is attached; it tells its image without a doubt.

    Args:
        slot: name of the pipeline.
        setup: what is attached; None for nothing.
        num_steps: sampling steps.
        samples: seeds of the samples.
        guidance: `usual`, `stronger`, `off`, or `passes` for one transformer call per branch.
        pixels: side of the picture.
        stop: how and at which step the call is broken off; None for not at all.
    """

    slot: str
    setup: str | None
    num_steps: int = STEPS
    samples: tuple[int, ...] = (0,)
    guidance: str = "usual"
    pixels: int = 32
    stop: tuple[str, int] | None = None


class Broken(Exception):
    pass


class Enough(Exception):
    pass


ABORTS = {
    "callback": Broken,
    "block": KeyboardInterrupt,
    "head": torch.OutOfMemoryError,
    "enough": Enough,
}


# --------------------------------------------------------------------------------------- pipelines


def build(slot: str) -> dict[str, Any]:
    """A fresh pipeline, and those that share its transformer."""
    if slot == "dit":
        return {"dit": pipeline("dit_guided")}
    if slot == "sd3":
        return {"sd3": FAMILIES["sd3"].build()}
    other = MORE["flux_img2img"].build()
    found = {"flux_img2img": other}
    for name, scheduler in {"flux": other.scheduler, "flux_twin": None}.items():
        scheduler = scheduler or copy.deepcopy(other.scheduler)
        nothing = [None] * 4
        found[name] = silent(FluxPipeline(scheduler, other.vae, *nothing, other.transformer))
    return found


def image(pipe: Any, wanted: Call, **more: Any) -> Tensor:
    """The final latents of a call."""
    if wanted.slot == "dit":
        scale = {"usual": 3.0, "stronger": 4.0, "off": 1.0}[wanted.guidance]
        given = {"class_labels": [seed % 3 for seed in wanted.samples], "guidance_scale": scale}
        generator = [seeded(seed) for seed in wanted.samples]
        return run("dit", pipe, num_inference_steps=wanted.num_steps, generator=generator, **given)
    given = {"num_inference_steps": wanted.num_steps, **more}
    if wanted.slot == "flux_img2img":
        given |= {"strength": 0.75}
    given |= {"height": wanted.pixels, "width": wanted.pixels}
    if wanted.slot == "sd3":
        family = FAMILIES["sd3"]
        given["guidance_scale"] = {"usual": 5.0, "stronger": 7.0, "off": 1.0}[wanted.guidance]
    else:
        given["guidance_scale"] = 5.0 if wanted.guidance == "stronger" else 3.5
        family = FAMILIES["flux_cfg" if wanted.guidance == "passes" else "flux"]
        family = MORE["flux_img2img"] if wanted.slot == "flux_img2img" else family
    return call(family, pipe, wanted.samples, **given)


def grid(slot: str) -> tuple[float, ...]:
    """Flow times of a pipeline's usual run, which its learned predictors are for."""
    pipe, found = build(slot)[slot], []
    clock = Clock(pipe.scheduler, found.append, lambda *_: None)
    image(pipe, Call(slot, None))
    begin = clock.begin
    clock.detach()
    return tuple(found[0][begin:])


# ---------------------------------------------------------------------------- what can be attached


def random_rows(predictor: L2P) -> L2P:
    """Rows that are not reuse's."""
    on_anchors = torch.zeros(predictor.num_steps)
    on_anchors[list(predictor.anchors)] = 0.05
    noise = torch.randn(predictor.weight.shape, generator=seeded(3)) * on_anchors
    predictor.weight += noise.tril(-1)
    return predictor


def random_gram(predictor: L2PGram) -> L2PGram:
    steps = torch.linspace(0, 1, predictor.num_steps)
    nearby = torch.exp(-((steps[:, None] - steps) ** 2)).double()
    predictor.set_gram(nearby.repeat(predictor.num_branches, 1, 1))
    return predictor


def random_disca(pipe: Any) -> DiscaPredictor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        width = modulation_width(pipe.transformer)
        predictor = DiscaPredictor(16, width, num_heads=2, order=1, max_gap=1.0).eval()
        nn.init.normal_(predictor.out.weight, std=0.02)
    return predictor


Make = Callable[[Any, str, tuple[float, ...]], Predictor]
LEARNED: dict[str, tuple[Make, str]] = {  # how each is made, and its tap
    "l2p_output": (lambda p, s, g: random_rows(L2P(len(g), ANCHORS, branches(s))), "output"),
    "l2p_hidden": (lambda p, s, g: random_rows(L2P(len(g), ANCHORS, branches(s))), "hidden"),
    "l2p_groups": (
        lambda p, s, g: random_rows(
            L2P(len(g), ANCHORS, branches(s), partition=ChannelGroups([0, 1] * 8))
        ),
        "hidden",
    ),
    "gram": (lambda p, s, g: random_gram(L2PGram(len(g), branches(s))), "hidden"),
    "lesa": (lambda p, s, g: lesa(sigmas=g, num_branches=branches(s)), "hidden"),
    "lesa_values": (lambda p, s, g: lesa_values(sigmas=g, num_branches=branches(s)), "output"),
    "disca": (lambda p, s, g: random_disca(p), "hidden"),
}
SETUPS: dict[str, tuple[Callable[[], Predictor] | str, dict[str, Any]]] = {
    "taylor": (lambda: Taylor(2), {"anchors": ANCHORS, "tap": "hidden"}),
    "reuse": (Reuse, {"anchors": LISTS["few"], "tap": "residual"}),
    "newton": (lambda: Newton(2, "sigma"), {"anchors": LISTS["warped"], "tap": "output"}),
    "hicache": (lambda: HiCache(2), {"anchors": LISTS["interval"], "tap": "hidden"}),
    "masked": (lambda: Taylor(1), {"anchors": LISTS["mask"], "tap": "output"}),
    "freqca": (lambda: FreqCa([2, 2]), {"anchors": ANCHORS, "tap": "hidden"}),
    "teacache": (lambda: Taylor(1), {"schedule": lambda: TeaCache(0.1), "tap": "output"}),
    "first_block": (Reuse, {"schedule": lambda: FirstBlock(0.6), "tap": "residual"}),
    "speca": (lambda: Taylor(1), {"schedule": lambda: SpeCa(0.05, max_run=3)}),
    "random": (Reuse, {"tokens": lambda: RandomPolicy(2), "anchors": ANCHORS}),
    "clusters": (lambda: Taylor(1), {"tokens": lambda: ClusterPolicy(2), "anchors": ANCHORS}),
    "lattice": (lambda: Taylor(1), {"tokens": lambda: LatticePolicy(0.5), "anchors": ANCHORS}),
    "pruned": (Reuse, {"tokens": lambda: PruningPolicy(0.5, past=1.0), "anchors": ANCHORS}),
    "tight": (lambda: Taylor(2), {"anchors": ANCHORS, "tap": "hidden", "memory_budget": 600}),
    "recorder": ("", {}),
    **{name: (name, {}) for name in LEARNED},
    "gram_list": ("gram", {"anchors": LISTS["mask"]}),
    "gram_first_block": ("gram", {"schedule": lambda: FirstBlock(0.6)}),
    "gram_speca": ("gram", {"schedule": lambda: SpeCa(0.02)}),
    "l2p_teacache": ("l2p_hidden", {"schedule": lambda: TeaCache(0.1)}),
}
"""Name of what can be attached: its predictor, or the name of a learned one, and its arguments."""


def branches(slot: str) -> int:
    return BRANCHES.get(slot, 1)


def setups(slot: str) -> list[str]:
    """What can be attached to a pipeline."""
    unknown = ("random", "clusters", "disca")  # they know some classes of blocks only
    return [name for name in SETUPS if slot != "sd3" or name not in unknown]


class Predictors:
    """The predictors of a process, each made once and used again.

    Args:
        grids: flow times of every pipeline's usual run.
    """

    def __init__(self, grids: dict[str, tuple[float, ...]]) -> None:
        self.grids = grids
        self.made: dict[tuple[str, str], Predictor] = {}

    def get(self, setup: str, slot: str, pipe: Any) -> Predictor:
        source = SETUPS[setup][0]
        name = source if isinstance(source, str) else setup
        if (slot, name) not in self.made:
            made = self._learned(name, slot, pipe) if isinstance(source, str) else source()
            self.made[slot, name] = made
        return self.made[slot, name]

    def _learned(self, name: str, slot: str, pipe: Any) -> Predictor:
        make, tap = LEARNED[name]
        made = make(pipe, slot, self.grids[slot])
        made.spec = PredictorSpec(
            tap=tap,
            anchors=ANCHORS,
            sigmas=self.grids[slot],
            host=host_fingerprint(pipe.transformer),
            scheduler=type(pipe.scheduler).__name__,
            num_branches=branches(slot),
            guidance_scale=GUIDANCE.get(slot, 3.5),
            dtype="float32",
        )
        return made

    def attach(self, setup: str, slot: str, pipe: Any) -> Session:
        """The session of a setup, at work on a pipeline."""
        if setup == "recorder":
            return Session(pipe, observers=[Recorder(["output", "hidden"])])
        predictor = self.get(setup, slot, pipe)
        arguments = dict(SETUPS[setup][1])
        for name in arguments.keys() & {"schedule", "tokens"}:
            arguments[name] = arguments[name]()
        return attach(pipe, predictor, **arguments).session


# ------------------------------------------------------------------------------------------- calls


def draw(rng: random.Random, slot: str, setup: str | None) -> Call:
    """A random call of a pipeline; most are as its learned predictors know them."""
    kinds = ["usual", "usual", "stronger"]
    kinds += [] if slot == "flux_img2img" else ["passes" if slot.startswith("flux") else "off"]
    usual = rng.random() < 0.5
    return Call(
        slot,
        setup,
        STEPS if usual else rng.choice([6, STEPS, STEPS, 10]),
        rng.choice([(0,), (1,), (0, 1)]),
        "usual" if usual else rng.choice(kinds),
        32 if usual or slot in ("dit", "flux_img2img") else rng.choice([32, 32, 48]),
        draw_stop(rng, slot, setup) if rng.random() < 0.3 else None,
    )


def draw_stop(rng: random.Random, slot: str, setup: str | None) -> tuple[str, int]:
    """How a call is broken off, and when; `interrupt` ends it early with an image."""
    kinds = ["block", "head"] + ([] if setup is None else ["enough"])
    kinds += [] if slot == "dit" else ["callback", "interrupt"]
    return rng.choice(kinds), rng.randrange(5)


class Counting(Observer):
    """Calls something at the end of every step."""

    def __init__(self, count: Any) -> None:
        self.count = count

    def on_step(self, record: StepRecord) -> None:
        """A step is over."""
        self.count()


@contextlib.contextmanager
def stopping(pipe: Any, session: Session | None, stop: tuple[str, int] | None) -> Iterator[Any]:
    """What a call that shall be broken off is given more; everything is taken away again."""
    kind, step = stop or ("", 0)
    left = [step + 1]

    def count(*_: Any) -> None:
        left[0] -= 1
        if not left[0]:
            raise ABORTS[kind]

    def end(pipe: Any, index: int, timestep: Any, kwargs: Any) -> Any:
        if kind == "callback":
            count()
        elif index == step:
            pipe._interrupt = True
        return kwargs

    with contextlib.ExitStack() as stack:
        if kind in ("block", "head"):
            lists = [m for m in pipe.transformer.children() if isinstance(m, nn.ModuleList)]
            module = lists[-1][-1] if kind == "block" else list(pipe.transformer.children())[-1]
            stack.callback(module.register_forward_pre_hook(count).remove)
        if kind == "enough" and session is not None:
            session.observers.append(Counting(count))
            stack.callback(session.observers.pop)
        yield {"callback_on_step_end": end} if kind in ("callback", "interrupt") else {}


def outcome(pipe: Any, session: Session | None, wanted: Call) -> dict[str, str]:
    """What a call gives: hashes of the image and of what was recorded, or its refusal.

    Raises:
        BaseException: the one that broke the call off.
    """
    with stopping(pipe, session, wanted.stop) as more:
        try:
            found = {"image": sha256(image(pipe, wanted, **more))}
        except (PredictorMismatch, ValueError, MemoryError) as error:
            return {"refused": f"{type(error).__name__}: {error}"}
    if wanted.setup == "recorder" and wanted.stop is None:
        (recorder,) = session.observers
        features = [recorder.trajectory(0, tap) for tap in sorted(recorder.taps)]
        found["recorded"] = sha256(*(t for branches in features for t in branches))
    return found


def sha256(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


def fresh(wanted: Call, grids: dict[str, tuple[float, ...]]) -> dict[str, str]:
    """What a call gives in a process that has not called a pipeline before."""
    pipe = build(wanted.slot)[wanted.slot]
    session = None
    if wanted.setup is not None:
        session = Predictors(grids).attach(wanted.setup, wanted.slot, pipe)
    return outcome(pipe, session, wanted)
