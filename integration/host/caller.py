"""The pipeline call under way: who opened a run, and what it sets that changes the function.

A transformer may be shared: with another pipeline, called in between or from another thread, or
with a loop written by hand. A run is therefore known by the call that opened it. Settings are
arguments of the call, such as scales of guidance, of a ControlNet or of a LoRA, and what hangs on
the transformer and a callback may change in mid-run: strengths of LoRAs, IP-adapters and FreeU.
"""

import contextvars
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from numbers import Real
from statistics import mean
from types import FrameType
from typing import Any

from diffusers import ClassifierFreeGuidance, DiffusionPipeline, ModularPipeline
from torch import nn

from foreseer.checkpoints.spec import LORA, Value
from foreseer.integration.host.fingerprint import adapter_layers

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


WORDS = ("guidance", "cfg", "scale", "attention_kwargs", "control_mode")
"""What the names of arguments that change the function have in them."""

AFTERWARDS = "decode_"  # what begins so is of what follows the last step
TRUE_GUIDANCE = "qwenimage"
"""Modular pipelines whose ordinary ones call the strength of their guidance `true_cfg_scale`."""
UNIT = "scale"  # entry of attention arguments: strength of LoRAs, 1 where it is not given


class CallSettings:
    """Read the settings of a run, at any of its steps.

    Args:
        transformers: the hosts, as they are when the run begins.
    """

    def __init__(self, transformers: Iterable[nn.Module]) -> None:
        hosts = list(transformers)
        self.layers = [layer for host in hosts for _, layer in adapter_layers(host)]
        self.processors = [p for host in hosts for p in ip_adapters(host)]
        self.unets = [host for host in hosts if hasattr(host, "enable_freeu")]
        self._constant: dict[str, Value] | None = None  # of a loop around a network without any
        if not (self.layers or self.processors or self.unets):
            self._constant = self.read(None)

    def read(self, call: FrameType | None) -> dict[str, Value]:
        """The settings now, by name.

        Args:
            call: the pipeline call; None in a loop written by hand.
        """
        if call is None and self._constant is not None:
            return self._constant
        found = {} if call is None else settings_of(call)
        found |= lora_strengths(self.layers) | ip_adapter_strengths(self.processors)
        return found | freeu_strengths(self.unets)


def arguments_of(call: FrameType) -> dict[str, Any]:
    """The arguments of a pipeline call by name, as its body has them now.

    Args:
        call: the call; a modular pipeline keeps its arguments in a state.
    """
    code = call.f_code
    names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    values = variables(call, names)
    if isinstance(values.pop("self", None), ModularPipeline):
        return dict(values["state"].values)
    return values


def settings_of(call: FrameType) -> dict[str, Value]:
    """The settings that a pipeline call was given, as its loop reads them now.

    Pipelines keep what their loop reads as `_<argument>`, which callbacks change; modular ones keep
    arguments in a state. Those of a guider count as `guider.<name>`, and its strength of
    classifier-free guidance as the argument that the ordinary pipeline around the network takes.

    Args:
        call: the call.
    """
    values = arguments_of(call)
    pipe = variable(call, "self")
    kept = getattr(pipe, "__dict__", {})
    found: dict[str, Value] = {}
    for name, value in values.items():
        if any(word in name for word in WORDS) and not name.startswith(AFTERWARDS):
            value = kept.get(f"_{name}", value)
            if "attention_kwargs" in name:
                value = {UNIT: 1.0} | (value or {})
            found |= numbers(name, value)
    guider = getattr(pipe, "guider", None)
    for name, value in dict(getattr(guider, "config", {})).items():
        found |= numbers(f"guider.{name}", value)
    if isinstance(pipe, ModularPipeline) and isinstance(guider, ClassifierFreeGuidance):
        is_true = str(pipe.blocks.model_name).startswith(TRUE_GUIDANCE)
        strength = "true_cfg_scale" if is_true else "guidance_scale"
        found |= numbers(strength, guider.guidance_scale)
    return found


def numbers(name: str, value: Any) -> Iterator[tuple[str, Value]]:
    """The numbers in a value with their names; nothing for what is no number and holds none."""
    if value is None or (isinstance(value, list | tuple | dict) and not value):
        yield name, None
    elif isinstance(value, Real):
        yield name, float(value)
    elif isinstance(value, list | tuple | dict):
        entries = value.items() if isinstance(value, dict) else enumerate(value)
        for key, entry in entries:
            yield from numbers(f"{name}[{key}]", entry)


def lora_strengths(layers: Sequence[Any]) -> dict[str, Value]:
    """Strength of every active LoRA as `lora_scale[<adapter>]`, its mean over the layers.

    Which layer has which is in the fingerprint of the weights; this tells that it has changed.

    Args:
        layers: adapter layers of PEFT.
    """
    found: dict[str, list[float]] = {}
    for layer in layers:
        for adapter in () if layer.disable_adapters else layer.active_adapters:
            if adapter in layer.scaling:
                found.setdefault(adapter, []).append(float(layer.scaling[adapter]))
    if not found:
        return {LORA: None}
    return {f"{LORA}[{adapter}]": mean(scales) for adapter, scales in found.items()}


def ip_adapter_strengths(processors: Sequence[Any]) -> dict[str, Value]:
    """Strengths of IP-adapters as `ip_adapter_scale[<adapter>]`, by layer where layers differ.

    Args:
        processors: see `ip_adapters`.
    """
    layers = [dict(numbers("ip_adapter_scale", processor.scale)) for processor in processors]
    if all(layer == layers[0] for layer in layers):
        return layers[0] if layers else {"ip_adapter_scale": None}
    return {
        f"{name}[layer {place}]": scale
        for place, layer in enumerate(layers)
        for name, scale in layer.items()
    }


def freeu_strengths(unets: Sequence[Any]) -> dict[str, Value]:
    """FreeU's four numbers as `freeu[<name>]`, None where it is off; nothing without a U-Net."""
    return {
        f"freeu[{name}]": getattr(unet.up_blocks[0], name, None)
        for unet in unets
        for name in ("s1", "s2", "b1", "b2")
    }


def ip_adapters(transformer: nn.Module) -> list[Any]:
    """The attention processors of a transformer that add an IP-adapter of some strength."""
    processors = (getattr(module, "processor", None) for module in transformer.modules())
    return [p for p in processors if "IPAdapter" in type(p).__name__ and hasattr(p, "scale")]
