"""Files of earlier layouts, brought in memory to the layout that this release writes.

A layout has a number, `schema_version`. One function per number leads to the next, for each kind of
file; a file goes through all that it needs. Nothing is guessed: what an earlier layout did not say
becomes what it stood for.
"""

from collections.abc import Callable, Mapping
from typing import Any

from foreseer.errors import ForeseerError

Values = dict[str, Any]
Upgrade = Callable[[Values], Values]

ONE_TRANSFORMER: Values = {"guidance": {}, "branch_steps": [], "expert_steps": [0]}
"""What a run stands for that names no further guidance, branches that stop or transformers."""


class NewerVersion(ForeseerError, ValueError):
    """A file of a later release: what was found, what is read here, and what to do."""


def upgraded(values: Values, upgrades: Mapping[int, Upgrade]) -> Values:
    """The values in the newest layout; as they are where their version is none that is known.

    Args:
        values: a JSON object, not checked yet; it is left as it is.
        upgrades: by version, the function that leads from it to the next.

    Raises:
        NewerVersion: the version is above the newest.
    """
    newest = max(upgrades) + 1
    version = values.get("schema_version")
    if type(version) is not int:
        return values
    if version > newest:
        raise NewerVersion(
            f"has schema_version {str(version)[:20]}, this release reads {min(upgrades)} to "
            f"{newest}; upgrade foreseer (pip install --upgrade foreseer)."
        )
    while version in upgrades:
        values = upgrades[version](values)
        version += 1
        values = values | {"schema_version": version}
    return values


def _predictor_from_1(values: Values) -> Values:
    """2026-11-28: several transformers, branches that stop, guidance numbers, sizes of latents."""
    spec = values.get("spec")
    if not isinstance(spec, dict):
        return values
    return values | {"spec": ONE_TRANSFORMER | {"latent_shapes": []} | spec}


def _recording_from_1(values: Values) -> Values:
    """2026-11-28: several transformers, branches that stop, guidance numbers."""
    return ONE_TRANSFORMER | values


def _settings_from_2(values: Values) -> Values:
    """2026-11-29: settings of the call that do not guide, null, and a value per step."""
    return values  # arguments that are not told of are not compared


def _past_from_3(values: Values) -> Values:
    """2026-11-29: readouts of several anchors' hidden states."""
    arguments = values.get("arguments")
    if values.get("predictor_class") != "Readout" or not isinstance(arguments, dict):
        return values
    return values | {"arguments": {"past": 0} | arguments}


PARTS = {"L2PBands": "Bands", "L2PGroups": "ChannelGroups"}
OF_ROWS = ("num_steps", "anchors", "num_branches", "expert_steps")


def _rows_from_4(values: Values) -> Values:
    """2026-11-29: one class of rows, of one transformer or several, of the whole or of parts."""
    name, given = values.get("predictor_class"), values.get("arguments")
    if not isinstance(given, dict) or name not in ("L2P", "L2PExperts", *PARTS):
        return values
    arguments: Values = {"expert_steps": [0], "partition": None} | given
    if name in PARTS:
        own = {n: arguments.pop(n) for n in list(arguments) if n not in (*OF_ROWS, "partition")}
        arguments["partition"] = {"class": PARTS[name]} | own
    return values | {"predictor_class": "L2P", "arguments": arguments}


def _order_from_5(values: Values) -> Values:
    """2026-11-29: which guidance branch comes first; weights in any layout, which may lack."""
    spec = values.get("spec")
    if not isinstance(spec, dict):
        return values
    return values | {"spec": {"first_branch": ""} | spec}


def _first_time_from_6(values: Values) -> Values:
    """2026-11-29: rows and readouts may tell the network another time at step 0."""
    arguments = values.get("arguments")
    if values.get("predictor_class") not in ("L2P", "Readout") or not isinstance(arguments, dict):
        return values
    return values | {"arguments": {"first_time": None} | arguments}


def _classes_from_7(values: Values) -> Values:
    """2026-11-29: DisCa without modulation is a class; readouts may have token groups."""
    name, arguments = values.get("predictor_class"), values.get("arguments")
    if not isinstance(arguments, dict):
        return values
    if name == "Readout":
        return values | {"arguments": {"partition": None} | arguments}
    if name != "DiscaPredictor" or arguments.get("modulation_width") != 0:
        return values
    kept = {each: value for each, value in arguments.items() if each != "modulation_width"}
    return values | {"predictor_class": "OffsetDisca", "arguments": kept}


def _order_from_3(values: Values) -> Values:
    """2026-11-29: which guidance branch comes first, and the weights in any layout."""
    return {"first_branch": "", "values_digest": ""} | values


PREDICTOR: dict[int, Upgrade] = {
    1: _predictor_from_1,
    2: _settings_from_2,
    3: _past_from_3,
    4: _rows_from_4,
    5: _order_from_5,
    6: _first_time_from_6,
    7: _classes_from_7,
}
"""Of the `config.json` of a predictor checkpoint."""

RECORDING: dict[int, Upgrade] = {
    1: _recording_from_1,
    2: _settings_from_2,
    3: _order_from_3,
}
"""Of the `recording.json` of a recording."""
