"""What a session puts on a pipeline, and whether the pipeline still runs what it was put on."""

import contextlib
import functools
from collections import Counter
from collections.abc import Callable
from types import FrameType
from typing import Any

from torch import Tensor, nn

from foreseer.integration.host.caller import PIPELINES, variable
from foreseer.integration.host.clock import Clock, Pace
from foreseer.integration.host.expert import Expert
from foreseer.integration.host.hook import (
    Attached,
    refuse_other_caches,
    replace_method,
    restore_method,
)
from foreseer.integration.host.hosts import Host


class Attachment:
    """What a session is attached to on a host: nothing before `install` and after `remove`.

    Args:
        host: its networks are forecast, its scheduler is the clock.
        taps: taps to capture where the hosts run.
        probe: what to look at in their first block; None for nothing.

    Raises:
        UnsupportedHost: the host has no network that can be forecast.
    """

    def __init__(self, host: Host, taps: frozenset[str], probe: str | None = None) -> None:
        self.host = host
        self.pipe = host.given
        self.scheduler = host.scheduler
        self.experts = {
            name: Expert(host.turn(name), name, network, taps, probe)
            for name, network in host.networks().items()
        }
        self.others = host.others()
        self.pace = Pace(self.host.steps_elsewhere)
        self.attached = False

    def install(
        self,
        route: Callable[..., Any],
        counts: Callable[[], Counter[str] | None],
        ticks: tuple[Callable[..., None], ...],
    ) -> Clock:
        """Watch the pipeline's networks and its scheduler until `remove`.

        Args:
            route: called for every call of a host, with its expert, its forward and the arguments;
                by other threads before this has returned.
            counts: asked at every call of another network for what to count it in, if at all.
            ticks: what the clock calls.

        Returns:
            The clock.

        Raises:
            ValueError: a host already has a cache or a session.
        """
        with contextlib.ExitStack() as installed:
            for expert in self.experts.values():
                own = functools.partial(route, expert)
                installed.callback(Attached(expert.transformer, own).remove)
            for name, network in self.others.items():
                installed.callback(Counted(name, network, counts).remove)
            clock = Clock(self.scheduler, *ticks)
            installed.callback(clock.detach)
            self._installed = installed.pop_all()
        self.attached = True
        return clock

    def remove(self) -> None:
        """Give the networks and the scheduler their own methods back."""
        self._installed.close()
        self.attached = False

    def is_of(self, call: FrameType) -> bool:
        """Whether a pipeline call is this pipeline's: others may share its transformer."""
        pipe = variable(call, "self")
        if isinstance(self.pipe, PIPELINES):
            return pipe is self.pipe
        experts = self.experts.values()
        return all(getattr(pipe, expert.name, None) is expert.transformer for expert in experts)

    @property
    def has_clock(self) -> bool:
        """Whether the pipeline still has the scheduler that is watched."""
        return self.host.scheduler is self.scheduler

    def check_reached(self) -> None:
        """Raise if calls of the pipeline cannot be seen: clock and transformers were exchanged.

        Raises:
            ValueError: they were; nothing is raised after `remove`.
        """
        experts = self.experts.values()
        left = any(getattr(self.pipe, each.name, None) is each.transformer for each in experts)
        if self.attached and not left and not self.has_clock:
            self.check()

    def check_outside(self, time: Tensor | None) -> None:
        """Raise if a call outside of a run belongs to one that the clock does not see.

        Args:
            time: what the network is told in this call; None while a run is open elsewhere.

        Raises:
            ValueError: the scheduler was exchanged, or steps are made elsewhere.
        """
        call = self.host.call()
        if call is not None and not self.is_of(call):
            return
        if not self.has_clock:
            self.check()
        if call is not None and time is not None:
            self.pace.call(time)

    def check_step(self, index: int) -> None:
        """Raise unless a step that is over had a call of a transformer.

        Raises:
            ValueError: a transformer was exchanged in mid-run, or its forward was replaced.
        """
        if not self.pace.calls:
            self.check()
            raise ValueError(
                f"step {index} is over without a call of {' or '.join(self.experts)} that could be "
                "seen: something took its forward's place since; detach and attach again."
            )
        self.pace.step()

    def check(self) -> None:
        """Raise if the pipeline runs something else than what was attached to.

        Raises:
            ValueError: a network or the scheduler was exchanged since, or has a cache now.
        """
        networks = self.host.networks()  # refuses one that was compiled since
        found = {**networks, **self.host.others(), "scheduler": self.host.scheduler}
        hosts = {name: expert.transformer for name, expert in self.experts.items()}
        expected = {**hosts, **self.others, "scheduler": self.scheduler}
        for network in networks.values():
            refuse_other_caches(network)
        for name in expected | found:
            if found.get(name) is not expected.get(name):
                raise ValueError(
                    f"the pipeline's {name} was exchanged since attaching; detach and attach again."
                )


class Counted:
    """Count the calls of a network that is left alone, until `remove`.

    Args:
        name: its name in the pipeline.
        network: the network.
        counts: asked at every call for what to count it in; None where it is not to be counted.
    """

    def __init__(
        self, name: str, network: nn.Module, counts: Callable[[], Counter[str] | None]
    ) -> None:
        self.name = name
        self.network = network
        self.counts = counts
        compiled = network._compiled_call_impl is not None
        self._place = "_compiled_call_impl" if compiled else "forward"  # what a call comes to
        self._replaced = replace_method(network, self._place, self._call)

    def _call(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        counts = self.counts()
        if counts is not None:
            counts[self.name] += 1
        return forward(*args, **kwargs)

    def remove(self) -> None:
        """Give the network its own forward back."""
        restore_method(self.network, self._place, self._replaced)
