"""`import foreseer as fs`: light, complete, and the whole road in a few calls."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoint_cases import tiny_pipe

import foreseer as fs
from foreseer.checkpoints.config import CheckpointError
from foreseer.checkpoints.spec import PredictorMismatch
from foreseer.evaluation.plan import load_learned
from foreseer.integration.host.trunk import UnsupportedHost
from foreseer.integration.pipelines.load import opened
from foreseer.integration.report import Report
from foreseer.trajectories.files.header import RecordingError
from foreseer.trajectories.files.shards import CorruptShard

SETTINGS = {"guidance_scale": 3.0, "num_inference_steps": 8}
LIGHT = """
import sys, time
started = time.perf_counter()
import foreseer as fs
seconds = time.perf_counter() - started
loaded = {"torch", "numpy", "diffusers", "lightning"} & set(sys.modules)
print(seconds, sorted(loaded), set(fs.__all__) <= set(dir(fs)))
"""


@pytest.fixture(scope="module")
def recording(tmp_path_factory) -> fs.Recording:
    """Of 24 images; the pipeline draws classes."""
    folder = tmp_path_factory.mktemp("face") / "recording"
    return fs.record(tiny_pipe(), None, str(folder), num_trajectories=24, **SETTINGS)


@pytest.fixture(scope="module")
def fitted(recording, tmp_path_factory) -> tuple[fs.predictors.Predictor, Path]:
    out = tmp_path_factory.mktemp("face") / "predictor"
    return fs.fit(recording, 4, pipeline=tiny_pipe(), out=str(out)), out


def draw(pipe) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return pipe([1], generator=generator, output_type="latent", **SETTINGS)[0]


# ----------------------------------------------------------------------------------------- the face


def test_importing_it_takes_milliseconds_and_loads_no_torch():
    done = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, timeout=60)
    seconds, rest = done.stdout.strip().split(" ", 1)
    assert (rest, done.stderr) == ("[] True", "")
    assert float(seconds) < 0.5


def test_every_name_is_there_and_documented():
    for name in fs.__all__:
        assert getattr(fs, name).__doc__, name
        assert f"`{name}" in fs.__doc__, name
    with pytest.raises(AttributeError, match="foreseer has no 'recrod'; it has .*record"):
        fs.recrod  # noqa: B018
    assert {"Taylor", "Readout", "TeaCache"} <= {*fs.predictors.__all__, *fs.schedules.__all__}


def test_the_errors_are_of_one_kind_and_what_they_were():
    for kind in (PredictorMismatch, UnsupportedHost, RecordingError, CheckpointError, CorruptShard):
        assert issubclass(kind, fs.ForeseerError) and issubclass(kind, ValueError)
    assert fs.RecordingError is RecordingError and issubclass(CorruptShard, RecordingError)


# ----------------------------------------------------------------------------------------- the road


def test_a_dtype_is_torchs_or_its_name(tmp_path):
    tiny_pipe().save_pretrained(tmp_path)
    for dtype in ("bfloat16", torch.bfloat16):
        assert fs.load_pipeline(str(tmp_path), dtype).transformer.dtype is torch.bfloat16
        assert opened(tmp_path, dtype).transformer.dtype is torch.bfloat16
    for wrong in ("bf16", "nn", torch.int8):
        with pytest.raises(ValueError, match="dtype is .*expected 'float32', 'bfloat16'"):
            fs.load_pipeline(str(tmp_path), wrong)


def test_a_recording_says_what_it_is_and_where_its_pipeline_was_from(recording):
    assert "24 trajectories of 8 steps, DiTTransformer2DModel, taps hidden, output" in repr(
        recording
    )
    assert recording.header.pipeline == ""  # this one was built


def test_a_fit_chooses_method_and_anchors_and_is_a_predictor_at_once(fitted):
    predictor, out = fitted
    assert isinstance(predictor, fs.predictors.Readout)
    assert (len(predictor.spec.anchors), predictor.spec.tap) == (4, "output")
    assert predictor.spec.metrics.keys() >= {"val_error_db", "val_error_db_start"}
    assert "4 of 8 steps evaluated, tap output, guidance_scale 3" in repr(predictor)
    assert fs.load(str(out)).spec == predictor.spec


@pytest.mark.parametrize("given", ["itself", "its folder", "its path"])
def test_forecasting_takes_a_predictor_or_its_place(given, fitted):
    predictor, out = fitted
    pipe = tiny_pipe()
    each = {"itself": predictor, "its folder": str(out), "its path": out}[given]
    with fs.forecasting(pipe, each) as run:
        draw(pipe)
    assert tuple(run.report().anchors) == predictor.spec.anchors
    assert "Run, detached: 4 of 8 steps forecast: 2.0 x fewer evaluations" in repr(run)


def test_a_recording_without_a_pipeline_is_fitted_on_its_grams_and_says_why(recording, capsys):
    predictor = fs.fit(recording, 4)
    assert isinstance(predictor, fs.predictors.L2P)
    printed = capsys.readouterr().out
    assert "lstsq (not the default fit, a readout, since the recording does not name" in printed
    assert "searched on the Grams of" in printed and "GPU available" not in printed


@pytest.mark.parametrize("method", ["lstsq", "adam", "gram", "closed_loop"])
def test_every_method_is_a_word(method, recording):
    options = {"max_epochs": 3} if method == "adam" else {}
    pipe = tiny_pipe()
    before = torch.get_rng_state()
    predictor = fs.fit(recording, 4, method=method, pipeline=pipe, **options)
    assert torch.equal(torch.get_rng_state(), before)
    with fs.forecasting(pipe, predictor) as run:
        draw(pipe)
    assert len(run.report().anchors) == 4


@pytest.fixture(scope="module")
def full_recording(tmp_path_factory) -> fs.Recording:
    """Of 5 images, with features and the Grams of parts."""
    place = tmp_path_factory.mktemp("full")
    (place / "groups.json").write_text(json.dumps({"hidden": [c % 2 for c in range(64)]}))
    parts = {"bands": 2, "groups": str(place / "groups.json"), "features": "full"}
    options = {"num_trajectories": 5, "batch_size": 5, **parts, **SETTINGS}
    return fs.record(tiny_pipe(), None, str(place / "recording"), **options)


@pytest.mark.parametrize(
    ("method", "kind", "options"),
    [
        ("bands", "L2P", {}),
        ("groups", "L2P", {}),
        ("continuous", "L2PContinuous", {}),
        ("lesa", "LesaPredictor", {"closed_loop_epochs": 1, "batch_size": 4}),
        ("disca", "DiscaPredictor", {"mse_epochs": 1, "closed_epochs": 0, "num_heads": 1}),
    ],
)
def test_every_method_that_needs_more_is_a_word_too(
    method, kind, options, full_recording, tmp_path
):
    out, pipe = str(tmp_path / "predictor"), tiny_pipe()
    predictor = fs.fit(full_recording, 3, method=method, pipeline=pipe, out=out, **options)
    assert type(predictor).__name__ == kind and len(predictor.spec.anchors) == 3
    with fs.forecasting(pipe, predictor):
        own = draw(pipe)
    with fs.forecasting(pipe, out):  # its file
        assert torch.equal(draw(pipe), own)


def test_anchors_and_tap_are_taken_as_given(recording):
    predictor = fs.fit(recording, method="lstsq", anchors=[0, 2, 5], tap="hidden", ridge=0.01)
    assert (predictor.spec.anchors, predictor.spec.tap) == ((0, 2, 5), "hidden")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({}, "give the number of network evaluations in place of 8, as in evaluations=8"),
        ({"evaluations": 8}, "evaluations is 8, expected 1 to 7: the runs of .* have 8 steps"),
        ({"evaluations": 3, "anchors": [0, 1]}, "evaluations is 3, and 2 anchors are given"),
        ({"evaluations": 3, "method": "lstq"}, "did you mean 'lstsq'"),
        ({"evaluations": 3, "method": "lstsq", "rigde": 1.0}, "did you mean 'ridge'"),
        (
            {"evaluations": 3, "tap": "residual", "method": "lstsq"},
            "the fit needs residual; record",
        ),
        ({"evaluations": 3, "method": "closed_loop"}, "runs the pipeline, and the recording does"),
        (
            {"evaluations": 3, "tap": "hidden", "method": "readout"},
            "forecasts the tap 'output', not",
        ),
    ],
)
def test_a_wrong_fit_is_told_what_to_do(given, told, recording):
    given = {"pipeline": tiny_pipe() if given.get("method") == "readout" else None, **given}
    with pytest.raises(ValueError, match=told):
        fs.fit(recording, **given)


def test_another_pipeline_than_the_recorded_one_is_refused(recording):
    other = tiny_pipe()
    with torch.no_grad():
        next(other.transformer.parameters()).add_(1.0)
    with pytest.raises(fs.PredictorMismatch, match="weights"):
        fs.fit(recording, 3, pipeline=other)


def test_a_predictor_is_saved_with_its_own_spec_and_a_formula_is_not(fitted, tmp_path):
    predictor, _ = fitted
    fs.save(predictor, str(tmp_path / "again"))
    assert fs.load(str(tmp_path / "again")).spec == predictor.spec
    with pytest.raises(fs.CheckpointError, match="this Taylor has no spec"):
        fs.save(fs.predictors.Taylor(1), str(tmp_path / "formula"))


def test_verify_answers_and_leaves_the_program_running(fitted):
    with torch.no_grad():
        next((other := tiny_pipe()).transformer.parameters()).add_(1.0)
    found = fs.verify(other, fitted[0], num_inference_steps=3)
    told = {check.name: check.passed for check in found.checks}
    assert told["replay output"] and not told["predictor"] and not found
    assert "fitted on another host" in str(found)
    with pytest.raises(ValueError, match="this Taylor has no spec"):
        fs.verify(other, fs.predictors.Taylor(1))


def test_a_bench_is_told_predictors_themselves_or_their_places(fitted):
    predictor, out = fitted
    given = [predictor, {4: predictor}, out, f"mine={out}"]
    names = ["readout", "readout", "predictor", "mine"]
    with pytest.raises(ValueError, match="two predictors are called readout@output"):
        load_learned(given)
    assert [name.split("@")[0] for name in load_learned(given[1:])] == names[1:]
    assert [*load_learned({"ours": predictor})][0].startswith("ours@output 0 ")
    with pytest.raises(ValueError, match="a learned Taylor has no spec"):
        load_learned([fs.predictors.Taylor(1)])


def test_detaching_needs_no_run(fitted):
    predictor, _ = fitted
    pipe = tiny_pipe()
    full = draw(pipe)
    fs.attach(pipe, predictor)
    assert not torch.equal(draw(pipe), full)
    assert fs.detach(pipe)
    assert torch.equal(draw(pipe), full)
    assert not fs.detach(pipe)


# --------------------------------------------------------------------------------------- the report


def test_the_report_begins_with_what_it_came_to():
    report = Report(50, list(range(6)), list(range(6, 50)))
    report.seconds = {"anchor": [1.0] * 6, "forecast": [0.01] * 44}
    report.steps = [3.0, 1.2, *([1.0] * 4), *([0.02] * 44)]  # the first one warms up
    # 50 steps of the least of 1 s, against 6 of the median of 1 s and 44 of 0.02 s
    assert report.faster == pytest.approx(50 / 6.88)
    line = "44 of 50 steps forecast: 8.3 x fewer evaluations, 7.3 x faster"
    assert str(report).splitlines()[0] == line
    assert report._repr_html_().startswith(f"<b>{line}</b>")


def test_a_report_of_no_run_or_a_full_one_promises_nothing():
    assert Report().headline() == "no run yet"
    full = Report(2, [0, 1], steps=[1.0, 1.0])
    assert (full.headline(), full.faster) == ("0 of 2 steps forecast", None)
