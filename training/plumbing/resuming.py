"""What a training needs to go on, after a kill, with the bits of one that was never killed."""

from typing import Any

import lightning
import torch
import torch.distributed as dist
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from foreseer.training.plumbing.same_training import (
    NOTED,
    arguments_of,
    check_same,
    described,
    described_data,
)

UNUSED = "ddp_find_unused_parameters_true"


def check_strategy(module: lightning.LightningModule) -> None:
    """Raise where DistributedDataParallel would wait for gradients that an update does not have.

    An update reaches the experts of its own stages, or the discriminator alone.

    Raises:
        ValueError: the strategy expects a gradient of every parameter.
    """
    wrapped = module.trainer.strategy.model
    if isinstance(wrapped, DistributedDataParallel) and not wrapped.find_unused_parameters:
        raise ValueError(
            f"{type(module).__name__} updates some parameters at a time, and the strategy waits "
            f"for the gradients of all; set `trainer.strategy: {UNUSED}`."
        )


def mean_over_processes(value: Tensor) -> Tensor:
    """The mean of a number over the processes, each of which has as many examples; same on all."""
    if not (dist.is_available() and dist.is_initialized()):
        return value
    total = value.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


RANDOM_STATE = "random_state"
WEIGHTS = "current_model_state"  # where Lightning's weight averaging keeps those being trained


class Resumable(lightning.LightningModule):
    """A training that goes on from a checkpoint of any batch of its own, and from no other.

    All trainings are: their checkpoints note every argument, see `same_training`.
    """

    _given: dict[str, Any]
    _described: dict[str, Any] | None

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Remember the arguments of whatever training this is."""
        module = super().__new__(cls)
        given = arguments_of(cls.__init__, args, kwargs)
        object.__setattr__(module, "_given", given)  # a module's own needs its __init__ first
        object.__setattr__(module, "_described", None)
        return module

    def described(self) -> dict[str, Any]:
        """What this training is made of, as its recordings were when it was first asked."""
        if self._described is None:
            data = getattr(self.trainer, "datamodule", None)
            model = described(type(self).__name__, self._given)
            self._described = {"model": model, "data": described_data(data)}
        return self._described

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note what the training is made of."""
        checkpoint[NOTED] = self.described()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse another training's; mend what Lightning mistakes, which it reads afterwards.

        Raises:
            ValueError: the checkpoint to resume is of another training.
        """
        if self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING:
            found, where = checkpoint.get(NOTED), str(self.trainer.ckpt_path)
            check_same(self.described(), found, where)
        close_epoch(checkpoint)


class Drawing(Resumable):
    """A training that draws from torch's own random numbers, whose state its checkpoint keeps.

    It is of one process: several would draw the same numbers for their different examples.
    """

    _resumed = False
    _random_state: Tensor | None = None
    _weights: dict[str, Tensor] | None = None

    def on_fit_start(self) -> None:
        """Refuse several processes.

        Raises:
            ValueError: there are several.
        """
        if (world := self.trainer.world_size) > 1:
            raise ValueError(
                f"{type(self).__name__} was started in {world} processes, expected one: all would "
                "draw the same noise. Set `trainer.devices: 1` and `num_nodes: 1`."
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the state of torch's random numbers, and weights that nothing was added to.

        Where nothing is left to train, weight averaging puts the average in the weights' place
        before Lightning writes the checkpoint again.
        """
        super().on_save_checkpoint(checkpoint)
        checkpoint[RANDOM_STATE] = torch.get_rng_state()
        if self._weights is not None:
            checkpoint[WEIGHTS] = self._weights

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Remember the state until training starts."""
        super().on_load_checkpoint(checkpoint)
        self._resumed, self._random_state = True, checkpoint.get(RANDOM_STATE)
        self._weights = checkpoint.get(WEIGHTS)

    def on_train_start(self) -> None:
        """Go on with the numbers that the checkpoint had left.

        Raises:
            ValueError: it does not say.
        """
        if not self._resumed:
            return
        if self._random_state is None:
            raise ValueError(
                f"the checkpoint of {type(self).__name__} has no {RANDOM_STATE}, so the numbers "
                "drawn before would be drawn again; it is of an older version: train anew."
            )
        torch.set_rng_state(self._random_state)

    def on_train_batch_start(self, batch: object, batch_idx: int) -> None:
        """From here on the checkpoint's weights are old."""
        self._weights = None


def close_epoch(checkpoint: dict[str, Any]) -> None:
    """Let a checkpoint written after the last batch of an epoch be one between two epochs.

    Lightning (2.6) takes it for one in the middle, does not count the epoch that follows, and
    after a second kill begins that epoch anew with what it had left. The validation that was due
    is left out in either case.

    Args:
        checkpoint: Lightning's, changed in place.
    """
    loop = checkpoint.get("loops", {}).get("fit_loop", {})
    batches, epochs = loop.get("epoch_loop.batch_progress"), loop.get("epoch_progress")
    if not batches or not batches["is_last_batch"]:
        return
    if batches["current"]["completed"] != batches["current"]["processed"] - 1:
        return
    batches["total"]["completed"] = batches["total"]["processed"]
    batches["current"] = dict.fromkeys(batches["current"], 0)
    batches["is_last_batch"] = False
    for counts in (epochs["total"], epochs["current"]):
        counts["processed"] = counts["completed"] = counts["started"]
