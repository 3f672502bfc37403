"""Every way to start several recorders fills one folder with what one recorder writes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from nightly import nightly
from tiny_pipelines import tiny_pipeline

from foreseer.cli import main
from foreseer.trajectories.recording import Recording

pytestmark = pytest.mark.slow

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2"]
LAUNCHERS = {
    "torchrun": [*TORCHRUN, "--master-port", "29731", "-m"],
    # Without --multi_gpu accelerate starts one process on a machine without GPUs.
    "accelerate": [*ACCELERATE, "--multi_gpu", "--main_process_port", "29732", "-m"],
}
SLURM = {
    "srun": [{"SLURM_PROCID": str(rank), "SLURM_NTASKS": "2"} for rank in range(2)],
    "array": [
        {
            "SLURM_ARRAY_TASK_ID": task,
            "SLURM_ARRAY_TASK_MIN": "1",
            "SLURM_ARRAY_TASK_MAX": "3",
            "SLURM_ARRAY_TASK_COUNT": "2",
        }
        for task in ("3", "1")
    ],
}


def words(pipeline: Path, out: Path) -> list[str]:
    options = {"num_trajectories": 7, "num_inference_steps": 4, "batch_size": 1}
    given = ["foreseer", "record", "--pipeline", str(pipeline), "--out", str(out)]
    return given + [word for name, value in options.items() for word in (f"--{name}", str(value))]


def environment(**more: str) -> dict[str, str]:
    paths = os.pathsep.join([p for p in sys.path if p])
    return {**os.environ, "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": "", **more}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def alone(pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    """Hash of every item as one process records it."""
    out = tmp_path_factory.mktemp("alone") / "run"
    main(words(pipeline, out)[1:])
    return hashes(out)


def hashes(folder: Path) -> dict[int, str]:
    return {item: entry.xxh3 for item, entry in Recording(folder).entries.items()}


@pytest.mark.parametrize("name", nightly(LAUNCHERS, by_default=["torchrun"]))
def test_two_processes_write_what_one_writes(
    name: str, pipeline: Path, alone: dict[int, str], tmp_path: Path
) -> None:
    command = [*LAUNCHERS[name], *words(pipeline, tmp_path / "run")]
    result = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "rank 0 of 2: 0 of 4 trajectories" in result.stdout
    assert "rank 1 of 2: 0 of 3 trajectories" in result.stdout
    assert hashes(tmp_path / "run") == alone
    for rank in range(2):
        shards = (tmp_path / f"run/shards/{rank:05d}").glob("*")
        assert {int(path.stem[5:]) % 2 for path in shards} == {rank}


@pytest.mark.parametrize("name", SLURM)
def test_the_tasks_of_slurm_write_what_one_writes(
    name: str,
    pipeline: Path,
    alone: dict[int, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for variables in SLURM[name]:  # what SLURM sets, in this process, one task after the other
        with monkeypatch.context() as patch:
            for variable, value in variables.items():
                patch.setenv(variable, value)
            main(words(pipeline, tmp_path / "run")[1:])
    assert hashes(tmp_path / "run") == alone
    assert sorted(p.name for p in tmp_path.glob("run/shards/*")) == ["00000", "00001"]


def test_a_shell_loop_does_too_and_a_lost_rank_blocks_nobody(
    pipeline: Path, alone: dict[int, str], tmp_path: Path
) -> None:
    line = " ".join([sys.executable, "-m", *words(pipeline, tmp_path / "run")])
    loop = f"for r in 0 2; do {line} --rank $r --world 3 & done; wait"
    subprocess.run(["bash", "-c", loop], env=environment(), check=True)
    assert Recording(tmp_path / "run").items == [0, 2, 3, 5, 6]  # rank 1 never came
    main([*words(pipeline, tmp_path / "run")[1:], "--rank", "1", "--world", "3"])
    assert hashes(tmp_path / "run") == alone
