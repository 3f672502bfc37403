"""The bundled teacher learns, samples with the right sign, stops by the clock and resumes."""

import gzip
import json
import signal
from pathlib import Path
from types import SimpleNamespace

import dit_teacher as teacher
import lightning
import pytest
import torch
from dit_teacher import TeacherModule, class_grid
from export_teacher import export_teacher, save_weights
from fashion_mnist import FashionMNIST, load_split
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from sample_grid import SampleGrid
from torch.utils.data import DataLoader, TensorDataset

from foreseer.cli import main
from foreseer.integration.pipelines.pixel_pipeline import PixelDiTPipeline
from foreseer.training.plumbing import progress as callbacks
from foreseer.training.plumbing.progress import ClockCosine

CONFIGS = Path(__file__).parents[1] / "examples" / "bundled_models"


def tiny_teacher(**changes) -> TeacherModule:
    torch.manual_seed(0)
    arguments = dict(num_layers=1, num_attention_heads=1, sample_size=8, num_classes=3)
    return TeacherModule(**{**arguments, **changes})


def tiny_batches(count: int = 6) -> DataLoader:
    images = torch.full((2 * count, 1, 8, 8), 0.5)
    return DataLoader(TensorDataset(images, torch.zeros(2 * count, dtype=torch.long)), 2)


def quiet_trainer(folder: Path, **changes) -> lightning.Trainer:
    return lightning.Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"logger": False, **changes},
    )


def test_the_first_prediction_is_exactly_zero():
    transformer = tiny_teacher(num_layers=2).transformer
    v = transformer(
        torch.randn(2, 1, 8, 8),
        timestep=torch.tensor([300.0, 900.0]),
        class_labels=torch.zeros(2).long(),
    ).sample
    assert torch.count_nonzero(v) == 0


def test_the_loss_falls_on_a_constant_image(monkeypatch):
    module = tiny_teacher()
    monkeypatch.setattr(module, "log", lambda *args, **kwargs: None)
    optimizer = module.configure_optimizers()
    batch = [torch.full((16, 1, 8, 8), 0.5), torch.zeros(16, dtype=torch.long)]
    losses = []
    for index in range(60):
        loss = module.training_step(batch, index)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 1.0  # E |eps - x_0|^2 = 1 + 0.25 for the zero prediction
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])


def test_a_dropped_label_is_dropped_for_every_block_of_its_sample(monkeypatch):
    module = tiny_teacher(num_layers=3, label_dropout=0.5).train()
    monkeypatch.setattr(module, "log", lambda *args, **kwargs: None)
    seen = []
    for block in module.transformer.transformer_blocks:
        table = block.norm1.emb.class_embedder.embedding_table
        table.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].tolist()))
    module.training_step([torch.zeros(32, 1, 8, 8), torch.ones(32, dtype=torch.long)], 0)
    assert len(seen) == 4  # three blocks, and the head asks the first one again
    assert all(labels == seen[0] for labels in seen)
    assert set(seen[0]) == {1, 3}  # the class and the null class


def test_the_validation_loss_uses_the_same_noise_every_time(monkeypatch):
    module, logged = tiny_teacher(), []
    monkeypatch.setattr(module, "log", lambda name, value, **kwargs: logged.append(value.item()))
    batch = next(iter(tiny_batches()))
    for index in (0, 0, 1):
        module.validation_step(batch, index)
    assert logged[0] == logged[1] != logged[2]


def fake_clock(monkeypatch, seconds_per_look: float) -> None:
    """Let the callback's clock advance by the same amount whenever it is read."""
    now = iter(range(10_000))
    monkeypatch.setattr(
        callbacks, "time", SimpleNamespace(monotonic=lambda: seconds_per_look * next(now))
    )


def test_the_clock_stops_training_at_its_budget_and_survives_a_checkpoint(tmp_path, monkeypatch):
    fake_clock(monkeypatch, seconds_per_look=1.0)
    clock = ClockCosine(minutes=10 / 60, warmup_steps=1, floor=0.1)
    trainer = quiet_trainer(tmp_path, max_epochs=-1, callbacks=[clock], enable_checkpointing=False)
    module = tiny_teacher()
    trainer.fit(module, tiny_batches(6))
    assert trainer.global_step == 10  # one second a step
    rate = trainer.optimizers[0].param_groups[0]["lr"]
    assert rate == pytest.approx(0.1 * module.learning_rate)
    restored = ClockCosine(minutes=1.0)
    restored.load_state_dict(clock.state_dict())
    assert restored.elapsed_s == clock.elapsed_s == 10


def test_the_last_update_before_the_clock_stops_is_in_the_checkpoint(tmp_path, monkeypatch):
    fake_clock(monkeypatch, seconds_per_look=1.0)
    saver = ModelCheckpoint(tmp_path, filename="step", every_n_train_steps=4, save_last=True)
    callbacks = [ClockCosine(minutes=10 / 60, warmup_steps=1), saver]
    trainer = quiet_trainer(tmp_path, max_epochs=-1, callbacks=callbacks)
    module = tiny_teacher()
    trainer.fit(module, tiny_batches(6))
    kept = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert kept["global_step"] == trainer.global_step == 10
    assert all(torch.equal(kept["state_dict"][n], v) for n, v in module.state_dict().items())


def rates(monkeypatch, tmp_path, clock: ClockCosine) -> list[float]:
    """The rate of every step, one second each, relative to the module's."""

    class Noting(TeacherModule):
        def training_step(self, batch, batch_idx):
            seen.append(self.optimizers().param_groups[0]["lr"] / self.learning_rate)
            return super().training_step(batch, batch_idx)

    seen: list[float] = []
    fake_clock(monkeypatch, seconds_per_look=1.0)
    trainer = quiet_trainer(tmp_path, max_epochs=-1, callbacks=[clock], enable_checkpointing=False)
    arguments = dict(num_layers=1, num_attention_heads=1, sample_size=8, num_classes=3)
    trainer.fit(Noting(**arguments), tiny_batches(6))
    return seen


def test_the_rate_stays_until_the_last_minutes_and_a_longer_budget_moves_them(
    tmp_path, monkeypatch
):
    clock = ClockCosine(10 / 60, warmup_steps=1, floor=0.0, decay_minutes=4 / 60)
    assert rates(monkeypatch, tmp_path, clock) == pytest.approx(
        [1.0] * 6 + [(2 + 2**0.5) / 4, 0.5, (2 - 2**0.5) / 4, 0.0]
    )
    longer = ClockCosine(14 / 60, warmup_steps=1, floor=0.0, decay_minutes=2 / 60)
    longer.load_state_dict(clock.state_dict())  # 10 of 14 seconds are spent
    assert rates(monkeypatch, tmp_path, longer) == pytest.approx([1.0, 1.0, 0.5, 0.0])


@pytest.mark.parametrize("decay", [0.0, -1.0, 3.5])
def test_a_decay_that_the_budget_does_not_hold_is_refused(decay):
    with pytest.raises(ValueError, match=rf"decay_minutes is {decay}, .*at most the 3.0"):
        ClockCosine(3.0, decay_minutes=decay)


def interrupted(self, batch, batch_idx):
    """Ctrl-C in the sixth step."""
    if self.global_step == 5:
        raise KeyboardInterrupt


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path, monkeypatch):
    fake_clock(monkeypatch, seconds_per_look=1.0)

    def trainer() -> lightning.Trainer:
        grid = SampleGrid(every_n_steps=3, columns=2, num_inference_steps=2)
        saver = ModelCheckpoint(
            tmp_path, "step", every_n_train_steps=4, save_last=True, save_on_exception=True
        )
        average = EMAWeightAveraging(decay=0.9)
        return quiet_trainer(
            tmp_path,
            max_epochs=-1,
            callbacks=[ClockCosine(minutes=9 / 60), average, grid, saver],
            logger=TensorBoardLogger(tmp_path, "", ""),
        )

    arguments = dict(num_layers=1, num_attention_heads=1, sample_size=8, num_classes=3)
    try:
        with pytest.raises(SystemExit), monkeypatch.context() as patched:
            patched.setattr(TeacherModule, "on_train_batch_start", interrupted)
            trainer().fit(TeacherModule(**arguments), tiny_batches(20))
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # Lightning ignores it from here
    last = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert last["global_step"] == 5
    resumed = trainer()
    resumed.fit(TeacherModule(**arguments), tiny_batches(20), ckpt_path=tmp_path / "last.ckpt")
    spent = last["callbacks"]["ClockCosine"]["elapsed_s"]
    assert resumed.global_step == 5 + (9 - spent)


class WeightRecorder(SampleGrid):
    """Notes the weights that are in the module right before and right after a grid is drawn."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        before = pl_module.transformer.proj_out_2.bias.clone()
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        assert torch.equal(before, pl_module.transformer.proj_out_2.bias)
        self.current = before


def test_grids_are_drawn_with_the_averaged_weights(tmp_path, monkeypatch):
    drawn_with = []

    def noting(pipe, *args):
        assert not pipe.transformer.training
        drawn_with.append(pipe.transformer.proj_out_2.bias.clone())
        return class_grid(pipe, *args)

    monkeypatch.setattr(teacher, "class_grid", noting)
    grid = WeightRecorder(every_n_steps=2, columns=2, num_inference_steps=1)
    trainer = quiet_trainer(
        tmp_path,
        max_steps=2,
        callbacks=[EMAWeightAveraging(decay=0.5), grid],
        logger=TensorBoardLogger(tmp_path, "", ""),
    )
    module = tiny_teacher()
    trainer.fit(module, tiny_batches(6))
    averaged = module.transformer.proj_out_2.bias  # Lightning leaves the average there in the end
    assert len(drawn_with) == 1
    assert torch.equal(drawn_with[0], averaged)
    assert not torch.equal(drawn_with[0], grid.current)


def write_idx(folder: Path, split: str, labels: list[int]) -> None:
    """Write images of constant brightness `10 * label` and their labels as gzipped IDX files."""
    pixels = b"".join(bytes([10 * label]) * 28 * 28 for label in labels)
    sizes = len(labels).to_bytes(4) + (28).to_bytes(4) * 2
    content = b"\0\0\x08\x03" + sizes + pixels
    (folder / f"{split}-images-idx3-ubyte.gz").write_bytes(gzip.compress(content))
    content = b"\0\0\x08\x01" + len(labels).to_bytes(4) + bytes(labels)
    (folder / f"{split}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(content))


def test_idx_files_become_padded_images_and_labels(tmp_path):
    write_idx(tmp_path, "t10k", [0, 9, 3])
    images, labels = load_split(tmp_path, "t10k")
    assert labels.tolist() == [0, 9, 3]
    assert images.shape == (3, 1, 32, 32)
    assert torch.all(images[:, :, :2] == -1) and torch.all(images[:, :, :, -2:] == -1)
    assert torch.all(images[1, :, 2:-2, 2:-2] == torch.tensor(90) / 127.5 - 1)


def test_a_missing_file_is_named_with_the_way_to_get_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="dataset-fashion-mnist"):
        FashionMNIST(folder=str(tmp_path)).setup("fit")


@pytest.mark.parametrize("name", ["fashion_dit.yaml", "judge.yaml"])
def test_the_shipped_configuration_fits_the_real_signatures(name, capsys):
    with pytest.raises(SystemExit) as stop:
        LightningCLI(args=["fit", "--config", str(CONFIGS / name), "--print_config"])
    assert stop.value.code == 0
    assert "foreseer.training" in capsys.readouterr().out


def test_the_shipped_recipe_trains_and_exports(tmp_path, monkeypatch):
    write_idx(tmp_path, "train", [label % 10 for label in range(256)])
    write_idx(tmp_path, "t10k", list(range(10)))
    monkeypatch.chdir(tmp_path)  # the recipe writes to runs/ in the current folder
    sizes = ["--model.num_layers=1", "--model.num_attention_heads=1"]
    length = ["--trainer.max_steps=3", "--trainer.log_every_n_steps=1"]
    config = ["--config", str(CONFIGS / "fashion_dit.yaml"), f"--data.folder={tmp_path}"]
    main(["fit", *config, *sizes, *length])
    checkpoint = tmp_path / "runs" / "teacher" / "fashion_dit" / "last.ckpt"
    out = tmp_path / "out"
    export_teacher(str(checkpoint), str(out))
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    pipe = PixelDiTPipeline.from_pretrained(out)
    for name, weight in pipe.transformer.state_dict().items():
        assert torch.equal(weight, state[f"transformer.{name}"].bfloat16().float()), name
    facts = json.loads((out / "training.json").read_text())
    assert (facts["steps"], facts["samples_seen"]) == (3, 3 * 64)
    assert {"recipe.yaml", "loss_curve.png", "samples.png"} <= {file.name for file in out.iterdir()}
    assert "(1 blocks, width 64, patch" in (out / "README.md").read_text()


def test_a_checkpoint_without_averaged_weights_is_refused(tmp_path):
    with pytest.raises(ValueError, match="EMAWeightAveraging"):
        save_weights({"state_dict": {}}, tmp_path)
