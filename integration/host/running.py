"""Who runs: the pipeline call that opened a run, so that calls from elsewhere are left alone.

A transformer may be shared: with another pipeline, called in between or from another thread, or
with a loop written by hand. A run is therefore known by the call that opened it.
"""

import contextvars
import sys
import threading
from collections.abc import Iterable
from types import FrameType
from typing import Any

from diffusers import DiffusionPipeline, ModularPipeline
from torch import nn

CALLER = "_foreseer_caller"
"""Name under which a pipeline call's variables hold its `Caller`."""

PIPELINES = (DiffusionPipeline, ModularPipeline)


class Caller:
    """Who opened a run: the pipeline call under way, else the loop written by hand in this context.

    It lies among the variables of the call and lives as long as they do, so whoever keeps a weak
    reference to it hears when the call is over, however it ended. It holds nothing itself.
    """

    @staticmethod
    def here() -> "Caller | None":
        """The one that the code now running was called from; None where none has opened a run."""
        frame = pipeline_call()
        if frame is None:
            return _by_hand.get()
        found: Caller | None = variable(frame, CALLER)
        return found

    @staticmethod
    def new() -> "Caller":
        """One for the innermost pipeline call under way, or for the loop written by hand."""
        caller, frame = Caller(), pipeline_call()
        if frame is None:
            _by_hand.set(caller)
        else:
            frame.f_locals[CALLER] = caller
        return caller


_by_hand: contextvars.ContextVar[Caller | None] = contextvars.ContextVar(CALLER, default=None)


def pipeline_call() -> FrameType | None:
    """The innermost pipeline call under way in this thread; None in a loop written by hand."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not _is_pipeline_call(frame):
        frame = frame.f_back
    return frame


def _is_pipeline_call(frame: FrameType) -> bool:
    named = frame.f_code.co_name == "__call__"
    return named and isinstance(variable(frame, "self"), PIPELINES)


def variable(frame: FrameType, name: str) -> Any:
    """One variable of a call under way; None where it has none of that name."""
    return variables(frame, (name,)).get(name)


def variables(frame: FrameType, names: Iterable[str]) -> dict[str, Any]:
    """Those variables of a call under way that it has.

    Before Python 3.13 asking makes a copy of all variables, which keeps them alive while the call
    lasts; it is emptied again unless the call itself holds on to it, as `locals()` does.
    """
    values = frame.f_locals
    found = {name: values[name] for name in names if name in values}
    if isinstance(values, dict) and sys.getrefcount(values) <= _UNSHARED:
        for other in values.keys() - {CALLER}:
            del values[other]
    return found


_UNSHARED = 3  # references to a frame's copy: the frame's, the variable's, getrefcount's own


def steps_made_elsewhere(pipe: Any) -> str:
    """What to tell whoever makes a step of a run that another call has opened."""
    name = type(pipe).__name__
    return (
        f"this step of {type(pipe.scheduler).__name__} is made by another call than the one that "
        f"last set its timesteps: two threads share one {name}, or a loop has moved to another "
        "thread. Give every thread a pipeline with a scheduler of its own: "
        f"{name}(**{{**pipe.components, 'scheduler': copy.deepcopy(pipe.scheduler)}})."
    )


def is_called_elsewhere(module: nn.Module, passed: Any) -> bool:
    """Whether another thread is inside a call of a module that did not pass what now watches it.

    Args:
        module: the module.
        passed: what every call of it goes through from now on.
    """
    frames = sys._current_frames()
    frames.pop(threading.get_ident(), None)
    for top in frames.values():
        frame: FrameType | None = top
        while frame is not None:
            name = frame.f_code.co_name
            if name == "__call__" and variable(frame, "self") is passed:
                break
            if name in ("forward", "_call_impl") and variable(frame, "self") is module:
                return True
            frame = frame.f_back
    return False
