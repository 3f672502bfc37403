"""Every training of foreseer at tiny size: the shipped configurations and where they die."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from clips import write_clips
from source_files import PACKAGE
from student_cases import save_teacher
from test_teacher import write_idx
from test_text_teacher import write_archive
from tiny_hosts import items, pipeline, settings
from tiny_video import FRAMES, SIDE, write_packages
from video_latents import write_latents
from video_vae import VideoVaeModule

from foreseer.predictors.partition import ChannelGroups
from foreseer.predictors.spectrum import equal_bands
from foreseer.trajectories.recorder import record

ANCHORS = [0, 2, 4]
PARTITIONS = {
    "hidden/bands": equal_bands(2, (2, 2)),
    "hidden/groups": ChannelGroups([c % 2 for c in range(16)]),
}
QUIET = {
    "trainer.accelerator": "cpu",
    "trainer.enable_progress_bar": False,
    "trainer.enable_model_summary": False,
    "model.init_args.anchors": ANCHORS,
}


@dataclass(frozen=True)
class Kill:
    """When a training dies.

    Args:
        at: `batch`, right before a batch; `write`, in the writing of a checkpoint; `saved`, right
            after one.
        epoch: epoch of the batch, or how many checkpoints of this process are written before.
        batch: the batch within the epoch.
    """

    at: str
    epoch: int
    batch: int = 0


@dataclass(frozen=True)
class Case:
    """One training.

    Args:
        config: shipped configuration, as in `fit/lesa`.
        kills: where it is killed, one after the other.
        changes: values by dotted path, lists by index.
        steps: checkpoints are of every so many optimizer steps; None leaves the shipped rule.
    """

    config: str
    kills: list[Kill]
    changes: dict[str, Any] = field(default_factory=dict)
    steps: int | None = None

    @property
    def resumes(self) -> bool:
        """Whether the same command goes on from the last checkpoint."""
        return self.config != "bundled_models/judge"

    @property
    def words(self) -> list[str]:
        """The command."""
        kind = self.config.partition("/")[0]
        return ["distill" if kind == "distill" else "fit", "--config", "training.yaml"]


ONCE = [Kill("batch", 0), Kill("write", 0), Kill("saved", 0)]  # trainings of one step
LESA = {
    "model.init_args.predictor.init_args.hidden": [4],
    "model.init_args.predictor.init_args.grid_size": 3,
    "model.init_args.open_loop_epochs": 2,
    "model.init_args.closed_loop_epochs": 2,
    "trainer.max_epochs": 4,
    "data.init_args.batch_size": 2,
}
TAPS = "model.init_args.predictor.init_args.taps"
OURS = LESA | {TAPS: [2, 2, 3], "model.init_args.steps_per_update": 2}
PUBLISHED = LESA | {
    TAPS: [2, 2],
    "model.init_args.predictor.init_args.boundaries": [0.6],
    "model.init_args.steps_per_update": 3,
    "model.init_args.tap_rate": 1e-2,
}
DISCA = {
    "model.init_args.num_heads": 1,
    "model.init_args.max_gap": 0.5,
    "data.init_args.batch_size": 2,
}
TWO_PHASES = DISCA | {
    "model.init_args.mse_epochs": 2,
    "model.init_args.closed_epochs": 2,
    "trainer.max_epochs": 4,
}
GAN = DISCA | {
    "model.init_args.mse_epochs": 1,
    "model.init_args.gan_epochs": 2,
    "model.init_args.closed_epochs": 1,
    "trainer.max_epochs": 4,
}
EPOCHS = [Kill("batch", 0, 1), Kill("batch", 1, 2), Kill("write", 0), Kill("batch", 3, 1)]
STEPS = [Kill("batch", 0, 2), Kill("batch", 1, 0), Kill("batch", 1, 1), Kill("saved", 3)]
PYKAN = OURS | {
    "model.init_args.pykan_seed": 0,
    "model.init_args.open_loop_epochs": 1,
    "model.init_args.closed_loop_epochs": 1,
    "trainer.max_epochs": 2,
}
CLOSED = {
    "model.init_args.anchors": [0, 2],
    "model.init_args.num_probe": 2,
    "data.init_args.batch_size": 2,
}
DISTILL = {
    "data.init_args.num_runs": 10,
    "data.init_args.num_validation": 2,
    "data.init_args.num_inference_steps": 6,
    "data.init_args.runs_per_file": 4,
    "data.init_args.batch_size": 2,
    "model.init_args.num_validation_steps": 2,
    "trainer.check_val_every_n_epoch": 1,
    "trainer.log_every_n_steps": 1,
    "trainer.callbacks.0.init_args.minutes": 12 / 60,
    "trainer.callbacks.0.init_args.warmup_steps": 3,
}
TEACHER = {
    "model.init_args.num_layers": 1,
    "model.init_args.num_attention_heads": 1,
    "trainer.log_every_n_steps": 1,
    "trainer.callbacks.0.init_args.minutes": 12 / 60,
    "trainer.callbacks.0.init_args.warmup_steps": 3,
    "trainer.callbacks.2.init_args.every_n_steps": 7,
    "trainer.callbacks.2.init_args.columns": 1,
    "trainer.callbacks.2.init_args.num_inference_steps": 2,
}
TEXT_TEACHER = TEACHER | {
    "model.init_args.num_single_layers": 1,
    "model.init_args.sample_size": 8,
    "model.init_args.prompts": ["a cat"],
    "model.init_args.compile_blocks": False,  # minutes, and a compiler
    "data.init_args.sample_size": 8,
    "data.init_args.batch_size": 16,
}
VIDEO_VAE = {
    "model.init_args.base_dim": 4,
    "model.init_args.z_dim": 4,
    "model.init_args.dim_mult": [1, 1, 1],
    "data.init_args.window": 1,
    "data.init_args.batch_size": 40,
    "trainer.val_check_interval": 3,
    "trainer.log_every_n_steps": 1,
    "trainer.callbacks.0.init_args.minutes": 12 / 60,
    "trainer.callbacks.0.init_args.warmup_steps": 3,
}
VIDEO_TEACHER = TEACHER | {
    "model.init_args.latent_channels": 4,
    "model.init_args.sample_size": 16,
    "model.init_args.num_frames": 5,
    "model.init_args.compile_blocks": False,
    "model.init_args.prompts": ["a cat"],
    "data.init_args.batch_size": 64,
    "trainer.val_check_interval": 3,
    "trainer.callbacks.0.init_args.decay_minutes": 3 / 60,
}
UNET_TEACHER = {k: v for k, v in TEACHER.items() if not k.startswith("model")} | {
    "model.init_args.channels": [8, 32],
    "data.init_args.batch_size": 4,
}
CLASSES_ALONE = {f"bundled_models/{name}" for name in ("fashion_dit", "fashion_unet", "judge")}
# Five batches to an epoch and a checkpoint every second: after a batch, and at an epoch's end.
CLOCK = [Kill("batch", 0, 3), Kill("write", 1), Kill("batch", 2, 0), Kill("saved", 1)]
CASES = {
    "l2p": Case("fit/l2p", [Kill("batch", 1, 1), Kill("write", 0)], CLOSED),
    "l2p_batches": Case(  # not on the tap `output`: two starts there differ by 1e-15 at times
        "fit/l2p", [Kill("batch", 0, 1), Kill("batch", 1, 0), Kill("batch", 1, 2)], CLOSED, 1
    ),
    "l2p_adam": Case(
        "fit/l2p_adam",
        [Kill("batch", 1), Kill("batch", 3), Kill("write", 0)],
        {"trainer.max_epochs": 6, "trainer.callbacks.1.init_args.every_n_epochs": 2},
    ),
    "readout": Case("fit/readout", [Kill("write", 0), Kill("batch", 1), Kill("saved", 0)]),
    "l2p_lstsq": Case("fit/l2p_lstsq", ONCE),
    "l2p_bands": Case("fit/l2p_bands", ONCE),
    "l2p_groups": Case("fit/l2p_groups", ONCE),
    "l2p_gram": Case("fit/l2p_gram", ONCE),
    "l2p_continuous": Case("fit/l2p_continuous", ONCE, {"model.init_args.num_lists": 6}),
    "lesa": Case("fit/lesa", EPOCHS, OURS),
    "lesa_pykan": Case("fit/lesa", [Kill("batch", 0, 1), Kill("batch", 1, 2)], PYKAN, 1),
    "lesa_published": Case("fit/lesa_published", STEPS, PUBLISHED, 1),
    "disca": Case("fit/disca", EPOCHS, TWO_PHASES),
    "disca_published": Case("fit/disca_published", [*STEPS, Kill("batch", 3, 2)], GAN, 1),
    "guidance": Case("distill/guidance", CLOCK, DISTILL),
    "chord": Case("distill/chord", CLOCK[::2], DISTILL),
    "meanflow": Case("distill/meanflow", CLOCK[::2], DISTILL),
    "rmf": Case("distill/rmf", CLOCK[::2], DISTILL),
    "two_branches": Case("distill/two_branches", CLOCK[::2], DISTILL),
    "two_branches_rmf": Case("distill/two_branches_rmf", CLOCK[::2], DISTILL),
    "video_student": Case(
        "distill/emoji_wan",
        CLOCK[:1],
        DISTILL | {"data.init_args.conditions": None, "data.init_args.shape": None},
    ),
    "teacher": Case(
        "bundled_models/fashion_dit",
        CLOCK,
        TEACHER | {"data.init_args.batch_size": 4},
    ),
    "text_teacher": Case("bundled_models/emoji_flux", CLOCK[::2], TEXT_TEACHER),
    "text_teacher_2": Case(
        "bundled_models/emoji_flux_2",
        CLOCK[:1],
        TEXT_TEACHER | {"trainer.callbacks.0.init_args.decay_minutes": 3 / 60},
    ),
    "video_frames": Case("bundled_models/emoji_wan_frames", CLOCK[::2], VIDEO_VAE),
    "video_vae": Case(
        "bundled_models/emoji_wan_vae", CLOCK[:1], VIDEO_VAE | {"model.init_args.start": None}
    ),
    "video_teacher": Case("bundled_models/emoji_wan", CLOCK[::2], VIDEO_TEACHER),
    "text_teacher_grids": Case(
        "bundled_models/emoji_flux_grids", CLOCK[:1], TEXT_TEACHER | {"model.init_args.start": None}
    ),
    "unet_teacher": Case("bundled_models/fashion_unet", CLOCK[:1], UNET_TEACHER),
    "emoji_l2p": Case(  # on the tap `hidden` for the same reason
        "fit/emoji_l2p",
        ONCE[:2],
        CLOSED | {"model.init_args.tap": "hidden", "trainer.limit_train_batches": 1},
    ),
    "emoji_lesa": Case("fit/emoji_lesa", EPOCHS[:2], OURS),
    "emoji_disca": Case("fit/emoji_disca", EPOCHS[:2], TWO_PHASES),
    "judge": Case(
        "bundled_models/judge",
        [Kill("batch", 0, 3), Kill("batch", 2, 1), Kill("write", 2)],
        {"model.init_args.width": 2, "data.init_args.batch_size": 4},
    ),
}


def make_sources(folder: Path) -> dict[str, Any]:
    """What the trainings need, and the values that name it, by dotted path."""
    pipeline("dit_guided").save_pretrained(folder / "pipeline")
    save_teacher(folder / "tiny")
    options: dict[str, Any] = {"taps": ["hidden", "output"], "features": "full", "batch_size": 4}
    for name, steps in (("recording", 6), ("shorter", 5)):
        call = settings("dit_guided", steps)
        listed = items("dit_guided", 8)
        record(
            pipeline("dit_guided"), listed, folder / name, partitions=PARTITIONS, **options, **call
        )
    write_idx(folder, "train", [label % 10 for label in range(22)])
    write_idx(folder, "t10k", list(range(10)))
    archive = write_archive(folder / "emoji.tgz")
    clips = make_clips(folder)
    recording, both = str(folder / "recording"), [str(folder / n) for n in ("recording", "shorter")]
    return {
        "model.init_args.recording": recording,
        "model.init_args.recordings": both,
        "model.init_args.pipeline": str(folder / "pipeline"),
        "model.init_args.start": str(folder / "guidance/whole/distill/guidance/last.ckpt"),
        "model.init_args.vae": str(folder / "vae"),
        "data.init_args.archive": str(archive),
        "data.init_args.clips": str(clips),
        "data.init_args.folders": both,
        "data.init_args.folder": recording,
        "data.init_args.validation_fraction": 0.25,
        "data.init_args.seed": 4,  # 6 trajectories to train on, 2 held out
    }


def make_clips(folder: Path) -> Path:
    """Clips, a small autoencoder and its latents of them."""
    clips = write_packages(folder) / "clips.npz"
    write_clips(str(folder), str(clips), FRAMES, SIDE)
    arguments = {"base_dim": 4, "z_dim": 4, "dim_mult": (1, 1, 1)}
    weights = VideoVaeModule(**arguments).state_dict()
    torch.save({"hyper_parameters": arguments, "state_dict": weights}, folder / "vae.ckpt")
    write_latents(str(folder / "vae.ckpt"), str(clips), str(folder), starts=2)
    return clips


def shipped(config: str) -> Path:
    """The file of a configuration: of the package, or of the bundled models' recipes."""
    home = Path(__file__).parents[1] / "examples"
    return (home if config.startswith("bundled_models") else PACKAGE / "configs") / f"{config}.yaml"


def configuration(case: Case, sources: dict[str, Any], folder: Path) -> str:
    """The shipped configuration at tiny size, as YAML."""
    content = yaml.safe_load(shipped(case.config).read_text())
    kind = case.config.partition("/")[0]
    named = dict(sources)
    if kind == "distill":
        named["data.init_args.folder"] = "runs/teacher_runs"
        named["data.init_args.pipeline"] = str(folder / "tiny")
        named["model.init_args.pipeline"] = str(folder / "tiny")
    if kind == "bundled_models":
        named["data.init_args.folder"] = str(folder)
        if case.config in CLASSES_ALONE:
            content["data"].setdefault("init_args", {})["folder"] = ""
    for path, value in (QUIET | named | case.changes).items():
        put(content, path.split("."), value, path in case.changes or path in QUIET)
    if "model.init_args.anchors" in QUIET and kind != "fit":
        content["model"].get("init_args", {}).pop("anchors", None)
    if kind != "bundled_models":
        content["trainer"]["logger"] = False  # the teacher's grids need one
    for callback in content["trainer"]["callbacks"]:
        keeps = callback["init_args"]
        if callback["class_path"].endswith("ModelCheckpoint"):
            if "every_n_train_steps" in keeps:
                keeps["every_n_train_steps"] = 2
            elif case.steps is not None and keeps["filename"] in ("last", "epoch"):
                keeps["every_n_train_steps"] = case.steps
    return yaml.safe_dump(content, sort_keys=False)


def put(content: Any, path: list[str], value: Any, always: bool) -> None:
    """Set a value inside nested mappings and lists; one that is not there only if asked to."""
    for key in path[:-1]:
        if isinstance(content, list):
            content = content[int(key)]
        else:
            content = content.setdefault(key, {})
    if always or path[-1] in content:
        content[path[-1]] = value


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """Nested mappings and lists as one mapping by dotted name."""
    if isinstance(value, dict):
        pairs = [(str(key), each) for key, each in value.items()]
    elif isinstance(value, list | tuple):
        pairs = [(str(place), each) for place, each in enumerate(value)]
    else:
        return {name: value}
    return {k: v for key, each in pairs for k, v in flat(each, f"{name}.{key}").items()}


def same(one: Any, other: Any) -> bool:
    """Equality to the bit, of tensors too."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    return type(one) is type(other) and one == other
