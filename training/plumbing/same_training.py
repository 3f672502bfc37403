"""Whether a checkpoint to resume is of the training that resumes it.

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
import xxhash
from torch import Tensor

from foreseer.integration.host.denoisers import transformers_of
from foreseer.integration.host.fingerprint import host_fingerprint
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
    if hasattr(value, "scheduler") and hasattr(value, "transformer"):
        return {type(value).__name__: host_fingerprint(*transformers_of(value).values())}
    names = list(inspect.signature(type(value).__init__).parameters)[1:]
    kept = {name: getattr(value, name) for name in names if hasattr(value, name)}
    return described(type(value).__name__, kept)
