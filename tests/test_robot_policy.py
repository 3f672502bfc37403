"""The robot policy of the examples: chunks, what forecasts leave of them, faults, its page."""

import json
import math
from pathlib import Path

import pytest
import torch

import foreseer as fs
from foreseer.integration.module_reuse import ModuleReuse, every
from foreseer.predictors import Taylor

pytest.importorskip("action_head", reason="the wheel holds no examples")

from action_head import ACTION, CHUNK, load_head  # noqa: E402
from observations import SPLITS, load_observations  # noqa: E402
from policy import STEPS, TIMES, action_errors, chunk, policy_host  # noqa: E402
from rollout import wilson  # noqa: E402

HOME = Path(__file__).parents[1] / "examples" / "robot_policy"
ROWS = Path(__file__).parents[1] / "benchmarks" / "results" / "vla.json"
ALL = range(STEPS)


@pytest.fixture(scope="module")
def head():
    return load_head()


def some(rows, split="judge"):
    return {name: values[rows] for name, values in load_observations(split).items()}


def alone(head, inputs):
    return chunk(head, inputs, inputs["eps"], TIMES)


def forecast(head, inputs, predictor, anchors=None, **settings):
    with fs.forecasting(policy_host(head), predictor, anchors, **settings) as run:
        with run.steps(TIMES) as steps:
            return chunk(head, inputs, inputs["eps"], steps)


# ------------------------------------------------------------------------------- what is beside it


def test_no_observation_is_in_two_splits():
    seen = [load_observations(split)["observation"] for split in SPLITS]
    for place, first in enumerate(seen):
        assert first.shape[1] == 39 and len(first) == [1020, 126, 258][place]
        for second in seen[place + 1 :]:
            assert not (first[:, None] == second[None]).all(-1).any()


def test_what_is_beside_the_example_is_small():
    sizes = {path.name: path.stat().st_size for path in HOME.rglob("*.safetensors")}
    assert sizes["action_head.safetensors"] < 5e6 and sum(sizes.values()) < 8e6


# ------------------------------------------------------------------------------------ all anchors


@pytest.mark.parametrize("tap", ["output", "hidden"])
def test_with_all_steps_anchors_three_ticks_are_the_head_alone(head, tap):
    host = policy_host(head)
    with fs.forecasting(host, Taylor(1), ALL, tap=tap) as run:
        for tick in range(3):
            inputs = some(slice(tick, tick + 1))
            with run.steps(TIMES) as steps:
                found = chunk(head, inputs, inputs["eps"], steps)
            assert run.report().anchors == list(ALL)
            detached = {name: values.clone() for name, values in inputs.items()}
            assert torch.equal(found, alone(load_head(), detached))


def test_modules_computed_at_every_step_are_the_head_alone(head):
    inputs = some(slice(0, 2))
    names = [f"blocks.{i}.{part}" for i in range(len(head.blocks)) for part in ("attention", "mlp")]
    with ModuleReuse(head, dict.fromkeys(names, every(1, STEPS))) as reuse:

        def said():
            for step, sigma in enumerate(TIMES):
                reuse.at(step)
                yield sigma

        for _ in range(3):
            assert torch.equal(chunk(head, inputs, inputs["eps"], said()), alone(head, inputs))


# --------------------------------------------------------------------------------------- faults


def test_an_observation_of_nan_is_refused_and_the_next_tick_is_clean(head):
    inputs = some(slice(0, 1))
    broken = inputs | {"observation": torch.full_like(inputs["observation"], math.nan)}
    with fs.forecasting(policy_host(head), Taylor(1), (0, 2, 5)) as run:
        with run.steps(TIMES) as steps:
            expected = chunk(head, inputs, inputs["eps"], steps)
        with pytest.raises(ValueError, match="NaN or Inf"), run.steps(TIMES) as steps:
            chunk(head, broken, inputs["eps"], steps)
        with run.steps(TIMES) as steps:  # a tick without any reset after it
            assert torch.equal(chunk(head, inputs, inputs["eps"], steps), expected)


def test_another_number_of_steps_than_fitted_is_refused(head):
    inputs = some(slice(0, 1))
    with fs.forecasting(policy_host(head), str(HOME / "readout_5")) as run:
        with pytest.raises(fs.PredictorMismatch, match="this run has 5"):
            with run.steps(TIMES[::2]) as steps:
                chunk(head, inputs, inputs["eps"], steps)


def test_another_head_than_fitted_is_refused(head):
    other = load_head()
    with torch.no_grad():
        other.embed.weight += 0.01
    with pytest.raises(fs.PredictorMismatch, match="weights"):
        forecast(other, some(slice(0, 1)), str(HOME / "readout_5"))


def test_a_chunk_of_another_length_is_refused(head):
    inputs = some(slice(0, 1))
    inputs["eps"] = inputs["eps"][:, :8]
    with pytest.raises(RuntimeError, match="16"):  # the head's own places
        forecast(head, inputs, str(HOME / "readout_5"))


def test_environments_by_turns_are_as_one_by_one(head):
    def environment(run, key):
        inputs = some(slice(key, key + 1))
        x = inputs["eps"]
        with torch.no_grad(), run.steps(TIMES, key=key) as steps:
            for sigma in steps:
                v = head(x, torch.full((1,), sigma), inputs["observation"], inputs["task"])
                x = x - v / STEPS
                yield None
        found[key] = x

    found = {}
    predictor = fs.load(str(HOME / "readout_5"))
    with fs.forecasting(policy_host(head), predictor) as run:
        running = [environment(run, key) for key in range(3)]
        while running:
            running = [each for each in running if next(each, "over") != "over"]
    for key in range(3):
        assert torch.equal(found[key], forecast(head, some(slice(key, key + 1)), predictor))


def test_a_compiled_head_is_refused():
    head = load_head()
    head.compile()
    with pytest.raises(fs.UnsupportedHost, match="compile its blocks one by one"):
        policy_host(head)


# -------------------------------------------------------------------------- what the page says


def rows():
    if not ROWS.exists():
        pytest.skip("the wheel holds no benchmarks")
    return json.loads(ROWS.read_text())


def test_shipped_readouts_have_the_errors_of_the_table(head):
    judged = load_observations("judge")
    reference = alone(head, judged)
    for row in rows():
        if row["method"] == "readout" and row["evaluations"] in (5, 3):
            predictor = fs.load(str(HOME / f"readout_{row['evaluations']}"))
            assert list(predictor.anchors) == row["chosen"]
            errors = action_errors(forecast(head, judged, predictor), reference)
            assert float(errors.mean()) == pytest.approx(row["action_mse"], rel=0.02)
            assert row["num_samples"] == len(judged["task"]) >= 128


def test_every_row_says_what_the_page_needs():
    needed = {"method", "kind", "evaluations", "cost_ratio", "action_mse", "num_samples"}
    for row in rows():
        assert needed <= row.keys()
        assert row["kind"] == "reference" or {"paired_low", "paired_high"} <= row.keys()


def test_the_page_and_its_picture_show_what_was_measured():
    vla_page = pytest.importorskip("vla_page", reason="the wheel holds no benchmarks")
    page = (ROWS.parents[2] / vla_page.PAGE).read_text()
    assert vla_page.table(rows()) in page and vla_page.success_table(rows()) in page
    headings, lines = vla_page.error_chart(rows()).values()
    by_name = {line[0]: line[1:] for line in lines} if headings[1] == "2" else None
    by_name = by_name or {name: [line[i] for line in lines] for i, name in enumerate(headings)}
    readout = [row for row in rows() if row["method"] == "readout"]
    shown = sorted(readout, key=lambda row: row["evaluations"])
    assert by_name["readout"] == [f"{row['action_mse']:.1e}" for row in shown]


def test_a_wilson_interval_is_that_of_its_source():
    low, high = wilson(8, 10)
    assert (round(low, 4), round(high, 4)) == (0.4902, 0.9433)
    assert wilson(0, 10)[0] == pytest.approx(0, abs=1e-9)


# ---------------------------------------------------------------------------------- the simulator


def test_an_episode_follows_its_seed_alone():
    pytest.importorskip("metaworld", reason="the simulator is not installed")
    from demonstrations import chunks
    from tasks import TASKS, World

    world = World(TASKS.index("reach"))
    first = world.episode(world.expert, seed=7, noise=0.1)
    assert first.success
    again = world.episode(world.expert, seed=7, noise=0.1)
    assert (first.observations == again.observations).all()
    assert (first.observations[0] != world.episode(world.expert, seed=8).observations[0]).any()
    made = chunks(first.actions)
    assert made.shape == (len(first.actions), CHUNK, ACTION)
    assert (made[-1] == first.actions[-1]).all() and (made[0] == first.actions[:CHUNK]).all()
