"""The estimates of docs/recipes.md are those of their JSON, which follow from the recipes."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from families.images import flux_transformer

ROOT = Path(__file__).parents[1]
if not (ROOT / "benchmarks").exists():
    pytest.skip("the wheel holds no benchmarks", allow_module_level=True)
sys.path.insert(0, str(ROOT / "benchmarks"))

import recipe_estimates as estimates  # noqa: E402 - found in the folder just added

CONTENT = json.loads(estimates.RESULT.read_text())
PAGE = estimates.PAGE.read_text()


def test_the_page_shows_what_the_json_holds():
    for name, text in estimates.tables(CONTENT).items():
        (shown,) = re.findall(rf"<!-- {name} -->\n(.*?)\n<!-- /{name} -->", PAGE, re.DOTALL)
        assert shown == text, name


def test_the_page_says_that_nothing_of_it_was_run():
    assert CONTENT["estimate"] is True
    assert "**None of these models was run here.**" in PAGE
    tables = re.findall(r"^\| (.*?) \|.*\n\| ---", PAGE, re.MULTILINE)
    assert tables and set(tables) == {"estimate"}  # every table is called one


@pytest.mark.parametrize("model", estimates.MODELS, ids=lambda model: model.recipe)
def test_every_number_follows_from_the_counts_the_recipe_and_the_assumptions(model):
    (row,) = [row for row in CONTENT["rows"] if row["recipe"] == model.recipe]
    told = estimates.recipe_of(model)
    given = {k: v for k, v in CONTENT["assumptions"].items() if k != "gpu"}
    fact = {name: row[name] for name in FACTS}
    assert json.loads(json.dumps(estimates.derived(fact, told, given))) == row


FACTS = (
    "recipe",
    "model",
    "transformer_parameters",
    "transformers",
    "other_parameters",
    "branches",
    "tokens",
    "step_flops",
    "output_elements",
    "output_bytes",
    "hidden_bytes",
)
PUBLISHED = {  # billions of parameters of a transformer, by the models' names or reports
    "flux_dev": 12,
    "sd35_large": 8.1,
    "qwen_image": 20,
    "wan22_t2v": 14,
    "hunyuan_video15": 8.3,
}


def test_the_transformers_have_the_published_size():
    for row in CONTENT["rows"]:
        found = row["transformer_parameters"] / 1e9
        assert found == pytest.approx(PUBLISHED[row["recipe"]], rel=0.03)


def call_of(device: str) -> dict:
    shapes = {"hidden_states": (1, 4, 16), "encoder_hidden_states": (1, 3, 12)}
    shapes |= {"pooled_projections": (1, 12), "timestep": (1,), "guidance": (1,)}
    shapes |= {"img_ids": (4, 3), "txt_ids": (3, 3)}
    return {n: torch.zeros(s, device=device) for n, s in shapes.items()} | {"return_dict": False}


def test_a_call_on_the_meta_device_is_counted_as_on_the_cpu():
    host = flux_transformer()
    on_cpu = estimates.counted(host, call_of("cpu"))
    on_meta = estimates.counted(host.to("meta"), call_of("meta"))
    assert on_meta[0] == on_cpu[0] and on_cpu[0].full > 0
    assert on_meta[1].shape == on_cpu[1].shape == (1, 4, 16)


def test_half_the_share_doubles_time_and_cost_and_leaves_the_bytes():
    model = estimates.MODELS[0]
    row = CONTENT["rows"][0]
    told, fact = estimates.recipe_of(model), {name: row[name] for name in FACTS}
    given = {"peak_tflops": 1000.0, "share": 0.4, "price_per_hour": 2.0}
    one = estimates.derived(fact, told, given)
    other = estimates.derived(fact, told, {**given, "share": 0.2})
    for name in ("run_s", "record_hours", "record_cost", "verify_hours"):
        assert other[name] == pytest.approx(2 * one[name])
    assert other["recording_bytes"] == one["recording_bytes"]
    assert other["shares"] == one["shares"]
