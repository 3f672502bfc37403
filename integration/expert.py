"""A transformer of a pipeline and what has been proven of it; most pipelines have one."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .call import Call
from .controller import Controller
from .gate import FirstLook, LastBlock
from .hook import LAST_BLOCK, TrunkSkipper
from .host import Trunk, UnsupportedHost
from .prediction import prediction
from .proof import check_rows, prove


class Expert:
    """A transformer at work under a controller; its facts are there after the first call.

    Args:
        name: its name in the pipeline.
        transformer: the module.
        controller: what will be asked of it.
    """

    def __init__(self, name: str, transformer: nn.Module, controller: Controller) -> None:
        self.name = name
        self.transformer = transformer
        self.trunk: Trunk | None = None
        self.skipper: TrunkSkipper | None = None
        self.first_look: FirstLook | None = None
        self.last_block: LastBlock | None = None
        self.proven = not (controller.taps - {"output"}) and controller.probe is None
        self.rows_proven = LAST_BLOCK not in controller.taps  # else checked on the first batch

    def prove(self, call: Call, controller: Controller) -> None:
        """Find the trunk on this call's inputs and check everything the controller relies on."""
        proven = prove(call, set(controller.taps), controller.probe)
        self.trunk, self.skipper = proven.trunk, proven.skipper
        self.first_look, self.last_block = proven.first_look, proven.last_block
        self.proven = True

    def prove_rows(self, call: Call, output: Any) -> None:
        """Check, once, that rows computed alone are what they are in their batch."""
        sample = prediction(output) if not self.rows_proven else None
        if sample is not None and len(sample) > 1:
            check_rows(call, sample)
            self.rows_proven = True

    def skip(self, call: Call, entering: Callable[[Tensor], Tensor]) -> Any:
        """The call without its trunk, the head's input t replaced by `entering(t)`."""
        if self.skipper is None:
            raise UnsupportedHost("the trunk of this host was never traced; report this as a bug.")
        return self.skipper(call.forward, call.args, call.kwargs, entering)
