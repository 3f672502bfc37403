"""The verdict after every fit: its number is that of the features and samples themselves."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from row_cases import rows_fitted
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_hosts import items, pipeline, settings

from foreseer.checkpoints.format import load_predictor
from foreseer.checkpoints.standing import standing
from foreseer.evaluation.measure import References, generate, log_error
from foreseer.evaluation.metrics import Paired, paired
from foreseer.evaluation.rows import adams_bashforth_rows, formula_tables
from foreseer.evaluation.verdict import (
    Estimate,
    Rival,
    closed_loop_line,
    estimate,
    open_loop_line,
    rivals_on,
)
from foreseer.fit_commands import refit as refit_command
from foreseer.integration.schedule import PUBLISHED_L2P, uniform
from foreseer.predictors.base import History, Predictor, Step
from foreseer.predictors.lesa import LesaPredictor
from foreseer.predictors.rules import RULES
from foreseer.predictors.spectrum import equal_bands
from foreseer.training.closed_loop import L2PClosedLoop
from foreseer.training.continuous_fit import L2PContinuousModule, SeveralGrams
from foreseer.training.disca import disca_fit as disca
from foreseer.training.disca.disca_fit import DiscaModule
from foreseer.training.export import export_command
from foreseer.training.l2p import L2PAdam, L2PGramModule, L2PLeastSquares
from foreseer.training.lesa.lesa_fit import LesaModule
from foreseer.training.verdict_callbacks import NO_HELD_OUT, SAMPLES_KEY
from foreseer.trajectories.datamodule import GramDataModule, RecordingDataModule
from foreseer.trajectories.recorder import record
from foreseer.trajectories.recording import Recording

STEPS, ANCHORS = 9, (0, 1, 3, 6)
CALL = settings("dit_guided", STEPS)
PART = re.compile(
    r"(\d+) evaluations: (ahead|level|behind) (?:of |with )?the best formula on its own list "
    r"\((\w+), anchors ([\d ]+)\), (\S+) dB \(paired (\S+) to (\S+)\), "
)


class Told(NamedTuple):
    """What a verdict says at one number of evaluations."""

    count: int
    word: str
    rival: str
    own: tuple[int, ...]  # the rival's anchors
    gain: float
    low: float
    high: float


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A pipeline, and a recording of eight of its runs with everything that can be recorded."""
    out = tmp_path_factory.mktemp("verdict")
    pipe = pipeline("dit_guided")
    pipe.save_pretrained(out / "pipe")
    options: dict[str, Any] = {"taps": ["output", "hidden"], "features": "full", "batch_size": 4}
    options["partitions"] = {"hidden/bands": equal_bands(2, (2, 2))}
    record(pipe, items("dit_guided", 8), out / "r", **options, **CALL)
    return out


def fit(module: Any, data: Any, out: Path, epochs: int = 1, monitor: str | None = None) -> None:
    last = monitor is None
    kept = ModelCheckpoint(
        out, "kept", monitor=monitor, save_last=last, enable_version_counter=False
    )
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=TensorBoardLogger(out, "logs", ""),
        callbacks=[kept],
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=data)


def told(printed: str) -> tuple[str, list[Told]]:
    """The verdict among what was printed, and each of its parts."""
    (line,) = [line for line in printed.splitlines() if line.startswith("verdict: ")]
    found = [
        Told(int(count), word, rival, tuple(map(int, own.split())), *map(float, numbers))
        for count, word, rival, own, *numbers in PART.findall(line)
    ]
    return line, found


def text_of(out: Path) -> str:
    """The verdict in TensorBoard."""
    events = EventAccumulator(str(out / "logs"))
    events.Reload()
    (event,) = events.Tensors("verdict/text_summary")
    return event.tensor_proto.string_val[0].decode()


def piled_up(
    predictor: Predictor, recording: Recording, held: Sequence[int], tap: str, anchors: Any
) -> float:
    """Mean square of ||sum_t h_t (F_hat_t - F_t)||, by forecasting the stored features."""
    sigmas, squares = recording.header.sigmas, []
    for item in held:
        features = recording.load(item, [f"feature/{tap}"])[f"feature/{tap}"].double()
        history, total = History(predictor.window), torch.zeros_like(features[:, 0])
        for t, sigma in enumerate(sigmas):
            step = Step(t, sigma, len(sigmas), (0, 1))
            if t in anchors:
                history.push(step, features[:, t])
            else:
                length = ([*sigmas, 0.0])[t + 1] - sigma
                total = total + length * (predictor(history, step) - features[:, t])
            squares.append(total.flatten(1).square().sum(1).mean())
    return float(torch.stack(squares).mean())


def rule_of(told: Told, sigmas: Sequence[float]) -> Predictor:
    """The formula that a verdict names."""
    return (
        Rows(adams_bashforth_rows(told.own, sigmas)) if told.rival == "ab2" else RULES[told.rival]
    )


FITS: dict[str, Any] = {
    "lstsq": lambda place: L2PLeastSquares(place, ANCHORS, "hidden"),
    "adam": lambda place: L2PAdam(place, ANCHORS, "hidden"),
    "gram": lambda place: L2PGramModule(place, ANCHORS, "hidden"),
    "continuous": lambda place: L2PContinuousModule([place], ANCHORS, "hidden", num_lists=4),
    "parts": lambda place: L2PLeastSquares(place, ANCHORS, "hidden", partition="bands"),
}


@pytest.mark.parametrize("name", FITS)
def test_a_fit_on_grams_is_judged_by_what_its_forecasts_pile_up(name, folder, tmp_path, capsys):
    place = str(folder / "r")
    module, tap = FITS[name](place), "hidden/bands" if name == "parts" else "hidden"
    data: Any = GramDataModule(place, tap, 0.4)
    if name == "continuous":
        data = SeveralGrams([place], tap, 0.4)
    fit(module, data, tmp_path)
    line, found = told(capsys.readouterr().out)
    held = (data.parts[0] if name == "continuous" else data).val_items
    lists = [ANCHORS]
    if name in ("gram", "continuous"):  # serve any list, so are judged on others too
        lists = [uniform(8, STEPS), uniform(6, STEPS), ANCHORS]
    assert [each.count for each in found] == [len(anchors) for anchors in lists]
    recording = Recording(module.recording.folder)
    for each, anchors in zip(found, lists, strict=True):
        rule = rule_of(each, recording.header.sigmas)
        mine = piled_up(module.predictor, recording, held, module.tap, anchors)
        other = piled_up(rule, recording, held, module.tap, each.own)
        assert each.gain == pytest.approx(10 * math.log10(other / mine), abs=0.06)
        assert len(each.own) == each.count and each.low <= each.gain <= each.high
        if min(abs(each.low - 1), abs(each.high + 4.5)) > 0.06:  # not by rounding
            assert each.word == standing(each.low, each.high, estimated=True)
    assert f"of {len(held)} trajectories" in line and text_of(tmp_path) == line
    assert "PSNR" not in line.split("foreseer bench")[0]
    export_command(str(tmp_path / "last.ckpt"), str(tmp_path / "out"))
    metrics = load_predictor(tmp_path / "out").spec.metrics
    assert {"estimate_db", "estimate_db_reuse", "estimate_db_taylor_1"} <= metrics.keys()
    best = max(value for key, value in metrics.items() if key.startswith("estimate_db_"))
    own = next(each for each in found if each.count == len(ANCHORS))
    assert metrics["estimate_db"] - best == pytest.approx(own.gain, abs=0.06)
    ends = metrics["paired_low_db"], metrics["paired_high_db"]
    assert ends == (pytest.approx(own.low, abs=0.06), pytest.approx(own.high, abs=0.06))
    card = (tmp_path / "out" / "README.md").read_text()
    assert ", `estimate_db`)" in card.split("**Verdict.**")[1].splitlines()[0]


class Rows(Predictor):
    """Forecasts with the same given rows in every branch."""

    def __init__(self, rows: torch.Tensor) -> None:
        super().__init__()
        self.rows, self.window = rows, None

    def forward(self, history: History, step: Step) -> torch.Tensor:
        weights = [float(self.rows[step.index, s]) for s in history.steps]
        return sum(w * f.float() for w, f in zip(weights, history.features, strict=True))


def sample_errors(
    predictor: Predictor, module: Any, held: Sequence[int], anchors: Sequence[int] = ANCHORS
) -> torch.Tensor:
    """Errors of the final latents in dB, by the pipeline itself."""
    references = References(Recording(module.recording.folder), held)
    pipe = pipeline("dit_guided")
    latents = [
        generate(pipe, predictor, module.tap, batch, anchors, **references.settings)
        for batch in references.batches
    ]
    return log_error(torch.cat(latents), references.finals)


@pytest.mark.parametrize("tap", ["output", "hidden"])
def test_a_closed_loop_fit_is_judged_by_its_samples(tap, folder, tmp_path, capsys):
    module = L2PClosedLoop(str(folder / "r"), str(folder / "pipe"), ANCHORS, tap, num_probe=2)
    data = RecordingDataModule(folder / "r", ["final"], 4, 0.4, 0)
    fit(module, data, tmp_path)
    printed = capsys.readouterr().out
    for error, best in re.findall(r"ridge .*: (\S+) dB, best so far (\S+)", printed):
        assert float(best) <= float(error)  # this one counts already
    line, (found,) = told(printed)
    rule, held = rule_of(found, module.recording.header.sigmas), data.test_items
    mine = sample_errors(module.predictor, module, held)
    expected = paired(-mine, -sample_errors(rule, module, held, found.own))
    assert (found.count, len(found.own)) == (4, 4)
    for value, wanted in ((found.gain, expected.mean), (found.low, expected.low)):
        assert value == pytest.approx(wanted, abs=0.06)
    assert found.word == expected.standing
    assert f"final latents of {len(data.test_items)} held-out" in line and "chose nothing" in line
    assert not {*data.test_items} & {*data.train_items, *data.val_items} and data.val_items
    assert text_of(tmp_path) == line


def lesa(folder: Path) -> tuple[Any, list[str]]:
    def small(sigmas: Any, num_branches: int) -> LesaPredictor:
        return LesaPredictor(sigmas, num_branches, (0.6,), (2, 3), hidden=(4,), grid_size=3)

    place, pipe = str(folder / "r"), str(folder / "pipe")
    options: dict[str, Any] = {"closed_loop_epochs": 1, "tap_rate": 1e-2}
    return LesaModule(place, pipe, ANCHORS, small, **options), ["feature/hidden", "final"]


def neural(folder: Path) -> tuple[Any, list[str]]:
    options: dict[str, Any] = {"num_heads": 1, "max_gap": 0.5, "mse_epochs": 2}
    module = DiscaModule(str(folder / "r"), str(folder / "pipe"), ANCHORS, **options)
    return module, ["feature/hidden", "feature/output", "final"]


@pytest.mark.parametrize("made", [lesa, neural])
def test_a_training_is_judged_against_formulas_that_are_run(
    made, folder, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(disca, "opened_for", lambda *_, **__: pipeline("dit_guided"))
    module, names = made(folder)
    data = RecordingDataModule(folder / "r", names, 3, 0.4, 0)
    fit(module, data, tmp_path, epochs=2, monitor="val/error_db")
    line, (found,) = told(capsys.readouterr().out)
    export_command(str(tmp_path / "kept.ckpt"), str(tmp_path / "out"))  # the best epoch's
    loaded: Any = load_predictor(tmp_path / "out")
    told_by = torch.load(tmp_path / "kept.ckpt", weights_only=True)[SAMPLES_KEY]
    errors, held = {}, data.test_items
    for name, ran in told_by["rivals"].items():
        one = Told(4, "", name, tuple(ran["anchors"]), 0, 0, 0)
        rule = rule_of(one, module.recording.header.sigmas)
        errors[name] = sample_errors(rule, module, held, one.own)
        assert ran["errors"] == pytest.approx(errors[name].tolist(), abs=1e-3)
        kept = loaded.spec.metrics[f"test_error_db_{name}"]
        assert kept == pytest.approx(float(errors[name].mean()), abs=1e-3)
    assert "ab2" in errors and 3 <= len(errors) <= 4
    best = min(errors, key=lambda name: float(errors[name].mean()))
    mine = sample_errors(loaded, module, held)
    expected = paired(-mine, -errors[best])
    assert (found.count, found.rival, found.word) == (4, best, expected.standing)
    assert found.gain == pytest.approx(expected.mean, abs=0.06)
    assert text_of(tmp_path) == line
    assert loaded.spec.metrics["test_error_db"] == pytest.approx(float(mine.mean()), abs=1e-3)
    assert loaded.spec.metrics["paired_low_db"] == pytest.approx(expected.low, abs=1e-3)


def test_a_resumed_training_does_not_run_the_formulas_again(folder, tmp_path, monkeypatch, capsys):
    module, names = lesa(folder)
    data = RecordingDataModule(folder / "r", names, 3, 0.4, 0)
    fit(module, data, tmp_path)
    before = told(capsys.readouterr().out)
    monkeypatch.setattr(
        "foreseer.training.verdict_callbacks.closed_loop_errors",
        lambda *args, **kwargs: pytest.fail("the formulas are known already"),
    )
    module, _ = lesa(folder)
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(module, datamodule=data, ckpt_path=tmp_path / "last.ckpt")
    assert told(capsys.readouterr().out) == before


def test_without_held_out_trajectories_there_is_no_verdict(folder, tmp_path, capsys):
    place = str(folder / "r")
    fit(L2PLeastSquares(place, ANCHORS), GramDataModule(place, "output", 0.0), tmp_path)
    assert NO_HELD_OUT in capsys.readouterr().out.splitlines()
    export_command(str(tmp_path / "last.ckpt"), str(tmp_path / "out"))
    assert load_predictor(tmp_path / "out").spec.metrics == {}


def test_a_refit_is_judged_on_trajectories_it_was_solved_without(folder, tmp_path, capsys):
    place, options = str(folder / "r"), {"taps": ["output", "hidden"], "batch_size": 4}
    record(pipeline("dit_guided"), items("dit_guided", 8)[:5], tmp_path / "a", **options, **CALL)
    added = items("dit_guided", 8)[5:]
    options["features"] = "full"
    record(pipeline("dit_guided"), added, tmp_path / "b", **options, **CALL)
    module = L2PLeastSquares(str(tmp_path / "a"), ANCHORS, "hidden")
    fit(module, GramDataModule(str(tmp_path / "a"), "hidden", 0.0), tmp_path / "fit")
    export_command(str(tmp_path / "fit" / "last.ckpt"), str(tmp_path / "old"))
    capsys.readouterr()
    refit_command(str(tmp_path / "old"), [str(tmp_path / "b")], str(tmp_path / "new"), 1e-3)
    _, (found,) = told(capsys.readouterr().out)
    squares: dict[str, list[float]] = {"mine": [], "rival": []}
    rule = rule_of(found, Recording(place).header.sigmas)
    for left in (5, 6, 7):
        kept = [item for item in range(8) if item != left]
        without = L2PLeastSquares(place, ANCHORS, "hidden", ridge=1e-3)
        total = Recording(place).stack("gram/hidden", kept).double().sum(0)
        without.predictor.set_rows(rows_fitted(total[None], ANCHORS, 1e-3))
        one = Recording(place), [left], "hidden"
        squares["mine"].append(piled_up(without.predictor, *one, ANCHORS))
        squares["rival"].append(piled_up(rule, *one, found.own))
    expected = 10 * math.log10(sum(squares["rival"]) / sum(squares["mine"]))
    assert (found.count, found.gain) == (4, pytest.approx(expected, abs=0.06))
    assert load_predictor(tmp_path / "new").spec.metrics.keys() >= {"estimate_db"}


OWN = (0, 4, 10, 16, 23, 30, 37, 43)


@pytest.mark.parametrize(
    ("gain", "words"),
    [
        (
            1.2,
            "ahead of the best formula on its own list (taylor_2, anchors 0 4 10 16 23 30 37 43)",
        ),
        (0.9, "level with the best formula"),
        (-4.4, "level with the best formula"),
        (-4.6, "behind the best formula"),
    ],
)
def test_an_estimate_is_worded_by_the_bounds_of_inspect(gain, words):
    """Of trajectories that differ far more than methods do, so only pairing tells them apart."""
    rival = 10 ** -torch.linspace(0, 4, 24, dtype=torch.float64)
    mine, far = rival * 10 ** (-gain / 10), torch.full((24,), 9.0)
    lists = {"taylor_2": OWN, "reuse": (0, 1)}
    found = Estimate(8, mine, {"reuse": far, "taylor_2": rival}, lists, 1.0)
    other = Estimate(6, far, {"reuse": 0.1 * far}, lists, 1.0)
    line = open_loop_line([found, other])
    assert line.startswith(f"verdict: 8 evaluations: {words}")
    assert f", {gain:+.1f} dB (paired {gain:+.1f} to {gain:+.1f}), " in line
    assert "; 6 evaluations: behind the best formula on its own list (reuse, anchors 0 1)" in line
    assert "--budgets 8,6" in line and "tells a gain of 1 dB or a loss of 4.5" in line


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (0.1, 4.0, "ahead of the best formula on its own list (ab2, anchors 0 3), +1.5 dB"),
        (-0.1, 3.0, "level with the best formula"),
        (-3.0, -0.1, "behind the best formula"),
    ],
)
def test_a_measured_gain_is_worded_by_its_paired_interval(low, high, words):
    line = closed_loop_line(6, Paired(1.5, low, high, 5, 7), "ab2", (0, 3))
    assert line.startswith(f"verdict: 6 evaluations: {words}")
    assert f"(paired {low:+.1f} to {high:+.1f})" in line and "of 7 held-out trajectories" in line
    assert ("use it" in line, "use the formula" in line) == (low > 0, high < 0)


def test_a_fit_on_a_published_list_is_held_against_formulas_on_better_ones():
    """On the published list alone the rows are ahead; a formula on its own list is far better."""
    steps, anchors = 50, PUBLISHED_L2P[8]
    generator = torch.Generator().manual_seed(0)
    waves = torch.rand(2, 32, 4, 1, 64, generator=generator, dtype=torch.float64)
    size = torch.randn(32, 4, 1, 64, generator=generator, dtype=torch.float64)
    time = torch.linspace(0, 1, steps, dtype=torch.float64)[:, None]
    features = (size * torch.cos(4 * math.pi * waves[0] * time + 2 * math.pi * waves[1])).sum(1)
    grams = (features @ features.transpose(1, 2))[:, None]
    sigmas = [1 - t / steps for t in range(steps)]
    rows = rows_fitted(grams[:16], anchors)[:, None]
    words = {}
    for name, others in (("same", True), ("own", False)):
        rivals = rivals_on(grams[:16].mean(0), 8, sigmas, others=[anchors])
        if others:
            tables = formula_tables(anchors, sigmas)
            rivals = [Rival(each, anchors, table, 0.0) for each, table in tables.items()]
        words[name] = estimate([(grams[16:, :, None], rows)], rivals, 8, sigmas)
    assert words["same"].standing == "ahead" and words["same"].gap.low > 1
    assert words["own"].standing == "behind" and words["own"].gap.high < -4.5
    assert words["own"].lists[words["own"].best] != anchors
