"""The teacher's own runs as training data: no images are needed, and no teacher while training.

A run is stored as its noise and the guided velocity of every step, in float16: states are sums of
those, so that rounding does not pile up as differences of rounded states would.

Shapes: n runs of a file, S steps, B batch.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from foreseer.distill.guidance import Conditions, class_conditions, guidance_range, guided_velocity
from foreseer.integration.host.fingerprint import host_fingerprint
from foreseer.integration.pipelines.load import load_pipeline
from foreseer.trajectories.epoch_sampler import ResumableLoader
from foreseer.trajectories.files.shards import write_atomically, write_shard

FACTS_FILE = "runs.json"
NOISE_SEED, SCALE_SEED = 1_000_000, 2_000_000  # far from the seeds of recordings and benchmarks
Example = dict[str, Any]


class TeacherRuns(lightning.LightningDataModule):
    """Euler runs of a guided teacher, drawn when they are missing, and their batches.

    Run i has its own noise, guidance scale g ~ U(min, max) and condition. Drawing goes on where an
    interrupted call stopped, and may be shared by several processes with different `rank`.

    Args:
        folder: where the runs are kept, next to `runs.json` with what they were drawn from.
        pipeline: the teacher's pipeline, a folder or `zoo:<name>`.
        num_runs: runs to train on.
        num_validation: further runs, to validate on.
        num_inference_steps: steps S of every run.
        min_guidance: smallest guidance scale; None for a teacher without an unconditional branch.
        max_guidance: largest one.
        conditions: safetensors file of the transformer's keyword arguments, named `own.<name>`,
            `null.<name>` (one row per prompt; run i takes row i modulo their number) and
            `shared.<name>` (without a batch axis); None asks for class labels in turn.
        shape: shape of one latent; None reads it off a class-to-image transformer.
        runs_per_file: runs drawn in one batch and kept in one file.
        batch_size: runs per training batch.
        seed: seed of the training order.

    Raises:
        ValueError: a number is out of range.
    """

    def __init__(
        self,
        folder: str,
        pipeline: str = "zoo:fashion_dit",
        num_runs: int = 1536,
        num_validation: int = 64,
        num_inference_steps: int = 50,
        min_guidance: float | None = 1.0,
        max_guidance: float | None = 4.0,
        conditions: str | None = None,
        shape: list[int] | None = None,
        runs_per_file: int = 32,
        batch_size: int = 32,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if min(num_runs, num_validation, num_inference_steps, runs_per_file, batch_size) < 1:
            raise ValueError("numbers of runs and steps and batch sizes must be at least 1.")
        self.folder = Path(folder)
        self.pipeline = pipeline
        self.num_runs = num_runs
        self.num_validation = num_validation
        self.num_inference_steps = num_inference_steps
        self.min_guidance = min_guidance
        self.max_guidance = max_guidance
        self.conditions = conditions
        self.shape = shape
        self.runs_per_file = runs_per_file
        self.batch_size = batch_size
        self.seed = seed

    def prepare_data(self) -> None:
        """Draw what is missing.

        Raises:
            ValueError: the folder holds runs drawn from something else.
        """
        self.draw()

    def draw(self, rank: int = 0, world: int = 1) -> None:
        """Draw the missing files with number `rank` modulo `world`.

        Raises:
            ValueError: the folder holds runs drawn from something else.
        """
        missing = [n for n in range(rank, self._num_files(), world) if not self._file(n).exists()]
        if not missing:
            return
        pipe = load_pipeline(self.pipeline)
        self._claim(pipe)
        for number in tqdm(missing, desc="drawing the teacher's runs", unit="file"):
            write_shard(self._file(number), self._draw_file(pipe, number), {"runs": str(number)})

    def setup(self, stage: str | None = None) -> None:
        """Split the runs: the first ones to train on, those after them to validate on."""
        total = self.num_runs + self.num_validation
        files = [self._file(number) for number in range(self._num_files())]
        every = RunDataset(files, self.runs_per_file)
        self.train = torch.utils.data.Subset(every, range(self.num_runs))
        self.val = torch.utils.data.Subset(every, range(self.num_runs, total))

    def train_dataloader(self) -> ResumableLoader:
        """Shuffled batches; an interrupted epoch goes on with what it had left."""
        return ResumableLoader(self.train, self.batch_size, self.seed)

    def val_dataloader(self) -> DataLoader[Example]:
        """Validation runs in order."""
        return DataLoader(self.val, self.batch_size, generator=torch.Generator())

    def _num_files(self) -> int:
        return -(-(self.num_runs + self.num_validation) // self.runs_per_file)

    def _file(self, number: int) -> Path:
        return self.folder / f"runs.{number:05d}.safetensors"

    def _claim(self, pipe: Any) -> None:
        """Write down what the runs are drawn from, or compare it with what is written."""
        facts = {
            "host": host_fingerprint(pipe.transformer),
            "scheduler": type(pipe.scheduler).__name__,
            "num_inference_steps": self.num_inference_steps,
            "min_guidance": self.min_guidance,
            "max_guidance": self.max_guidance,
            "conditions": self.conditions,
            "runs_per_file": self.runs_per_file,
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / FACTS_FILE
        if not path.exists():
            write_atomically(path, ((json.dumps(facts, indent=1) + "\n").encode(),), mode=0o644)
        found = json.loads(path.read_text())
        if found != facts:
            other = sorted(key for key in facts if found.get(key) != facts[key])
            raise ValueError(
                f"{self.folder} holds runs drawn with another {', '.join(other)}; name another "
                "folder, or go on with the settings in its runs.json."
            )

    @torch.no_grad()
    def _draw_file(self, pipe: Any, number: int) -> dict[str, Tensor]:
        transformer, scheduler = pipe.transformer.eval(), pipe.scheduler
        scheduler.set_timesteps(self.num_inference_steps)
        sigmas = torch.cat([scheduler.sigmas[: self.num_inference_steps], torch.zeros(1)])
        size = self.runs_per_file
        items = range(number * size, (number + 1) * size)
        shape = self.shape or _image_shape(transformer)
        eps = torch.stack([torch.randn(shape, generator=_seeded(NOISE_SEED + i)) for i in items])
        conditions = self._conditions(transformer, items)
        scale = None
        guidance = guidance_range(self.min_guidance, self.max_guidance)
        if guidance is not None:
            drawn = [torch.rand((), generator=_seeded(SCALE_SEED + i)) for i in items]
            low, high = guidance
            scale = low + (high - low) * torch.stack(drawn)
        x_t, velocities = eps, []
        for sigma, following in zip(sigmas[:-1], sigmas[1:], strict=True):
            v = guided_velocity(transformer, x_t, sigma.expand(size), conditions, scale).half()
            velocities.append(v)
            x_t = x_t + (following - sigma) * v.float()
        stored = {"eps": eps, "v": torch.stack(velocities, 1), "sigmas": sigmas.double()}
        stored |= {f"own.{name}": value for name, value in conditions.own.items()}
        if self.conditions is not None:
            stored |= {f"null.{name}": value for name, value in conditions.null.items()}
        stored |= {f"shared.{name}": value for name, value in conditions.shared.items()}
        return stored if scale is None else stored | {"guidance_scale": scale}

    def _conditions(self, transformer: Any, items: range) -> Conditions:
        if self.conditions is None:
            num_classes = transformer.config.num_embeds_ada_norm
            labels = torch.tensor([i % num_classes for i in items])
            return class_conditions(labels, num_classes)
        given = load_file(self.conditions)
        named = {kind: starting(given, f"{kind}.") for kind in ("own", "null", "shared")}
        rows = torch.tensor([i % len(next(iter(named["own"].values()))) for i in items])
        per_sample = {
            kind: {name: value[rows % len(value)] for name, value in named[kind].items()}
            for kind in ("own", "null")
        }
        return Conditions(per_sample["own"], per_sample["null"], named["shared"])


class RunDataset(Dataset[Example]):
    """Runs of several files, read one by one.

    Args:
        files: the files, in order.
        runs_per_file: runs in each.

    Raises:
        FileNotFoundError: one is missing.
    """

    def __init__(self, files: list[Path], runs_per_file: int) -> None:
        missing = [str(file) for file in files if not file.exists()]
        if missing:
            raise FileNotFoundError(f"no {missing[0]}; draw the runs again with the same command.")
        self.files = files
        self.runs_per_file = runs_per_file

    def __len__(self) -> int:
        """Number of runs."""
        return len(self.files) * self.runs_per_file

    def __getitem__(self, index: int) -> Example:
        """`eps`, `v` (S, ...), `sigmas` and what else the run was drawn with."""
        number, row = divmod(index, self.runs_per_file)
        with safe_open(self.files[number], framework="pt") as file:
            names = list(file.keys())
            whole = {name for name in names if name == "sigmas" or name.startswith("shared.")}
            return {
                name: file.get_tensor(name) if name in whole else file.get_slice(name)[row]
                for name in names
            }


def _image_shape(transformer: Any) -> tuple[int, ...]:
    config = transformer.config
    return (config.in_channels, config.sample_size, config.sample_size)


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def starting(tensors: Mapping[str, Tensor], start: str) -> dict[str, Tensor]:
    """The tensors whose names have a common start, without it."""
    return {n.removeprefix(start): value for n, value in tensors.items() if n.startswith(start)}
