"""What earlier releases wrote is read to the same numbers; what later ones write is refused.

`tests/earlier/version_<schema version>...` holds a recording and a predictor as a release wrote
them: 3 trajectories of the tiny guided DiT at 8 steps, and its least-squares rows on 3 anchors.
They are never written again; a new version adds a folder.
"""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from row_cases import rows_fitted
from tiny_hosts import items, pipeline, settings

from foreseer import predictors
from foreseer.checkpoints import config, upgrade
from foreseer.checkpoints.format import CheckpointError, load_predictor, save_predictor
from foreseer.checkpoints.zoo import bundled
from foreseer.predictors.linear import L2P
from foreseer.predictors.partition import ChannelGroups
from foreseer.predictors.readout import Readout
from foreseer.predictors.spectrum import Bands
from foreseer.training.shipped import read_sums
from foreseer.trajectories.files import header
from foreseer.trajectories.files.header import RecordingError
from foreseer.trajectories.files.repair import merge
from foreseer.trajectories.recorder import record
from foreseer.trajectories.recording import Recording

EARLIER = sorted((Path(__file__).parent / "earlier").iterdir())
NEWEST = EARLIER[-1]
each = pytest.mark.parametrize("folder", EARLIER, ids=lambda folder: folder.name)


def written(path: Path) -> dict:
    return json.loads(path.read_text())


def changed(path: Path, **values: object) -> None:
    path.write_text(json.dumps(written(path) | values))


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def test_every_version_has_an_example_and_a_way_to_the_next():
    for kind, upgrades in (("predictor", upgrade.PREDICTOR), ("recording", upgrade.RECORDING)):
        file = {"predictor": config.CONFIG_FILE, "recording": header.HEADER_FILE}[kind]
        versions = {written(folder / kind / file)["schema_version"] for folder in EARLIER}
        newest = {"predictor": config.SCHEMA_VERSION, "recording": header.SCHEMA_VERSION}[kind]
        assert versions == set(range(1, newest + 1))
        assert sorted(upgrades) == list(range(1, newest))


@each
def test_a_predictor_of_an_earlier_release_has_the_rows_of_its_recording(folder):
    predictor = load_predictor(folder / "predictor")  # which replays its golden pair
    grams = Recording(folder / "recording").stack("gram/output")
    rows = rows_fitted(grams, predictor.spec.anchors)
    torch.testing.assert_close(predictor.weight, rows, atol=1e-9, rtol=0)  # other LAPACKs round so
    assert (predictor.spec.branch_steps, predictor.spec.expert_steps) == ((), (0,))
    assert predictor.spec.guidance == written(folder / "predictor" / "config.json")["spec"].get(
        "guidance", {}
    )


def test_a_readout_of_version_3_reads_its_last_anchor_alone(tmp_path):
    old = load_predictor(NEWEST / "predictor")
    sizes = {"width": 16, "patch": 4, "rank": 3}
    predictor = Readout(8, old.spec.anchors, 2, (0,), **sizes, past=0)
    predictor.outer.normal_()
    predictor.inner.normal_()
    folder = save_predictor(predictor, old.spec, tmp_path / "p")
    arguments = written(folder / "config.json")["arguments"]
    assert arguments.pop("past") == 0
    changed(folder / "config.json", schema_version=3, arguments=arguments)
    again = load_predictor(folder)
    assert again.past == 0 and torch.equal(again.inner, predictor.inner)


ROWS_OF_VERSION_4 = {
    "L2PExperts": ({"expert_steps": (0, 1)}, {"expert_steps": [0, 1]}),
    "L2PBands": (
        {"partition": Bands([0.5], [2, 3], "fft")},
        {"edges": [0.5], "grid": [2, 3], "transform": "fft"},
    ),
    "L2PGroups": ({"partition": ChannelGroups([0, 1, 1])}, {"labels": [0, 1, 1]}),
}


@pytest.mark.parametrize("name", ROWS_OF_VERSION_4)
def test_rows_of_version_4_that_had_a_class_of_their_own_are_read(name, tmp_path):
    now, then = ROWS_OF_VERSION_4[name]
    spec = load_predictor(NEWEST / "predictor").spec
    spec = dataclasses.replace(spec, expert_steps=now.get("expert_steps", (0,)))
    predictor = L2P(8, spec.anchors, 2, **now)
    predictor.weight += torch.randn_like(predictor.weight)
    folder = save_predictor(predictor, spec, tmp_path / "p")
    arguments = {"num_steps": 8, "anchors": list(spec.anchors), "num_branches": 2} | then
    old = {"schema_version": 4, "predictor_class": name, "arguments": arguments}
    changed(folder / "config.json", **old)
    again = load_predictor(folder)  # which replays the golden pair
    assert type(again) is L2P and again.arguments() == predictor.arguments()
    assert torch.equal(again.weight, predictor.weight)
    with pytest.warns(DeprecationWarning, match=rf"{name}\(...\) is L2P\("):
        same = getattr(predictors, name)(8, spec.anchors, 2, *then.values())
    assert same.arguments() == predictor.arguments()


@each
def test_a_predictor_of_an_earlier_release_is_written_in_the_newest_layout(folder, tmp_path):
    old = load_predictor(folder / "predictor")
    new = save_predictor(old, old.spec, tmp_path / "new")
    assert written(new / "config.json")["schema_version"] == config.SCHEMA_VERSION
    again = load_predictor(new)
    assert again.spec == old.spec and torch.equal(again.weight, old.weight)


def test_a_layout_does_not_change_without_a_new_version(tmp_path):
    predictor = load_predictor(NEWEST / "predictor")
    now = written(save_predictor(predictor, predictor.spec, tmp_path / "new") / "config.json")
    frozen = written(NEWEST / "predictor" / "config.json")
    assert now.keys() == frozen.keys() and now["spec"].keys() == frozen["spec"].keys()
    Recording(NEWEST / "recording").header.write(tmp_path)
    assert written(tmp_path / "recording.json") == written(NEWEST / "recording" / "recording.json")


@each
def test_a_recording_of_an_earlier_release_goes_on(folder, copy):
    place = copy / "recording"
    before = Recording(place)
    call = settings("dit_guided")
    pipe, wanted = pipeline("dit_guided"), items("dit_guided", 4)
    record(pipe, wanted, place, taps=["output"], states=False, batch_size=3, **call)
    after = Recording(place)
    assert (before.items, after.items) == ([0, 1, 2], [0, 1, 2, 3])
    newest = Recording(NEWEST / "recording").header
    assert after.header == dataclasses.replace(newest, guidance=before.header.guidance)


@each
def test_merging_writes_the_newest_layout(folder, copy, tmp_path):
    merge(tmp_path / "merged", [copy / "recording"])
    merged = Recording(tmp_path / "merged")
    assert (
        written(tmp_path / "merged" / "recording.json")["schema_version"] == header.SCHEMA_VERSION
    )
    frozen = Recording(folder / "recording")
    assert torch.equal(merged.stack("gram/output"), frozen.stack("gram/output"))


@each
def test_files_of_a_later_release_ask_for_it(folder, copy):
    later = config.SCHEMA_VERSION + 1
    changed(copy / "predictor" / "config.json", schema_version=later, colour="blue")
    with pytest.raises(CheckpointError, match=f"schema_version {later}.*upgrade foreseer"):
        load_predictor(copy / "predictor")
    later = header.SCHEMA_VERSION + 1
    changed(copy / "recording" / "recording.json", schema_version=later, colour="blue")
    with pytest.raises(RecordingError, match=f"schema_version {later}.*upgrade foreseer"):
        Recording(copy / "recording")


@pytest.mark.parametrize("folder", [NEWEST], ids=["newest"])
def test_what_only_an_earlier_layout_may_lack_is_missed_in_the_newest(copy):
    path = copy / "predictor" / "config.json"
    values = written(path)
    del values["spec"]["guidance"]
    path.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"lacks \['guidance'\]"):
        load_predictor(copy / "predictor")
    path = copy / "recording" / "recording.json"
    values = written(path)
    del values["expert_steps"]
    path.write_text(json.dumps(values))
    with pytest.raises(RecordingError, match=r"lacks the keys \['expert_steps'\]"):
        Recording(copy / "recording")


@pytest.mark.parametrize("folder", [EARLIER[0]], ids=lambda folder: folder.name)
def test_sums_that_do_not_tell_their_trajectories_are_refused_with_what_to_do(folder):
    spec = load_predictor(folder / "predictor").spec
    with pytest.raises(CheckpointError, match="earlier release wrote it.*foreseer export"):
        read_sums(folder / "predictor", spec)


def test_bundled_predictors_are_of_versions_that_are_read():
    found = [folder for folder in bundled().values() if (folder / "config.json").exists()]
    assert len(found) >= 6
    for folder in found:
        assert load_predictor(folder).spec.sigmas
