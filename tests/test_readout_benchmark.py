"""The benchmark of the readout goes through on a tiny model, its lists searched by itself."""

import json
from pathlib import Path

import pytest
from tiny_pipelines import tiny_pipeline

from foreseer.checkpoints import zoo
from foreseer.evaluation import offline
from foreseer.predictors.rules import RULES

readout = pytest.importorskip("readout", reason="the wheel holds no benchmarks")
readout_lists = pytest.importorskip("readout_lists")
ROOT = Path(__file__).parents[1]
SEARCHED = {"euler": ("none",), "ab2": ("none",), "taylor_1": ("output", "hidden")}
BUDGET, FITTED, JUDGED = 4, 16, 4


def lists_of(path: Path) -> dict[str, list[int]]:
    return {name: each for name, each in json.loads(path.read_text()).items() if "|" in name}


@pytest.mark.slow
def test_every_stage_runs_on_lists_it_has_searched_itself(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    tiny_pipeline().save_pretrained(tmp_path / "zoo" / "tiny")
    monkeypatch.setattr(zoo, "ZOO", tmp_path / "zoo")
    for module, name, value in (
        (offline, "RULES", {name: RULES[name] for name in ("reuse", "taylor_1")}),
        (readout, "HOSTS", {"tiny": readout.Host(None, None, "zoo:tiny_l2p_{}")}),
        (readout, "SEARCHED", SEARCHED),
        (readout, "FORMULAS", {"taylor_1": ("output", "hidden"), "spectrum": ("hidden",)}),
        (readout, "SOLVER_NAMES", {"euler": ("none",), "ab2": ("none",)}),
        (readout, "ROWS_FITTED_ON", FITTED),
        (readout_lists, "HOSTS", readout.HOSTS),
        (readout_lists, "FITTED_ON", FITTED),
    ):
        monkeypatch.setattr(module, name, value)
    place = {"hosts": ["tiny"], "budgets": [BUDGET]}
    readout.record(["tiny"], FITTED + 8)
    readout.search(**place, num_samples=2, num_moves=1)
    found = lists_of(readout.lists("tiny"))
    named = {f"{method}|{tap}|{BUDGET}" for method, taps in SEARCHED.items() for tap in taps}
    assert set(found) == named | {f"readout|output|{BUDGET}"}
    assert all(len(each) == BUDGET and each[0] == 0 for each in found.values())
    own = found[f"readout|output|{BUDGET}"]
    readout_lists.compare(["tiny"], [BUDGET], num_samples=8)
    tried = json.loads((readout.ROOT / "tiny" / "tried.json").read_text())[f"{BUDGET} of 8"]
    told = [
        own,
        readout_lists.stretched(own, 2),
        *(found[f"{name}|{BUDGET}"] for name in readout_lists.BEGUN),
    ]
    assert {" ".join(map(str, each)) for each in told} <= set(tried)
    best = lists_of(readout.lists("tiny"))[f"readout|output|{BUDGET}"]
    assert tried[" ".join(map(str, best))] == min(tried.values(), key=sum)
    readout.fit(**place, num_trajectories=FITTED)
    readout.bench(**place, num_samples=JUDGED, num_trajectories=FITTED)
    readout.publish(**place, num_samples=JUDGED, num_trajectories=FITTED)
    rows = {row["method"]: row for row in json.loads(readout.RESULT.read_text())}
    assert set(rows) == {"readout", "rows", "taylor_1", "spectrum", "euler", "ab2"}
    assert rows["readout"]["anchors"] == " ".join(map(str, best))
    rival = rows[rows["readout"]["rival"]]
    gap = rows["readout"]["psnr_db"] - rival["psnr_db"]
    assert rows["readout"]["paired_db"] == pytest.approx(gap)
    on = {" ".join(map(str, found[f"euler|none|{BUDGET}"])), rows["readout"]["anchors"]}
    assert rows["euler"]["anchors"] in on
    readout.search(**place, num_samples=2, num_moves=1)
    known = found | {f"readout|output|{BUDGET}": best}
    assert lists_of(readout.lists("tiny")) == known
