"""Any bytes in place of a file are read as what was written, or refused by name, never more."""

import hashlib
import json
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_cases import random_predictor, spec_for
from fuzz_cases import damaged_bytes, damaged_json, quick
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from recording_cases import record, small_header
from safetensors import safe_open

from foreseer import cli
from foreseer.checkpoints.config import CheckpointError, decode_config
from foreseer.checkpoints.format import CLASSES, load_predictor, save_predictor
from foreseer.checkpoints.strict import MalformedFile, read_header
from foreseer.predictors.any_anchors import L2PGram
from foreseer.predictors.base import Predictor
from foreseer.predictors.continuous import L2PContinuous
from foreseer.predictors.corrected_rows import CorrectedRows
from foreseer.predictors.lattice_policy import LatticePolicy
from foreseer.predictors.lesa import LesaPredictor
from foreseer.predictors.lesa_values import LesaValues
from foreseer.predictors.linear import L2P
from foreseer.predictors.neural import DiscaPredictor, OffsetDisca
from foreseer.predictors.partition import ChannelGroups
from foreseer.predictors.per_part import HyCa
from foreseer.predictors.pruning_policy import PruningPolicy
from foreseer.predictors.readout import Readout
from foreseer.predictors.resampled import Resampled
from foreseer.predictors.spectrum import Bands
from foreseer.predictors.token_rows import TokenRows
from foreseer.predictors.tuned_block import TunedLastBlock
from foreseer.trajectories.files.header import Header
from foreseer.trajectories.files.manifest import Entry, append_entry, parse_line
from foreseer.trajectories.files.shards import read_shard
from foreseer.trajectories.recording import CorruptShard, Recording, RecordingError

pytestmark = pytest.mark.fault
MODEL, CONFIG = "model.safetensors", "config.json"
ANCHORS, SIGMAS = (0, 1, 3, 6), tuple(1.0 - step / 8 for step in range(8))
SHARD = "shards/00000/item-000000.safetensors"
MAX_GROWTH = 400 * 2**10  # kilobytes of memory over all tests of this file
MANY = settings(
    max_examples=200,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
SOME = settings(MANY, max_examples=40)

PREDICTORS: dict[str, Callable[[], Predictor]] = {
    "L2P": random_predictor,
    "L2P of bands": lambda: L2P(8, ANCHORS, 2, partition=Bands([0.5], [2, 3])),
    "L2P of groups": lambda: L2P(8, ANCHORS, 2, partition=ChannelGroups([0, 1, 1])),
    "HyCa": lambda: HyCa([0, 1, 1], ["reuse", "ab2"]),
    "L2PGram": lambda: L2PGram(8, 2, 0.01, 3),
    "L2PContinuous": lambda: L2PContinuous([SIGMAS], 2),
    "L2P of two": lambda: L2P(8, ANCHORS, 2, (0, 3)),
    "LesaPredictor": lambda: LesaPredictor(SIGMAS, 2, (0.5,), (2, 3), "kan", (3,)),
    "LesaValues": lambda: LesaValues(SIGMAS, 2, (0.5,), (2, 3), (2,), "mlp", (2,)),
    "DiscaPredictor": lambda: DiscaPredictor(6, 4, max_gap=1.0),
    "OffsetDisca": lambda: OffsetDisca(6, max_gap=1.0),
    "CorrectedRows": lambda: CorrectedRows(8, ANCHORS, 2, width=6, modulation_width=4),
    "TunedLastBlock": lambda: TunedLastBlock(4, {"mlp.weight": [3, 2], "norm.weight": [2]}, 1.0, 9),
    "Resampled": lambda: Resampled(8, ANCHORS, [1, 3], [1.0, 0.8, 0.7, 0.6], [4, 2], 2),
    "TokenRows": lambda: TokenRows(8, ANCHORS, 2, LatticePolicy(0.5)),
    "TokenRows of pruning": lambda: TokenRows(8, ANCHORS, 2, PruningPolicy([0.0] + 7 * [0.4])),
    "Readout": lambda: Readout(8, ANCHORS, 2, width=6, patch=4, rank=2),
}


@pytest.fixture(scope="module", autouse=True)
def modest_memory() -> Iterator[None]:
    """No file of a few kilobytes may make a reader allocate much, in any test of this file."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MAX_GROWTH


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A predictor of every class."""
    found = {}
    for name, build in PREDICTORS.items():
        predictor: Any = build()
        steps = {"expert_steps": (0, 3)} if name == "L2P of two" else {}
        spec = spec_for(random_predictor(), **steps)
        found[name] = save_predictor(predictor, spec, tmp_path_factory.mktemp(name))
    return found


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recording") / "run"
    record(folder, range(2))
    for path in folder.rglob("*.safetensors"):
        path.chmod(0o644)
    return folder


def loads(folder: Path) -> Any:
    """The predictor in a folder, or None where it is refused in the way that is promised."""
    with quick():
        try:
            return load_predictor(folder)
        except CheckpointError as error:
            assert str(folder) in str(error) and len(str(error)) < 3000
            return None


def opens(folder: Path) -> Recording | None:
    """The recording in a folder, or None where it is refused in the way that is promised."""
    with quick():
        try:
            return Recording(folder)
        except RecordingError as error:
            assert str(folder) in str(error)
            return None


def rows(folder: Path, content: bytes) -> Any:
    """What stands in the model file once `content` is there and its hash is forged to match."""
    (folder / MODEL).write_bytes(content)
    config = json.loads((folder / CONFIG).read_text())
    config["model_sha256"] = hashlib.sha256(content).hexdigest()
    (folder / CONFIG).write_text(json.dumps(config))
    return loads(folder)


def headed(header: bytes, body: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + body


def parts(content: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and body of a safetensors file."""
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def test_every_class_that_a_checkpoint_may_hold_is_fuzzed() -> None:
    assert {name.partition(" ")[0] for name in PREDICTORS} == CLASSES.keys()


@pytest.mark.parametrize("name", PREDICTORS)
def test_changed_arguments_build_that_predictor_or_are_refused(folders, name) -> None:
    folder = folders[name]
    config = json.loads((folder / CONFIG).read_text())

    @SOME
    @given(st.data())
    def check(data: st.DataObject) -> None:
        text = data.draw(damaged_json(config, ("arguments",)))
        (folder / CONFIG).write_bytes(text)
        if (loaded := loads(folder)) is not None:
            kind = name.partition(" ")[0]
            assert json.loads(text)["predictor_class"] == type(loaded).__name__ == kind

    try:
        check()
    finally:
        (folder / CONFIG).write_text(json.dumps(config))


@MANY
@given(st.data())
def test_a_changed_config_is_read_or_refused(data) -> None:
    text = data.draw(damaged_json(CONFIG_VALUES))
    with quick():
        try:
            config = decode_config(text, "here/config.json")
        except CheckpointError as error:
            assert str(error).startswith("here/config.json") and len(str(error)) < 3000
        else:
            assert config.spec.anchors == tuple(json.loads(text)["spec"]["anchors"])


CONFIG_VALUES = {
    "predictor_class": "L2P",
    "arguments": {"num_steps": 4, "anchors": [0, 2], "num_branches": 1},
    "spec": {
        "tap": "output",
        "anchors": [0, 2],
        "sigmas": [1.0, 0.75, 0.5, 0.25],
        "host": {"class": "T", "parameters": 3},
        "scheduler": "S",
        "num_branches": 1,
        "guidance_scale": 3.0,
        "dtype": "float32",
        "recording_digest": "",
        "num_trajectories": 7,
        "metrics": {"psnr_db": 30.0},
        "guidance": {"true_cfg_scale": 2.0},
        "latent_shapes": [[1, 8, 8]],
        "branch_steps": [4],
        "expert_steps": [0, 2],
        "first_branch": "conditional",
    },
    "versions": {"foreseer": "1"},
    "model_sha256": "0" * 64,
    "schema_version": 7,
}


@MANY
@given(st.data())
def test_config_bytes_that_were_damaged_are_read_or_refused(data) -> None:
    text = data.draw(damaged_bytes(json.dumps(CONFIG_VALUES).encode()) | st.binary(max_size=60))
    with quick():
        try:
            decode_config(text, "here/config.json")
        except CheckpointError as error:
            assert str(error).startswith("here/config.json")


def test_a_damaged_model_file_is_refused_even_under_a_forged_hash(folders) -> None:
    folder = folders["L2P"]
    content, original = (folder / MODEL).read_bytes(), load_predictor(folder)
    header, body = parts(content)
    names = set(header)

    @MANY
    @given(st.data())
    def check(data: st.DataObject) -> None:
        changed = data.draw(
            damaged_bytes(content) | damaged_json(header).map(lambda text: headed(text, body))
        )
        loaded = rows(folder, changed)
        if loaded is not None and changed != content:  # numbers may differ where no hash protects
            assert loaded.weight.shape == original.weight.shape
            assert {f"predictor.{name}" for name in loaded.state_dict()} <= names
        (folder / MODEL).write_bytes(changed + b"\0")
        assert loads(folder) is None  # the hash is that of another file

    try:
        check()
    finally:
        rows(folder, content)


@MANY
@given(st.data())
def test_a_header_that_is_accepted_is_accepted_by_safetensors_too(tmp_path_factory, data) -> None:
    header: dict[str, Any] = {
        "__metadata__": {"item": "0"},
        "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b": {"dtype": "BF16", "shape": [0, 4], "data_offsets": [24, 24]},
        "c": {"dtype": "U8", "shape": [], "data_offsets": [24, 25]},
    }
    whole = headed(json.dumps(header).encode(), bytes(25))
    text = damaged_json(header).map(lambda text: headed(text, bytes(25)))
    path = tmp_path_factory.getbasetemp() / "header.safetensors"
    path.write_bytes(data.draw(text | damaged_bytes(whole)))
    with quick():
        try:
            names = list(read_header(path))
        except MalformedFile:
            return
        with safe_open(path, framework="pt") as file:
            assert sorted(file.keys()) == names
            for name in names:
                file.get_tensor(name)


def test_a_damaged_shard_gives_its_tensors_or_is_refused(recording) -> None:
    path = recording / SHARD
    content = path.read_bytes()
    original = {name: tensor.clone() for name, tensor in read_shard(path).items()}  # no mapping
    header, body = parts(content)

    @MANY
    @given(st.data())
    def check(data: st.DataObject) -> None:
        changed = data.draw(
            damaged_bytes(content) | damaged_json(header).map(lambda text: headed(text, body))
        )
        path.write_bytes(changed)
        with quick():
            try:
                found = read_shard(path, item=0)
            except CorruptShard as error:
                assert str(path) in str(error) and "item 0" in str(error)
            else:
                assert found.keys() == original.keys()
                assert all(torch.equal(found[name], original[name]) for name in found)

    try:
        check()
    finally:
        path.write_bytes(content)


def test_a_damaged_recording_json_is_read_or_refused(recording) -> None:
    path = recording / "recording.json"
    content = path.read_bytes()

    @MANY
    @given(st.data())
    def check(data: st.DataObject) -> None:
        text = data.draw(damaged_json(json.loads(content)) | damaged_bytes(content))
        path.write_bytes(text)
        found = opens(recording)
        if found is not None:
            assert found.header.recipe == json.loads(text)["recipe"]

    try:
        check()
    finally:
        path.write_bytes(content)


def test_a_damaged_manifest_line_is_read_or_refused_and_never_leaves_the_folder(recording) -> None:
    path = recording / "manifest.00000.jsonl"
    content = path.read_bytes()
    line, rest = content.split(b"\n", 1)
    original = Recording(recording).load(0)

    @MANY
    @given(st.data())
    def check(data: st.DataObject) -> None:
        text = data.draw(damaged_json(json.loads(line)) | damaged_bytes(line))
        path.write_bytes(text + b"\n" + rest)
        found = opens(recording)
        for item, entry in found.entries.items() if found is not None else ():
            shard = (recording / entry.file).resolve()
            assert shard.is_relative_to(recording.resolve() / "shards")
            try:
                loaded = found.load(item)
            except CorruptShard:
                continue
            if item == 0:
                assert all(torch.equal(loaded[name], original[name]) for name in loaded)

    try:
        check()
    finally:
        path.write_bytes(content)


NAMES = st.text(st.characters(min_codepoint=32, max_codepoint=0x2FF), min_size=1, max_size=9)
PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8"), max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=6,
)


@SOME
@given(
    recipe=st.dictionaries(NAMES, PLAIN, max_size=4),
    sigmas=st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=9),
    taps=st.lists(NAMES, unique=True, max_size=4),
    latent_shape=st.lists(st.integers(1, 2**20), max_size=5),
    guidance=st.dictionaries(NAMES, st.floats(-1e6, 1e6), max_size=3),
    num_branches=st.integers(1, 4),
)
def test_a_valid_header_comes_back_as_it_was(tmp_path_factory, **values) -> None:
    header = small_header(**values)
    folder = tmp_path_factory.getbasetemp()
    header.write(folder)
    assert Header.parse((folder / "recording.json").read_bytes(), "here") == header


@SOME
@given(
    item=st.integers(0, 2**62),
    name=st.from_regex(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,30}", fullmatch=True),
    size=st.integers(0, 2**62),
    meta=st.dictionaries(
        NAMES.filter(lambda name: name not in {"item", "file", "xxh3", "bytes", "meta"}),
        st.text(st.characters(codec="utf-8"), max_size=30)
        | st.integers(-(2**53), 2**53)
        | st.floats(allow_nan=False, allow_infinity=False),
        max_size=4,
    ),
)
def test_a_valid_entry_comes_back_as_it_was(tmp_path_factory, item, name, size, meta) -> None:
    entry = Entry(item=item, file=f"shards/{name}", xxh3="0f" * 16, bytes=size, meta=meta)
    path = tmp_path_factory.getbasetemp() / "entry.jsonl"
    path.unlink(missing_ok=True)
    append_entry(path, entry)
    assert parse_line(path.read_bytes().rstrip(b"\n"), "here") == entry


OPTIONS: dict[str, dict[str, Any]] = {
    "generate": {"num_inference_steps": 4, "device": "cpu", "compare": True, "settings": {"a": 1}},
    "record": {"pipeline": "p", "out": "o", "num_trajectories": 4, "taps": ["output"]},
    "search": {"recording": "r", "num_anchors": [6, 8]},
    "bench": {"out": "o", "budgets": [6], "num_samples": 4},
}


ILL_FORMED = ["many", [1, [2]], [{"a": None}], {}, None, 1e30, -1, "a" * 5000, "\x1b[2J", [True]]


def parsed(word: str, values: Any, path: Path, capsys: pytest.CaptureFixture[str]) -> str | None:
    """What is said to be wrong with a YAML file, or None where it is a configuration."""
    path.write_text(values if isinstance(values, str) else json.dumps(values))
    with pytest.raises(SystemExit) as stop:
        cli.main([word, "--config", str(path), "--print_config"])
    printed = capsys.readouterr()
    assert stop.value.code in (0, 2)
    assert "Traceback" not in printed.err
    return printed.err.split("error:")[-1] if stop.value.code else None


@pytest.mark.parametrize("word", OPTIONS)
def test_an_ill_formed_option_is_named_and_exits_with_code_2(tmp_path, capsys, word) -> None:
    for key in [*OPTIONS[word], "no_option"]:
        for value in ILL_FORMED:
            problem = parsed(word, OPTIONS[word] | {key: value}, tmp_path / "a.yaml", capsys)
            assert problem is None or key in problem
            assert problem is not None or key != "no_option" or value == {}  # holds no option


@pytest.mark.parametrize(
    ("place", "value", "named"),
    [
        (("model", "init_args", "anchors"), "many", "anchors"),
        (("model", "init_args", "anchors"), [0, {"a": 1}], "anchors"),
        (("model", "init_args", "ridge"), [1], "ridge"),
        (("model", "init_args", "no_option"), 1, "no_option"),
        (("model", "class_path"), "pathlib.Path", "pathlib.Path"),
        (("model", "class_path"), "foreseer.no_module.Here", "no_module"),
        (("trainer", "max_epochs"), "ten", "max_epochs"),
        (("trainer", "no_option"), 1, "no_option"),
        (("no_option",), 1, "no_option"),
        (("data",), [1], "data"),
    ],
)
def test_an_ill_formed_training_config_is_named(tmp_path, capsys, place, value, named) -> None:
    values: dict[str, Any] = {
        "model": {
            "class_path": "foreseer.training.l2p.L2PLeastSquares",
            "init_args": {"recording": "runs/none", "anchors": [0, 1]},
        },
        "trainer": {"max_epochs": 1},
    }
    node = values
    for key in place[:-1]:
        node = node[key]
    node[place[-1]] = value
    problem = parsed("fit", values, tmp_path / "a.yaml", capsys)
    assert problem is not None and named in problem


@pytest.mark.parametrize("text", ["[1", "\t", "\0", "- 1", "", "a: " + "[" * 3000])
def test_a_text_that_is_no_configuration_exits_with_code_2(tmp_path, capsys, text) -> None:
    for word in ("generate", "fit"):
        assert "onfig" in str(parsed(word, text, tmp_path / "a.yaml", capsys))


def test_a_yaml_tag_never_builds_an_object(tmp_path, capsys) -> None:
    text = f"model: !!python/object/apply:os.mkdir [{tmp_path / 'ran'}]"
    for word in ("generate", "fit"):
        assert "python/object" in str(parsed(word, text, tmp_path / "a.yaml", capsys))
    assert not (tmp_path / "ran").exists()


def test_nothing_was_run_and_nothing_left_behind(recording, folders) -> None:
    found = {path.name for folder in folders.values() for path in folder.iterdir()}
    assert found == {MODEL, CONFIG, "README.md"}
    assert not [path for path in os.listdir(recording) if path.endswith((".tmp", ".partial"))]
