"""After calls, swaps and aborts an image is a fresh process's, bit for bit, and nothing is left."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from nightly import nightly
from soak_cases import ABORTS

INTERPRETERS = {30: 1, 200: 3}  # calls, and how many also face a truly new interpreter
FEW, MANY = INTERPRETERS


@pytest.mark.slow
@pytest.mark.fault
@pytest.mark.parametrize("calls", nightly([FEW, MANY], by_default=[FEW]))
def test_every_call_is_like_the_first_of_a_process(calls):
    interpreters = INTERPRETERS[calls]
    script = Path(__file__).with_name("soak.py")
    words = ["--calls", str(calls), "--interpreters", str(interpreters)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    command = [sys.executable, str(script), *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["faults"] == []
    assert set(found["growth"].values()) == {0}
    assert found["new_interpreters_agreeing"] == interpreters
    assert found["calls"] == calls
    aborted = sum(found["aborted"].values())
    assert found["completed"] + found["refused"] + aborted == calls and aborted > 0
    assert found["completed"] > calls // 2 and found["distinct_configurations"] > calls // 3
    assert found["detached"] == found["attached"] and found["swaps"] > calls // 4
    assert found["quiet"] > calls // 20
    if calls == MANY:
        assert found["aborted"].keys() == ABORTS.keys() and found["interrupted"]
    assert found["resident_mib"]["end"] - found["resident_mib"]["quarter"] < 20
