"""What is known of transformer classes, by class name: a host that differs is a row here.

Where the trunk is, where tracing does not find it, and how the class takes its time: where it makes
modulation vectors, and in which unit.

Shapes: B batch, W width of a modulation vector.
"""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from foreseer.errors import UnsupportedHost


@dataclass(frozen=True)
class Trunk:
    """Where the blocks and the head of a transformer are.

    Args:
        block_lists: names of the root's `ModuleList`s of blocks, in calling order.
        head: qualified name of the head module.
        streams: where the last block takes what the block before it returned: positions and
            keywords; empty where something happens in between.
        place: which of the tensors that a block returns is the stream the head takes, counted
            from the end: -1 for the last.
        batch_axis: axis of the head's input that counts samples; features have it first.
    """

    block_lists: tuple[str, ...]
    head: str
    streams: tuple[int | str, ...] = ()
    place: int = -1
    batch_axis: int = 0


TRUNK_FACTS: dict[str, Trunk | str] = {
    # The modules of the face are called between the blocks.
    "ConsisIDTransformer3DModel": Trunk(("transformer_blocks",), "norm_final", (), -2),
    # Tokens come before samples.
    "ErnieImageTransformer2DModel": Trunk(("layers",), "final_norm", (), -1, 1),
    # The tokens get their place in the grid back before the head, which adds two axes.
    "Kandinsky5Transformer3DModel": Trunk(
        ("text_transformer_blocks", "visual_transformer_blocks"), "out_layer"
    ),
    "LatteTransformer3DModel": "has frames and samples on one axis; use the `output` tap",
    "LTX2VideoTransformer3DModel": "predicts sound beside the video, with a head for each; it is "
    "not supported",
}
"""The trunk of a class where tracing does not find it; a text says why there is none."""


@dataclass(frozen=True)
class TimeFacts:
    """How a transformer class takes its time.

    Args:
        places: pattern of the names of the modules that return modulation vectors.
        waves: pattern of the names of the modules that turn the time into sines and cosines.
        time_scale: what the flow time is multiplied by before it is passed as `timestep`.
    """

    places: str
    waves: str
    time_scale: float


TIME_FACTS = {
    "DiTTransformer2DModel": TimeFacts(
        r"transformer_blocks\.\d+\.norm1\.emb",
        r"transformer_blocks\.\d+\.norm1\.emb\.time_proj",
        1000.0,
    ),
    "FluxTransformer2DModel": TimeFacts(r"time_text_embed", r"time_text_embed\.time_proj", 1.0),
}
"""Known hosts by class name; another one is a row here."""


def time_facts(transformer: nn.Module) -> TimeFacts:
    """The row of a transformer's class.

    Raises:
        UnsupportedHost: there is none.
    """
    name = type(transformer).__name__
    if name not in TIME_FACTS:
        raise UnsupportedHost(
            f"it is not known where {name} makes its modulation vector; known are "
            f"{sorted(TIME_FACTS)}. Add a row to TIME_FACTS in integration/host/facts.py."
        )
    return TIME_FACTS[name]


def modulation_places(transformer: nn.Module) -> list[nn.Module]:
    """The modules of a transformer that return modulation vectors, in the order of their names.

    Raises:
        UnsupportedHost: its class is not known.
    """
    return _matching(transformer, time_facts(transformer).places)


def wave_places(transformer: nn.Module) -> list[nn.Module]:
    """The modules of a transformer that turn the time into sines and cosines.

    Raises:
        UnsupportedHost: its class is not known.
    """
    return _matching(transformer, time_facts(transformer).waves)


def _matching(transformer: nn.Module, pattern: str) -> list[nn.Module]:
    found = re.compile(pattern)
    return [module for name, module in transformer.named_modules() if found.fullmatch(name)]


@contextlib.contextmanager
def modulations(transformer: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the modulation vectors of the forward inside, as its head sees them.

    Only the first place counts: on a host that makes one per block, that is the one of its head.

    Raises:
        UnsupportedHost: the host's class is not known.
    """
    found: list[Tensor] = []
    place = modulation_places(transformer)[0]
    handle = place.register_forward_hook(lambda module, args, output: found.append(output))
    try:
        yield found
    finally:
        handle.remove()


def modulation_width(transformer: nn.Module) -> int:
    """Width of a modulation vector: what the last linear layer of its module returns.

    Raises:
        UnsupportedHost: the host's class is not known.
    """
    place = modulation_places(transformer)[0]
    layers = [module for module in place.modules() if isinstance(module, nn.Linear)]
    return layers[-1].out_features
