"""Adding recordings to a predictor is a fit on everything; nothing is added twice or mixed up."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_cases import tiny_pipe
from peft import LoraConfig, inject_adapter_in_model
from recording_cases import small_header
from row_cases import errors_of, rows_fitted, rows_of

from foreseer.checkpoints.config import CheckpointError
from foreseer.checkpoints.format import load_predictor, save_predictor
from foreseer.checkpoints.zoo import ZOO
from foreseer.cli import main
from foreseer.evaluation.rows import analytic_rows
from foreseer.fit_commands import refit as refit_command
from foreseer.integration.forecasting import forecasting
from foreseer.predictors.linear import L2P
from foreseer.predictors.spectrum import equal_bands
from foreseer.training.export import export_predictor
from foreseer.training.l2p import L2PGramModule, L2PLeastSquares
from foreseer.training.refit import refit
from foreseer.training.shipped import (
    WEIGHTS,
    differences,
    read_sums,
    trajectory_digests,
    write_sums,
)
from foreseer.trajectories.files.repair import merge
from foreseer.trajectories.files.shards import read_shard, write_shard
from foreseer.trajectories.files.writer import RecordingWriter
from foreseer.trajectories.prompts import class_items
from foreseer.trajectories.recorder import record
from foreseer.trajectories.recording import Recording

ANCHORS = [0, 1, 3]
SETTINGS: dict[str, Any] = {"guidance_scale": 3.0, "num_inference_steps": 6}
RIDGE = 1e-4
CLOSE: dict[str, float] = {"rtol": 1e-9, "atol": 1e-9}
"""Sums in another order differ by 1e-15, which the ridge lets grow by its inverse times K."""


def made(out: Path, first: int, num: int, pipe: Any = None, **changes: Any) -> str:
    """A recording of items `first ..`, two taps."""
    options = {"taps": ["output", "hidden"], "batch_size": 4, **SETTINGS, **changes}
    record(pipe or tiny_pipe(), class_items(num, 3, first), out, **options)
    return str(out)


def lora_pipe() -> Any:
    pipe = tiny_pipe()
    torch.manual_seed(1)
    config = LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    inject_adapter_in_model(config, pipe.transformer)
    return pipe


def least_squares(recording: str, out: Path) -> str:
    """A predictor fitted in closed form on all of a recording, exported with its sums."""
    module = L2PLeastSquares(recording, ANCHORS, ridge=RIDGE)
    module.predictor.set_rows(
        rows_fitted(Recording(recording).stack("gram/output"), ANCHORS, RIDGE)
    )
    module.num_trajectories.fill_(len(Recording(recording)))
    return str(export_predictor(module, out, {"psnr_db": 30.0}))


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("refit")
    for name, (first, num) in {"a": (0, 5), "b": (5, 4), "c": (9, 3)}.items():
        made(folder / name, first, num)
    made(folder / "lora", 12, 4, lora_pipe())
    least_squares(str(folder / "a"), folder / "predictor")
    return folder


def write(found: Any, out: Path) -> str:
    """What the command writes, without its words."""
    save_predictor(found.predictor, found.spec, out)
    write_sums(out, [found.sums], found.spec.recording_digest)
    return str(out)


def test_all_ways_of_adding_are_one_fit_on_everything(place, tmp_path):
    a, b, c = (str(place / name) for name in "abc")
    together = refit(str(place / "predictor"), [b, c], RIDGE)
    first = write(refit(str(place / "predictor"), [b], RIDGE), tmp_path / "first")
    one_by_one = refit(first, [c], RIDGE)
    grams = torch.cat([Recording(each).stack("gram/output") for each in (a, b, c)])
    expected = rows_fitted(grams, ANCHORS, RIDGE)
    for found in (together, one_by_one):
        torch.testing.assert_close(found.predictor.weight, expected, **CLOSE)
        total = found.sums.grams["gram/output"]
        torch.testing.assert_close(total, grams.sum(0), rtol=1e-14, atol=0)
        assert found.sums.count == found.spec.num_trajectories == 12
    assert together.sums.digest == one_by_one.sums.digest
    same = {"metrics": {}}
    assert dataclasses.replace(together.spec, **same) == dataclasses.replace(
        one_by_one.spec, **same
    )
    assert refit(str(place / "predictor"), [c, b], RIDGE).sums.digest == together.sums.digest


def test_the_errors_are_those_of_trajectories_that_were_not_fitted_on(place):
    found = refit(str(place / "predictor"), [str(place / "b")], RIDGE)
    old = Recording(str(place / "a")).stack("gram/output")
    new = Recording(str(place / "b")).stack("gram/output")
    errors = []
    for left in range(len(new)):
        kept = torch.cat([old, new[:left], new[left + 1 :]])
        rows = rows_fitted(kept, ANCHORS, RIDGE)
        errors.append(errors_of(new[left : left + 1], rows).mean())
    metrics = found.spec.metrics
    assert metrics["open_loop_error"] == pytest.approx(float(sum(errors)) / len(new), rel=1e-8)
    formulas = analytic_rows(ANCHORS, found.spec.sigmas)
    for name in ("reuse", "taylor_1"):
        expected = errors_of(new, formulas[name].repeat(2, 1, 1)).mean()
        assert metrics[f"open_loop_error_{name}"] == pytest.approx(float(expected), rel=1e-8)
    before = errors_of(new, load_predictor(place / "predictor").weight).mean()
    assert metrics["before_open_loop_error"] == pytest.approx(float(before), rel=1e-8)
    assert "psnr_db" not in metrics  # of the old rows


def test_the_command_writes_a_predictor_that_deploys_and_extends_again(place, tmp_path, capsys):
    words = ["refit", "--predictor", str(place / "predictor"), "--out", str(tmp_path / "new")]
    main([*words, "--recordings", f"[{place / 'b'}]"])
    told = capsys.readouterr().out
    assert "left-out error of 4 trajectories by ridge: 0: " in told and "least at" in told
    assert "before" in told and "reuse" in told and "added to 5 of" in told
    loaded: Any = load_predictor(tmp_path / "new")
    pipe = tiny_pipe()
    with forecasting(pipe, loaded) as run:
        pipe([1], output_type="latent", **SETTINGS)
    assert run.report().anchors == ANCHORS
    card = (tmp_path / "new" / "README.md").read_text()
    assert "on the sum of 9 trajectories" in card
    assert f"{loaded.spec.host['weights_sha256']} | 9" in card
    assert "An estimate" in card.split("**Verdict.**")[1][:60]
    again = refit(str(tmp_path / "new"), [str(place / "c")])
    assert again.sums.count == 12
    refit_command(str(tmp_path / "new"), [str(place / "c")], str(tmp_path / "new"))  # in place
    assert load_predictor(tmp_path / "new").spec.num_trajectories == 12


def test_recordings_of_a_lora_make_a_predictor_for_it_and_the_card_says_of_whom_the_sums_are(
    place, tmp_path
):
    refit_command(str(place / "predictor"), [str(place / "lora")], str(tmp_path / "new"), RIDGE)
    loaded: Any = load_predictor(tmp_path / "new")
    hosts = [Recording(str(place / name)).header.host for name in ("a", "lora")]
    assert hosts[0]["weights_sha256"] != hosts[1]["weights_sha256"]
    assert loaded.spec.host == hosts[1]
    card = (tmp_path / "new" / "README.md").read_text()
    assert f"| {hosts[0]['weights_sha256']} | 5 |" in card
    assert f"| {hosts[1]['weights_sha256']} | 4 |" in card
    sums = read_sums(tmp_path / "new", loaded.spec)
    assert sums.hosts == {hosts[0]["weights_sha256"]: 5, hosts[1]["weights_sha256"]: 4}
    with forecasting(lora_pipe(), loaded):
        pass
    with pytest.raises(ValueError, match="another host"), forecasting(tiny_pipe(), loaded):
        pass
    both = [str(place / "b"), str(place / "lora")]
    with pytest.raises(ValueError, match="expected one for all recordings added at once"):
        refit(str(place / "predictor"), both)


# ------------------------------------------------------------------------------- nothing twice


def test_a_recording_that_was_fitted_on_is_refused_whatever_became_of_it(place, tmp_path):
    predictor = str(place / "predictor")
    with pytest.raises(ValueError, match=r"5 of the 5 trajectories of .* items \[0, 1, 2, 3, 4\]"):
        refit(predictor, [str(place / "a")])
    with pytest.raises(ValueError, match="4 of the 4"):
        refit(predictor, [str(place / "b"), str(place / "b")])
    grown = tmp_path / "grown"
    merge(str(grown), [str(place / "a"), str(place / "b")])
    with pytest.raises(ValueError, match=r"5 of the 9 trajectories .* items \[0, 1, 2, 3, 4\]"):
        refit(predictor, [str(grown)])
    again = made(tmp_path / "again", 3, 4, taps=["output"], batch_size=2)
    with pytest.raises(ValueError, match=r"2 of the 4 trajectories .* items \[3, 4\]"):
        refit(predictor, [again])


def test_a_digest_stays_with_its_trajectory_and_differs_from_all_others(place, tmp_path):
    merged = tmp_path / "merged"
    merge(str(merged), [str(place / name) for name in "abc"])
    apart = torch.cat([trajectory_digests(Recording(str(place / name))) for name in "abc"])
    assert torch.equal(trajectory_digests(Recording(merged)), apart)
    assert len({tuple(row) for row in apart.tolist()}) == 12


# ----------------------------------------------------------------------- of the same circumstances


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"taps": ["hidden"]}, "tap is hidden, expected output"),
        ({"num_inference_steps": 7}, "number of steps is 7, expected 6"),
        ({"guidance_scale": 4.0}, "guidance_scale is 4.0, expected 3.0"),
        ({"guidance_scale": 1.0}, "number of branches is 1, expected 2"),
    ],
)
def test_a_recording_of_other_settings_is_refused_with_all_that_differs(
    place, tmp_path, changes, match
):
    other = made(tmp_path / "other", 20, 2, **changes)
    with pytest.raises(ValueError, match=match):
        refit(str(place / "predictor"), [other])


def test_every_fact_of_a_run_is_compared_or_may_differ(place):
    spec = load_predictor(place / "predictor").spec
    may_differ = {"anchors", "recording_digest", "num_trajectories", "metrics", "latent_shapes"}
    changed = {
        "tap": "hidden",
        "sigmas": spec.sigmas[1:],  # their values are compared apart, with a tolerance
        "host": {},
        "scheduler": "Other",
        "num_branches": 1,
        "guidance_scale": 4.0,
        "dtype": "float16",
        "guidance": {name: 4.0 for name in spec.guidance},
        "branch_steps": (1,),
        "expert_steps": (0, 3),
        "first_branch": "unconditional",
    }
    spec = dataclasses.replace(spec, first_branch="conditional")
    assert changed.keys() | may_differ == {field.name for field in dataclasses.fields(spec)}
    assert not differences(spec, spec)
    for name, value in changed.items():
        other = dataclasses.replace(spec, **{name: value})
        assert differences(other, spec), name
    assert not differences(dataclasses.replace(spec, first_branch=""), spec)  # not known
    without_weights = {k: v for k, v in spec.host.items() if k != "weights_sha256"}
    other = dataclasses.replace(spec, host=without_weights)
    assert differences(other, spec) and not differences(other, spec, WEIGHTS)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"host": {"class": "OtherDiT"}}, "transformer class is OtherDiT, expected DiTTransformer"),
        ({"expert_steps": [0, 3]}, r"first steps of the transformers is \[0, 3\], expected \[0\]"),
        ({"dtype": "bfloat16"}, "dtype is bfloat16, expected float32"),
        ({"guidance": {"guidance_scale": 2.0}}, "guidance_scale is 2.0, expected 3.0"),
        ({"sigmas": [1.0, 0.9, 0.7, 0.5, 0.3, 0.1]}, r"step \d has sigma 0"),
    ],
)
def test_a_recording_of_another_kind_of_run_is_refused(place, changes, match, monkeypatch):
    def changed(folder):
        recording = Recording(folder)
        recording.header = dataclasses.replace(recording.header, **changes)
        return recording

    monkeypatch.setattr("foreseer.training.refit.Recording", changed)
    with pytest.raises(ValueError, match=match):
        refit(str(place / "predictor"), [str(place / "b")])


# ------------------------------------------------------------------------------- kinds of predictor


def test_the_predictor_for_any_anchors_gets_the_mean_of_everything(place, tmp_path):
    module = L2PGramModule(str(place / "a"), ANCHORS, "hidden", window=2)
    stacked = [Recording(str(place / name)).stack("gram/hidden") for name in "ab"]
    module.predictor.set_gram(stacked[0].mean(0))
    export_predictor(module, tmp_path / "any", {})
    found: Any = refit(str(tmp_path / "any"), [str(place / "b")])
    mean = torch.cat(stacked).mean(0)
    torch.testing.assert_close(found.predictor.gram, mean, rtol=1e-13, atol=0)
    assert found.predictor.window == 2 and found.predictor.ridge == found.validation.ridge
    rows = rows_of(module.predictor, ANCHORS, found.spec.sigmas)
    before = float(errors_of(stacked[1], rows).mean())
    assert found.spec.metrics["before_open_loop_error"] == pytest.approx(before)
    load_predictor(write(found, tmp_path / "new"))


def test_rows_of_parts_are_solved_on_the_grams_of_the_parts(tmp_path):
    bands = {"hidden/bands": equal_bands(2, (2, 2))}
    recordings = [
        made(tmp_path / name, first, 4, partitions=bands) for name, first in (("a", 0), ("b", 4))
    ]
    module = L2PLeastSquares(recordings[0], ANCHORS, "hidden", partition="bands")
    module.predictor.weight.copy_(
        rows_fitted(Recording(recordings[0]).stack("gram/hidden/bands"), ANCHORS)
    )
    export_predictor(module, tmp_path / "predictor", {})
    found: Any = refit(str(tmp_path / "predictor"), recordings[1:], RIDGE)
    grams = torch.cat([Recording(each).stack("gram/hidden/bands") for each in recordings])
    expected = rows_fitted(grams, ANCHORS, RIDGE)
    torch.testing.assert_close(found.predictor.weight, expected, **CLOSE)
    assert set(found.sums.grams) == {"gram/hidden", "gram/hidden/bands"}
    write(found, tmp_path / "new")
    plain = made(tmp_path / "plain", 8, 2)
    with pytest.raises(ValueError, match="partition is None, expected"):
        refit(str(tmp_path / "new"), [plain])


def of_two_transformers(folder: Path, items: range) -> str:
    """A synthetic recording whose second transformer starts at step 3."""
    guided = {"class": "FlowMatchEulerDiscreteScheduler", "guidance_scale": 3.0}
    kind: dict[str, Any] = {"scheduler": guided, "dtype": "float32", "expert_steps": [0, 3]}
    header = small_header(taps=["output"], sigmas=[1 - step / 8 for step in range(8)], **kind)
    t = torch.linspace(0, 1, 8, dtype=torch.float64)[:, None]
    with RecordingWriter(folder, header) as writer:
        for item in items:
            random = torch.Generator().manual_seed(item)
            a, b = torch.randn(2, 2, 1, 30, dtype=torch.float64, generator=random)
            noise = torch.randn(2, len(t), 30, dtype=torch.float64, generator=random)
            features = a + b * t + 0.05 * noise
            writer.write(item, {"gram/output": features @ features.mT}, {"seed": item})
    return str(folder)


def test_rows_of_several_transformers_stay_apart(tmp_path):
    anchors = [0, 1, 3, 5]
    recordings = [
        of_two_transformers(tmp_path / "a", range(4)),
        of_two_transformers(tmp_path / "b", range(4, 8)),
    ]
    grams = torch.cat([Recording(each).stack("gram/output") for each in recordings])
    module = L2PLeastSquares(recordings[0], anchors)
    module.predictor.set_rows(rows_fitted(grams[:4], anchors, RIDGE, [0, 3]))
    export_predictor(module, tmp_path / "predictor", {})
    found: Any = refit(str(tmp_path / "predictor"), recordings[1:], RIDGE)
    assert type(found.predictor) is L2P
    expected = rows_fitted(grams, anchors, RIDGE, [0, 3])
    torch.testing.assert_close(found.predictor.weight, expected, **CLOSE)
    assert not found.predictor.weight[:, 3:, :3].any()
    load_predictor(write(found, tmp_path / "new"))
    with pytest.raises(ValueError, match="2 transformers that take over at the steps"):
        L2PGramModule(recordings[0], anchors)


@pytest.mark.parametrize("budget", [6, 8, 11])
def test_rows_fitted_in_closed_loop_are_not_replaced_by_least_squares(budget):
    with pytest.raises(ValueError, match="was fitted otherwise"):
        refit(f"zoo:fashion_dit_l2p_{budget}", ["anywhere"])


@pytest.mark.parametrize("ridge", [0.0, 1e-1])
def test_rows_of_any_usual_ridge_count_as_the_closed_form(place, tmp_path, ridge):
    grams = Recording(str(place / "a")).stack("gram/output")
    module = L2PLeastSquares(str(place / "a"), ANCHORS)
    module.predictor.set_rows(rows_fitted(grams[:4], ANCHORS, ridge))  # one was held out
    export_predictor(module, tmp_path / "predictor", {})
    refit(str(tmp_path / "predictor"), [str(place / "b")], RIDGE)


def test_the_bundled_predictor_for_any_anchors_can_be_extended():
    predictor: Any = load_predictor("zoo:fashion_dit_l2p_any")
    sums = read_sums(ZOO / "fashion_dit_l2p_any", predictor.spec)
    assert sums.count == 96 and list(sums.hosts.values()) == [96]
    # Fitted on 65 of these 96, so the mean is only about that of all.
    assert torch.allclose(sums.grams["gram/hidden"] / 96, predictor.gram, rtol=0.2)


def test_a_predictor_that_no_sum_determines_is_refused():
    with pytest.raises(ValueError, match="is a DiscaPredictor, expected one of"):
        refit("zoo:fashion_dit_student_disca", ["anywhere"])


# ------------------------------------------------------------------------------- the file of sums


def changed_sums(place: Path, out: Path, change) -> str:
    """A copy of the predictor whose sums were changed."""
    predictor: Any = load_predictor(place / "predictor")
    save_predictor(predictor, predictor.spec, out)
    tensors = read_shard(place / "predictor" / "grams.safetensors")
    told = {"recording_digest": predictor.spec.recording_digest}
    told["hosts"] = json.dumps({predictor.spec.host["weights_sha256"]: 5})
    change(tensors, told)
    write_shard(out / "grams.safetensors", tensors, told)
    return str(out)


CHANGES = {
    "of an earlier release": (lambda t, m: t.pop("trajectories"), "does not say of which traject"),
    "of another recording": (lambda t, m: m.update(recording_digest="0"), "are of the recording 0"),
    "another shape": (
        lambda t, m: t.update({"gram/output": torch.ones(2, 4, 4).double()}),
        "expected {'gram/output'",
    ),
    "another tap": (lambda t, m: t.update({"gram/x": t.pop("gram/output")}), "expected {'gram/o"),
    "NaN": (lambda t, m: t["gram/output"].fill_(torch.nan), "no sum of Grams"),
    "less than nothing": (lambda t, m: t["gram/output"].neg_(), "no sum of Grams"),
    "float32": (lambda t, m: t.update({"gram/output": t["gram/output"].float()}), "it holds"),
    "hosts of others": (lambda t, m: m.update(hosts='{"a": 4}'), "are of 4 trajectories, expected"),
    "no hosts": (lambda t, m: m.pop("hosts"), "hosts are not JSON"),
    "hosts of nothing": (lambda t, m: m.update(hosts="[]"), "expected numbers of trajectories by"),
    "count": (lambda t, m: t.update(count=torch.tensor(7)), "count is 7, expected 5"),
}


@pytest.mark.parametrize("case", CHANGES)
@pytest.mark.fault
def test_sums_that_cannot_be_trusted_are_refused(place, tmp_path, case):
    change, match = CHANGES[case]
    folder = changed_sums(place, tmp_path / "changed", change)
    with pytest.raises(CheckpointError, match=match):
        refit(folder, [str(place / "b")])


def test_a_predictor_without_sums_says_how_to_get_them(place, tmp_path):
    folder = Path(changed_sums(place, tmp_path / "bare", lambda t, m: None))
    (folder / "grams.safetensors").unlink()
    with pytest.raises(CheckpointError, match="has no grams.safetensors.*foreseer export"):
        refit(str(folder), [str(place / "b")])
    with pytest.raises(ValueError, match="no recordings were given"):
        refit(str(place / "predictor"), [])
