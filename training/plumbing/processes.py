"""What a training by descent needs where several processes share its batches."""

import lightning
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

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
