"""Whether the features that a run is going to cache fit into memory, asked before they are stored.

How many bytes a feature takes is known once the network has run: after a run's first step.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from foreseer.integration.observers import Observer
from foreseer.integration.report import Report

MEMINFO = Path("/proc/meminfo")  # of Linux
UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


def check_memory(
    observers: Sequence[Observer],
    memory_budget: int | None,
    report: Report,
    index: int,
    device: torch.device,
) -> None:
    """Raise unless the features that a run is going to cache fit into memory.

    The device is asked only where more is expected than before: after the first step of a run, and
    after the first one of another transformer or guidance branch.

    Args:
        observers: have been told of the step.
        memory_budget: the limit in bytes; None for what the device has.
        report: told what is held and expected.
        index: the step.
        device: where the features lie.

    Raises:
        MemoryError: they do not fit.
    """
    if report.anchors[-1:] != [index]:
        return  # a forecast: nothing was stored
    held = sum(observer.state_bytes() for observer in observers)
    report.state_bytes = max(report.state_bytes, held)
    expected = sum(observer.most_bytes(index, report.num_steps) for observer in observers)
    if expected <= report.predicted_bytes:
        return
    report.predicted_bytes = expected
    limit = memory_budget
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
            f"({readable(held)} after step {index}), but {source}. {advice(observers)}"
        )


def advice(observers: Sequence[Observer]) -> str:
    """What makes the cached features smaller."""
    ways = ["draw fewer samples per call"]
    if any(observer.taps - {"output"} for observer in observers):
        ways.append("forecast the tap 'output'")
    more = [observer.to_need_less for observer in observers if observer.to_need_less]
    return f"To need less, {', '.join(ways)} or {' or '.join(more)}."


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
