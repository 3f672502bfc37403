"""Every family of pipelines: what is recorded and put back is exact, or the host is refused."""

import functools

import pytest
import torch
from diffusers import ConsisIDTransformer3DModel
from families import FAMILIES, MORE, call
from families.family import noise, tiny
from torch import nn

from foreseer.checkpoints.format import load_predictor, save_predictor
from foreseer.evaluation.verify import (
    Replay,
    check_abort,
    check_detached,
    check_tap,
    final_latents,
    footprint,
)
from foreseer.integration.forecasting import attach, forecasting
from foreseer.integration.host.call import Call
from foreseer.integration.host.proof import prove
from foreseer.integration.host.trunk import TRUNK_FACTS, Trunk, UnsupportedHost
from foreseer.integration.session import Session
from foreseer.predictors.rules import Reuse
from foreseer.training.least_squares import fit_rows
from foreseer.trajectories.prompts import Item
from foreseer.trajectories.recorder import record
from foreseer.trajectories.recording import Recording

ANCHORS = [0, 2, 5]
EVERY = FAMILIES | MORE
REFUSED = ("ltx2", "ltx2_all_guidance")
SUPPORTED = [name for name in EVERY if name not in REFUSED]
OUTPUT_ONLY = ("latte",)
NO_RESIDUAL = ("lumina2", "zimage", "kandinsky5")


@pytest.mark.parametrize(
    ("name", "tap"),
    [
        *((name, "output") for name in SUPPORTED),
        *((name, "hidden") for name in SUPPORTED if name not in OUTPUT_ONLY),
    ],
)
def test_a_tap_put_back_gives_the_same_picture_bit_for_bit(name, tap):
    pipe = EVERY[name].build()
    run = functools.partial(call, EVERY[name], pipe)
    expected = final_latents(pipe, run)
    before = footprint(pipe)
    checks = [*check_tap(pipe, run, tap, expected), check_abort(pipe, run, tap, expected)]
    checks.append(check_detached(pipe, before))
    failed = [check for check in checks if check.passed is False]
    assert not failed and len(checks) == 5


@pytest.mark.parametrize("name", REFUSED)
def test_a_host_with_two_heads_is_refused_with_the_reason(name):
    pipe = EVERY[name].build()
    plain = call(EVERY[name], pipe)
    with pytest.raises(UnsupportedHost, match="sound beside the video"):
        with forecasting(pipe, Reuse(), ANCHORS, "hidden"):
            call(EVERY[name], pipe)
    with pytest.raises(UnsupportedHost, match="returned a tuple of 2, expected a tensor"):
        with forecasting(pipe, Reuse(), ANCHORS, "output"):
            call(EVERY[name], pipe)
    assert torch.equal(call(EVERY[name], pipe), plain)


@pytest.mark.parametrize("name", NO_RESIDUAL)
def test_a_trunk_that_starts_with_refiners_has_no_residual(name):
    pipe = EVERY[name].build()
    with pytest.raises(UnsupportedHost, match="has no `residual` tap"):
        with forecasting(pipe, Reuse(), ANCHORS, "residual"):
            call(EVERY[name], pipe)


@pytest.mark.parametrize("name", ["sd3", "cogvideox", "hunyuan_video", "ernie_image"])
def test_a_residual_is_put_back_up_to_rounding(name):
    pipe = EVERY[name].build()
    plain = call(EVERY[name], pipe)
    replay = Replay("residual")
    session = Session(pipe, replay)
    call(EVERY[name], pipe)
    replay.replay()
    replayed = call(EVERY[name], pipe)
    session.detach()
    # a + (b - a) rounds twice; eight steps of float32 carry that along
    torch.testing.assert_close(replayed, plain, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("head", ["", "norm_out.linear", "time_text_embed.timestep_embedder"])
def test_a_wrong_fact_is_found_out_before_anything_is_forecast(head, monkeypatch):
    pipe = FAMILIES["flux"].build()
    plain = call(FAMILIES["flux"], pipe)
    wrong = Trunk(("transformer_blocks", "single_transformer_blocks"), head)
    monkeypatch.setitem(TRUNK_FACTS, "FluxTransformer2DModel", wrong)
    with forecasting(pipe, Reuse(), ANCHORS, "output"):
        call(FAMILIES["flux"], pipe)  # no trunk is needed
    with pytest.raises(UnsupportedHost):
        with forecasting(pipe, Reuse(), ANCHORS, "hidden"):
            call(FAMILIES["flux"], pipe)
    assert torch.equal(call(FAMILIES["flux"], pipe), plain)
    assert type(pipe.transformer.transformer_blocks) is nn.ModuleList


def test_features_that_count_tokens_first_are_refused_without_their_axis(monkeypatch):
    monkeypatch.delitem(TRUNK_FACTS, "ErnieImageTransformer2DModel")
    pipe = MORE["ernie_image"].build()
    with pytest.raises(UnsupportedHost, match="expected samples first"):
        with forecasting(pipe, Reuse(), ANCHORS, "hidden"):
            call(MORE["ernie_image"], pipe)


def test_frames_on_the_axis_of_the_samples_leave_the_output_only():
    pipe = MORE["latte"].build()
    with pytest.raises(UnsupportedHost, match="frames and samples on one axis"):
        with forecasting(pipe, Reuse(), ANCHORS, "hidden"):
            call(MORE["latte"], pipe)


def test_the_modules_of_a_face_between_the_blocks_do_not_mislead():
    widths = {"num_attention_heads": 2, "attention_head_dim": 24, "text_embed_dim": 12}
    host = tiny(
        ConsisIDTransformer3DModel,
        **widths,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        num_layers=3,
        sample_width=4,
        sample_height=4,
        sample_frames=5,
        max_text_seq_length=3,
        is_train_face=True,
        cross_attn_interval=1,
        cross_attn_dim_head=8,
        cross_attn_num_heads=2,
        LFE_id_dim=8,
        LFE_vit_dim=8,
        LFE_depth=5,
        LFE_dim_head=8,
        LFE_num_heads=2,
        LFE_num_id_token=2,
        LFE_num_querie=3,
        LFE_output_dim=32,
    )
    given = {
        "hidden_states": noise(0, 2, 4, 4, 4),
        "encoder_hidden_states": noise(1, 3, 12),
        "timestep": torch.tensor([500]),
        "id_cond": noise(2, 8),
        "id_vit_hidden": [noise(3 + i, 2, 8) for i in range(5)],
    }
    with torch.no_grad():
        trunk, _ = prove(Call(host, host.forward, (), given), {"hidden"}, None)
    assert trunk.head == "norm_final"


def recorded(name, folder, **changes):
    """A recording of a family and its pipeline."""
    family = EVERY[name]
    pipe = family.build()
    items = [Item(i, i, family.inputs(i)) for i in range(4)]
    settings = {**family.settings, **changes}
    return pipe, Recording(record(pipe, items, folder, batch_size=2, **settings))


def fitted(recording, tap, anchors, folder):
    """A predictor fitted on a recording, saved and loaded again."""
    predictor = fit_rows(recording, anchors, tap)
    save_predictor(predictor, predictor.spec, folder)
    return load_predictor(folder)


@pytest.mark.parametrize("name", ["flux_cfg", "dit", "zimage", "wan22", "cogvideox", "ernie_image"])
@pytest.mark.parametrize("tap", ["output", "hidden"])
def test_what_is_recorded_fits_a_predictor_that_runs(name, tap, tmp_path):
    pipe, recording = recorded(name, tmp_path / "r")
    header = recording.header
    assert header.num_branches == EVERY[name].branches
    anchors = sorted({*ANCHORS, *header.expert_steps})
    predictor = fitted(recording, tap, anchors, tmp_path / "p")
    full = call(EVERY[name], pipe, (7, 8))
    with forecasting(pipe, predictor) as attached:
        forecast = call(EVERY[name], pipe, (7, 8))
    assert attached.report().anchors == anchors
    error = (forecast - full).norm() / full.norm()
    assert 0 < error < 0.5  # random weights: forecasts are rough, and never of another order


def test_a_predictor_of_two_transformers_keeps_to_their_steps(tmp_path):
    pipe, recording = recorded("wan22", tmp_path / "r")
    assert recording.header.expert_steps == [0, 3]
    predictor = fitted(recording, "hidden", [0, 2, 3, 5], tmp_path / "p")
    assert type(predictor).__name__ == "L2P"
    assert not predictor.weight[:, 3:, :3].any()
    with pytest.raises(ValueError, match="all of them anchors"):
        fit_rows(recording, [0, 2, 5])
    pipe.register_to_config(boundary_ratio=0.5)
    with pytest.raises(ValueError, match="changes over at another step"):
        with forecasting(pipe, predictor):
            call(FAMILIES["wan22"], pipe)


def test_a_change_in_the_second_transformer_is_noticed(tmp_path):
    pipe, recording = recorded("wan22", tmp_path / "r")
    predictor = fitted(recording, "output", [0, 3, 5], tmp_path / "p")
    pipe.transformer_2.proj_out.weight.data.mul_(1.5)
    with pytest.raises(ValueError, match="weights"):
        attach(pipe, predictor)


def test_both_halves_of_a_doubled_sample_are_branches(tmp_path):
    pipe, recording = recorded("dit", tmp_path / "r")
    with torch.no_grad():
        grams = recording.stack("gram/output")
    assert grams.shape[1] == 2
    assert not torch.equal(grams[:, 0], grams[:, 1])
