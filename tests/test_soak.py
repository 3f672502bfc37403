"""After calls, swaps and aborts an image is a fresh process's, bit for bit, and nothing is left."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from soak_cases import ABORTS

CALLS = 200


@pytest.mark.slow
@pytest.mark.fault
def test_two_hundred_calls_are_each_like_the_first_of_a_process():
    script = Path(__file__).with_name("soak.py")
    command = [sys.executable, str(script), "--calls", str(CALLS)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["faults"] == []
    assert set(found["growth"].values()) == {0}
    assert found["new_interpreters_agreeing"] == 3
    assert found["calls"] == CALLS
    aborted = sum(found["aborted"].values())
    assert found["completed"] + found["refused"] + aborted == CALLS
    assert found["completed"] > CALLS // 2 and found["distinct_configurations"] > CALLS // 3
    assert found["aborted"].keys() == ABORTS.keys() and found["interrupted"]
    assert found["swaps"] > 50 and found["detached"] == found["attached"] and found["quiet"] > 10
    assert found["resident_mib"]["end"] - found["resident_mib"]["quarter"] < 20
