"""Who runs: the pipeline call that opened a run, so that calls from elsewhere are left alone.

A run that was broken off is only known to be over when the next one opens. Between the two its
transformer may be called by another pipeline that shares it, or by hand.
"""

import sys
from types import FrameType
from typing import Any

from diffusers import DiffusionPipeline

GUIDANCE_WORDS = ("guidance", "cfg")


def pipeline_call() -> FrameType | None:
    """The innermost pipeline call under way; None in a loop written by hand."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not _is_pipeline_call(frame):
        frame = frame.f_back
    return frame


def is_innermost(call: FrameType) -> bool:
    """Whether `call` is the innermost pipeline call that the code now running was called from."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame is not call:
        if _is_pipeline_call(frame):
            return False
        frame = frame.f_back
    return frame is call


def _is_pipeline_call(frame: FrameType) -> bool:
    named = frame.f_code.co_name == "__call__"
    return named and isinstance(frame.f_locals.get("self"), DiffusionPipeline)


def guidance_of(call: FrameType | None) -> dict[str, float]:
    """The numbers of a pipeline call that say how it is guided, by name.

    These are its arguments with `guidance` or `cfg` in their names, such as `true_cfg_scale`, and
    the settings of its guider, where it has one.
    """
    if call is None:
        return {}
    names = call.f_code.co_varnames[: call.f_code.co_argcount + call.f_code.co_kwonlyargcount]
    values: dict[str, Any] = {name: call.f_locals.get(name) for name in names}
    guider = getattr(values.get("self"), "guider", None)
    config = dict(getattr(guider, "config", {}))
    values |= {f"guider.{name}": value for name, value in config.items()}
    return {
        name: float(value)
        for name, value in sorted(values.items())
        if any(word in name for word in GUIDANCE_WORDS) and isinstance(value, int | float)
    }
