"""The sums of Grams beside a predictor, from which its rows can be solved again with more of them.

Which trajectories are in the sums is written with them, as digests: one added twice would count
double without a trace. Of hosts whose weights differ (a LoRA) it is written how many are of which.
Shapes: n trajectories, S sampling steps.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from jaxtyping import Int64
from torch import Tensor

from foreseer.checkpoints.config import CheckpointError, is_int, is_name
from foreseer.checkpoints.format import GRAMS_FILE
from foreseer.checkpoints.spec import (
    SIGMA_TOLERANCE,
    PredictorSpec,
    as_settings,
    first_difference,
    with_weights_of,
)
from foreseer.checkpoints.strict import MalformedFile, parse_json, read_header
from foreseer.training.recorded import spec_of
from foreseer.trajectories.files.header import Header, canonical_json
from foreseer.trajectories.files.shards import CorruptShard, read_shard, shard_metadata, write_shard
from foreseer.trajectories.gram import sum_grams
from foreseer.trajectories.recording import Recording

MAX_TRAJECTORIES = 2**20
MAX_HOSTS = 256
TRAJECTORIES, COUNT, HOSTS, DIGEST = "trajectories", "count", "hosts", "recording_digest"
AGAIN = "export it again with `foreseer export` where its recording is."


@dataclass(frozen=True)
class ShippedSums:
    """Summed Grams, and of what.

    Args:
        grams: sums by name, as in "gram/hidden", float64.
        trajectories: two digests of each, see `trajectory_digests`.
        hosts: number of trajectories by the digest of the weights that made them.
    """

    grams: dict[str, Tensor]
    trajectories: Int64[Tensor, "n 2"]
    hosts: dict[str, int]

    @property
    def count(self) -> int:
        """Number of trajectories."""
        return len(self.trajectories)

    @property
    def digest(self) -> str:
        """xxh3-128 over the trajectories in no order: the same however they were put together."""
        rows = sorted(map(tuple, self.trajectories.tolist()))
        return xxhash.xxh3_128_hexdigest(canonical_json(rows).encode())

    def known(self, recording: Recording) -> list[int]:
        """Items of a recording that are in the sums already."""
        found = trajectory_digests(recording)
        twice = torch.stack(
            [torch.isin(found[:, i], self.trajectories[:, i]) for i in (0, 1)], 1
        ).any(1)
        return [item for item, known in zip(recording.items, twice.tolist(), strict=True) if known]

    def plus(self, recording: Recording) -> "ShippedSums":
        """The sums with all trajectories of a recording, which has the Grams of the same names.

        Raises:
            ValueError: some of its trajectories are in the sums already.
        """
        if known := self.known(recording):
            shown = known if len(known) <= 8 else f"{known[:4]} ... {known[-4:]}"
            raise ValueError(
                f"{len(known)} of the {len(recording)} trajectories of {recording.folder} are "
                f"among the {self.count} in the sum already, expected new ones: items {shown}. "
                "Leave the recording out, or record other items (--first_item)."
            )
        more = sums_of(recording, list(self.grams))
        hosts = {
            host: self.hosts.get(host, 0) + more.hosts.get(host, 0)
            for host in dict.fromkeys([*self.hosts, *more.hosts])
        }
        grams = {name: total + more.grams[name] for name, total in self.grams.items()}
        return ShippedSums(grams, torch.cat([self.trajectories, more.trajectories]), hosts)


def sums_of(recording: Recording, names: Sequence[str]) -> ShippedSums:
    """The sums over all trajectories of a recording.

    Raises:
        ValueError: it has none, lacks a name, or a Gram is not finite.
    """
    host = str(recording.header.host.get("weights_sha256", "not told"))
    grams = sum_grams(recording, names, recording.items)
    return ShippedSums(grams, trajectory_digests(recording), {host: len(recording)})


def trajectory_digests(recording: Recording) -> Int64[Tensor, "n 2"]:
    """Two xxh3-64 of every trajectory, in item order: what tells that it is in a sum already.

    The first is over the hash of its shard, which stays with it when recordings are merged or grow.
    The second is over what it was made from (host, settings, seed, inputs) and stays when the same
    is recorded again with other taps; where the inputs are not told (tensors) it is the first.
    """
    header = recording.header
    settings = header.recipe.get("settings_digest", "")
    rows = []
    for entry in recording.entries.values():
        content = _digest(entry.xxh3)
        told = canonical_json([header.host, header.latent_shape, settings, entry.meta])
        rows.append([content, _digest(told) if entry.meta.keys() - {"seed"} else content])
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, 2)


def _digest(text: str) -> int:
    return int.from_bytes(xxhash.xxh3_64_digest(text.encode()), "big", signed=True)


def write_sums(folder: Path, sums: Sequence[ShippedSums], digest: str) -> None:
    """Write the sums beside a predictor.

    Args:
        folder: of the predictor.
        sums: one, or one per grid; those after the first are named `<name>/<place>`.
        digest: `recording_digest` of its spec.
    """
    tensors: dict[str, Tensor] = {}
    hosts: dict[str, int] = {}
    for place, each in enumerate(sums):
        own = each.grams | {COUNT: torch.tensor(each.count), TRAJECTORIES: each.trajectories}
        tensors |= {f"{name}/{place}" if place else name: t for name, t in own.items()}
        for host, count in each.hosts.items():
            hosts[host] = hosts.get(host, 0) + count
    told = {DIGEST: digest, HOSTS: json.dumps(hosts)}
    write_shard(folder / GRAMS_FILE, tensors, told)


def read_sums(folder: Path, spec: PredictorSpec, num_parts: int | None = None) -> ShippedSums:
    """The sums beside a predictor, of one recording or of a refit; nothing in them is trusted.

    Args:
        folder: of the predictor.
        spec: of the predictor.
        num_parts: P where the fit is on the Grams of parts, which must be there once.

    Raises:
        CheckpointError: there are none, they do not say of which trajectories they are, or they
            are not those of the predictor.
    """
    path = folder / GRAMS_FILE
    if not path.exists():
        raise CheckpointError(
            f"{folder} has no {GRAMS_FILE}, expected the summed Grams of its trajectories; {AGAIN}"
        )
    try:
        names = _check_entries(read_header(path), spec, num_parts, str(path))
        told = shard_metadata(path)
        if told.get(DIGEST) != spec.recording_digest:
            raise MalformedFile(
                f"the sums are of the recording {str(told.get(DIGEST))[:80]}, the predictor of "
                f"{spec.recording_digest}"
            )
        tensors = read_shard(path)
        if (count := int(tensors[COUNT])) != len(tensors[TRAJECTORIES]):
            raise MalformedFile(f"count is {count}, expected {len(tensors[TRAJECTORIES])}")
        hosts = _read_hosts(told.get(HOSTS, ""), len(tensors[TRAJECTORIES]))
    except (MalformedFile, CorruptShard) as error:
        raise CheckpointError(f"{path}: {error}; {AGAIN}") from error
    grams = {name: tensors[name] for name in names}
    for name, gram in grams.items():
        if not torch.isfinite(gram).all() or (gram.diagonal(dim1=-2, dim2=-1) < 0).any():
            raise CheckpointError(f"{path}: {name} is no sum of Grams (NaN, Inf or < 0); {AGAIN}")
    return ShippedSums(grams, tensors[TRAJECTORIES], hosts)


def _check_entries(
    found: dict[str, tuple[str, list[int]]], spec: PredictorSpec, num_parts: int | None, where: str
) -> list[str]:
    """Names of the sums, after checking that the file holds what the predictor needs, no more."""
    if TRAJECTORIES not in found:
        raise CheckpointError(
            f"{where} does not say of which trajectories it is, so that some could be added twice; "
            f"an earlier release wrote it, or there are several grids: {AGAIN}"
        )
    whole, steps = f"gram/{spec.tap}", len(spec.sigmas)
    expected = {whole: ("F64", [spec.num_branches, steps, steps]), COUNT: ("I64", [])}
    parts = [name for name in found if name.startswith(f"{whole}/")]
    if num_parts is not None:
        if len(parts) != 1:
            raise MalformedFile(f"found the Grams of the parts {parts}, expected one partition")
        expected[parts[0]] = ("F64", [spec.num_branches, num_parts, steps, steps])
    code, shape = found.pop(TRAJECTORIES)
    sound = code == "I64" and len(shape) == 2 and shape[1] == 2
    if found != expected or not sound or not 1 <= shape[0] <= MAX_TRAJECTORIES:
        raise MalformedFile(
            f"it holds {str({**found, TRAJECTORIES: [code, shape]})[:400]}, expected {expected} "
            f"and 1 to {MAX_TRAJECTORIES} trajectories of two digests"
        )
    return [name for name in expected if name != COUNT]


def _read_hosts(text: str, count: int) -> dict[str, int]:
    try:
        hosts = parse_json(text)
    except ValueError as error:
        raise MalformedFile(f"hosts are not JSON ({error})") from error
    sound = isinstance(hosts, dict) and 1 <= len(hosts) <= MAX_HOSTS and all(map(is_name, hosts))
    if not sound or not all(is_int(n) and n >= 1 for n in hosts.values()):
        raise MalformedFile(f"hosts are {text[:80]!r}, expected numbers of trajectories by weights")
    if sum(hosts.values()) != count:
        raise MalformedFile(f"hosts are of {sum(hosts.values())} trajectories, expected {count}")
    return hosts


def check_extends(
    spec: PredictorSpec, recording: Recording, gram: str, partition: dict[str, Any] | None
) -> None:
    """Raise unless a recording is of the circumstances of a fit; its weights may be others.

    Args:
        spec: of the fit.
        recording: to add.
        gram: name of the Grams fitted on.
        partition: description of the parts where the fit is on parts.

    Raises:
        ValueError: names all that differs, as found and as expected.
    """
    header = recording.header
    tap = spec.tap if spec.tap in header.taps else " ".join(header.taps)
    found = spec_of(header, tap, spec.anchors, len(recording))
    guidance = with_weights_of(spec.guidance, found.guidance)
    pairs = differences(found, dataclasses.replace(spec, guidance=guidance), WEIGHTS)
    if partition is not None:
        own = header.recipe.get("partitions", {}).get(gram.removeprefix("gram/"))
        if own != partition:
            pairs["partition"] = own, partition
    differing = [f"{name} is {here}, expected {there}" for name, (here, there) in pairs.items()]
    both = zip(header.sigmas, spec.sigmas, strict=False)
    gap, step = max((abs(a - b), i) for i, (a, b) in enumerate(both))
    if gap > SIGMA_TOLERANCE:
        differing.append(
            f"step {step} has sigma {header.sigmas[step]:.6f}, expected {spec.sigmas[step]:.6f}"
        )
    if differing:
        raise ValueError(
            f"{recording.folder} cannot be added to the fit: {'; '.join(differing)}. Record with "
            "the predictor's settings, or fit a predictor of its own on the recording."
        )


STEPS, EXPERTS, WEIGHTS = "number of steps", "first steps of the transformers", "weights"
FACTS: Mapping[str, Callable[[PredictorSpec], Any]] = {
    "tap": lambda spec: spec.tap,
    STEPS: lambda spec: len(spec.sigmas),
    "number of branches": lambda spec: spec.num_branches,
    "guidance_scale": lambda spec: round(spec.guidance_scale, 6),
    "steps of the branches": lambda spec: list(spec.branch_steps),
    EXPERTS: lambda spec: list(spec.expert_steps),
    "first branch": lambda spec: spec.first_branch,
    "scheduler": lambda spec: spec.scheduler,
    "dtype": lambda spec: spec.dtype,
    "transformer class": lambda spec: spec.host.get("class"),
    "transformer configuration": lambda spec: spec.host.get("config_sha256"),
    WEIGHTS: lambda spec: spec.host.get("weights_sha256"),
}
"""What a run is told by, beside its sigmas and settings; "" where an older file does not tell."""


def differences(
    found: PredictorSpec, expected: PredictorSpec, *left_out: str
) -> dict[str, tuple[Any, Any]]:
    """What two runs differ in, by name: as found and as expected.

    Args:
        found: of one run.
        expected: of the other.
        left_out: facts that may differ.
    """
    pairs = {n: (fact(found), fact(expected)) for n, fact in FACTS.items() if n not in left_out}
    if name := first_difference(expected.guidance, found.guidance):
        pairs[name] = found.guidance.get(name), expected.guidance.get(name)
    told = {name: pair for name, pair in pairs.items() if "" not in pair}
    return {name: (here, there) for name, (here, there) in told.items() if here != there}


def check_one_host(first: Recording, other: Recording) -> None:
    """Raise unless two recordings are of one host with equal weights.

    Raises:
        ValueError: they are not; the rows would be of neither.
    """
    if first.header.host != other.header.host:
        raise ValueError(
            f"{other.folder} is of the host {other.header.host}, {first.folder} of "
            f"{first.header.host}, expected one for all recordings added at once: the predictor is "
            "bound to it. Add one host's after the other's; the last one's is the predictor's."
        )


def extended_spec(
    old: PredictorSpec, headers: Sequence[Header], sums: ShippedSums, metrics: dict[str, float]
) -> PredictorSpec:
    """What a predictor is of, once recordings were added.

    Args:
        old: before.
        headers: of the recordings added.
        sums: of all trajectories.
        metrics: measured of the new predictor.
    """
    shapes = dict.fromkeys([*old.latent_shapes, *(tuple(h.latent_shape) for h in headers)])
    return dataclasses.replace(
        old,
        host=headers[0].host,
        guidance=with_weights_of(old.guidance, as_settings(headers[0].guidance)),
        recording_digest=sums.digest,
        num_trajectories=sums.count,
        metrics=metrics,
        latent_shapes=tuple(shapes) if old.latent_shapes else (),
    )
