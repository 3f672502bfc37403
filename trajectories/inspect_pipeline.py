"""What a pipeline is made of, and what foreseer can do with it."""

from collections.abc import Mapping
from typing import Any

from tqdm.auto import tqdm

from foreseer.integration.host.hosts import host_of
from foreseer.integration.host.trunk import UnsupportedHost, modulation_width
from foreseer.integration.memory import readable
from foreseer.integration.session import Session
from foreseer.trajectories.collector import Recorder
from foreseer.trajectories.prompts import Item, generate_batch
from foreseer.trajectories.recipe import Enough, FirstStep, count

TAPS = ("output", "hidden", "residual")


def inspected(pipe: Any, item: Item, settings: Mapping[str, Any]) -> tuple[list[str], bool]:
    """Lines for a person, and whether the pipeline is supported at all.

    Args:
        pipe: the pipeline, with nothing attached.
        item: what to generate.
        settings: keyword arguments of the call.
    """
    try:
        host = host_of(pipe)
        transformers = host.networks()
    except UnsupportedHost as error:
        return [f"NOT SUPPORTED: {error}"], False
    lines = [f"pipeline    {host.name}, scheduler {type(host.scheduler).__name__}"]
    for name, transformer in transformers.items():
        total = sum(parameter.numel() for parameter in transformer.parameters()) / 1e6
        lines.append(f"{name:<11} {type(transformer).__name__}, {total:,.1f} M parameters")
    for name, other in host.others().items():
        lines.append(f"{name:<11} {type(other).__name__}, is not forecast: it runs at every step")
    usable: list[str] = []
    for tap in tqdm(TAPS, desc="inspect", unit="tap", delay=2, leave=False):
        try:
            session, recorder = first_step(pipe, item, tap, settings)
        except (UnsupportedHost, ValueError) as error:
            lines.append(f"{tap:<12}no: {error}")
            continue
        if not usable:
            lines += _run_facts(recorder)
        usable.append(tap)
        lines += _tap_facts(tap, session, recorder)
    if not usable:
        return [*lines, "NOT SUPPORTED: none of the taps can be put back."], False
    return [*lines, *_limits(pipe), f"SUPPORTED on the taps {', '.join(usable)}."], True


def first_step(
    pipe: Any, item: Item, tap: str, settings: Mapping[str, Any]
) -> tuple[Session, Recorder]:
    """What the first step of a run shows of a tap; the tap is proven on the way.

    Raises:
        UnsupportedHost: the tap cannot be put back.
        ValueError: the pipeline never stepped its scheduler.
    """
    recorder = FirstStep([tap])
    session = Session(pipe, observers=[recorder])
    try:
        generate_batch(pipe, [item], output_type="latent", **settings)
    except Enough:
        return session, recorder
    finally:
        session.detach()
    raise ValueError("the pipeline never called scheduler.step.")


def _run_facts(recorder: Recorder) -> list[str]:
    assert recorder.final is not None  # the first step is over
    sigmas, shape = recorder.sigmas, "x".join(map(str, recorder.final.shape[1:]))
    settings = recorder.settings[0].items()
    guided = ", ".join(f"{name} {value:g}" for name, value in settings if value is not None)
    return [
        f"run         {len(sigmas)} steps, sigma {sigmas[0]:.3f} to {sigmas[-1]:.3f}, latents "
        f"{shape}",
        f"guidance    {recorder.num_branches} branch(es) per step ({guided or 'no settings'})",
    ]


def _tap_facts(tap: str, session: Session, recorder: Recorder) -> list[str]:
    """Shape, dtype and sizes of a tap, and where the host keeps it."""
    feature = next(iter(recorder.features[tap][0].values()))[0]
    shape = "x".join(map(str, feature.shape))
    per_anchor = recorder.num_branches * feature.numel() * feature.element_size()
    size = count(recorder, "none", 0, True)
    lines = [
        f"{tap:<12}{shape} {recorder.dtype}, {readable(per_anchor)} a sample for each anchor kept; "
        f"recorded: {readable(size.trajectory_bytes)} as Grams and states, "
        f"{readable(size.full_bytes)} in full"
    ]
    trunk = next(iter(session.experts.values())).trunk
    if tap == "hidden" and trunk is not None:
        lines.append(f"{'':<12}trunk {' + '.join(trunk.block_lists)}, head {trunk.head}")
        if recorder.masks:
            mask = next(iter(recorder.masks.values()))[0]
            lines.append(
                f"{'':<12}{int(mask.sum())} of {len(mask)} tokens are the picture's; Grams are of "
                "those"
            )
    return lines


def _limits(pipe: Any) -> list[str]:
    """Which fits and methods do not serve this host."""
    host = host_of(pipe)
    transformers = host.networks()
    if len({host.turn(name) for name in transformers}) == 1 < len(transformers):
        return ["fits        L2PLeastSquares, a branch for each network of a step"]
    if len(transformers) > 1:
        return [
            f"fits        L2PLeastSquares, each of the {len(transformers)} transformers its own"
        ]
    try:
        modulation_width(next(iter(transformers.values())))
    except UnsupportedHost as error:
        return [f"fits        L2P and LESA; not DisCa and distillation: {error}"]
    return ["fits        L2P, LESA and DisCa"]
