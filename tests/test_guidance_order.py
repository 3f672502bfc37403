"""A recording tells which guidance branch its pipeline runs first, read off the guided output."""

import pytest
import torch
from families import FAMILIES
from test_field_settings import ANCHORS, fitted, recorded

from foreseer.trajectories.collector import first_branch

ORDER = {
    "flux": "",
    "flux_cfg": "conditional",
    "qwenimage": "conditional",
    "wan": "conditional",
    "zimage": "conditional",  # which negates what it guides
    "lumina2": "conditional",
    "sd3": "unconditional",
    "sana": "unconditional",
}


@pytest.mark.parametrize("host", ORDER)
def test_the_order_of_a_pipeline_is_recorded_and_is_in_the_predictor_s_file(host, tmp_path):
    family = FAMILIES[host]
    recording = recorded(family, family.build(), tmp_path / "r")
    assert recording.header.first_branch == ORDER[host]
    predictor = fitted(recording, "output", ANCHORS, tmp_path / "p")
    assert predictor.spec.first_branch == ORDER[host]


def test_what_does_not_tell_is_not_guessed():
    c, u = torch.randn(2, 3, 8)
    guided = u + 4.0 * (c - u)
    rescaled = guided * (0.7 + 0.1 * torch.rand(3, 1))
    for v in (guided, rescaled, -guided, guided.view(8, 3)):
        assert first_branch(v, c, u) == "conditional" and first_branch(v, u, c) == "unconditional"
    assert first_branch(u + 0.5 * (c - u), c, u) == ""  # no guidance, an average
    assert first_branch(guided, c, c.clone()) == ""
    assert first_branch(guided[:2], c, u) == ""
    assert first_branch(guided, torch.zeros_like(c), u) == ""
