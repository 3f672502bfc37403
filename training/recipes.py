"""The shipped configurations of the fits, as what a call of `foreseer.fit` starts from."""

import functools
import importlib
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning
import yaml

from foreseer.errors import meant

METHODS = {
    "readout": "readout",
    "lstsq": "l2p_lstsq",
    "closed_loop": "l2p",
    "adam": "l2p_adam",
    "gram": "l2p_gram",
    "continuous": "l2p_continuous",
    "bands": "l2p_bands",
    "groups": "l2p_groups",
    "lesa": "lesa",
    "disca": "disca",
}
"""The shipped configuration of every method, a file of `configs/fit`."""

SEVERAL = "continuous"  # the method that is fitted on several recordings
OF_DATA = {"batch_size"}  # options of the data module
OF_TRAINER = {"max_epochs"}
OWN = ("accelerator", "devices", "log_every_n_steps", "logger", "callbacks")  # not the recipe's
RECIPES = Path(__file__).parent.parent / "configs" / "fit"


class Recipe:
    """A method's module, data and trainer, with the arguments its configuration gives them.

    Args:
        method: a key of `METHODS`.
        options: arguments of the module by name, `batch_size` of the data, `max_epochs` of the
            trainer.

    Raises:
        ValueError: there is no such method or option.
    """

    def __init__(self, method: str, options: Mapping[str, Any]) -> None:
        if method not in METHODS:
            expected = f"{', '.join(METHODS)}{meant(method, METHODS)}"
            raise ValueError(f"no method {method!r}, expected one of {expected}")
        content = yaml.safe_load((RECIPES / f"{METHODS[method]}.yaml").read_text())
        self.method = method
        self.model: dict[str, Any] = content["model"]["init_args"]
        self.data: dict[str, Any] = content["data"]["init_args"]
        self.trainer: dict[str, Any] = content["trainer"]
        self.kind = class_of(content["model"]["class_path"])
        self.data_kind = class_of(content["data"]["class_path"])
        self.takes = inspect.signature(self.kind).parameters
        given = {"recording", "recordings", "anchors", "tap", "pipeline"}
        known = sorted((self.takes.keys() - given) | OF_DATA | OF_TRAINER)
        for name in options:
            if name not in known:
                raise ValueError(
                    f"the method {method!r} has no option {name!r}, expected one of "
                    f"{', '.join(known)}{meant(name, known)}"
                )
        self.options = dict(options)

    @property
    def tap(self) -> str:
        """The tap of the configuration."""
        return str(self.model.get("tap", getattr(self.kind, "tap", "output")))

    @property
    def runs_pipeline(self) -> bool:
        """Whether the fit runs the recorded pipeline."""
        return "pipeline" in self.takes

    @property
    def keeps_best(self) -> bool:
        """Whether the epoch of least held-out error is the one to keep."""
        return any("monitor" in each["init_args"] for each in self.trainer["callbacks"])

    def module(self, given: Mapping[str, Any]) -> Any:
        """The module.

        Args:
            given: recordings, anchors, tap and pipeline; what it does not take is left out.
        """
        return self.kind(**self._arguments(given))

    def _arguments(self, given: Mapping[str, Any]) -> dict[str, Any]:
        own = {name: _made(value) for name, value in self.model.items()}
        return own | {n: v for n, v in {**given, **self.options}.items() if n in self.takes}

    def datamodule(
        self, recordings: Sequence[str], tap: str, validation_fraction: float, seed: int
    ) -> lightning.LightningDataModule:
        """The data module on other recordings, another tap and another split."""
        own = dict(self.data)
        own |= {"folders": list(recordings)} if "folders" in own else {"folder": recordings[0]}
        own |= {"validation_fraction": validation_fraction, "seed": seed}
        if "tap" in own:
            own["tap"] = own["tap"].replace(self.tap, tap)  # that of parts is `<tap>/<parts>`
        if "names" in own:
            own["names"] = [name.replace(f"/{self.tap}", f"/{tap}") for name in own["names"]]
        takes = inspect.signature(self.data_kind).parameters
        own |= {n: v for n, v in self.options.items() if n in OF_DATA and n in takes}
        made: lightning.LightningDataModule = self.data_kind(**own)
        return made

    def trainer_arguments(self) -> dict[str, Any]:
        """Arguments of the trainer, whose epochs are those of all phases of the module."""
        given = {name: value for name, value in self.trainer.items() if name not in OWN}
        defaults = {name: parameter.default for name, parameter in self.takes.items()}
        own = {**defaults, **self.model, **self.options}
        phases = sum(own[name] for name in self.takes if name.endswith("_epochs"))
        return given | {"max_epochs": self.options.get("max_epochs", phases or given["max_epochs"])}


def class_of(path: str) -> Any:
    """The class at a dotted path of a shipped configuration."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def _made(value: Any) -> Any:
    """A value of a configuration; a class with some of its arguments is what makes the object."""
    if isinstance(value, dict) and "class_path" in value:
        return functools.partial(class_of(value["class_path"]), **value.get("init_args", {}))
    return value
