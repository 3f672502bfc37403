"""Each numbered way in which a file or a host can be wrong ends in an error that says so."""

import hashlib
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from checkpoint_cases import random_predictor, spec_for
from diffusers import DiTTransformer2DModel
from huggingface_hub.errors import LocalEntryNotFoundError, RevisionNotFoundError
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from recording_cases import record
from row_cases import rows_fitted
from safetensors.torch import load_file, save_file
from tiny_hosts import STEPS, adding_pipeline, pipeline, run, tiny_dit
from tiny_hosts import spec_for as host_spec

from foreseer.checkpoints.format import CheckpointError, load_predictor, save_predictor
from foreseer.checkpoints.spec import PredictorMismatch
from foreseer.integration.forecasting import forecasting
from foreseer.predictors.any_anchors import L2PGram
from foreseer.predictors.base import History, Step
from foreseer.predictors.linear import L2P
from foreseer.training.export import read_checkpoint
from foreseer.trajectories.gram import gram, projection_fidelity
from foreseer.trajectories.recording import CorruptShard, Recording

pytestmark = pytest.mark.fault
QUIET: dict[str, Any] = {
    "logger": False,
    "accelerator": "cpu",
    "enable_progress_bar": False,
    "enable_checkpointing": False,
}
MODEL, CONFIG, SHARD = "model.safetensors", "config.json", "shards/00000/item-000000.safetensors"


@pytest.fixture
def predictor(tmp_path: Path) -> Path:
    plain = random_predictor()
    return save_predictor(plain, spec_for(plain), tmp_path / "predictor")


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    record(tmp_path / "recording", range(1))
    (tmp_path / "recording" / SHARD).chmod(0o644)
    return tmp_path / "recording"


class Bomb:
    """A pickle that makes a folder when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (self.path,)


def seal(folder: Path) -> None:
    """Make the hash in config.json that of the file, as one who forges a checkpoint would."""
    config = json.loads((folder / CONFIG).read_text())
    config["model_sha256"] = hashlib.sha256((folder / MODEL).read_bytes()).hexdigest()
    (folder / CONFIG).write_text(json.dumps(config))


def change_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / CONFIG).read_text())
    change(config)
    (folder / CONFIG).write_text(json.dumps(config))


def many_keys(count: int) -> bytes:
    one = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
    text = json.dumps({str(number): one for number in range(count)}).encode()
    return len(text).to_bytes(8, "little") + text


HEADERS = {
    "a header of 1 MB and a byte": (1_000_001).to_bytes(8, "little") + b" " * 1_000_001,
    "a length of 2^63": (2**63).to_bytes(8, "little") + b"{}",
    "200,000 keys": many_keys(200_000),
    "4,097 keys": many_keys(4097),
}


@pytest.mark.parametrize("content", HEADERS.values(), ids=HEADERS)
def test_case_03_a_huge_header_is_refused_before_it_is_parsed(predictor, recording, content):
    (predictor / MODEL).write_bytes(content)
    seal(predictor)
    says = r"header (claims \d+ bytes|lists 4097 tensors), the limit is (1000000|4096)"
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: {says}"):
        load_predictor(predictor)
    (recording / SHARD).write_bytes(content)
    manifest = recording / "manifest.00000.jsonl"
    line = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**line, "bytes": len(content)}) + "\n")
    with pytest.raises(CorruptShard, match=rf"item-000000\.safetensors \(item 0\): {says}"):
        Recording(recording).load(0)


@pytest.mark.parametrize("write", [torch.save, lambda bomb, p: p.write_bytes(pickle.dumps(bomb))])
def test_case_05_a_malicious_pickle_never_runs(predictor, recording, tmp_path, write):
    bomb = Bomb(tmp_path / "ran")
    write(bomb, predictor / MODEL)
    seal(predictor)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: (header|truncated)"):
        load_predictor(predictor)
    (predictor / MODEL).rename(predictor / "model.pt")
    with pytest.raises(CheckpointError, match=r"expected model\.safetensors: a pickle can run"):
        load_predictor(predictor)
    write(bomb, recording / SHARD)
    with pytest.raises(CorruptShard, match=r"item-000000\.safetensors \(item 0\)"):
        Recording(recording).load(0)
    write(bomb, tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match=r"expected the \.ckpt that `foreseer fit` wrote"):
        read_checkpoint(tmp_path / "last.ckpt")
    trainer = Trainer(max_epochs=1, **QUIET)
    with pytest.raises(pickle.UnpicklingError, match="[Ww]eights.only"):
        trainer.fit(BoringModel(), ckpt_path=tmp_path / "last.ckpt")
    assert not (tmp_path / "ran").exists()


def rename(tensors):
    tensors["weight"] = tensors.pop("predictor.weight")


TENSORS: dict[str, tuple[Callable, str]] = {
    "missing": (lambda t: t.pop("predictor.weight"), "tensor predictor.weight is missing"),
    "extra": (lambda t: t.update(more=torch.ones(1)), "tensor more is not part of the class"),
    "renamed": (rename, "predictor.weight is missing; weight is not part of the class"),
    "shape": (
        lambda t: t.update({"predictor.weight": torch.zeros(2, 8, 7).double()}),
        r"predictor.weight is F64 \[2, 8, 7\], expected F64 \[2, 8, 8\]",
    ),
    "dtype": (
        lambda t: t.update({"predictor.weight": torch.zeros(2, 8, 8)}),
        r"predictor.weight is F32 \[2, 8, 8\], expected F64 \[2, 8, 8\]",
    ),
}


@pytest.mark.parametrize("fault", TENSORS)
def test_case_06_a_wrong_tensor_is_named_and_nothing_is_filled_in(predictor, fault):
    change, says = TENSORS[fault]
    tensors = load_file(predictor / MODEL)
    change(tensors)
    save_file(tensors, predictor / MODEL)
    seal(predictor)
    with pytest.raises(CheckpointError, match=f"{says}.*Nothing was loaded"):
        load_predictor(predictor)


def dit(**changes: Any) -> DiTTransformer2DModel:
    return DiTTransformer2DModel(**{**tiny_dit().config, **changes}).eval()


HOSTS: dict[str, tuple[Callable, dict[str, Any], str]] = {
    "class": (lambda: adding_pipeline().transformer, {}, "class is AddingHost, expected DiT"),
    "blocks": (lambda: dit(num_layers=3), {}, r"number of parameters is \d+, expected \d+"),
    "hidden size": (lambda: dit(attention_head_dim=32), {}, r"number of parameters is \d+"),
    "configuration": (lambda: dit(dropout=0.5), {}, "transformer configuration is .*, expected"),
    "weights": (lambda: tiny_dit(seed=1), {}, r"weights .* is \w{64}, expected \w{64}"),
    "site": (tiny_dit, {"tap": "hidden"}, "fitted on the tap 'output', not 'hidden'"),
}


@pytest.mark.parametrize("fault", HOSTS)
def test_case_07_a_predictor_of_another_model_is_refused_at_attach(fault):
    build, how, says = HOSTS[fault]
    pipe = pipeline("dit_guided")
    learned = L2P(STEPS, (0, 1, 4), 2)
    learned.spec = host_spec(pipe)
    plain = run("dit_guided", pipe)
    own, pipe.transformer = pipe.transformer, build()
    with pytest.raises(PredictorMismatch, match=says), forecasting(pipe, learned, **how):
        raise AssertionError("it was attached")
    pipe.transformer = own
    assert torch.equal(run("dit_guided", pipe), plain)


@pytest.mark.parametrize("ridge", [0.0, 1e-4])
@pytest.mark.parametrize("width", [1, 2, 3])
@pytest.mark.parametrize("constant", [True, False])
def test_case_19_a_history_of_low_rank_gives_finite_weights(ridge, width, constant):
    features = torch.randn(1, 1, 1 if constant else 8, width).expand(1, 1, 8, width)
    grams, anchors = gram(features), [0, 1, 2, 3, 4]  # five anchors, three numbers at most
    rows = rows_fitted(grams, anchors, ridge)
    assert torch.isfinite(rows).all()
    forecast = rows[0, 5:] @ features[0, 0].double()
    if constant:
        torch.testing.assert_close(forecast, features[0, 0, 5:].double(), rtol=1e-6, atol=1e-6)
    assert torch.isfinite(projection_fidelity(grams, anchors)).all()
    predictor, history = L2PGram(8, 1, ridge), History()
    predictor.set_gram(grams[0])
    for index in anchors:
        history.push(Step(index, 1 - index / 8, 8), features[0, :, index, None].float())
    assert torch.isfinite(predictor(history, Step(5, 3 / 8, 8))).all()


CONFIGS: dict[str, tuple[Callable, str]] = {
    "unknown key": (lambda c: c.update(extra=1), r"unknown keys \['extra'\]"),
    "unknown key of the spec": (lambda c: c["spec"].update(lora=1), r"unknown keys \['lora'\]"),
    "unknown argument": (lambda c: c["arguments"].update(device=1), "'device', .* L2P takes"),
    "string for number": (
        lambda c: c["spec"].update(guidance_scale="3"),
        "guidance_scale is '3', expected a number",
    ),
    "string for number in the arguments": (
        lambda c: c["arguments"].update(num_branches="2"),
        "argument num_branches is '2', but its spec says 2",
    ),
    "newer schema": (lambda c: c.update(schema_version=9), "schema_version 9.*upgrade foreseer"),
    "unknown class": (lambda c: c.update(predictor_class="X"), "predictor_class is 'X', expected"),
}


@pytest.mark.parametrize("fault", CONFIGS)
def test_case_20_an_ill_formed_config_is_refused_by_the_name_of_its_key(predictor, fault):
    change, says = CONFIGS[fault]
    change_config(predictor, change)
    with pytest.raises(CheckpointError, match=rf"config\.json.*{says}"):
        load_predictor(predictor)


@pytest.mark.parametrize("offline", [True, False])
def test_case_23_a_hub_that_is_not_there_names_cache_and_switch(tmp_path, monkeypatch, offline):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))

    def unreachable(*_: object, **__: object) -> None:
        raise LocalEntryNotFoundError("cannot reach the hub")

    if not offline:
        monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(CheckpointError) as caught:
        load_predictor("owner/name", revision="v9")
    switch = f"HF_HUB_OFFLINE is {'on' if offline else 'off'}"
    for text in ("revision v9 of owner/name", str(tmp_path), switch, "give a folder"):
        assert text in str(caught.value)


def test_case_23_a_revision_that_is_missing_is_named(monkeypatch):
    def missing(*_: object, **__: object) -> None:
        answer = SimpleNamespace(headers={}, request=None, status_code=404)
        raise RevisionNotFoundError("Revision Not Found", response=answer)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", missing)
    with pytest.raises(CheckpointError, match="revision v9 of owner/name .*Revision Not Found"):
        load_predictor("owner/name", revision="v9")
