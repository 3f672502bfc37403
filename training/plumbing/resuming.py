"""What a training needs to go on, after a kill, with the bits of one that was never killed.

A checkpoint notes what its training was made of: every argument of the module and of its data, and
what the recordings held. A training goes on from one that notes the same, and from no other.
"""

import functools
import hashlib
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning
import torch
import torch.distributed as dist
import xxhash
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from foreseer.integration.host.fingerprint import host_fingerprint
from foreseer.integration.host.hosts import TURNS, transformers_of
from foreseer.trajectories.files.header import HEADER_FILE
from foreseer.trajectories.recording import Recording

NOTED = "training"  # entry of a checkpoint
RECORDINGS = ("recording", "recordings", "folder", "folders")  # arguments that may name some
NEUTRAL = ("device", "num_workers", "quiet")  # change where and how, not what


def arguments_of(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments of a call of a method by name, defaults among them, the instance left out."""
    bound = inspect.signature(function).bind_partial(None, *args, **kwargs)
    bound.apply_defaults()
    return dict(list(bound.arguments.items())[1:])


def described(name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What was made with these arguments, in plain values; recordings by what they hold.

    Args:
        name: of the class.
        arguments: by name.
    """
    found: dict[str, Any] = {"class": name}
    for key, value in arguments.items():
        if key not in NEUTRAL:
            found[key] = _contents(value) if key in RECORDINGS else _plain(value)
    return found


def described_data(data: lightning.LightningDataModule | None) -> dict[str, Any]:
    """The same of a data module, which keeps its arguments under their names."""
    if data is None:
        return {}
    names = list(inspect.signature(type(data).__init__).parameters)[1:]
    given = {name: getattr(data, name) for name in names if hasattr(data, name)}
    return described(type(data).__name__, given)


def check_same(expected: dict[str, Any], found: Any, where: str) -> None:
    """Raise unless a checkpoint notes what a training is made of.

    Args:
        expected: of this training, nested by `model` and `data`.
        found: noted in the checkpoint; None where it notes nothing.
        where: the checkpoint.

    Raises:
        ValueError: it is of another training, or of a version that noted nothing.
    """
    advice = (
        "Give this fit a folder of its own (`--out`, or `dirpath` of ModelCheckpoint), or remove "
        "the checkpoint to start anew."
    )
    if not isinstance(found, dict):
        raise ValueError(
            f"the checkpoint to resume, {where}, does not note what it was trained on, as one of "
            f"an earlier version of foreseer; expected one of this training. {advice}"
        )
    before, now = _flat(found), _flat(expected)
    names = [n for n in before | now if before.get(n) != now.get(n)]
    if names:
        told = ", ".join(
            f"{name} {before.get(name, 'not given')}, here {now.get(name, 'not given')}"
            for name in names
        )
        raise ValueError(
            f"the checkpoint to resume, {where}, is of another fit: it has {told}. {advice}"
        )


def _flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by dotted path."""
    found: dict[str, Any] = {}
    for name, value in nested.items():
        inside = _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {}
        found |= inside or {f"{prefix}{name}": value}
    return found


def _contents(value: Any) -> Any:
    """A recording by what it holds, wherever it lies; anything else as it is."""
    if isinstance(value, list | tuple):
        return [_contents(each) for each in value]
    if isinstance(value, Recording) or (isinstance(value, str | Path) and _is_recording(value)):
        recording = value if isinstance(value, Recording) else Recording(value)
        entries = "".join(f"{e.item} {e.xxh3}\n" for e in recording.entries.values())
        return {
            "recipe": recording.header.recipe_hash,
            "trajectories": len(recording),
            "contents": xxhash.xxh3_128_hexdigest(entries.encode()),
        }
    return _plain(value)


def _is_recording(folder: str | Path) -> bool:
    return "://" in str(folder) or (Path(folder) / HEADER_FILE).exists()


def _plain(value: Any) -> Any:
    """A value in words and numbers."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, Tensor):
        return hashlib.sha256(value.detach().cpu().contiguous().numpy().tobytes()).hexdigest()
    if isinstance(value, functools.partial):
        return {"call": _plain(value.func), "with": _plain([*value.args, value.keywords])}
    if isinstance(value, type) or inspect.isroutine(value):
        return value.__qualname__
    if hasattr(value, "scheduler") and any(hasattr(value, name) for name in TURNS):
        return {type(value).__name__: host_fingerprint(*transformers_of(value).values())}
    names = list(inspect.signature(type(value).__init__).parameters)[1:]
    kept = {name: getattr(value, name) for name in names if hasattr(value, name)}
    return described(type(value).__name__, kept)


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
