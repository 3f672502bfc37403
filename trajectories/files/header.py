"""`recording.json`: what was asked for and on which host, read and written strictly."""

import json
import math
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import xxhash

from foreseer.checkpoints.spec import as_settings, first_difference
from foreseer.checkpoints.strict import parse_json
from foreseer.checkpoints.upgrade import RECORDING, NewerVersion, upgraded
from foreseer.errors import RecordingError as RecordingError
from foreseer.trajectories.files.shards import write_atomically

SCHEMA_VERSION = 4
HEADER_FILE = "recording.json"
MAX_RECORDING_JSON_BYTES = 1_000_000
MAX_INT = 1 << 63
MAX_NAME = 4096
FEATURE_MODES = ("none", "tokens", "full")


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a recording holds; equal headers mean that trajectories may be mixed.

    Args:
        recipe: what was asked for (taps, mode, guidance_scale, num_inference_steps, conditions
            digest, ...); plain JSON values.
        host: fingerprint of the model; plain JSON values, alike on every machine that takes part.
        scheduler: fingerprint of the scheduler; plain JSON values.
        sigmas: flow sigma of each step, length S; they rise in an inversion.
        taps: names of the recorded taps.
        num_branches: classifier-free-guidance streams, >= 1.
        dtype: dtype of the model, as in "bfloat16".
        features: which features are stored: "none", "tokens" (a subset) or "full".
        states: whether the sampler states are stored.
        latent_shape: shape of one latent, without the batch axis.
        guidance: what the pipeline call sets that changes the function, by argument (see
            checkpoints/spec.py): a number, None, or a list of a value per step.
        branch_steps: steps each guidance branch lasts; empty where all last to the end.
        expert_steps: first step of each transformer of the pipeline, starting with 0.
        pipeline: name or folder the pipeline was loaded by; empty where it does not tell. It is no
            part of what makes headers equal.
        first_branch: kind of the first of two guidance branches, `conditional` or `unconditional`;
            empty where it is not known. No part of what makes headers equal, as the next.
        values_digest: `values_digest` of the model's weights; empty where it was not told.
        recipe_hash: xxh3-128 of `recipe` as sorted JSON; computed when left empty.
        schema_version: version of this file's layout.

    Raises:
        ValueError: a field has a wrong type or range, or `recipe_hash` is not that of `recipe`.
    """

    recipe: dict[str, Any]
    host: dict[str, Any]
    scheduler: dict[str, Any]
    sigmas: list[float]
    taps: list[str]
    num_branches: int
    dtype: str
    features: str
    states: bool
    latent_shape: list[int]
    guidance: dict[str, Any] = field(default_factory=dict)
    branch_steps: list[int] = field(default_factory=list)
    expert_steps: list[int] = field(default_factory=lambda: [0])
    pipeline: str = field(default="", compare=False)
    first_branch: str = field(default="", compare=False)
    values_digest: str = field(default="", compare=False)
    recipe_hash: str = ""
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        for name in ("recipe", "host", "scheduler", "guidance"):
            value = getattr(self, name)
            _require(isinstance(value, dict), name, value, "a dict")
            object.__setattr__(self, name, json.loads(canonical_json(value)))  # as read back
        for name in ("sigmas", "taps", "latent_shape", "branch_steps", "expert_steps"):
            value = getattr(self, name)
            _require(isinstance(value, list | tuple), name, value, "a list")
            object.__setattr__(self, name, list(value))
        self._check_fields()
        expected = xxhash.xxh3_128(canonical_json(self.recipe).encode()).hexdigest()
        if not self.recipe_hash:
            object.__setattr__(self, "recipe_hash", expected)
        _require(self.recipe_hash == expected, "recipe_hash", self.recipe_hash, repr(expected))

    def _check_fields(self) -> None:
        _require(
            all(_is_number(s) for s in self.sigmas) and len(self.sigmas) > 0,
            "sigmas",
            self.sigmas,
            "a non-empty list of finite numbers",
        )
        named = all(isinstance(tap, str) and tap for tap in self.taps)
        unique = named and len(set(self.taps)) == len(self.taps)
        _require(unique, "taps", self.taps, "different non-empty names")
        _require(_is_size(self.num_branches), "num_branches", self.num_branches, "an int >= 1")
        named = isinstance(self.dtype, str) and bool(self.dtype)
        _require(named, "dtype", self.dtype, "a name such as 'bfloat16'")
        _require(self.features in FEATURE_MODES, "features", self.features, f"{FEATURE_MODES}")
        _require(isinstance(self.states, bool), "states", self.states, "true or false")
        sizes = all(_is_size(size) for size in self.latent_shape)
        _require(sizes, "latent_shape", self.latent_shape, "a list of ints >= 1")
        holds = all(self._is_setting(value) for value in self.guidance.values())
        _require(holds, "guidance", self.guidance, "numbers by name, null, or one for each step")
        sizes = all(map(_is_size, self.branch_steps))
        _require(sizes, "branch_steps", self.branch_steps, "a list of ints >= 1")
        first, others = self.expert_steps[:1], self.expert_steps[1:]
        holds = first == [0] and all(map(_is_size, others))
        holds = holds and self.expert_steps == sorted(set(self.expert_steps))
        _require(holds, "expert_steps", self.expert_steps, "rising steps starting with 0")
        named = isinstance(self.pipeline, str) and len(self.pipeline) <= MAX_NAME
        _require(named, "pipeline", self.pipeline, f"a string of at most {MAX_NAME} characters")
        kinds = ("", "conditional", "unconditional")
        _require(self.first_branch in kinds, "first_branch", self.first_branch, f"one of {kinds}")
        named = isinstance(self.values_digest, str) and len(self.values_digest) <= MAX_NAME
        _require(named, "values_digest", self.values_digest, "a string")
        _require(isinstance(self.recipe_hash, str), "recipe_hash", self.recipe_hash, "a string")
        version = self.schema_version
        _require(version == SCHEMA_VERSION, "schema_version", version, f"{SCHEMA_VERSION}")

    def _is_setting(self, value: Any) -> bool:
        values = value if isinstance(value, list) else [value]
        whole = not isinstance(value, list) or len(value) == self.num_steps
        return whole and all(each is None or _is_number(each) for each in values)

    @property
    def num_steps(self) -> int:
        """S, the number of steps of every trajectory."""
        return len(self.sigmas)

    @classmethod
    def parse(cls, content: bytes, where: str) -> "Header":
        """The header in the bytes of a `recording.json`.

        Args:
            content: its bytes.
            where: its place, for messages.

        Raises:
            RecordingError: not JSON, a newer schema, or a malformed field.
        """
        try:
            values = parse_json(content)
        except ValueError as error:
            raise RecordingError(
                f"{where} is not JSON ({error}); restore or re-record it."
            ) from error
        if not isinstance(values, dict):
            raise RecordingError(f"{where} holds {type(values).__name__}, expected a JSON object.")
        try:
            values = upgraded(values, RECORDING)
        except NewerVersion as error:
            raise RecordingError(f"{where} {error}") from error
        known = {field.name for field in fields(cls)}
        if unknown := sorted(values.keys() - known):
            raise RecordingError(f"{where} has unknown keys {unknown}; expected {sorted(known)}.")
        if missing := sorted(known - values.keys() - {"pipeline"}):  # was not always told
            raise RecordingError(f"{where} lacks the keys {missing}.")
        try:
            return cls(**values)
        except (ValueError, TypeError) as error:
            raise RecordingError(f"{where}: {error}") from error

    def write(self, folder: Path) -> None:
        """Write `recording.json` atomically.

        Raises:
            ValueError: it would be too large to be read.
        """
        values = asdict(self)
        if not self.pipeline:
            del values["pipeline"]
        text = json.dumps(values, indent=1, sort_keys=True, allow_nan=False) + "\n"
        content = text.encode()
        if len(content) > MAX_RECORDING_JSON_BYTES:
            raise ValueError(
                f"the header has {len(content)} bytes, the limit is {MAX_RECORDING_JSON_BYTES}; "
                "shorten the settings."
            )
        write_atomically(folder / HEADER_FILE, [content], mode=0o644)

    def check_same(self, found: "Header", folder: str | Path) -> None:
        """Refuse to continue a recording that was started with other settings.

        Raises:
            RecordingError: names what differs, as found in the folder and as expected now.
        """
        told, own = as_settings(found.guidance), as_settings(self.guidance)
        alike = first_difference(told, own) is None
        if alike and replace(self, guidance=found.guidance) == found:
            return
        here, there = asdict(self), asdict(found)
        if self.recipe_hash != found.recipe_hash:
            here, there = self.recipe, found.recipe
        differing = sorted(k for k in here.keys() | there.keys() if here.get(k) != there.get(k))
        what = "; ".join(
            f"{k}: found {_short(there.get(k))}, expected {_short(here.get(k))}" for k in differing
        )
        raise RecordingError(
            f"{folder} was recorded with another recipe or host (recipe hash found "
            f"{found.recipe_hash}, expected {self.recipe_hash}). {what}. "
            "Record into a new folder, or restore the old settings."
        )


def check_size(size: int, limit: int, path: str | Path) -> None:
    """Raise before reading what is over its limit.

    Raises:
        RecordingError: it is.
    """
    if size > limit:
        raise RecordingError(
            f"{path} has {size} bytes, the limit is {limit}; it was not written by `record`."
        )


def canonical_json(value: Any) -> str:
    """Compact JSON with sorted keys; ValueError on anything JSON cannot hold."""
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except TypeError as error:
        raise ValueError(f"only plain JSON values are stored, got {error}.") from error


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def _require(holds: bool, name: str, found: Any, expected: str) -> None:
    if not holds:
        raise ValueError(f"{name}: found {_short(found)}, expected {expected}.")


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value) if isinstance(value, float) else abs(value) < MAX_INT


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value < MAX_INT
