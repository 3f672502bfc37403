"""Whatever is wrong with a checkpoint, loading says so in one clear error and runs no code."""

import hashlib
import json
import os
import pickle
from pathlib import Path

import huggingface_hub
import pytest
import torch
from checkpoint_cases import random_predictor, spec_for
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

from foreseer.checkpoints import format as checkpoint_format
from foreseer.checkpoints.format import CheckpointError, load_predictor, save_predictor
from foreseer.checkpoints.push import push_predictor
from foreseer.checkpoints.spec import PredictorMismatch, check_grid, check_host
from foreseer.checkpoints.strict import MAX_HEADER_BYTES

pytestmark = pytest.mark.fault
MODEL, CONFIG = "model.safetensors", "config.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    predictor = random_predictor()
    return save_predictor(predictor, spec_for(predictor), tmp_path / "predictor")


def refused(folder: Path | str, match: str) -> None:
    with pytest.raises(CheckpointError, match=match):
        load_predictor(folder)


def change_config(folder: Path, change) -> None:
    config = json.loads((folder / CONFIG).read_text())
    change(config)
    (folder / CONFIG).write_text(json.dumps(config))


def seal(folder: Path) -> None:
    """Make the hash in config.json that of the file, as one who forges a checkpoint would."""
    digest = hashlib.sha256((folder / MODEL).read_bytes()).hexdigest()
    change_config(folder, lambda config: config.update(model_sha256=digest))


def change_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / MODEL)
    change(tensors)
    save_file(tensors, folder / MODEL)
    seal(folder)


@pytest.mark.parametrize("keep", [0, 7, 8, 100, -100, -1])
def test_a_truncated_file_is_refused(folder, keep):
    (folder / MODEL).write_bytes((folder / MODEL).read_bytes()[:keep])
    refused(folder, r"model\.safetensors: truncated.*.* export the predictor again")


def test_trailing_bytes_are_refused(folder):
    (folder / MODEL).write_bytes((folder / MODEL).read_bytes() + b"\0")
    refused(folder, "has trailing bytes .*file not fully covered")


def test_no_flipped_bit_is_ever_loaded(folder):
    content = (folder / MODEL).read_bytes()
    places = torch.randint(0, 8 * len(content), (100,)).tolist()
    for place in [*range(0, 8 * 300, 31), *places]:
        damaged = bytearray(content)
        damaged[place // 8] ^= 1 << place % 8
        (folder / MODEL).write_bytes(damaged)
        refused(folder, "SHA-256|truncated|trailing|malformed|header")
    (folder / MODEL).write_bytes(content)
    load_predictor(folder)


def test_a_file_of_another_checkpoint_is_refused(folder, tmp_path):
    other = random_predictor(seed=1)
    save_predictor(other, spec_for(other), tmp_path / "other")
    os.replace(tmp_path / "other" / MODEL, folder / MODEL)
    refused(folder, r"SHA-256 is \w{64}, config.json says \w{64} \(flipped bits\)")


@pytest.mark.parametrize("length", [MAX_HEADER_BYTES + 1, 2**63, 2**64 - 1])
def test_a_huge_header_is_refused_before_it_is_read(folder, length):
    (folder / MODEL).write_bytes(length.to_bytes(8, "little") + b" " * 100)
    seal(folder)
    refused(folder, f"header claims {length} bytes, the limit is {MAX_HEADER_BYTES}")


def test_too_many_tensors_are_refused(folder):
    one = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
    text = json.dumps({str(n): one for n in range(4097)}).encode()
    (folder / MODEL).write_bytes(len(text).to_bytes(8, "little") + text)
    seal(folder)
    refused(folder, "header lists 4097 tensors, the limit is 4096")


def test_an_oversized_file_is_refused_before_it_is_read(folder):
    with open(folder / MODEL, "ab") as file:
        file.truncate(checkpoint_format.MAX_MODEL_BYTES + 1)  # sparse: takes no disk
    refused(folder, f"has {2**30 + 1} bytes, the limit is {2**30}")


def test_an_oversized_config_is_refused_before_it_is_read(folder):
    with open(folder / CONFIG, "ab") as file:
        file.truncate(1_000_001)
    refused(folder, "has 1000001 bytes, the limit is 1000000")


@pytest.mark.parametrize("name", ["predictor.weight", "golden.features", "golden.forecasts"])
def test_a_missing_tensor_is_named(folder, name):
    change_tensors(folder, lambda tensors: tensors.pop(name))
    refused(folder, f"tensor {name} is missing. Nothing was loaded")


def test_an_extra_tensor_is_named(folder):
    change_tensors(folder, lambda tensors: tensors.update(extra=torch.zeros(1)))
    refused(folder, "tensor extra is not part of the class")


def test_all_wrong_tensors_are_named_in_one_error(folder):
    def rename(tensors):
        tensors["weight"] = tensors.pop("predictor.weight")

    change_tensors(folder, rename)
    refused(folder, "predictor.weight is missing; weight is not part of the class")


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda weight: weight[:1].clone(), r"F64 \[1, 8, 8\]"),
        (lambda weight: weight[:, :7].clone(), r"F64 \[2, 7, 8\]"),
        (lambda weight: weight.float(), r"F32 \[2, 8, 8\]"),
        (lambda weight: weight.bfloat16(), r"BF16 \[2, 8, 8\]"),
    ],
)
def test_a_wrong_shape_or_dtype_is_named_with_the_right_one(folder, change, found):
    def edit(tensors):
        tensors["predictor.weight"] = change(tensors["predictor.weight"])

    change_tensors(folder, edit)
    refused(folder, rf"predictor.weight is {found}, expected F64 \[2, 8, 8\]")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(folder, value, tmp_path):
    change_tensors(folder, lambda tensors: tensors["predictor.weight"].view(-1)[9:10].fill_(value))
    refused(folder, r"NaN or Inf in \['predictor.weight'\]")
    predictor = random_predictor()
    predictor.weight[0, 2, 0] = value
    with pytest.raises(CheckpointError, match="NaN or Inf"):
        save_predictor(predictor, spec_for(predictor), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_changed_weights_under_a_right_hash_fail_the_golden_replay(folder):
    change_tensors(folder, lambda tensors: tensors["predictor.weight"][1, 2, 0].add_(1e-3))
    refused(folder, "replaying the golden pair differs by .* expected at most")


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("golden.features", (4, 2, 8)),
        ("golden.features", (3, 2, 2, 4)),
        ("golden.forecasts", (4, 2, 2, 3)),
    ],
)
def test_a_golden_pair_of_another_shape_is_refused(folder, name, shape):
    change_tensors(folder, lambda tensors: tensors.update({name: torch.zeros(shape)}))
    refused(folder, f"{name} has shape .* expected")


def set_in(*path, value):
    def change(config):
        for key in path[:-1]:
            config = config[key]
        config[path[-1]] = value

    return change


CONFIG_FAULTS = {
    "newer schema": (set_in("schema_version", value=9), "schema_version 9, .* upgrade foreseer"),
    "no version": (set_in("schema_version", value=0), "schema_version is 0, expected 8"),
    "no schema": (lambda c: c.pop("schema_version"), r"lacks \['schema_version'\]"),
    "schema true": (set_in("schema_version", value=True), "schema_version is True, expected 8"),
    "unknown class": (
        set_in("predictor_class", value="os.system"),
        r"predictor_class is 'os.system', expected one of \[.*'L2P'.*\]; upgrade foreseer",
    ),
    "unknown key": (set_in("extra", value=1), r"unknown keys \['extra'\]"),
    "missing key": (lambda c: c.pop("versions"), r"lacks \['versions'\]"),
    "unknown spec key": (
        set_in("spec", "lora", value="x"),
        r"spec has the unknown keys \['lora'\]",
    ),
    "missing spec key": (lambda c: c["spec"].pop("sigmas"), r"lacks \['sigmas'\]"),
    "no argument": (lambda c: c["arguments"].pop("anchors"), r"arguments are \['expert_steps',"),
    "more arguments": (set_in("arguments", "device", value="meta"), "'device', .* L2P takes"),
    "string for number": (
        set_in("spec", "guidance_scale", value="3"),
        "guidance_scale is '3', expected a number",
    ),
    "huge number": (set_in("spec", "guidance_scale", value=10**400), "expected a number"),
    "number for string": (set_in("spec", "dtype", value=32), "dtype is 32, expected a name"),
    "spec is a list": (set_in("spec", value=[]), r"spec is \[\], expected an object"),
    "unknown tap": (
        set_in("spec", "tap", value="blocks.3"),
        "tap is 'blocks.3', expected 'output'",
    ),
    "anchor 1.0": (set_in("spec", "anchors", value=[0, 1.0]), "anchors is .* a list of 1 to 4096"),
    "no sigmas": (set_in("spec", "sigmas", value=[]), "sigmas is .* a list of 1 to 4096 numbers"),
    "metric": (set_in("spec", "metrics", value={"psnr_db": None}), "metrics is .* of numbers"),
    "branches": (set_in("spec", "num_branches", value=10**9), "whole number from 1 to 16"),
    "steps": (
        set_in("arguments", "num_steps", value=10**9),
        "num_steps is 1000000000, but its spec",
    ),
    "steps true": (set_in("arguments", "num_steps", value=True), "num_steps is True, but its spec"),
    "anchors": (
        set_in("arguments", "anchors", value=[0, 1]),
        "contradicts itself: argument anchors",
    ),
}


@pytest.mark.parametrize("fault", CONFIG_FAULTS)
def test_an_ill_formed_config_names_its_key(folder, fault):
    change, match = CONFIG_FAULTS[fault]
    change_config(folder, change)
    refused(folder, match)


def test_anchors_that_are_no_schedule_are_refused(folder):
    def change(config):
        config["spec"]["anchors"] = config["arguments"]["anchors"] = [1, 3, 6]

    change_config(folder, change)
    refused(folder, r"L2P refuses its arguments: anchors are \[1, 3, 6\]")


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"\xff", b"[" * 100_000, b'{"a":1,"a":1}', b'{"a":NaN}', b'{"a":-Infinity}'],
)
def test_a_config_that_is_not_json_is_refused(folder, text):
    (folder / CONFIG).write_bytes(text)
    refused(folder, "config.json is not JSON")


def test_a_config_that_is_no_object_is_refused(folder):
    (folder / CONFIG).write_bytes(b"[1]")
    refused(folder, r"config.json holds \[1\], expected a JSON object")


def test_a_missing_file_is_named(folder):
    (folder / CONFIG).rename(folder / "hidden.json")
    refused(folder, "has no config.json; expected a folder that `foreseer export` wrote")
    (folder / "hidden.json").rename(folder / CONFIG)
    (folder / MODEL).unlink()
    refused(folder, "model.safetensors: the file is missing")


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "last.ckpt", "model.pkl"])
def test_a_pickle_in_place_of_the_tensors_is_named_and_never_run(folder, tmp_path, name):
    (folder / MODEL).unlink()
    (folder / name).write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    refused(folder, rf"holds \['{name}'\], expected model.safetensors: a pickle can run code")
    refused(folder / name, "is a file, expected the folder .* `foreseer export`")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("protocol", [0, 4])
def test_a_pickle_under_the_name_of_the_tensors_is_never_run(folder, tmp_path, protocol):
    content = pickle.dumps(Bomb(tmp_path / "ran"), protocol)
    (folder / MODEL).write_bytes(content)
    seal(folder)
    refused(folder, "header claims|truncated")
    torch.save(Bomb(tmp_path / "ran"), folder / MODEL)
    seal(folder)
    refused(folder, "header claims")
    assert not (tmp_path / "ran").exists()


def test_a_state_that_is_not_the_class_s_is_not_saved(tmp_path):
    predictor = random_predictor()
    spec = spec_for(predictor)
    with pytest.raises(CheckpointError, match=r"is F32 \[2, 8, 8\], expected F64"):
        save_predictor(predictor.float(), spec, tmp_path)
    with pytest.raises(CheckpointError, match="argument num_steps is 8, but its spec says 7"):
        save_predictor(random_predictor(), spec_for(random_predictor(7)), tmp_path)
    for changes in ({"guidance_scale": float("nan")}, {"host": {"class": object()}}):
        with pytest.raises(CheckpointError, match="cannot be stored"):
            save_predictor(random_predictor(), spec_for(random_predictor(), **changes), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_write_that_fails_leaves_the_older_checkpoint_or_an_error(folder, monkeypatch):
    older = load_predictor(folder)
    replace = os.replace

    def fail_at_config(source, target):
        if Path(target).name == CONFIG:
            raise OSError("disk full")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail_at_config)
    with pytest.raises(OSError, match="disk full"):
        save_predictor(random_predictor(seed=1), older.spec, folder)
    refused(folder, "SHA-256")


def test_a_loaded_predictor_refuses_another_host_and_another_grid(folder):
    spec = load_predictor(folder).spec

    class FlowMatchEulerDiscreteScheduler:
        pass

    check_host(spec, spec.host, FlowMatchEulerDiscreteScheduler())
    with pytest.raises(PredictorMismatch, match="weights .* is cd, expected ab"):
        check_host(spec, spec.host | {"weights_sha256": "cd"}, FlowMatchEulerDiscreteScheduler())
    with pytest.raises(PredictorMismatch, match="fitted on 8 steps, this run has 4"):
        check_grid(spec, [1.0, 0.75, 0.5, 0.25])
    with pytest.raises(PredictorMismatch, match="step 2 has sigma"):
        check_grid(spec, [s if i != 2 else s + 1e-3 for i, s in enumerate(spec.sigmas)])


def test_a_missing_folder_lists_what_would_do(tmp_path):
    refused(tmp_path / "none", "Expected a folder, zoo:<name>, or owner/name on the hub")
    refused("none", "no folder none; bundled are")


def test_a_revision_of_a_folder_is_refused(folder):
    with pytest.raises(CheckpointError, match="revision is 'v1', but .* is a folder"):
        load_predictor(folder, revision="v1")


def test_an_unreachable_hub_names_the_cache_and_the_switch(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))

    def snapshot_download(*args, **kwargs):
        raise LocalEntryNotFoundError("An error happened\nand more lines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(CheckpointError) as caught:
        load_predictor("owner/name", revision="v9")
    for text in ("revision v9 of owner/name", str(tmp_path / "cache"), "HF_HUB_OFFLINE is off"):
        assert text in str(caught.value)
    assert "more lines" not in str(caught.value)


def test_the_hub_s_own_offline_switch_gives_the_same_error(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    refused("owner/name", "HF_HUB_OFFLINE is on; check the name")
    refused("../name", "HF_HUB_OFFLINE is on; check the name")


def test_only_a_sound_checkpoint_is_uploaded(folder, monkeypatch):
    monkeypatch.setattr("foreseer.checkpoints.push.upload", None)
    (folder / MODEL).write_bytes(b"")
    with pytest.raises(CheckpointError, match="truncated"):
        push_predictor(folder, "owner/name")


def test_a_refused_upload_says_what_to_do(folder, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="could not upload .* `hf auth login`"):
        push_predictor(folder, "owner/name")
