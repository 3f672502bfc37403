"""Whether the features that a run is going to cache fit into memory, asked before they are stored.

How many bytes a feature takes is known once the network has run: after a run's first step.
"""

from pathlib import Path

import torch

from foreseer.integration.controller import Controller
from foreseer.integration.report import Report
from foreseer.predictors.base import History

MEMINFO = Path("/proc/meminfo")  # of Linux
UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


def most_bytes(history: History, to_come: int) -> int:
    """Bytes that a history holds at most once some more anchors are over.

    min(window, anchors held + anchors to come) * bytes of a feature

    Args:
        history: holds an anchor at least.
        to_come: anchors that may still be pushed to it.
    """
    count = len(history) + to_come
    if history.window is not None:
        count = min(count, history.window)
    newest = history.features[-1]
    count += history.reading is not None
    carried = 0 if history.carried is None else history.carried.nbytes
    return count * newest.numel() * newest.element_size() + carried


def check_memory(controller: Controller, report: Report, index: int, device: torch.device) -> None:
    """Raise unless the features that a run is going to cache fit into memory.

    The device is asked only where more is expected than before: after the first step of a run, and
    after the first one of another transformer or guidance branch.

    Args:
        controller: has closed the step; its `memory_budget` is the limit, where it has one.
        report: told what is expected.
        index: the step.
        device: where the features lie.

    Raises:
        MemoryError: they do not fit.
    """
    if report.anchors[-1:] != [index]:
        return  # a forecast: nothing was stored
    expected = controller.most_bytes(index, report.num_steps)
    if expected <= report.predicted_bytes:
        return
    report.predicted_bytes = expected
    held, limit = controller.state_bytes(), controller.memory_budget
    source = f"the memory budget is {readable(limit or 0)}"
    if limit is None:
        available = available_bytes(device)
        if available is None:
            return
        limit = available + held
        source = f"{readable(limit)} are available on {device}"
    if expected > limit:
        raise MemoryError(
            f"this run is going to cache up to {readable(expected)} of features "
            f"({readable(held)} after step {index}), but {source}. {advice(controller)}"
        )


def advice(controller: Controller) -> str:
    """What makes the cached features smaller."""
    ways = ["draw fewer samples per call"]
    if controller.taps != {"output"}:
        ways.append("forecast the tap 'output'")
    return f"To need less, {', '.join(ways)} or {controller.to_need_less}."


def available_bytes(device: torch.device) -> int | None:
    """Bytes that can still be allocated on a device; None where the system does not tell.

    On CUDA what is free and what torch has reserved without using it; on the CPU what Linux says is
    available, which knows nothing of a container's own limit.
    """
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free + unused)
    if device.type == "cpu" and MEMINFO.exists():
        for line in MEMINFO.read_text().splitlines():
            name, _, value = line.partition(":")
            if name == "MemAvailable":
                return 1024 * int(value.split()[0])
    return None


def check_budget(memory_budget: int | None) -> None:
    """Raise unless a memory budget is a number of bytes, or None.

    Raises:
        ValueError: it is not positive.
    """
    if memory_budget is not None and memory_budget < 1:
        raise ValueError(
            f"memory_budget is {memory_budget}, expected a number of bytes >= 1, or None for what "
            "is available on the device."
        )


def readable(num_bytes: int | float) -> str:
    """A number of bytes in the unit a person would choose."""
    value, unit = float(num_bytes), 0
    while value >= 1024 and unit < len(UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{value:.1f} {UNITS[unit]}" if unit else f"{num_bytes:.0f} bytes"
