"""Part Grams are recorded, resumed and fitted; clusters are found again; exports deploy."""

import dataclasses
import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from row_cases import errors_of, rows_fitted, tabulate
from source_files import PACKAGE
from test_commands import words
from test_recorder import Interrupted, fail, hashes, stop_at
from tiny_hosts import CALLS_PER_STEP, items, pipeline, settings

from foreseer.checkpoints.format import load_predictor, save_predictor
from foreseer.cli import main
from foreseer.integration.forecasting import forecasting
from foreseer.predictors.linear import fitted_rows
from foreseer.predictors.partition import ChannelGroups
from foreseer.predictors.per_part import POOL
from foreseer.predictors.spectrum import Bands, equal_bands
from foreseer.training.clusters import (
    best_solvers,
    channel_descriptors,
    cluster_channels,
    fit_hyca,
    random_groups,
)
from foreseer.training.export import export_command, export_predictor
from foreseer.training.l2p import L2PLeastSquares
from foreseer.training.least_squares import fit_rows
from foreseer.training.recorded import stack_part_grams
from foreseer.trajectories.datamodule import GramDataModule
from foreseer.trajectories.files.shards import read_shard
from foreseer.trajectories.gram import relative_errors, squared_errors
from foreseer.trajectories.recipe import token_grid
from foreseer.trajectories.recorder import record
from foreseer.trajectories.recording import Recording, RecordingError, RecordingWriter

STEPS, ANCHORS, WIDTH = 6, [0, 1, 3], 16
BANDS, GROUPS = equal_bands(2, (2, 2)), ChannelGroups([c % 3 for c in range(WIDTH)])
PARTITIONS = {"hidden/bands": BANDS, "hidden/groups": GROUPS}


def recorded(out: Path, pipe: Any = None, num_items: int = 5, **changes: Any) -> Path:
    options = {"taps": ["hidden", "output"], "batch_size": 2, "partitions": PARTITIONS, **changes}
    run = settings("dit_guided", STEPS)
    return record(
        pipe or pipeline("dit_guided"), items("dit_guided", num_items), out, **options, **run
    )


@pytest.fixture(scope="module")
def recording(tmp_path_factory) -> Recording:
    out = tmp_path_factory.mktemp("parts") / "recording"
    return Recording(recorded(out, features="full", num_items=6))


# ---------------------------------------------------------------------------------------- recording


def test_part_grams_are_stored_beside_the_taps_and_sum_to_it(recording):
    stored = recording.load(0)
    for name, partition in PARTITIONS.items():
        grams = stored[f"gram/{name}"]
        assert grams.shape == (2, partition.num_parts, STEPS, STEPS)
        whole = stored["gram/hidden"]
        assert float((grams.sum(1) - whole).abs().max()) <= 1e-12 * float(whole.abs().max())
    assert recording.header.recipe["partitions"]["hidden/bands"] == BANDS.describe()


def test_recorded_part_grams_are_those_of_the_stored_features(recording):
    from_features = stack_part_grams(recording, "hidden", ChannelGroups([0] * 8 + [1] * 8))
    assert from_features.shape == (6, 2, 2, STEPS, STEPS)
    feature = recording.load(2, ["feature/hidden"])["feature/hidden"][1]
    assert torch.equal(from_features[2, 1, 0], ChannelGroups([0] * 8 + [1] * 8).grams(feature)[0])
    assert torch.equal(
        stack_part_grams(recording, "hidden", BANDS), recording.stack("gram/hidden/bands")
    )


def test_without_features_other_partitions_are_refused(tmp_path):
    recording = Recording(recorded(tmp_path, num_items=2))
    with pytest.raises(ValueError, match=r"hidden/bands.*features: none.*features: full"):
        stack_part_grams(recording, "hidden", equal_bands(2, (2, 2), "fft"))


@pytest.mark.parametrize("batch", [0, 1, 2])
def test_a_broken_recording_with_partitions_resumes_to_the_same_bytes(batch, tmp_path):
    recorded(tmp_path / "whole")
    calls = 3 + (batch * STEPS + 2) * CALLS_PER_STEP["dit_guided"]
    with pytest.raises(Interrupted):
        recorded(tmp_path / "broken", stop_at(pipeline("dit_guided"), calls, fail))
    recorded(tmp_path / "broken")
    assert hashes(tmp_path / "broken") == hashes(tmp_path / "whole")


def test_resuming_with_another_partition_is_refused(tmp_path):
    recorded(tmp_path, num_items=2)
    with pytest.raises(RecordingError, match="partitions"):
        changed = {"hidden/bands": equal_bands(2, (2, 2), "fft")}
        recorded(tmp_path, num_items=2, partitions=changed)
    with pytest.raises(RecordingError, match="partitions is .*asked for None"):
        recorded(tmp_path, num_items=2, partitions=None)


@pytest.mark.parametrize("name", ["bands", "residual/bands", "hidden/", "hidden/a/b"])
def test_a_partition_must_be_named_after_a_recorded_tap(name, tmp_path):
    with pytest.raises(ValueError, match="<tap>/<name>"):
        recorded(tmp_path, partitions={name: BANDS})


def test_a_partition_of_another_size_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="16.*grid|grid"):
        recorded(tmp_path, partitions={"hidden/bands": Bands([0.5], (3, 3))})
    assert not list(tmp_path.glob("shards/**/*.safetensors"))


# -------------------------------------------------------------------------------------------- CLI


@pytest.fixture(scope="module")
def pipeline_folder(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("pipe") / "tiny"
    pipeline("dit_guided").save_pretrained(folder)
    return str(folder)


def test_the_command_line_records_bands_and_groups(pipeline_folder, tmp_path, capsys):
    groups = tmp_path / "groups.json"
    groups.write_text(json.dumps({"hidden": list(GROUPS.labels)}))
    main(words(pipeline_folder, tmp_path / "r", num_trajectories=2, bands=2, groups=str(groups)))
    header = Recording(tmp_path / "r").header
    told = header.recipe["partitions"]
    assert sorted(told) == ["hidden/bands", "hidden/groups", "output/bands"]
    assert told["hidden/bands"] == BANDS.describe()
    assert told["output/bands"]["grid"] == [4, 4]
    assert told["hidden/groups"] == GROUPS.describe()


@pytest.mark.parametrize("content", ["[0, 1]", '{"hidden": [0.5]}', '{"query": [0]}', "{}", "{"])
def test_a_file_of_groups_must_be_lists_of_numbers_per_tap(content, pipeline_folder, tmp_path):
    groups = tmp_path / "groups.json"
    groups.write_text(content)
    with pytest.raises((ValueError, SystemExit)):
        main(words(pipeline_folder, tmp_path / "r", num_trajectories=2, groups=str(groups)))
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("config", "latent", "feature", "grid"),
    [
        ({"patch_size": 2}, (4, 6, 8), (2, 12, 5), (3, 4)),
        ({"patch_size": [1, 2, 2]}, (4, 5, 6, 8), (2, 60, 5), (5, 3, 4)),
        ({"patch_size": 2, "patch_size_t": 1}, (4, 5, 6, 8), (2, 60, 5), (5, 3, 4)),
        ({"patch_size": 2}, (4, 6, 8), (2, 4, 6, 8), (6, 8)),
    ],
)
def test_the_token_grid_is_read_off_the_host(config, latent, feature, grid):
    assert token_grid(config, latent, feature) == grid


@pytest.mark.parametrize(
    ("config", "latent", "feature"),
    [({"patch_size": 1}, (16, 64), (2, 16, 5)), ({}, (4, 6, 8), (2, 12, 5))]
    + [({"patch_size": 2}, (4, 6, 8), (2, 13, 5))],
)
def test_an_unknown_token_grid_is_never_guessed(config, latent, feature):
    with pytest.raises(ValueError, match=r"token grid.*not known.*partitions="):
        token_grid(config, latent, feature)


# ------------------------------------------------------------------------------------------- fits


def smooth(seed: int, channels: int = 6) -> torch.Tensor:
    """Four trajectories of two branches whose channels move at speeds of their own."""
    random = torch.Generator().manual_seed(seed)
    t = torch.linspace(0, 1, STEPS)[:, None, None]
    speed = torch.linspace(0.2, 4, channels)
    phase = torch.randn(4, 2, 1, 4, channels, generator=random)
    noise = 0.01 * torch.randn(4, 2, STEPS, 4, channels, generator=random)
    return torch.sin(speed * t + phase) + noise


def grams_of(partition, features) -> torch.Tensor:
    return torch.stack([torch.stack([partition.grams(b) for b in item]) for item in features])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "partition",
    [ChannelGroups([0, 0, 1, 1, 2, 2]), equal_bands(2, (2, 2)), equal_bands(2, (1, 4), "fft")],
    ids=["groups", "dct bands", "fft bands"],
)
def test_more_parts_never_fit_worse_at_ridge_zero(partition, seed):
    features = smooth(seed)
    one = grams_of(ChannelGroups([0] * 6), features)
    more = grams_of(partition, features)
    error_one = squared_errors(one, rows_fitted(one, ANCHORS, 0.0)).sum()
    error_more = squared_errors(more, rows_fitted(more, ANCHORS, 0.0)).sum()
    assert error_more <= error_one * (1 + 1e-9)


def test_one_part_is_the_plain_fit_and_its_error():
    grams = grams_of(ChannelGroups([0] * 6), smooth(0))
    rows = rows_fitted(grams, ANCHORS)
    plain = rows_fitted(grams[:, :, 0], ANCHORS)
    assert torch.equal(rows[:, 0], plain)
    torch.testing.assert_close(relative_errors(grams, rows), errors_of(grams[:, :, 0], plain))


def test_the_error_on_grams_is_that_of_the_forecasts():
    features = smooth(1)
    partition = equal_bands(2, (2, 2))
    grams = grams_of(partition, features)
    rows = rows_fitted(grams, ANCHORS)
    maps = features[2, 1]  # (S, N, D)
    combined = [sum(rows[1, p, 5, a].float() * maps[a][None] for a in ANCHORS) for p in range(2)]
    forecast = partition.weigh(combined)[0]
    target = features[2, 1, 5]
    error = (target - forecast).norm() / target.norm()
    torch.testing.assert_close(relative_errors(grams, rows)[2, 1, 5].float(), error)


def test_a_part_that_is_zero_at_an_anchor_is_refused_and_one_that_always_is_is_reused():
    features, groups = smooth(0), ChannelGroups([0, 1, 1, 1, 1, 1])
    gone = features.clone()
    gone[..., 0] = 0
    rows = fitted_rows(grams_of(groups, gone).sum(0), ANCHORS)
    assert rows[0, 0, 2].tolist() == [0, 1, 0, 0, 0, 0]  # reuse
    torch.testing.assert_close(
        rows[0, 1], fitted_rows(grams_of(groups, features).sum(0), ANCHORS)[0, 1]
    )
    features[:, :, ANCHORS[1], ..., 0] = 0
    with pytest.raises(ValueError, match=r"parts \[0\] are zero at an anchor"):
        fitted_rows(grams_of(groups, features).sum(0), ANCHORS)


@pytest.fixture(scope="module", params=["bands", "groups"])
def fitted(request, recording) -> tuple[L2PLeastSquares, Path]:
    module = L2PLeastSquares(str(recording.folder), ANCHORS, "hidden", partition=request.param)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    trainer = Trainer(max_epochs=1, accelerator="cpu", enable_checkpointing=False, **quiet)
    data = GramDataModule(str(recording.folder), f"hidden/{request.param}", 0.0)
    trainer.fit(module, datamodule=data)
    path = Path(recording.folder).parent / f"{request.param}.ckpt"
    trainer.save_checkpoint(path)
    return module, path


def test_the_module_fits_the_rows_of_every_part(fitted, recording):
    module, _ = fitted
    grams = recording.stack(f"gram/hidden/{module.hparams['partition']}")
    assert torch.equal(module.predictor.weight, rows_fitted(grams, ANCHORS))
    assert module.spec().num_trajectories == 6


def test_the_module_fits_what_the_plain_function_fits(fitted, recording):
    module, _ = fitted
    plain = fit_rows(recording, ANCHORS, "hidden", partition=module.hparams["partition"])
    assert torch.equal(module.predictor.weight, plain.weight)
    assert module.spec() == plain.spec and module.predictor.arguments() == plain.arguments()


def test_the_fit_of_parts_that_earlier_yaml_names_is_this_one(recording):
    with pytest.warns(DeprecationWarning):
        earlier = importlib.import_module("foreseer.training.parts").L2PPartsLeastSquares
        module = earlier(str(recording.folder), ANCHORS)
    assert isinstance(module, L2PLeastSquares)
    assert (module.tap, module.partition, module.ridge) == ("hidden", "bands", 1e-4)


def test_an_exported_fit_deploys_and_keeps_its_part_grams(fitted, recording, tmp_path):
    module, checkpoint = fitted
    export_command(str(checkpoint), str(tmp_path / "a"))
    export_predictor(module, tmp_path / "b", {})
    for folder in (tmp_path / "a", tmp_path / "b"):
        loaded = load_predictor(folder)
        assert torch.equal(loaded.weight, module.predictor.weight)
        assert loaded.spec == module.spec()
        name = f"gram/hidden/{module.hparams['partition']}"
        grams = read_shard(folder / "grams.safetensors")
        torch.testing.assert_close(grams[name], recording.stack(name).sum(0))
    pipe = pipeline("dit_guided")
    with forecasting(pipe, loaded) as run:
        pipe([1], output_type="latent", **settings("dit_guided", STEPS))
    assert run.report().anchors == ANCHORS


def test_a_partition_that_was_not_recorded_is_refused_by_name(recording):
    with pytest.raises(ValueError, match=r"hidden/bands.*not 'output/bands'"):
        L2PLeastSquares(str(recording.folder), ANCHORS, "output", partition="bands")


# ----------------------------------------------------------------------------------------- clusters


@pytest.fixture(scope="module")
def two_kinds(recording, tmp_path_factory) -> Recording:
    """A recording whose even channels stay on a line while the odd ones swing."""
    folder = tmp_path_factory.mktemp("kinds") / "recording"
    header = dataclasses.replace(recording.header, taps=["hidden"], recipe={}, recipe_hash="")
    with RecordingWriter(folder, header) as writer:
        for item in range(3):
            random = torch.Generator().manual_seed(item)
            t = torch.arange(STEPS).float()[:, None, None]
            slope, phase = torch.randn(2, 2, 1, 4, WIDTH, generator=random)
            features = torch.where(
                torch.arange(WIDTH) % 2 == 0, 3 + slope * t, torch.sin(2.5 * t + 7 * phase)
            )
            flat = features.flatten(2).double()
            stored = {"feature/hidden": features.contiguous(), "gram/hidden": flat @ flat.mT}
            writer.write(item, stored, {"seed": item})
    return Recording(folder)


def test_channels_that_move_alike_share_a_group(two_kinds):
    expected = [c % 2 for c in range(WIDTH)]
    assert cluster_channels(two_kinds, "hidden", 2) == expected
    assert cluster_channels(two_kinds, "hidden") == expected  # the best silhouette has two groups
    assert cluster_channels(two_kinds, "hidden", 2, seed=5) == expected


def test_hyca_takes_taylor_on_lines_and_reuse_on_swings(two_kinds, tmp_path):
    predictor = fit_hyca(two_kinds, ANCHORS)
    assert predictor.solvers[0] in ("taylor_1", "rk2", "ab2", "adams_moulton")
    assert predictor.solvers[1] in ("reuse", "bdf2")
    assert predictor.spec.anchors == tuple(ANCHORS) and predictor.spec.num_trajectories == 3
    again = fit_hyca(two_kinds, ANCHORS)
    assert (again.labels, again.solvers) == (predictor.labels, predictor.solvers)
    save_predictor(predictor, predictor.spec, tmp_path)
    loaded = load_predictor(tmp_path)
    assert (loaded.labels, loaded.solvers) == (predictor.labels, predictor.solvers)


def test_the_solver_of_each_group_has_the_least_error_of_the_pool(recording):
    chosen = best_solvers(recording, "hidden", GROUPS, ANCHORS)
    grams = recording.stack("gram/hidden/groups")
    for group, solver in enumerate(chosen):
        errors = {
            name: float(
                squared_errors(
                    grams[:, :, [group]],
                    tabulate(rule, ANCHORS, recording.header.sigmas)[None, None],
                ).sum()
            )
            for name, rule in POOL.items()
        }
        assert errors[solver] == pytest.approx(min(errors.values()))


def test_descriptors_are_normalised_and_need_features(recording, tmp_path):
    described = channel_descriptors(recording, "hidden")
    assert described.shape == (WIDTH, 6)
    torch.testing.assert_close(described.mean(0), torch.zeros(6, dtype=torch.float64))
    torch.testing.assert_close(described.std(0, correction=0), torch.ones(6, dtype=torch.float64))
    bare = Recording(recorded(tmp_path, num_items=2))
    with pytest.raises(ValueError, match="features: full"):
        channel_descriptors(bare, "hidden")
    with pytest.raises(ValueError, match="16 channels"):
        cluster_channels(recording, "hidden", 16)


def test_random_groups_are_of_nearly_equal_size_and_the_same_every_time():
    labels = random_groups(10, 3)
    assert sorted(labels.count(g) for g in range(3)) == [3, 3, 4]
    assert labels == random_groups(10, 3) != random_groups(10, 3, seed=1)


# ------------------------------------------------------------------------------------------ configs


@pytest.mark.parametrize("name", ["l2p_bands", "l2p_groups"])
def test_the_shipped_fits_read_the_grams_of_the_partition_they_fit(name):
    config = yaml.safe_load((PACKAGE / f"configs/fit/{name}.yaml").read_text())
    model, data = config["model"]["init_args"], config["data"]["init_args"]
    assert data["tap"] == f"{model['tap']}/{model['partition']}"
    assert data["folder"] == model["recording"]
