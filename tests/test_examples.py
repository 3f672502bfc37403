"""Every example runs as a user would run it, and prints what it promises."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from nightly import nightly

EXAMPLES = Path(__file__).parents[1] / "examples"
if not EXAMPLES.exists():
    pytest.skip("the wheel holds no examples", allow_module_level=True)
PRINTS = {  # a line per entry, in this order
    "forecast.py": [rf" ?{n} of 50 evaluations: \d\d\.\d dB PSNR" for n in (11, 8, 6)],
    "record_fit_export.py": ["verdict: 6 evaluations: .*", ".*6 network evaluations.*"],
    "own_predictor.py": [rf"{n} +\d\d\.\d dB at 6 .*" for n in ("Reuse", "HalfTaylor", "Taylor")],
    "compare_with_solvers.py": [r"\w+ +\d\d\.\d dB at 8 evaluations"] * 4,
    "adaptive_schedule.py": [r"(Reuse|Taylor) +0\.[13]: \d+ of 30 evaluations, \d\d\.\d dB"] * 4,
}


def test_every_example_is_run_and_short():
    assert sorted(path.name for path in EXAMPLES.glob("*.py")) == sorted(PRINTS)
    for name in PRINTS:
        text = (EXAMPLES / name).read_text()
        assert f"python examples/{name}" in text.split('"""')[1]
        assert len(text.splitlines()) <= 60


def check(name: str, printed: str) -> None:
    lines = iter(printed.splitlines())
    for pattern in PRINTS[name]:
        assert any(re.fullmatch(pattern, line) for line in lines), (pattern, printed)


PROGRAM = "forecast.py"  # is run as its reader runs it, the others in this process
OTHERS = [name for name in PRINTS if name != PROGRAM]
SOLVERS = "compare_with_solvers.py"  # takes as long as the others together


@pytest.mark.slow
@pytest.mark.parametrize("name", nightly(OTHERS, [name for name in OTHERS if name != SOLVERS]))
def test_an_example_prints_what_it_promises(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name, str(tmp_path / "out")])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    check(name, capsys.readouterr().out)


@pytest.mark.slow
def test_an_example_is_a_program(tmp_path):
    command = [sys.executable, str(EXAMPLES / PROGRAM), str(tmp_path / "out")]
    alone = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        command, cwd=tmp_path, env=alone, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    check(PROGRAM, done.stdout)
