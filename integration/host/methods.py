"""Replace methods of one instance so that copies of it get the methods back.

Pipelines look at the signature of what they call, users copy and save what is replaced, and other
libraries put wrappers of their own above or below: all of that keeps working.
"""

import copy
import functools
import types
from collections.abc import Callable
from typing import Any


class ReplacedMethod:
    """A method of an instance replaced; the signature and name stay the method's.

    Args:
        method: what the instance did before.
        replacement: called instead, with the method and the call's arguments.
    """

    def __init__(self, method: Callable[..., Any], replacement: Callable[..., Any]) -> None:
        functools.update_wrapper(self, method)
        self.method: Any = method
        self.replacement = replacement

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The replacement."""
        return self.replacement(self.method, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """The method itself, of the copied instance."""
        if isinstance(self.method, types.MethodType):
            owner = memo.get(id(self.method.__self__), self.method.__self__)
            return types.MethodType(self.method.__func__, owner)
        return copy.deepcopy(self.method, memo)


def replace_method(owner: Any, name: str, replacement: Callable[..., Any]) -> ReplacedMethod:
    """Replace a method on an instance alone, below any hook of diffusers or accelerate on it.

    Those hooks come and go while a pipeline runs; what is below them stays.

    Args:
        owner: the instance.
        name: name of the method.
        replacement: see `ReplacedMethod`.

    Returns:
        What stands there now, for `restore_method`.
    """
    own = ((holder, slot) for holder, slot in _slots(owner, name) if _is_own(holder, slot, owner))
    holder, slot = next(own, (owner, name))
    replaced = ReplacedMethod(getattr(holder, slot), replacement)
    setattr(holder, slot, replaced)
    return replaced


def restore_method(owner: Any, name: str, replaced: ReplacedMethod) -> None:
    """Take a replacement out again, wherever it is by now.

    Where something unknown holds on to it, it lets every call through.

    Args:
        owner: the instance.
        name: name of the method.
        replaced: what `replace_method` returned.
    """
    replaced.replacement = _let_through
    for holder, slot in _slots(owner, name):
        found = getattr(holder, slot)
        if found is replaced:
            _put_back(holder, slot, replaced.method)
        while isinstance(found, ReplacedMethod):
            if found.method is replaced:
                found.method = replaced.method
            found = found.method


def _slots(owner: Any, name: str) -> list[tuple[Any, str]]:
    """The places that hold a method or what is below a hook on it."""
    registry = getattr(owner, "_diffusers_hook", None)
    found: list[tuple[Any, str]] = []
    for reference in getattr(registry, "_fn_refs", ()):
        inner = getattr(reference, "original_forward", None)
        found.append((reference, "forward" if inner is None else "original_forward"))
    if "_old_forward" in vars(owner):
        found.append((owner, "_old_forward"))
    return [*found, (owner, name)] if name == "forward" else [(owner, name)]


def _is_own(holder: Any, slot: str, owner: Any) -> bool:
    """Whether a place holds the instance's own method, or a replacement of it."""
    found = getattr(holder, slot)
    return isinstance(found, ReplacedMethod) or getattr(found, "__self__", None) is owner


def _put_back(holder: Any, slot: str, method: Any) -> None:
    """The method as it was: nothing on the instance where it was the class's own."""
    if getattr(method, "__func__", None) is getattr(type(holder), slot, None):
        delattr(holder, slot)
    else:
        setattr(holder, slot, method)


def _let_through(method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return method(*args, **kwargs)
