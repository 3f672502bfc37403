"""Every claim of docs/security.md names a test that shows it; those of no other file are here."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from checkpoint_cases import random_predictor, spec_for, tiny_pipe
from recording_cases import record
from safetensors.torch import load_file, save_file
from test_fault_cases_files import Bomb, change_config, seal

from foreseer.checkpoints.config import ARGUMENT_RULES, OF_PARTITIONS
from foreseer.checkpoints.format import (
    CLASSES,
    CheckpointError,
    argument_names,
    load_predictor,
    save_predictor,
)
from foreseer.checkpoints.hub import MAX_DOWNLOAD_BYTES
from foreseer.checkpoints.push import push_predictor
from foreseer.checkpoints.strict import MalformedFile, parse_json, read_header
from foreseer.checkpoints.zoo import resolve
from foreseer.integration.pipelines.load import load_pipeline
from foreseer.predictors.neural import DiscaPredictor

pytestmark = pytest.mark.fault
ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "security.md"
TEST = re.compile(r"`(tests/test_\w+\.py)::(test_\w+)`")
MODEL, CONFIG = "model.safetensors", "config.json"


@pytest.fixture
def predictor(tmp_path: Path) -> Path:
    plain = random_predictor()
    return save_predictor(plain, spec_for(plain), tmp_path / "predictor")


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    tiny_pipe().save_pretrained(tmp_path / "pipeline")
    return tmp_path / "pipeline"


# --------------------------------------------------------------------------------------- the page


def claims() -> list[str]:
    """Every list item and every table row of the page, as one line each."""
    found: list[str] = []
    for line in PAGE.read_text().splitlines():
        if line.startswith(("- ", "| ")) and not line.startswith(("| what", "| ---")):
            found.append(line)
        elif line.startswith("  ") and found:
            found[-1] += line
    return found


def test_every_claim_of_the_page_ends_with_a_test() -> None:
    assert len(claims()) > 30
    for claim in claims():
        assert re.search(r"`tests/test_\w+\.py::test_\w+`\)?[. |]*$", claim), claim


def test_every_test_that_the_page_names_exists() -> None:
    for file, name in TEST.findall(PAGE.read_text()):
        assert f"\ndef {name}(" in (ROOT / file).read_text(), f"{file} has no {name}"


def test_the_page_states_the_limits_that_the_code_has() -> None:
    from foreseer.checkpoints import config, format, strict
    from foreseer.trajectories.files import header, manifest

    text = PAGE.read_text()
    for module, names in {
        strict: ["MAX_HEADER_BYTES", "MAX_TENSORS", "MAX_NAME_LENGTH", "MAX_AXES", "MAX_DEPTH"],
        config: [
            *("MAX_CONFIG_BYTES", "MAX_STEPS", "MAX_BRANCHES", "MAX_STRING", "MAX_REPLAY"),
            *("MAX_CHANNELS", "MAX_TOKENS", "MAX_HIDDEN", "MAX_LAYERS", "MAX_TAPS"),
        ],
        format: ["MAX_MODEL_BYTES"],
        header: ["MAX_RECORDING_JSON_BYTES"],
        manifest: ["MAX_LINE_BYTES"],
    }.items():
        for name in names:
            assert re.search(rf"\b{getattr(module, name):,}\b", text), name


# ----------------------------------------------------------------------------------- what is read


@pytest.mark.parametrize("name", [MODEL, CONFIG])
def test_a_pipe_a_folder_or_a_device_is_refused_at_once(predictor, name) -> None:
    for make in (os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/zero")):
        path = predictor / name
        path.unlink()
        make(path)
        with pytest.raises(CheckpointError, match=f"{name}: is no plain file"):
            load_predictor(predictor)
        path.rmdir() if path.is_dir() else path.unlink()
        path.write_bytes(b"")


HEADERS: dict[str, tuple[dict[str, Any], str]] = {
    "hole": ({"shape": [2], "data_offsets": [8, 16]}, "invalid offset for tensor `b`"),
    "overlap": ({"shape": [2], "data_offsets": [0, 8]}, "invalid offset for tensor `b`"),
    "size": ({"shape": [3], "data_offsets": [4, 12]}, "invalid shape, data type, or offset"),
    "overflow": ({"shape": [2**32, 2**32], "data_offsets": [4, 4]}, "no shape of .* 2.60 numbers"),
    "overflow of an empty one": (
        {"shape": [0, 2**62, 4], "data_offsets": [4, 4]},
        "no shape of .* 2.60 numbers",
    ),
    "negative": ({"shape": [-2], "data_offsets": [4, 12]}, "no shape"),
    "axes": ({"shape": [1] * 9, "data_offsets": [4, 8]}, "no shape of at most 8 axes"),
    "dtype": ({"dtype": "F4", "shape": [2], "data_offsets": [4, 12]}, "has the dtype 'F4'"),
    "keys": ({"shape": [2], "data_offsets": [4, 12], "code": "x"}, "not the keys of a tensor"),
    "offsets": ({"shape": [2], "data_offsets": [4, 1e999]}, "no finite number|malformed header"),
}


@pytest.mark.parametrize("fault", HEADERS)
def test_a_header_that_does_not_add_up_is_refused(tmp_path, fault) -> None:
    entry, says = HEADERS[fault]
    first = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    text = json.dumps({"a": first, "b": {"dtype": "F32", **entry}}).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(12))
    with pytest.raises(MalformedFile, match=says):
        read_header(path)


@pytest.mark.parametrize("name", ["", "a" * 257, "a\x1b[2J", "a\nb", "\ud800"])
def test_a_tensor_name_cannot_write_to_the_terminal(tmp_path, name) -> None:
    text = json.dumps({name: {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}).encode()
    (tmp_path / "a").write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(MalformedFile, match="printable characters") as caught:
        read_header(tmp_path / "a")
    assert str(caught.value).isprintable() and len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "text", ['{"a":1,"a":2}', "NaN", "1e999", "[" * 17 + "]" * 17, "[" * 500_000, "9" * 5000]
)
def test_json_that_is_not_strict_is_refused(text) -> None:
    with pytest.raises(ValueError, match="twice|finite|deeper|limit"):
        parse_json(text)
    assert parse_json("[" * 16 + "1e3" + "]" * 16)


def test_every_argument_of_every_class_has_a_limit() -> None:
    taken = {name for known in CLASSES for name in argument_names(known)}
    assert taken | OF_PARTITIONS == ARGUMENT_RULES.keys()


BANDS = {"class": "Bands", "edges": [0.5], "transform": "dct"}
L2P_OF = {
    "num_steps": 8,
    "anchors": [0],
    "num_branches": 1,
    "expert_steps": [0],
    "partition": None,
}
HUGE: dict[str, tuple[str, dict[str, Any]]] = {
    "steps": ("L2P", L2P_OF | {"num_steps": 10**9}),
    "window": ("L2PGram", {"num_steps": 8, "num_branches": 2, "ridge": 0.1, "window": 10**12}),
    "grid": (
        "L2P",
        {
            "num_steps": 8,
            "anchors": [0, 1, 3, 6],
            "num_branches": 2,
            "expert_steps": [0],
            "first_time": None,
            "partition": {
                "class": "Bands",
                "edges": [0.5],
                "grid": [2**20, 2**20],
                "transform": "dct",
            },
        },
    ),
    "long grid": (
        "L2P",
        {
            "num_steps": 8,
            "anchors": [0, 1, 3, 6],
            "num_branches": 2,
            "expert_steps": [0],
            "first_time": None,
            "partition": BANDS | {"grid": [1, 2**20]},
        },
    ),
    "labels": ("HyCa", {"labels": [0, 10**9], "solvers": ["reuse"]}),
    "gate": (
        "LesaPredictor",
        {
            "sigmas": [1.0 - step / 8 for step in range(8)],
            "num_branches": 2,
            "boundaries": [],
            "taps": [4],
            "gate": "mlp",
            "hidden": [1],
            "grid_size": 10**9,
            "grid_range": 1.0,
            "feedback": True,
            "bias": True,
        },
    ),
    "width": (
        "DiscaPredictor",
        {
            "width": 10**9,
            "modulation_width": 10**9,
            "num_heads": 0,
            "depth": 10**9,
            "width_mult": 1.0,
            "residual": True,
            "order": 0,
            "max_gap": 1.0,
        },
    ),
    "block": (
        "TunedLastBlock",
        {"width": 4, "block": {"q.weight": [10**9, 10**9]}, "max_gap": 1.0, "max_tokens": 4},
    ),
}


@pytest.mark.parametrize("case", HUGE)
def test_a_config_that_asks_for_terabytes_is_refused_before_anything_is_built(
    predictor, case
) -> None:
    name, arguments = HUGE[case]
    change_config(predictor, lambda c: c.update(predictor_class=name, arguments=arguments))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match="config.json.* is .*, (expected|but its spec says)"):
        load_predictor(predictor)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 * 2**10


def test_a_golden_pair_that_would_be_replayed_for_hours_is_refused(predictor) -> None:
    def change(config: dict[str, Any]) -> None:
        config["predictor_class"] = "L2PGram"
        config["arguments"] = {"num_steps": 4096, "num_branches": 2, "ridge": 0.0, "window": None}
        config["spec"]["anchors"] = list(range(4000))
        config["spec"]["sigmas"] = [1 - step / 4096 for step in range(4096)]

    change_config(predictor, change)
    with pytest.raises(CheckpointError, match="anchors squared times .*, the limit is 16777216"):
        load_predictor(predictor)


def test_golden_features_larger_than_they_must_be_are_not_replayed(predictor) -> None:
    tensors = load_file(predictor / MODEL)
    tensors["golden.features"] = torch.zeros(4, 2, 2, 10**6)
    save_file(tensors, predictor / MODEL)
    seal(predictor)
    with pytest.raises(CheckpointError, match=r"has shape \(4, 2, 2, 1000000\), expected \(4, 2,"):
        load_predictor(predictor)


def test_numbers_that_make_no_sense_together_are_a_clear_error(tmp_path) -> None:
    predictor = DiscaPredictor(6, 4, order=1, max_gap=1.0)
    folder = save_predictor(predictor, spec_for(random_predictor()), tmp_path / "disca")
    change_config(folder, lambda c: c["spec"].update(sigmas=[1.0] * 8))  # no time between anchors
    with pytest.raises(CheckpointError, match="cannot be replayed: float division by zero"):
        load_predictor(folder)


@pytest.mark.parametrize("name", ["zoo:../zoo/fashion_dit", "zoo:/etc", "zoo:.", "zoo:a\0b"])
def test_a_zoo_name_cannot_leave_the_zoo(name) -> None:
    with pytest.raises(FileNotFoundError, match="bundled are zoo:"):
        resolve(name)


# ------------------------------------------------------------------------- what is written, fetched


def test_saving_into_a_strangers_folder_writes_through_no_link(predictor, tmp_path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("mine")
    for name in (MODEL, CONFIG, "README.md"):
        (predictor / f".{name}.partial").symlink_to(precious)
        (predictor / name).unlink()
        (predictor / name).symlink_to(precious)
    plain = random_predictor()
    save_predictor(plain, spec_for(plain), predictor)
    assert precious.read_text() == "mine"
    assert torch.equal(load_predictor(predictor).weight, plain.weight)


def test_publishing_follows_no_link_and_takes_no_pickle(predictor, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("foreseer.checkpoints.push.upload", None)
    torch.save(Bomb(tmp_path / "ran"), predictor / "grams.safetensors")
    with pytest.raises(CheckpointError, match=r"grams\.safetensors: header claims"):
        push_predictor(predictor, "owner/name")
    (tmp_path / "secret").write_text("a key")
    (predictor / "README.md").unlink()
    (predictor / "README.md").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match=r"README\.md is a link, expected a plain file"):
        push_predictor(predictor, "owner/name")


def test_a_download_over_the_limit_is_refused_before_it_starts(monkeypatch) -> None:
    def snapshot_download(*_: object, dry_run: bool = False, **__: object) -> list[Any]:
        assert dry_run
        info = huggingface_hub.file_download.DryRunFileInfo
        return [info("c", MAX_DOWNLOAD_BYTES + 1, MODEL, "p", False, True)]

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(CheckpointError, match=r"bytes to fetch, the limit is \d+"):
        load_predictor("owner/name")


# -------------------------------------------------------------------------------------- pipelines


def test_a_pipeline_of_pickles_is_refused_and_none_is_opened(pipeline, tmp_path) -> None:
    (pipeline / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(Bomb(tmp_path / "ran"), pipeline / "transformer" / "diffusion_pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="no safetensors .* a pickle is never opened here"):
        load_pipeline(str(pipeline))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("where", ["pipeline", "component", "module"])
def test_a_pipeline_with_code_of_its_own_is_refused_and_none_is_run(
    pipeline, tmp_path, where, monkeypatch
) -> None:
    code = f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\n"
    folder = {"pipeline": pipeline, "component": pipeline / "transformer", "module": tmp_path}
    (folder[where] / "evil.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    index = json.loads((pipeline / "model_index.json").read_text())
    if where == "pipeline":
        index["_class_name"] = ["evil", "Evil"]
    else:
        index["transformer"] = ["evil", "Evil"]
    (pipeline / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="code of its own|trust_remote_code|has not been imported"):
        load_pipeline(str(pipeline))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("text", ["", "[]", '{"_class_name": 3}', "{" * 100_000, "{}"])
def test_a_malformed_pipeline_index_is_refused_by_name(pipeline, text) -> None:
    (pipeline / "model_index.json").write_text(text)
    with pytest.raises(ValueError, match=r"model_index\.json"):
        load_pipeline(str(pipeline))


# ---------------------------------------------------------------------------- what is not protected


def test_a_forged_hash_and_a_forged_golden_pair_load(predictor) -> None:
    forged = random_predictor(seed=7)
    save_predictor(forged, load_predictor(predictor).spec, predictor)
    assert torch.equal(load_predictor(predictor).weight, forged.weight)


def test_a_yaml_file_imports_the_modules_it_names(tmp_path) -> None:
    (tmp_path / "a_module.py").write_text("import os\nos.mkdir('ran')\n")
    (tmp_path / "a.yaml").write_text("model: {class_path: a_module.Model}\n")
    words = [sys.executable, "-m", "foreseer", "fit", "--config", "a.yaml"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "a_module" in done.stderr
    assert (tmp_path / "ran").is_dir()


TRUNCATE = """
import os, sys
from pathlib import Path
from foreseer.trajectories.files.shards import read_shard
tensors = read_shard(Path(sys.argv[1]))
os.truncate(sys.argv[1], 0)
print(sum(float(tensor.double().sum()) for tensor in tensors.values()))
"""


def test_a_shard_that_is_cut_while_it_is_open_kills_the_process(tmp_path) -> None:
    record(tmp_path / "run", range(1))
    path = tmp_path / "run/shards/00000/item-000000.safetensors"
    path.chmod(0o644)
    words = [sys.executable, "-c", TRUNCATE, str(path)]
    done = subprocess.run(words, capture_output=True, timeout=120)
    assert done.returncode == -signal.SIGBUS
