"""Facts read off a diffusion transformer: its trunk of blocks and its head.

The trunk is the block lists; the head is the first module called after the last block whose first
tensor argument has the block output's rank, batch and channels. Both are read from one traced
forward.
"""

import functools
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


class UnsupportedHost(ValueError):
    """The transformer's trunk and head could not be found, or replaying its tap is not exact."""


@dataclass(frozen=True)
class Trunk:
    """Where the blocks and the head of a transformer are.

    Args:
        block_lists: names of the root's `ModuleList`s of blocks, in calling order.
        head: qualified name of the head module.
        streams: where the last block takes what the block before it returned: positions and
            keywords; empty where something happens in between.
    """

    block_lists: tuple[str, ...]
    head: str
    streams: tuple[int | str, ...] = ()


class SkippedBlocks(nn.ModuleList):
    """A view of a block list that iterates as empty but indexes and counts like the list itself.

    Hosts reach into a block between trunk and head (DiT asks `transformer_blocks[0]` for its
    embedding).
    """

    def __init__(self, blocks: nn.ModuleList) -> None:
        super().__init__()
        self._modules = blocks._modules

    def __iter__(self) -> Iterator[nn.Module]:
        """Nothing."""
        return iter(())


def first_tensor(args: tuple, kwargs: dict[str, Any]) -> Tensor | None:
    """The first tensor among a call's arguments, `hidden_states` before other keywords."""
    named = (kwargs.get("hidden_states"), *kwargs.values())
    return next((value for value in (*args, *named) if isinstance(value, Tensor)), None)


def stream_of(output: Any) -> Tensor | None:
    """The residual stream in a block's output: the tensor, or the last tensor of a tuple."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, tuple | list):
        return next((value for value in reversed(output) if isinstance(value, Tensor)), None)
    return None


class TrunkTracer:
    """Watch one forward of a transformer and name its trunk and head.

    Use as a context manager around the forward, then call `trunk()`.
    """

    def __init__(self, transformer: nn.Module) -> None:
        self.transformer = transformer
        self.lists = {
            name: module
            for name, module in transformer.named_children()
            if isinstance(module, nn.ModuleList) and len(module)
        }
        self.calls: list[tuple[str, Tensor | None]] = []  # module name, first tensor argument
        self.outputs: dict[str, Tensor | None] = {}  # residual stream after each block
        self.streams: dict[str, tuple[int | str, ...]] = {}  # arguments the block before returned
        self._returned_last: tuple = ()
        self._handles: list[Any] = []

    def __enter__(self) -> "TrunkTracer":
        """Start watching."""
        for name, module in self.transformer.named_modules():
            if not name:
                continue
            called = functools.partial(self._called, name)
            self._handles.append(module.register_forward_pre_hook(called, with_kwargs=True))
            if self._is_block(name):
                returned = functools.partial(self._returned, name)
                self._handles.append(module.register_forward_hook(returned))
        return self

    def __exit__(self, *_: object) -> None:
        """Stop watching."""
        for handle in self._handles:
            handle.remove()
        self._returned_last = ()

    def _called(self, name: str, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        tensor = first_tensor(args, kwargs)
        self.calls.append((name, None if tensor is None else tensor.detach()))
        if self._is_block(name):
            named: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
            self.streams[name] = tuple(
                place
                for place, value in named
                if any(value is returned for returned in self._returned_last)
            )

    def _returned(self, name: str, module: nn.Module, args: tuple, output: Any) -> None:
        self.outputs[name] = stream_of(output)
        values = output if isinstance(output, tuple | list) else (output,)
        self._returned_last = tuple(value for value in values if isinstance(value, Tensor))

    def _is_block(self, name: str) -> bool:
        return name.count(".") == 1 and name.split(".")[0] in self.lists

    def trunk(self) -> Trunk:
        """The trunk and head of the forward just watched.

        Raises:
            UnsupportedHost: no complete block list was run, or nothing after it looks like a head.
        """
        called = [name for name, _ in self.calls]
        run = [
            name
            for name, blocks in self.lists.items()
            if [c for c in called if c in self._block_names(name)]
            == [f"{name}.{i}" for i in range(len(blocks))]
        ]
        if not run:
            raise UnsupportedHost(
                f"{type(self.transformer).__name__} ran none of its block lists "
                f"({', '.join(self.lists) or 'it has none'}) once in order; this host needs the "
                "`output` tap."
            )
        run.sort(key=lambda name: called.index(f"{name}.0"))
        blocks = {block for name in run for block in self._block_names(name)}
        last = f"{run[-1]}.{len(self.lists[run[-1]]) - 1}"
        stream = self.outputs.get(last)
        if stream is None:
            raise UnsupportedHost(f"block {last} returned no tensor; use the `output` tap.")
        start = called.index(last) + 1
        for name, tensor in self.calls[start:]:
            inside = any(name.startswith(f"{block}.") for block in blocks)
            if not inside and tensor is not None and _fits(tensor, stream):
                return Trunk(tuple(run), name, self.streams.get(last, ()))
        raise UnsupportedHost(
            f"no module called after block {last} takes a tensor like its output "
            f"{tuple(stream.shape)}; use the `output` tap."
        )

    def _block_names(self, name: str) -> set[str]:
        return {f"{name}.{i}" for i in range(len(self.lists[name]))}


def _fits(tensor: Tensor, stream: Tensor) -> bool:
    same_ends = tensor.shape[0] == stream.shape[0] and tensor.shape[-1] == stream.shape[-1]
    return tensor.ndim == stream.ndim and same_ends and tensor.shape[1] <= stream.shape[1]


def transformer_of(pipe: Any) -> nn.Module:
    """The denoiser of a pipeline.

    Raises:
        UnsupportedHost: the pipeline has no `transformer`.
    """
    transformer = getattr(pipe, "transformer", None)
    if not isinstance(transformer, nn.Module):
        raise UnsupportedHost(
            f"{type(pipe).__name__} has no `transformer` module; foreseer works on diffusion "
            "transformers."
        )
    return transformer


CONDITIONER = "_foreseer_conditioner"
"""Attribute, outside of a transformer's own state, under which its conditioner is found."""


def host_fingerprint(transformer: nn.Module) -> dict[str, Any]:
    """What a predictor was fitted on: class, sizes that matter, and digests of config and weights.

    The weight digest is taken over each parameter's shape and a sample of up to 64 of its values,
    so it is quick on any size of model and changes with a LoRA that is fused in. A student's
    conditioner counts as part of its transformer.
    """
    host: Any = transformer
    config = {k: v for k, v in dict(host.config).items() if not k.startswith("_")}
    text = json.dumps(config, sort_keys=True, default=str)
    digest = hashlib.sha256()
    parameters = sorted(transformer.named_parameters())
    conditioner = getattr(transformer, CONDITIONER, None)
    if conditioner is not None:
        parameters += [(f"conditioner.{n}", p) for n, p in sorted(conditioner.named_parameters())]
    for name, parameter in parameters:
        flat = parameter.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // 64)][:64].float().cpu()
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        digest.update(sample.bfloat16().float().numpy().tobytes())
    return {
        "class": type(transformer).__name__,
        "parameters": sum(p.numel() for p in transformer.parameters()),
        "config_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "weights_sha256": digest.hexdigest(),
    }
