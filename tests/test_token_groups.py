"""Token groups arrive with the call: rows and readouts of their own, group-wise Grams, refusals."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from families.family import final, seeded
from families.images import flux_prompt
from field_pipelines import kontext
from PIL import Image
from readout_cases import fit, module_of, remember
from tiny_hosts import pipeline, run
from torch import Tensor

from foreseer.checkpoints.format import load_predictor, save_predictor
from foreseer.integration.forecasting import forecasting
from foreseer.predictors.base import History, Step
from foreseer.predictors.linear import L2P
from foreseer.predictors.partition import ChannelGroups
from foreseer.predictors.rules import Reuse, Taylor
from foreseer.predictors.token_groups import REGIONS, TokenGroups, region_groups
from foreseer.training.least_squares import fit_rows
from foreseer.trajectories.prompts import Item
from foreseer.trajectories.recorder import record
from foreseer.trajectories.recording import Recording

STEPS, ANCHORS, GRID = 6, [0, 2, 4], (4, 4)
PICTURE, SOURCE = 16, 16
SIZE = {"height": 64, "width": 64, "max_area": 64 * 64, "_auto_resize": False}
GIVEN = {**SIZE, "num_inference_steps": STEPS}


def item(seed: int) -> Item:
    image = Image.new("RGB", (64, 64), (200, 120, 30 * seed))
    return Item(seed, seed, flux_prompt(seed) | {"image": image})


def drawn(pipe: Any, seed: int = 3, **changes: Any) -> Tensor:
    settings = {"generator": seeded(seed), **item(seed).inputs, **GIVEN, **changes}
    return final(pipe(**settings, output_type="latent"))


def corner(count: int = 1, **changes: Any) -> Tensor:
    """Groups of pictures whose upper left corner is edited."""
    mask = torch.zeros(count, 32, 32)
    mask[:, :10, :6] = 1
    return region_groups(mask, GRID, num_reference=SOURCE, **changes)


def by_prompt(arguments: Any) -> Tensor:
    """Other groups for every prompt, from the arguments of the call."""
    embeds = arguments["prompt_embeds"]
    mask = torch.zeros(len(embeds), 32, 32)
    for own, row in zip(mask, embeds, strict=True):
        own[: 8 + 8 * (int(1000 * row[0, 0].abs()) % 3), :12] = 1
    return region_groups(mask, GRID, num_reference=SOURCE)


@pytest.fixture(scope="module")
def pipe() -> Any:
    return kontext()


@pytest.fixture(scope="module")
def recording(pipe, tmp_path_factory) -> Recording:
    out = tmp_path_factory.mktemp("groups") / "recording"
    items = [item(seed) for seed in range(5)]
    parts = {"output/regions": TokenGroups()}
    more: dict[str, Any] = {"taps": ["output", "hidden"], "batch_size": 1, "features": "full"}
    return Recording(
        record(pipe, items, out, partitions=parts, token_groups=by_prompt, **more, **GIVEN)
    )


def rows_of(predictor: L2P) -> L2P:
    """Random rows that sum to one, other ones for every group."""
    weight = torch.rand(predictor.weight.shape, generator=seeded(1)).double() - 0.3
    known = torch.zeros(STEPS, STEPS)
    for t in range(STEPS):
        known[t, [a for a in ANCHORS if a < t]] = 1.0
    weight = weight * known
    predictor.set_rows(weight / weight.sum(-1, keepdim=True).where(known.any(-1)[:, None], 1.0))
    return predictor


# ---------------------------------------------------------------------------------- masks to groups


def test_a_token_is_edited_if_any_of_its_pixels_is_and_rings_are_counted_diagonally():
    mask = torch.zeros(1, 32, 32)
    mask[0, 9, 13] = 255  # one pixel, of the token in row 2 and column 3
    groups = region_groups(mask, (8, 8), rings=2, num_reference=3)
    square = groups[0, :64].view(8, 8)
    assert square[2, 3] == 0 and int((square == 0).sum()) == 1
    assert torch.equal((square == 1).nonzero().amin(0), torch.tensor([0, 1]))
    assert int((square == 1).sum()) == 5 * 5 - 1
    assert groups[0, 64:].tolist() == [3, 3, 3]
    whole = region_groups(torch.ones(1, 32, 32), GRID, rings=2)
    assert whole.unique().tolist() == [0]  # a whole picture may be edited: other groups are absent


@pytest.mark.parametrize(
    ("mask", "told"),
    [
        (torch.stack([torch.ones(32, 32), torch.zeros(32, 32)]), r"samples \[1\] are empty"),
        (torch.ones(1, 30, 32), r"mask of shape \(1, 30, 32\), expected .* height that 4 tokens"),
        (None, "mask is a NoneType, expected a tensor.*leave groups out"),
    ],
)
def test_masks_that_mean_nothing_are_refused(mask, told):
    with pytest.raises(ValueError, match=told):
        region_groups(mask, GRID)


# ------------------------------------------------------------------------------- rows of the groups


def test_every_token_is_forecast_by_the_row_of_its_own_samples_group():
    predictor = rows_of(L2P(STEPS, ANCHORS, 2, partition=TokenGroups()))
    groups = torch.randint(4, (3, 5), generator=seeded(2))
    history, features = History(), torch.randn(2, 6, 5, 4, generator=seeded(3))
    for anchor, feature in zip((0, 2), features, strict=True):
        history.push(Step(anchor, 0.5, STEPS, (0, 1)), feature)
    found = predictor(history, Step(3, 0.4, STEPS, (0, 1), groups=groups.repeat(2, 1)))
    for branch in range(2):
        for sample in range(3):
            for token in range(5):
                row = predictor.weight[branch, groups[sample, token], 3, [0, 2]].float()
                expected = row @ features[:, 3 * branch + sample, token]
                torch.testing.assert_close(found[3 * branch + sample, token], expected)


def test_one_row_for_all_groups_is_the_common_row(pipe):
    common = rows_of(L2P(STEPS, ANCHORS))
    own = L2P(STEPS, ANCHORS, partition=TokenGroups())
    own.set_rows(common.weight[:, None].expand(-1, 4, -1, -1))
    common.learned = own.learned = False  # nothing was recorded: checked against no host
    with forecasting(pipe, common, ANCHORS):
        expected = drawn(pipe)
    with forecasting(pipe, own, ANCHORS, groups=corner()) as attached:
        torch.testing.assert_close(drawn(pipe), expected, rtol=1e-4, atol=1e-4)
    told = str(attached.report())
    assert "token groups: edit 6%, near 12%, keep 31%, reference 50%" in told


def test_only_the_tokens_of_a_group_change_with_its_row(pipe):
    predictor = L2P(STEPS, [0, 1, 2, 3, 4], partition=TokenGroups())
    predictor.learned = False
    with forecasting(pipe, predictor, predictor.anchors, groups=corner()):
        before = drawn(pipe)
    predictor.weight[:, 0, 5] *= 2.0  # the last step of the edited tokens
    with forecasting(pipe, predictor, predictor.anchors, groups=corner()):
        changed = (drawn(pipe) != before).any(-1)
    assert torch.equal(changed[0], corner()[0, :PICTURE] == 0)


def test_branches_of_one_call_share_the_groups_of_their_samples():
    pipe = pipeline("dit_guided")
    predictor = L2P(8, [0, 3], 2, partition=TokenGroups(("left", "right")))
    predictor.learned = False
    groups = torch.tensor([[0, 1, 0, 1], [1, 1, 0, 0]])
    common = L2P(8, [0, 3], 2)
    common.learned = False
    with forecasting(pipe, common, [0, 3], tap="hidden"):
        expected = run("dit_guided", pipe)
    assert len(expected) == 2
    with forecasting(pipe, predictor, [0, 3], tap="hidden", groups=groups):
        torch.testing.assert_close(run("dit_guided", pipe), expected)


# ----------------------------------------------------------------------------- recordings and fits


def test_grams_of_the_groups_are_recorded_and_leave_the_source_picture_out(recording, pipe):
    assert recording.header.recipe["partitions"] == {
        "output/regions": {"class": "TokenGroups", "names": list(REGIONS)}
    }
    for seed in (1, 2):
        stored = recording.load(seed)
        features = stored["feature/output"][0]  # (S, 32, D)
        groups = by_prompt({"prompt_embeds": item(seed).inputs["prompt_embeds"]})[0]
        own = stored["gram/output/regions"][0]
        for part in range(3):
            inside = features[:, :PICTURE][:, groups[:PICTURE] == part].flatten(1).double()
            torch.testing.assert_close(own[part], inside @ inside.mT)
        assert not own[3].any()  # what the pipeline cuts off enters no picture
        torch.testing.assert_close(own.sum(0), stored["gram/output"][0])
        assert stored["gram/hidden"].shape == (1, STEPS, STEPS)


def test_fitted_rows_of_the_groups_are_saved_loaded_and_deployed(recording, pipe, tmp_path):
    predictor = fit_rows(recording, ANCHORS, partition="regions")
    assert predictor.weight.shape == (1, 4, STEPS, STEPS)
    assert predictor.weight[0, 3, 3, 2] == 1.0  # reuse, of the tokens nobody sees
    folder = save_predictor(predictor, predictor.spec, tmp_path / "own")
    loaded = load_predictor(folder)
    assert loaded.group_names == REGIONS and torch.equal(loaded.weight, predictor.weight)
    with forecasting(pipe, loaded, groups=by_prompt):
        first = drawn(pipe)
    with forecasting(pipe, predictor, groups=by_prompt({**item(3).inputs})):
        assert torch.equal(drawn(pipe), first)
    common = fit_rows(recording, ANCHORS)
    assert not torch.allclose(common.weight[0], predictor.weight[0, 0])


def test_a_readout_of_groups_is_fitted_walked_and_deployed(recording, pipe, monkeypatch, tmp_path):
    remember([item(seed) for seed in range(5)], monkeypatch)
    own = {"partition": "regions", "groups": by_prompt, "past": 1, "neighbours": True}
    module = module_of(str(recording.folder), pipe, ANCHORS, rank=3, **own)
    module.batch_size = 1
    fit(module)
    predictor = module.deployed()
    assert predictor.outer.shape == (3, 4, 16, 3, 3, 3)
    assert not torch.equal(predictor.weight[0, 0], predictor.weight[0, 2])
    predictor.spec = fit_rows(recording, ANCHORS).spec
    folder = save_predictor(predictor, predictor.spec, tmp_path / "readout")
    with forecasting(pipe, load_predictor(folder), groups=by_prompt):
        found = drawn(pipe)
    full = recording.load(3)["final"]
    with forecasting(pipe, Reuse(), ANCHORS):
        reused = drawn(pipe)
    assert (found[0] - full).norm() < (reused[0] - full).norm()


def test_a_readout_with_one_group_in_every_token_is_the_common_readout(pipe, monkeypatch, tmp_path):
    items = [item(seed) for seed in range(4)]
    remember(items, monkeypatch)
    all_edited = region_groups(torch.ones(1, 32, 32), GRID, num_reference=SOURCE)
    parts = {"output/regions": TokenGroups()}
    folder = str(record(pipe, items, tmp_path / "r", batch_size=1, partitions=parts,
                        token_groups=all_edited, **GIVEN))  # fmt: skip
    common = module_of(folder, pipe, ANCHORS, rank=2)
    same = module_of(folder, pipe, ANCHORS, 2, partition="regions", groups=lambda given: all_edited)
    for module in (common, same):
        module.batch_size = 1
        fit(module)
    one, other = common.deployed(), same.deployed()
    torch.testing.assert_close(other.weight[:, 0], one.weight, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(other.outer[:, 0].float(), one.outer.float(), rtol=2e-2, atol=1e-5)


# ---------------------------------------------------------------------------------------- refusals


@pytest.mark.fault
@pytest.mark.parametrize(
    ("groups", "told"),
    [
        (None, "goes by the token groups edit, near, keep, reference; pass groups="),
        (corner()[:, :PICTURE], r"for 16 tokens, and the tap 'output' has 32 tokens"),
        (corner(2), r"2 rows, found a call of 1 rows; give one row per sample"),
        (corner() + 1, r"run from 1 to 4, expected 0 to 3: 0 edit, 1 near, 2 keep, 3 reference"),
        (corner() - 1, r"run from -1 to 2, expected 0 to 3"),
        (corner().float(), r"are \(1, 32\) of torch.float32, expected whole numbers"),
        (corner()[0], r"are \(32,\) of torch.int64, expected whole numbers \(samples, tokens\)"),
        (lambda given: None, "token groups are NoneType, expected whole numbers"),
        (corner() > 1, r"are \(1, 32\) of torch.bool, expected whole numbers"),
    ],
)
def test_token_groups_that_do_not_fit_are_refused_and_a_clean_run_follows(pipe, groups, told):
    predictor = L2P(STEPS, ANCHORS, partition=TokenGroups())
    predictor.learned = False
    plain = drawn(pipe)
    with pytest.raises(ValueError, match=told):
        with forecasting(pipe, predictor, ANCHORS, groups=groups):
            drawn(pipe)
    assert torch.equal(drawn(pipe), plain)


@pytest.mark.fault
def test_token_groups_of_both_guidance_halves_are_refused():
    pipe = pipeline("dit_guided")
    predictor = L2P(8, [0, 3], 2, partition=TokenGroups(("left", "right")))
    predictor.learned = False
    with pytest.raises(ValueError, match="4 rows, found a run of 2 samples; .* branches share it"):
        with forecasting(pipe, predictor, [0, 3], "hidden", groups=torch.zeros(4, 4).long()):
            run("dit_guided", pipe)


@pytest.mark.fault
def test_token_groups_that_nothing_goes_by_are_refused(pipe):
    with pytest.raises(ValueError, match="groups= was given, but Taylor treats all tokens alike"):
        with forecasting(pipe, Taylor(1), ANCHORS, groups=corner()):
            pass
    with pytest.raises(ValueError, match="expected two or more names"):
        TokenGroups(["edit"])
    with pytest.raises(ValueError, match="have not met a call"):
        TokenGroups().split(torch.zeros(1, 2, 3))


@pytest.mark.fault
def test_token_groups_are_recorded_with_their_names_or_not_at_all(pipe, tmp_path):
    for wrong in ({"token_groups": corner()}, {"partitions": {"output/regions": TokenGroups()}}):
        with pytest.raises(ValueError, match="token groups are recorded with both"):
            record(pipe, [item(1)], tmp_path / "r", **wrong, **GIVEN)
    assert not (tmp_path / "r").exists()
    parts = {"output/a": TokenGroups(("x", "y")), "output/b": TokenGroups()}
    with pytest.raises(ValueError, match="have other names for their token groups"):
        record(pipe, [item(1)], tmp_path / "r", partitions=parts, token_groups=corner(), **GIVEN)


@pytest.mark.fault
def test_a_readout_of_groups_asks_for_both_and_keeps_no_sums(recording, pipe):
    folder = str(recording.folder)
    with pytest.raises(ValueError, match="groups not given"):
        module_of(folder, pipe, ANCHORS, partition="regions")
    with pytest.raises(ValueError, match="found no partition and groups given"):
        module_of(folder, pipe, ANCHORS, groups=by_prompt)
    with pytest.raises(ValueError, match="sums of a readout of token groups are not kept"):
        module_of(folder, pipe, ANCHORS, partition="regions", groups=by_prompt, keep_sums=True)


@pytest.mark.fault
def test_an_error_in_mid_edit_leaves_the_pipeline_as_it_was(pipe):
    plain = drawn(pipe)
    predictor = L2P(STEPS, ANCHORS, partition=TokenGroups())
    predictor.learned = False

    def stop(owner: Any, index: int, *rest: Any) -> dict:
        if index == 3:
            raise InterruptedError
        return {}

    with forecasting(pipe, predictor, ANCHORS, groups=by_prompt):
        expected = drawn(pipe)
        with pytest.raises(InterruptedError):
            drawn(pipe, seed=1, callback_on_step_end=stop)
        assert torch.equal(drawn(pipe), expected)  # the groups are those of this call again
    assert torch.equal(drawn(pipe), plain)


@pytest.mark.fault
def test_two_pipelines_with_one_transformer_do_not_share_groups(pipe):
    other = type(pipe)(**{**pipe.components, "scheduler": copy.deepcopy(pipe.scheduler)})
    other.set_progress_bar_config(disable=True)
    plain = drawn(other)
    predictor = L2P(STEPS, ANCHORS, partition=TokenGroups())
    predictor.learned = False
    with forecasting(pipe, predictor, ANCHORS, groups=corner()):
        assert torch.equal(drawn(other), plain)  # its calls are its own
        with pytest.raises(ValueError, match="already"):
            with forecasting(other, predictor, ANCHORS, groups=corner()):
                pass
        forecast = drawn(pipe)
    assert not torch.equal(forecast, plain)


def test_partitions_of_channels_are_the_same_at_every_call():
    groups = ChannelGroups([0, 1, 1])
    assert groups.at(None) is groups
    assert not Path("groups").exists()
