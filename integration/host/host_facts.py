"""What is known of a transformer from one attachment to the next, as long as it stays as it was.

Finding a trunk and proving it costs evaluations of the network. What was found holds for the same
modules with the same hooks and methods, called in the same form; weights do not enter it, since a
tap that is put back runs the operations it would have run.
"""

import weakref
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from foreseer.integration.host.layout import Layout
from foreseer.integration.host.trunk_facts import Trunk
from foreseer.integration.host.watched import Watched

HOOKS = ("_forward_pre_hooks", "_forward_hooks")
CALLED = ("forward", "_old_forward", "_compiled_call_impl")  # what stands on a module's instance
DEVICES = ("cpu", "cuda")  # that autocast is asked of


@dataclass
class HostFacts:
    """What is known of a transformer.

    Args:
        state: what it was like, see `state_of`.
        trunk: its trunk and head, once traced.
        proven: what was proven of it, each with the form of the call it was proven on.
        layouts: where the tokens of its head's input lie in the output.
    """

    state: tuple[Any, ...]
    trunk: Trunk | None = None
    proven: set[Hashable] = field(default_factory=set)
    layouts: dict[Hashable, Layout] = field(default_factory=dict)


_known: weakref.WeakKeyDictionary[nn.Module, HostFacts] = weakref.WeakKeyDictionary()


def facts_of(transformer: nn.Module) -> HostFacts:
    """What is known of a transformer; nothing where it is not what it was.

    Args:
        transformer: the host, with or without a session on it.
    """
    state, facts = tuple(state_of(transformer)), _known.get(transformer)
    if facts is None or facts.state != state:
        facts = _known[transformer] = HostFacts(state)
    return facts


def state_of(transformer: nn.Module) -> Iterator[Any]:
    """The modules of a transformer with what is called when they are, but for foreseer's own.

    Modules and functions are held weakly: one that took the place of another is never taken for it.
    """
    for name, module in transformer.named_modules():
        yield name, _held(module)
        values = vars(module)
        for each in CALLED:
            if each in values and not _is_own(module, values[each]):
                yield _held(values[each])
        for hooks in HOOKS:
            yield from map(_held, values[hooks].values())
        registry = values.get("_diffusers_hook")
        yield from map(_held, getattr(registry, "hooks", {}).values())
        yield from (_held(values[each]) for each in ("_hf_hook", "processor") if each in values)


def _below(value: Any) -> Any:
    """What a session of foreseer calls, where it has put itself in its place."""
    while isinstance(value, Watched):
        value = value.method
    return value


def _is_own(module: nn.Module, value: Any) -> bool:
    """Whether a method is that of the module's class, under a session or not."""
    own = getattr(_below(value), "__func__", None)
    return own is not None and own is getattr(type(module), own.__name__, None)


def _held(value: Any) -> Any:
    value = _below(value)
    if hasattr(value, "__func__"):  # a bound method is a new object whenever it is asked for
        return _held(value.__func__), _held(value.__self__)
    try:
        return value if value is None else weakref.ref(value)
    except TypeError:  # of a class with slots: taken for another one whenever it is asked for
        return object()


def form_of_call(args: tuple, kwargs: dict[str, Any]) -> Hashable:
    """What kinds of arguments a call has: other shapes, times and prompts make the same form."""
    return _kind(args), _kind(kwargs), tuple(map(torch.is_autocast_enabled, DEVICES))


def _kind(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.dtype, value.device, value.ndim
    if isinstance(value, dict):
        return tuple((name, _kind(each)) for name, each in sorted(value.items()))
    if isinstance(value, tuple):
        return tuple(map(_kind, value))
    if isinstance(value, list):
        return frozenset(map(_kind, value))  # a list has an entry per sample
    return value if value is None or isinstance(value, bool | str) else type(value)
