"""The verdict after every fit: its number is that of the features and samples themselves."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from row_cases import rows_fitted
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_hosts import items, pipeline, settings

from foreseer.checkpoints.format import load_predictor
from foreseer.evaluation.measure import References, generate, log_error
from foreseer.evaluation.rows import adams_bashforth_rows
from foreseer.evaluation.verdict import Estimate, closed_loop_line, open_loop_line
from foreseer.fit_commands import refit as refit_command
from foreseer.integration.schedule import uniform
from foreseer.predictors.base import History, Predictor, Step
from foreseer.predictors.lesa import LesaPredictor
from foreseer.predictors.rules import RULES, Reuse, Taylor
from foreseer.predictors.spectrum import equal_bands
from foreseer.training.closed_loop import L2PClosedLoop
from foreseer.training.continuous_fit import L2PContinuousModule, SeveralGrams
from foreseer.training.disca import disca_fit as disca
from foreseer.training.disca.disca_fit import DiscaModule
from foreseer.training.export import export_command
from foreseer.training.l2p import L2PAdam, L2PGramModule, L2PLeastSquares
from foreseer.training.lesa.lesa_fit import LesaModule
from foreseer.training.verdict_callbacks import NO_HELD_OUT
from foreseer.trajectories.datamodule import GramDataModule, RecordingDataModule
from foreseer.trajectories.recorder import record
from foreseer.trajectories.recording import Recording

STEPS, ANCHORS = 9, (0, 1, 3, 6)
CALL = settings("dit_guided", STEPS)
PART = re.compile(r"(\d+) evaluations: ([\d.]+) dB (above|below) .*? \((\w+)\), ([a-z, ]+)")


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


def told(printed: str) -> tuple[str, list[tuple[int, float, str, str]]]:
    """The verdict among what was printed, and (evaluations, gain, rival, grade) of each part."""
    (line,) = [line for line in printed.splitlines() if line.startswith("verdict: ")]
    found = [
        (int(count), float(db) * (1 if side == "above" else -1), rival, grade)
        for part in re.split("; |\\. ", line)
        for count, db, side, rival, grade in PART.findall(part)
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


def gains(module: Any, held: Sequence[int], anchors: Any) -> dict[str, float]:
    """Decibels by which the fitted predictor piles up less than each formula of a few."""
    recording, tap = Recording(module.recording.folder), module.tap
    mine = piled_up(module.predictor, recording, held, tap, anchors)
    return {
        name: 10 * math.log10(piled_up(rule, recording, held, tap, anchors) / mine)
        for name, rule in RULES.items()
    }


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
    assert [count for count, *_ in found] == [len(anchors) for anchors in lists]
    for (_, gain, rival, grade), anchors in zip(found, lists, strict=True):
        expected = gains(module, held, anchors)
        least = min(expected.values())
        assert gain <= least + 0.06  # AB2 is a rival too
        if rival != "ab2":
            assert gain == pytest.approx(least, abs=0.06)
            assert expected[rival] == pytest.approx(least, abs=1e-3)
        assert grade == ("good" if gain >= 1 else "undecided" if gain > -4.5 else "do not use")
    assert f"of {len(held)} trajectories" in line and text_of(tmp_path) == line
    assert "PSNR" not in line.split("foreseer bench")[0]
    export_command(str(tmp_path / "last.ckpt"), str(tmp_path / "out"))
    metrics = load_predictor(tmp_path / "out").spec.metrics
    assert {"estimate_db", "estimate_db_reuse", "estimate_db_taylor_1"} <= metrics.keys()
    best = max(value for key, value in metrics.items() if key != "estimate_db")
    own = next(gain for count, gain, *_ in found if count == len(ANCHORS))
    assert metrics["estimate_db"] - best == pytest.approx(own, abs=0.06)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "(`estimate_db`)" in card.split("**Verdict.**")[1].splitlines()[0]


class Rows(Predictor):
    """Forecasts with the same given rows in every branch."""

    def __init__(self, rows: torch.Tensor) -> None:
        super().__init__()
        self.rows, self.window = rows, None

    def forward(self, history: History, step: Step) -> torch.Tensor:
        weights = [float(self.rows[step.index, s]) for s in history.steps]
        return sum(w * f.float() for w, f in zip(weights, history.features, strict=True))


def sample_error(predictor: Predictor, module: Any, held: Sequence[int]) -> float:
    """Error of the final latents in dB, by the pipeline itself."""
    references = References(Recording(module.recording.folder), held)
    pipe = pipeline("dit_guided")
    latents = [
        generate(pipe, predictor, module.tap, batch, ANCHORS, **references.settings)
        for batch in references.batches
    ]
    return float(log_error(torch.cat(latents), references.finals).mean())


@pytest.mark.parametrize("tap", ["output", "hidden"])
def test_a_closed_loop_fit_is_judged_by_its_samples(tap, folder, tmp_path, capsys):
    module = L2PClosedLoop(str(folder / "r"), str(folder / "pipe"), ANCHORS, tap, num_probe=2)
    data = RecordingDataModule(folder / "r", ["final"], 4, 0.4, 0)
    fit(module, data, tmp_path)
    printed = capsys.readouterr().out
    for error, best in re.findall(r"ridge .*: (\S+) dB, best so far (\S+)", printed):
        assert float(best) <= float(error)  # this one counts already
    line, ((count, gain, rival, grade),) = told(printed)
    sigmas = module.recording.header.sigmas
    start = Rows(adams_bashforth_rows(ANCHORS, sigmas)) if rival == "ab2" else RULES[rival]
    mine = sample_error(module.predictor, module, data.test_items)
    expected = sample_error(start, module, data.test_items) - mine
    assert (count, rival) == (4, module.start_name)
    assert gain == pytest.approx(expected, abs=0.06)
    assert grade.startswith("good" if expected >= 1 else "marginal" if expected > 0 else "no gain")
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
    line, ((count, gain, rival, _),) = told(capsys.readouterr().out)
    ab2 = Rows(adams_bashforth_rows(ANCHORS, module.recording.header.sigmas))
    rivals = {"reuse": Reuse(), "taylor_1": Taylor(1), "taylor_2": Taylor(2), "ab2": ab2}
    errors = {n: sample_error(rule, module, data.test_items) for n, rule in rivals.items()}
    export_command(str(tmp_path / "kept.ckpt"), str(tmp_path / "out"))  # the best epoch's
    loaded: Any = load_predictor(tmp_path / "out")
    expected = min(errors.values()) - sample_error(loaded, module, data.test_items)
    assert (count, rival) == (4, min(errors, key=lambda name: errors[name]))
    assert gain == pytest.approx(expected, abs=0.06)
    assert text_of(tmp_path) == line
    for name, error in errors.items():
        found = loaded.spec.metrics[f"test_error_db_{name}"]
        assert found == pytest.approx(error, abs=1e-3)
    mine = sample_error(loaded, module, data.test_items)
    assert loaded.spec.metrics["test_error_db"] == pytest.approx(mine, abs=1e-3)


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
    _, ((count, gain, rival, _),) = told(capsys.readouterr().out)
    squares: dict[str, list[float]] = {name: [] for name in ("mine", rival)}
    for left in (5, 6, 7):
        kept = [item for item in range(8) if item != left]
        without = L2PLeastSquares(place, ANCHORS, "hidden", ridge=1e-3)
        total = Recording(place).stack("gram/hidden", kept).double().sum(0)
        without.predictor.set_rows(rows_fitted(total[None], ANCHORS, 1e-3))
        one = (Recording(place), [left], "hidden", ANCHORS)
        squares["mine"].append(piled_up(without.predictor, *one))
        squares[rival].append(piled_up(RULES[rival], *one))
    expected = 10 * math.log10(sum(squares[rival]) / sum(squares["mine"]))
    assert (count, gain) == (4, pytest.approx(expected, abs=0.06))
    assert load_predictor(tmp_path / "new").spec.metrics.keys() >= {"estimate_db"}


@pytest.mark.parametrize(
    ("gain", "words"),
    [
        (2.14, "8 evaluations: 2.1 dB above the best formula on these anchors (taylor_2), good"),
        (
            0.9,
            "8 evaluations: 0.9 dB above the best formula on these anchors (taylor_2), undecided",
        ),
        (-4.4, "8 evaluations: 4.4 dB below the best formula on these anchors (taylor_2), undec"),
        (-4.6, "8 evaluations: 4.6 dB below the best formula on these anchors (taylor_2), do not"),
    ],
)
def test_an_estimate_is_graded_by_the_bounds_of_inspect(gain, words):
    found = Estimate(8, 5, 20.0 + gain, {"reuse": 15.0, "taylor_2": 20.0})
    other = Estimate(6, 5, 10.0, {"reuse": 17.0})
    line = open_loop_line([found, other])
    assert line.startswith(f"verdict: {words}")
    assert "; 6 evaluations: 7.0 dB below the best formula on these anchors (reuse), do not" in line
    assert "--budgets 8,6" in line


@pytest.mark.parametrize(
    ("error", "words"),
    [(-32.0, "2.0 dB above"), (-30.5, "0.5 dB above"), (-30.0, "0.0 dB"), (-29.0, "1.0 dB below")],
)
def test_a_measured_gain_is_graded_by_its_sign_first(error, words):
    line = closed_loop_line(6, error, {"reuse": -25.0, "taylor_1": -30.0}, 7)
    assert line.startswith(f"verdict: 6 evaluations: {words}") and "(taylor_1)" in line
    assert ("no gain, do not use" in line) == (error >= -30.0)
    assert ("marginal" in line, "good" in line) == (error == -30.5, error == -32.0)
