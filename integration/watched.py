"""Replace methods of one instance so that copies of it get the methods back.

Pipelines look at the signature of what they call, users copy and save what is replaced, and other
libraries put wrappers of their own above or below: all of that keeps working.
"""

import copy
import functools
import types
from collections.abc import Callable
from typing import Any


class Watched:
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


def watch(owner: Any, name: str, replacement: Callable[..., Any]) -> Watched:
    """Replace a method on an instance alone.

    Args:
        owner: the instance.
        name: name of the method.
        replacement: see `Watched`.

    Returns:
        What stands there now, for `unwatch`.
    """
    watched = Watched(getattr(owner, name), replacement)
    setattr(owner, name, watched)
    return watched


def unwatch(owner: Any, name: str, watched: Watched) -> None:
    """Take a replacement out again, whatever was put above it since.

    Above it may be another replacement, a hook of diffusers (its registry keeps what it wraps), or
    one of accelerate. Where something unknown holds on to it, it lets every call through.

    Args:
        owner: the instance.
        name: name of the method.
        watched: what `watch` returned.
    """
    watched.replacement = _let_through
    if vars(owner).get(name) is watched:
        _put_back(owner, name, watched.method)
        return
    above = vars(owner).get(name)
    while isinstance(above, Watched):
        if above.method is watched:
            above.method = watched.method
        above = above.method
    registry = getattr(owner, "_diffusers_hook", None)
    for reference in getattr(registry, "_fn_refs", ()):
        for attribute in ("forward", "original_forward"):
            if getattr(reference, attribute, None) is watched:
                setattr(reference, attribute, watched.method)
    if getattr(owner, "_old_forward", None) is watched:
        owner._old_forward = watched.method


def _put_back(owner: Any, name: str, method: Any) -> None:
    """The method as it was: nothing on the instance where it was the class's own."""
    if getattr(method, "__func__", None) is getattr(type(owner), name, None):
        delattr(owner, name)
    else:
        setattr(owner, name, method)


def _let_through(method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return method(*args, **kwargs)
