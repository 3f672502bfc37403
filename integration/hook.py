"""The hooks on a transformer: run it and capture a tap, or skip its trunk and put a forecast back.

Nothing here decides anything: `Session` (session.py) says what each call does.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook
from torch import Tensor, nn

from .host import SkippedBlocks, Trunk, first_tensor, stream_of

HOOK_NAME = "foreseer"
LAST_BLOCK = "last_block"


class RootHook(ModelHook):
    """Route every call of the transformer through `route(forward, args, kwargs)`."""

    def __init__(self, route: Callable[[Callable, tuple, dict[str, Any]], Any]) -> None:
        super().__init__()
        self.route = route

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The routed call."""
        return self.route(self.fn_ref.original_forward, args, kwargs)


def install(transformer: nn.Module, route: Callable) -> None:
    """Put the root hook on a transformer.

    Raises:
        ValueError: another foreseer session or a diffusers cache is on it already.
    """
    if getattr(transformer, "_cache_config", None) is not None:
        raise ValueError(
            f"{type(transformer).__name__} already has the cache "
            f"{type(transformer._cache_config).__name__} enabled; call disable_cache() first: two "
            "caches on one model would forecast each other's forecasts."
        )
    registry = HookRegistry.check_if_exists_or_initialize(transformer)
    if registry.get_hook(HOOK_NAME) is not None:
        raise ValueError("foreseer is already attached to this transformer; detach it first.")
    registry.register_hook(RootHook(route), HOOK_NAME)


def remove(transformer: nn.Module) -> None:
    """Take the root hook off; a transformer without other hooks is left as it was before."""
    registry = HookRegistry.check_if_exists_or_initialize(transformer)
    registry.remove_hook(HOOK_NAME, recurse=False)
    if not registry.hooks:
        del transformer._diffusers_hook
        forward = transformer.__dict__.get("forward")
        if getattr(forward, "__func__", None) is type(transformer).forward:
            del transformer.forward


class TrunkSkipper:
    """Run a transformer's forward without its blocks, with a given tensor entering the head."""

    def __init__(self, transformer: nn.Module, trunk: Trunk) -> None:
        self.transformer = transformer
        self.head = transformer.get_submodule(trunk.head)
        self.blocks = {name: block_list(transformer, name) for name in trunk.block_lists}
        self.empty = {name: SkippedBlocks(blocks) for name, blocks in self.blocks.items()}

    def __call__(
        self,
        forward: Callable,
        args: tuple,
        kwargs: dict[str, Any],
        entering: Callable[[Tensor], Tensor],
    ) -> Any:
        """The output of `forward` with the head's first tensor t replaced by `entering(t)`."""
        with exchanged(self.transformer, self.blocks, self.empty, self.head, entering):
            return forward(*args, **kwargs)


@contextlib.contextmanager
def exchanged(
    transformer: nn.Module,
    blocks: Mapping[str, nn.Module],
    others: Mapping[str, nn.Module],
    head: nn.Module,
    entering: Callable[[Tensor], Tensor],
) -> Iterator[None]:
    """Let the forward inside run on other block lists, with another tensor entering the head.

    Args:
        transformer: the host.
        blocks: its own block lists, put back come what may.
        others: what stands in their place.
        head: its head.
        entering: what enters the head, given what would have.
    """
    transformer._modules.update(others)
    handle = head.register_forward_pre_hook(replacing(entering), with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
        transformer._modules.update(blocks)


def replacing(entering: Callable[[Tensor], Tensor]) -> Callable:
    """A forward pre-hook that gives a module `entering(t)` for its first tensor t."""

    def hook(
        module: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]]:
        found = first_tensor(args, kwargs)
        assert found is not None  # the tracer chose the head by this tensor
        new = entering(found).to(found.dtype)
        for place, value in enumerate(args):
            if value is found:
                return (*args[:place], new, *args[place + 1 :]), kwargs
        return args, {name: new if value is found else value for name, value in kwargs.items()}

    return hook


@contextlib.contextmanager
def capturing(transformer: nn.Module, trunk: Trunk | None, taps: set[str]) -> Iterator[dict]:
    """Collect the given trunk taps of the forward run inside; yields a dict filled by its end.

    Args:
        transformer: the host.
        trunk: its facts; None when only `output` is tapped.
        taps: any of `hidden`, `residual`, `blocks.<i>`, `last_block` (its input streams, one entry
            `last_block.<i>` each); `output` is read off the call's result.
    """
    found: dict[str, Tensor] = {}
    handles: list[Any] = []
    if trunk is not None and taps & {"hidden", "residual"}:
        head = transformer.get_submodule(trunk.head)
        handles.append(head.register_forward_pre_hook(_keep(found, "hidden"), with_kwargs=True))
    if trunk is not None and "residual" in taps:
        first = transformer.get_submodule(f"{trunk.block_lists[0]}.0")
        handles.append(first.register_forward_pre_hook(_keep(found, "trunk_in"), with_kwargs=True))
    if trunk is not None and LAST_BLOCK in taps:
        last = block_list(transformer, trunk.block_lists[-1])[-1]
        keep = _keep_streams(found, trunk.streams)
        handles.append(last.register_forward_pre_hook(keep, with_kwargs=True))
    for tap, block in block_taps(transformer, trunk).items():
        if tap in taps:
            handles.append(block.register_forward_hook(_keep_stream(found, tap)))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
    if "residual" in taps:
        found["residual"] = found["hidden"] - found["trunk_in"]


def block_list(transformer: nn.Module, name: str) -> nn.ModuleList:
    """The block list of that name."""
    blocks = transformer.get_submodule(name)
    assert isinstance(blocks, nn.ModuleList)  # the tracer looks at nothing else
    return blocks


def block_taps(transformer: nn.Module, trunk: Trunk | None) -> dict[str, nn.Module]:
    """Tap name of every block of the trunk, in calling order: `blocks.0`, `blocks.1`, ..."""
    if trunk is None:
        return {}
    blocks = [block for name in trunk.block_lists for block in block_list(transformer, name)]
    return {f"blocks.{i}": block for i, block in enumerate(blocks)}


def _keep(found: dict[str, Tensor], tap: str) -> Callable:
    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        tensor = first_tensor(args, kwargs)
        if tensor is not None:
            found[tap] = own(tensor)

    return hook


def _keep_stream(found: dict[str, Tensor], tap: str) -> Callable:
    def hook(module: nn.Module, args: tuple, output: Any) -> None:
        stream = stream_of(output)
        if stream is not None:
            found[tap] = own(stream)

    return hook


def _keep_streams(found: dict[str, Tensor], streams: tuple[int | str, ...]) -> Callable:
    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        for number, place in enumerate(streams):
            value = args[place] if isinstance(place, int) else kwargs[place]
            found[f"{LAST_BLOCK}.{number}"] = own(value)

    return hook


def own(tensor: Tensor) -> Tensor:
    """A copy that keeps no larger storage alive and that nothing downstream can change in place."""
    return tensor.clone(memory_format=torch.contiguous_format)
