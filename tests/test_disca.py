"""DisCa trains on recorded runs in three phases; its adversary obeys the hinge, hosts stay put."""

import dataclasses
import random
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from student_cases import student_pipeline
from tiny_hosts import pipeline

import foreseer as fs
from foreseer.checkpoints.format import load_predictor, save_predictor
from foreseer.checkpoints.spec import PredictorMismatch
from foreseer.integration.forecasting import forecasting
from foreseer.predictors.base import Predictor
from foreseer.predictors.corrected_rows import CorrectedRows
from foreseer.predictors.linear import L2P
from foreseer.predictors.rules import Reuse
from foreseer.training.disca import disca_fit as disca
from foreseer.training.disca.disca_fit import DiscaModule
from foreseer.training.disca.gan import Adversary, Seen
from foreseer.training.disca.replayed_runs import draw_anchors, replayed, velocity_error
from foreseer.training.export import export_command
from foreseer.trajectories.datamodule import RecordingDataModule
from foreseer.trajectories.prompts import class_items
from foreseer.trajectories.recorder import record
from foreseer.trajectories.recording import Recording

STEPS = 8
ANCHORS = (0, 2, 5)
SETTINGS = {"num_inference_steps": STEPS, "guidance_scale": 3.0}
NAMES = ["feature/hidden", "feature/output", "final"]
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
    "logger": False,
}
HOSTS = {
    "student": student_pipeline,
    "two_branches": lambda: student_pipeline(embed_guidance=False),
    "guided": lambda: pipeline("dit_guided"),
}


@pytest.fixture(scope="module", params=HOSTS)
def host(request, tmp_path_factory) -> tuple[str, Path]:
    """A host, and a recording of eight of its runs."""
    out = tmp_path_factory.mktemp(request.param)
    options: dict[str, Any] = {"taps": ["hidden", "output"], "features": "full", "batch_size": 4}
    record(HOSTS[request.param](), class_items(8, 3), out, **options, **SETTINGS)
    return request.param, out


@pytest.fixture
def loads_host(host, monkeypatch) -> None:
    monkeypatch.setattr(disca, "opened_for", lambda *_, **__: HOSTS[host[0]]())


def module_for(recording: Path, **changes: Any) -> DiscaModule:
    options: dict[str, Any] = {"num_heads": 1, "max_gap": 0.5, "mse_epochs": 1} | changes
    torch.manual_seed(0)
    return DiscaModule(str(recording), "none", ANCHORS, **options)


def batch_of(recording: Path, count: int = 4) -> dict[str, Any]:
    data = RecordingDataModule(recording, NAMES, count, 0.25, 3)
    data.setup()
    return next(iter(data.train_dataloader()))


class Recorded(Predictor):
    """Forecasts what was recorded."""

    window, needs = 1, frozenset({"tokens", "modulation"})

    def __init__(self, hidden: torch.Tensor) -> None:
        super().__init__()
        self.hidden = hidden

    def forward(self, history, step):
        return torch.cat([self.hidden[:, branch, step.index] for branch in step.branches])


# T20
def test_a_replayed_run_with_true_features_has_no_error(host):
    batch = batch_of(host[1])
    items = [module_item(host[1], item) for item in batch["item"]]
    hidden, outputs = batch["feature/hidden"], batch["feature/output"]
    forced = replayed(
        HOSTS[host[0]](), Recorded(hidden), "hidden", [0], items, hidden, outputs, **SETTINGS
    )
    assert [each.step.index for each in forced] == list(range(1, STEPS))
    for each in forced:
        torch.testing.assert_close(each.forecast, each.target, atol=1e-5, rtol=1e-5)
    assert [each.next_sigma for each in forced][-1] == 0.0


def module_item(recording: Path, item: Any) -> Any:
    from foreseer.evaluation.measure import item_of

    return item_of(Recording(recording), int(item))


def test_a_replay_of_another_pipeline_is_refused(host):
    batch = batch_of(host[1])
    items = [module_item(host[1], item) for item in batch["item"]]
    hidden, outputs = batch["feature/hidden"], batch["feature/output"]
    with pytest.raises(ValueError, match="recorded pipeline"):
        replayed(HOSTS[host[0]](), Reuse(), "hidden", [0], items, hidden, outputs + 1, **SETTINGS)


@pytest.mark.parametrize("host", ["guided"], indirect=True)
def test_another_pipeline_than_the_recorded_one_is_refused(host):
    other = HOSTS[host[0]]()
    next(other.transformer.parameters()).data.add_(1e-3)
    with pytest.raises(PredictorMismatch, match="was recorded on another host: weights"):
        DiscaModule(str(host[1]), other, ANCHORS, num_heads=1, mse_epochs=1)


@pytest.mark.slow
@pytest.mark.parametrize("host", ["student"], indirect=True)
def test_a_predictor_can_learn_its_batch_by_heart(host, loads_host):
    module = module_for(host[1])
    batch = batch_of(host[1])
    optimizer = torch.optim.Adam(module.predictor.parameters(), 1e-2)
    errors = []
    for step in range(150):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (1 - step / 150)
        error = velocity_error(module.forced(batch, ANCHORS))
        errors.append(float(error.detach()))
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
    assert errors[-1] < 0.01 * errors[0]


@pytest.mark.parametrize("host", ["guided"], indirect=True)
def test_gaps_are_trained_as_long_as_those_of_the_anchors(host):
    pipe, sigmas = HOSTS[host[0]](), Recording(host[1]).header.sigmas
    made = DiscaModule(str(host[1]), pipe, [0, 5], num_heads=1, mse_epochs=1, max_gap=0.1)
    assert made.max_gap == made.predictor.max_gap == sigmas[0] - sigmas[4] > 0.1
    made = DiscaModule(str(host[1]), pipe, [0, 5], num_heads=1, mse_epochs=1, max_gap=0.9)
    assert made.max_gap == made.predictor.max_gap == 0.9


@pytest.mark.parametrize("max_gap", [0.15, 0.3, 1.0])
def test_drawn_anchors_leave_no_step_behind(max_gap):
    sigmas = [1 - i / 20 for i in range(20)]
    for seed in range(50):
        anchors = draw_anchors(sigmas, max_gap, random.Random(seed))
        assert anchors[0] == 0 and anchors == sorted(set(anchors))
        for step in range(20):
            newest = max(anchor for anchor in anchors if anchor <= step)
            assert sigmas[newest] - sigmas[step] <= max_gap + 1e-6


# T22
def test_only_the_predictor_gets_a_gradient(host, loads_host):
    module = module_for(host[1], gan_epochs=1)
    batch = batch_of(host[1])
    forced = module.forced(batch, ANCHORS)
    velocity_error(forced).backward()
    assert module.predictor.out.weight.grad.abs().sum() > 0
    frozen = list(module.pipe.transformer.parameters())
    if host[0] != "guided":
        frozen += list(module.pipe.conditioner.parameters())
    assert all(p.grad is None for p in frozen)
    module.predictor.zero_grad()
    seen = module.adversary.look(module.forced(batch, ANCHORS))
    module.adversary.discriminator_loss(seen).backward(retain_graph=True)
    assert all(p.grad is None or not p.grad.any() for p in module.predictor.parameters())
    assert module.adversary.heads[0].gain.grad is not None
    module.adversary.zero_grad()
    module.adversary.predictor_loss(seen).backward()
    assert module.predictor.out.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in frozen)


def test_one_side_is_not_moved_by_the_others_update(host, loads_host):
    module = module_for(host[1], gan_epochs=1)
    optimizers = module.configure_optimizers()
    mine = {id(p) for group in optimizers[0].param_groups for p in group["params"]}
    theirs = {id(p) for group in optimizers[1].param_groups for p in group["params"]}
    assert mine == {id(p) for p in module.predictor.parameters()}
    assert theirs == {id(p) for p in module.adversary.parameters()}


# T21, T23
def fixed_features(shift: float) -> list[torch.Tensor]:
    return [torch.randn(6, 4, 16) + shift * torch.linspace(-1, 1, 16) for _ in range(3)]


def adversary() -> Adversary:
    torch.manual_seed(0)
    return Adversary(student_pipeline(), 16)


def test_the_discriminator_learns_the_signs_and_stays_lipschitz():
    made = adversary()
    seen = Seen(fixed_features(1.0), fixed_features(-1.0))
    optimizer = torch.optim.Adam(made.parameters(), 1e-2, betas=(0.0, 0.99))
    for _ in range(200):
        optimizer.zero_grad()
        made.discriminator_loss(seen).backward()
        optimizer.step()
    monitors = made.monitors(seen)
    assert float(monitors["logit_real"]) > 0 > float(monitors["logit_made"])
    assert made.separates and float(monitors["accuracy"]) > 0.9
    made.eval()
    for head in made.heads:
        for layer in (head.inner, head.outer):
            assert float(torch.linalg.matrix_norm(layer.weight, 2)) <= 1 + 1e-2


def test_a_coin_does_not_separate():
    made = adversary()
    for _ in range(50):
        made.discriminator_loss(Seen(fixed_features(0.0), fixed_features(0.0)))
    assert not made.separates


def test_the_predictors_hinge_pushes_up_and_stops_at_one():
    made = adversary()
    feature = [f.requires_grad_() for f in fixed_features(0.0)]
    made.predictor_loss(Seen(fixed_features(0.0), feature)).backward()
    moved = [(f - 0.5 * f.grad / f.grad.norm()).detach() for f in feature]
    logits = [
        [float(h(f).mean()) for h, f in zip(made.heads, fs, strict=True)] for fs in (feature, moved)
    ]
    assert all(after > before for before, after in zip(*logits, strict=True))
    with torch.no_grad():
        for head in made.heads:
            head.outer.bias += 10.0  # every logit over 1
    content = [f.detach().requires_grad_() for f in feature]
    loss = made.predictor_loss(Seen(fixed_features(0.0), content))
    loss.backward()
    assert float(loss) == 0.0 and not any(f.grad.any() for f in content)


def fit(recording: Path, out: Path, max_epochs: int, **changes: Any) -> lightning.Trainer:
    lightning.seed_everything(0, verbose=False)
    module = module_for(recording, **changes)
    data = RecordingDataModule(recording, NAMES, 2, 0.25, 3)
    checkpoint = lightning.pytorch.callbacks.ModelCheckpoint(
        out, filename="last", enable_version_counter=False
    )
    trainer = lightning.Trainer(max_epochs=max_epochs, callbacks=[checkpoint], **QUIET)
    last = out / "last.ckpt"
    trainer.fit(module, datamodule=data, ckpt_path=last if last.exists() else None)
    return trainer


def test_three_phases_train_resume_and_export(host, loads_host, tmp_path):
    phases = {"mse_epochs": 1, "gan_epochs": 1, "closed_epochs": 1, "order": 1}
    whole = fit(host[1], tmp_path / "whole", 3, **phases)
    for epoch in (1, 2, 3):
        stopped = fit(host[1], tmp_path / "stopped", epoch, **phases)
    states = [trainer.lightning_module.predictor.state_dict() for trainer in (whole, stopped)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    metrics = whole.callback_metrics
    assert {"val/error_db", "val/gain_over_start_db", "train/discriminator_accuracy"} <= set(
        metrics
    )
    export_command(str(tmp_path / "whole" / "last.ckpt"), str(tmp_path / "out"))
    loaded = load_predictor(tmp_path / "out")
    assert loaded.spec.anchors == ANCHORS and loaded.spec.metrics["val_error_db"] < 0
    pipe = HOSTS[host[0]]()
    arguments = {"generator": torch.Generator().manual_seed(0), "output_type": "latent", **SETTINGS}
    with forecasting(pipe, loaded) as run:
        assert pipe([0, 1], **arguments).images.isfinite().all()
    assert run.report().anchors == list(ANCHORS)
    with forecasting(pipe, loaded, anchors=(0, 1, 3, 6)):  # any list within the gap
        pipe([0, 1], **arguments)
    with pytest.raises(ValueError, match="add an anchor"):
        with forecasting(pipe, loaded, anchors=(0, 1)):
            pipe([0, 1], **arguments)


# --------------------------------------------------------------------------- a network over rows


def rows_for(host: tuple[str, Path], out: Path, **changes: Any) -> str:
    given = {"anchors": list(ANCHORS), "tap": "hidden"} | changes
    fs.fit(Recording(host[1]), method="lstsq", out=str(out), **given)
    return str(out)


@pytest.mark.parametrize("host", ["guided"], indirect=True)
def test_training_over_rows_starts_at_the_rows_and_learns_what_they_leave(
    host, loads_host, tmp_path
):
    rows = rows_for(host, tmp_path / "rows")
    module = module_for(host[1], rows=rows)
    batch = batch_of(host[1])
    own = [each.forecast for each in module.forced(batch, ANCHORS)]
    items, hidden, outputs = module.items(batch), batch["feature/hidden"], batch["feature/output"]
    plain = replayed(
        HOSTS[host[0]](),
        load_predictor(rows),
        "hidden",
        ANCHORS,
        items,
        hidden,
        outputs,
        **SETTINGS,
    )
    for mine, theirs in zip(own, plain, strict=True):
        assert torch.equal(mine, theirs.forecast)
    assert {name for name, _ in module.predictor.named_parameters()} == {
        f"network.{name}" for name, _ in module.predictor.network.named_parameters()
    }
    phases = {"mse_epochs": 2, "closed_epochs": 1, "rows": rows, "learning_rate": 1e-3}
    trained = fit(host[1], tmp_path / "fit", 3, **phases).lightning_module.predictor
    assert torch.equal(trained.weight, load_predictor(rows).weight)
    export_command(str(tmp_path / "fit" / "last.ckpt"), str(tmp_path / "out"))
    loaded = load_predictor(tmp_path / "out")
    assert type(loaded) is CorrectedRows and loaded.spec.anchors == ANCHORS
    assert loaded.network.out.weight.any()
    pipe = HOSTS[host[0]]()
    drawn = {}
    for name, predictor in (("rows", load_predictor(rows)), ("corrected", loaded)):
        source = torch.Generator().manual_seed(0)
        with forecasting(pipe, predictor):
            drawn[name] = pipe([0, 1], generator=source, output_type="latent", **SETTINGS).images
    assert drawn["corrected"].isfinite().all()
    assert not torch.equal(drawn["corrected"], drawn["rows"])


@pytest.mark.parametrize("host", ["guided"], indirect=True)
def test_rows_that_are_not_this_fits_are_refused(host, loads_host, tmp_path):
    rows = rows_for(host, tmp_path / "rows")
    for told, changes in (
        ("leave out residual and order", {"order": 1}),
        (r"for the anchors \[0, 2, 5\], found \[0, 3, 5\]", {"anchors": (0, 3, 5)}),
        ("is a L2P on 'output', expected an L2P of one part on 'hidden'", {"tap": "output"}),
    ):
        name = rows
        if "tap" in changes:
            name = rows_for(host, tmp_path / "output", **changes)
            changes = {}
        given = {"num_heads": 1, "mse_epochs": 1, "anchors": ANCHORS, "rows": name} | changes
        with pytest.raises(ValueError, match=told):
            DiscaModule(str(host[1]), "none", **given)
    loaded = load_predictor(rows)
    told_time = L2P(**{**loaded.arguments(), "first_time": 0.9})
    told_time.set_rows(loaded.weight)
    save_predictor(told_time, loaded.spec, tmp_path / "told")
    with pytest.raises(ValueError, match=r"told 0.9 at step 0.*set mse_epochs and gan_epochs to 0"):
        module_for(host[1], rows=str(tmp_path / "told"))
    moved = dataclasses.replace(loaded.spec, sigmas=tuple(s / 2 for s in loaded.spec.sigmas))
    save_predictor(loaded, moved, tmp_path / "moved")
    with pytest.raises(ValueError, match="fitted on another sigmas than"):
        module_for(host[1], rows=str(tmp_path / "moved"))
