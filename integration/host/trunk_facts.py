"""What the trunk of a transformer is, and the trunks that cannot be traced, by class name."""

from dataclasses import dataclass


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
