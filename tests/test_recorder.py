"""Recording changes no image, stores what was computed, and resumes to the same bytes."""

import hashlib
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_hosts import CALLS_PER_STEP, HOSTS, items, pipeline, settings

from foreseer.trajectories.gram import gram
from foreseer.trajectories.prompts import class_items, generate_batch
from foreseer.trajectories.recorder import record
from foreseer.trajectories.recording import Recording, RecordingError

STEPS = 5
every_host = pytest.mark.parametrize("host", HOSTS)


def recorded(host: str, out: Path, num_items: int = 4, pipe: Any = None, **changes: Any) -> Path:
    arguments = {"batch_size": 2, **settings(host, STEPS), **changes}
    return record(pipe or pipeline(host), items(host, num_items), out, **arguments)


def hashes(folder: Path) -> dict[str, str]:
    """Every shard, the header and the sorted lines of the manifests."""
    found = {}
    for path in sorted([*folder.glob("shards/**/*.safetensors"), *folder.glob("*.json*")]):
        content = b"".join(sorted(path.read_bytes().splitlines(keepends=True)))
        found[str(path.relative_to(folder))] = hashlib.sha256(content).hexdigest()
    return found


# --------------------------------------------------------------------------------- what is stored


@every_host
@pytest.mark.parametrize("taps", [("output",), ("output", "hidden", "residual", "blocks.*")])
def test_recorded_images_are_bit_for_bit_the_pipelines_own(host, taps, tmp_path):
    pipe = pipeline(host)
    plain = []
    for batch in (items(host, 4)[:2], items(host, 4)[2:]):
        output = generate_batch(pipe, batch, output_type="latent", **settings(host, STEPS))
        plain.append(output.images)
    recording = Recording(recorded(host, tmp_path, pipe=pipe, taps=taps))
    assert torch.equal(recording.stack("final"), torch.cat(plain))
    assert "forward" not in vars(pipe.transformer) and "step" not in vars(pipe.scheduler)


@every_host
def test_grams_are_those_of_the_stored_features(host, tmp_path):
    taps = ("output", "hidden", "residual", "blocks.0")
    recording = Recording(recorded(host, tmp_path, taps=taps, features="full"))
    branches = 2 if host in ("dit_guided", "flux_two_calls") else 1
    assert recording.header.num_branches == branches
    assert recording.header.taps == sorted(taps)
    for item in recording.items:
        stored = recording.load(item)
        for tap in taps:
            features = stored[f"feature/{tap}"]
            assert features.shape[:2] == (branches, STEPS)
            assert torch.equal(stored[f"gram/{tap}"], gram(features.flatten(2)))
            assert stored[f"gram/{tap}"].dtype == torch.float64


def test_states_outputs_and_sigmas_are_one_euler_run(tmp_path):
    recording = Recording(recorded("dit_guided", tmp_path, features="full"))
    sigmas = [*recording.header.sigmas, 0.0]
    for item in recording.items:
        stored = recording.load(item)
        v_cond, v_uncond = stored["feature/output"]
        for s in range(STEPS):
            v = v_uncond[s] + 3.0 * (v_cond[s] - v_uncond[s])
            after = stored["states"][s] + (sigmas[s + 1] - sigmas[s]) * v
            torch.testing.assert_close(after, stored["states"][s + 1])
        assert torch.equal(stored["states"][-1], stored["final"])


@pytest.mark.parametrize("host", ["dit", "dit_guided"])
def test_the_last_block_leaves_what_the_head_gets(host, tmp_path):
    taps = ("hidden", "residual", "blocks.*")
    recording = Recording(recorded(host, tmp_path, taps=taps, features="full"))
    assert recording.header.taps == ["blocks.0", "blocks.1", "hidden", "residual"]
    stored = recording.load(0)
    assert torch.equal(stored["feature/blocks.1"], stored["feature/hidden"])
    assert torch.equal(stored["gram/blocks.1"], stored["gram/hidden"])
    assert not torch.allclose(stored["feature/blocks.0"], stored["feature/hidden"])


def test_blocks_of_both_kinds_are_numbered_in_calling_order(tmp_path):
    recording = Recording(recorded("flux", tmp_path, taps=("hidden", "blocks.*"), features="full"))
    assert recording.header.taps == ["blocks.0", "blocks.1", "blocks.2", "hidden"]
    stored = recording.load(1)
    assert torch.equal(stored["feature/blocks.2"], stored["feature/hidden"])


def test_two_calls_and_one_batched_call_number_their_branches_alike(tmp_path):
    batched = Recording(recorded("dit_guided", tmp_path / "dit", features="full"))
    alone = Recording(recorded("dit", tmp_path / "alone", features="full"))
    first = [r.load(0)["feature/output"][0, 0] for r in (batched, alone)]
    torch.testing.assert_close(*first)  # branch 0 is the conditional one
    two_calls = Recording(recorded("flux_two_calls", tmp_path / "flux2", features="full"))
    one_call = Recording(recorded("flux", tmp_path / "flux", features="full"))
    first = [r.load(0)["feature/output"][0, 0] for r in (two_calls, one_call)]
    assert torch.equal(*first)


@pytest.mark.parametrize(
    ("num_tokens", "expected"), [(2, [0, 3]), (3, [0, 2, 3]), (9, [0, 1, 2, 3])]
)
def test_the_tokens_mode_keeps_the_tokens_it_names(num_tokens, expected, tmp_path):
    few = Recording(
        recorded("dit_guided", tmp_path / "few", features="tokens", num_tokens=num_tokens)
    )
    full = Recording(recorded("dit_guided", tmp_path / "full", features="full"))
    for item in full.items:
        stored = few.load(item)
        assert stored["tokens/hidden"].tolist() == expected
        whole = full.load(item)["feature/hidden"]
        assert torch.equal(stored["feature/hidden"], whole[:, :, expected])
        assert torch.equal(stored["gram/hidden"], full.load(item)["gram/hidden"])


def test_only_what_is_asked_for_is_stored(tmp_path):
    recording = Recording(recorded("dit", tmp_path, taps=("output",), states=False))
    assert recording.names(0) == ["final", "gram/output"]
    assert not recording.header.states


def test_the_header_tells_the_run(tmp_path):
    pipe = pipeline("dit_guided")
    header = Recording(recorded("dit_guided", tmp_path, pipe=pipe)).header
    pipe.scheduler.set_timesteps(STEPS)
    assert header.sigmas == pipe.scheduler.sigmas[:-1].tolist()
    assert header.scheduler["class"] == "FlowMatchEulerDiscreteScheduler"
    assert header.scheduler["guidance_scale"] == 3.0
    assert header.host["class"] == "DiTTransformer2DModel"
    assert (header.dtype, header.latent_shape) == ("float32", [1, 4, 4])
    assert Recording(tmp_path).meta(2) == {"seed": 102, "class_labels": 2}


# ------------------------------------------------------------------------------------------ breaks


class Interrupted(Exception):
    pass


def stop_at(pipe: Any, call: int, how: Any) -> Any:
    """Let the `call`-th call of the transformer's last module go wrong."""
    calls = []

    def failing(*_):
        calls.append(1)
        if len(calls) == call:
            how()

    name = "proj_out_2" if hasattr(pipe.transformer, "proj_out_2") else "proj_out"
    pipe.transformer.get_submodule(name).register_forward_hook(failing)
    return pipe


def fail() -> None:
    raise Interrupted


@pytest.mark.parametrize("host", ["dit_guided", "flux_two_calls"])
@pytest.mark.parametrize("batch", [0, 1, 2])
def test_after_an_exception_a_recording_resumes_to_the_same_bytes(host, batch, tmp_path):
    options = {"taps": ("output", "hidden"), "features": "full", "num_items": 5}
    recorded(host, tmp_path / "whole", **options)
    proof = 4  # calls that prove the replay and ask for the image's tokens, within the first step
    pipe = stop_at(pipeline(host), proof + (batch * STEPS + 2) * CALLS_PER_STEP[host], fail)
    with pytest.raises(Interrupted):
        recorded(host, tmp_path / "broken", pipe=pipe, **options)
    assert "forward" not in vars(pipe.transformer)
    finished = 2 * batch
    if batch:
        assert Recording(tmp_path / "broken").items == list(range(finished))
    recorded(host, tmp_path / "broken", **options)
    assert hashes(tmp_path / "broken") == hashes(tmp_path / "whole")
    assert Recording(tmp_path / "broken").verify() == []


@pytest.mark.fault
def test_after_a_kill_a_recording_resumes_to_the_same_bytes(tmp_path):
    recorded("dit_guided", tmp_path / "whole", num_items=6)
    child = os.fork()
    if child == 0:
        pipe = stop_at(pipeline("dit_guided"), 13, lambda: os.kill(os.getpid(), signal.SIGKILL))
        recorded("dit_guided", tmp_path / "killed", num_items=6, pipe=pipe)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    assert Recording(tmp_path / "killed").items == [0, 1]
    recorded("dit_guided", tmp_path / "killed", num_items=6)
    assert hashes(tmp_path / "killed") == hashes(tmp_path / "whole")


def test_a_finished_recording_runs_nothing_again(tmp_path):
    recorded("dit", tmp_path)
    before = hashes(tmp_path)
    recorded("dit", tmp_path, pipe=stop_at(pipeline("dit"), 1, fail))
    assert hashes(tmp_path) == before


def test_more_items_are_added_to_those_there_are(tmp_path):
    recorded("dit", tmp_path / "grown", num_items=2)
    recorded("dit", tmp_path / "grown", num_items=6)
    recorded("dit", tmp_path / "whole", num_items=6)
    assert hashes(tmp_path / "grown") == hashes(tmp_path / "whole")


def test_two_ranks_record_the_items_of_one(tmp_path):
    for rank in (1, 0):
        recorded("dit", tmp_path / "two", rank=rank, world=2, batch_size=1)
    recorded("dit", tmp_path / "one", batch_size=1)
    two, one = Recording(tmp_path / "two"), Recording(tmp_path / "one")
    assert two.items == one.items
    assert torch.equal(two.stack("gram/hidden"), one.stack("gram/hidden"))
    with pytest.raises(ValueError, match="found 4 items for rank 8 of 8; expected"):
        recorded("dit", tmp_path / "none", rank=8, world=8)


def test_a_rank_without_items_leaves_them_to_the_others(tmp_path):
    pipe = pipeline("dit")
    call = {"batch_size": 1, "world": 3, **settings("dit")}
    for rank in range(3):
        out = record(pipe, items("dit", 2), tmp_path / "r", rank=rank, **call)
    assert Recording(out).items == [0, 1]


# --------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"guidance_scale": 2.0}, "settings"),
        ({"num_inference_steps": 6}, "settings"),
        ({"taps": ("output",)}, "taps is"),
        ({"features": "full"}, "features is none, asked for full"),
        ({"states": False}, "states is True, asked for False"),
        ({"batch_size": 3}, "batch_size is 2, asked for 3"),
    ],
)
def test_a_recording_goes_on_with_its_own_recipe_only(changes, message, tmp_path):
    recorded("dit_guided", tmp_path)
    before = hashes(tmp_path)
    with pytest.raises(RecordingError, match=f"another recipe: .*{message}"):
        recorded("dit_guided", tmp_path, num_items=6, **changes)
    assert hashes(tmp_path) == before


def test_a_recording_goes_on_with_its_own_model_only(tmp_path):
    recorded("dit", tmp_path)
    pipe = pipeline("dit")
    pipe.transformer.proj_out_2.weight.data += 0.1
    with pytest.raises(RecordingError, match="another recipe or host"):
        recorded("dit", tmp_path, num_items=6, pipe=pipe)
    assert Recording(tmp_path).items == [0, 1, 2, 3]


def test_an_item_keeps_its_seed(tmp_path):
    call = {"batch_size": 2, **settings("dit", STEPS)}
    record(pipeline("dit"), class_items(4, 3), tmp_path, **call)
    with pytest.raises(
        RecordingError, match=r"holds item 0 as .*'seed': 0.* asked for .*'seed': 50"
    ):
        record(pipeline("dit"), class_items(6, 3, seed_offset=50), tmp_path, **call)


@pytest.mark.parametrize("taps", [("hidden", "logits"), ("blocks.2",), ()])
def test_unknown_taps_are_refused(taps, tmp_path):
    with pytest.raises(ValueError, match="unknown taps .* this host has output, hidden"):
        recorded("dit", tmp_path, taps=taps)


def test_features_that_are_not_finite_are_refused(tmp_path):
    pipe = pipeline("dit")
    pipe.transformer.proj_out_2.bias.data[0] = float("nan")
    with pytest.raises(ValueError, match="holds NaN or Inf"):
        recorded("dit", tmp_path, pipe=pipe)
    assert Recording(tmp_path).items == []
    assert "forward" not in vars(pipe.transformer)


def test_a_recording_that_cannot_be_held_is_refused_after_its_first_step(tmp_path, monkeypatch):
    pipe, batch = pipeline("dit_guided"), items("dit_guided", 2)
    held = []

    def available(device: torch.device) -> int:
        held.append(device)
        return 1000

    monkeypatch.setattr("foreseer.integration.memory.available_bytes", available)
    with pytest.raises(MemoryError, match="going to cache up to .* after step 0.*or record fewer"):
        record(pipe, batch, tmp_path / "r", taps=["hidden"], **settings("dit_guided"))
    assert len(held) == 1 and not (tmp_path / "r").exists()
    monkeypatch.setattr("foreseer.integration.memory.available_bytes", lambda device: 1 << 40)
    record(pipe, batch, tmp_path / "r", taps=["hidden"], **settings("dit_guided"))
