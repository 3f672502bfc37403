"""Forecast the action head of a robot policy: record it, fit, and act with half of its evaluations.

python examples/robot_policy/policy.py --out runs/robot

Needs no simulator and no training: the head and the observations are beside this file.
"""

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from action_head import ACTION, CHUNK, ActionHead, load_head
from diffusers.utils.torch_utils import randn_tensor
from observations import load_observations
from torch import Tensor

import foreseer as fs

STEPS = 10
TIMES = [1 - step / STEPS for step in range(STEPS)]


@torch.no_grad()
def chunk(
    head: ActionHead, inputs: dict[str, Tensor], eps: Tensor, steps: Iterable[float]
) -> Tensor:
    """The loop: Euler from noise to actions, `(B, 16, 4)`.

    Args:
        head: network.
        inputs: `observation` and `task`.
        eps: noise.
        steps: flow time of every step.
    """
    x = eps
    for sigma in steps:
        time = torch.full((len(x),), sigma)
        x = x - head(x, time, inputs["observation"], inputs["task"]) / STEPS
    return x


def policy_host(head: ActionHead) -> Any:
    """The head as a host that knows its loop, for recording and fitting.

    Args:
        head: network.
    """
    host = fs.host(head, blocks="blocks", head="final")

    def sample(inputs: dict[str, Tensor], generator: Any) -> Tensor:
        eps = randn_tensor((len(inputs["task"]), CHUNK, ACTION), generator=generator)
        with host.steps(TIMES) as steps:
            return chunk(head, inputs, eps, steps)

    host.sample = sample
    return host


def recorded(host: Any, out: Path, count: int | None = None) -> Any:
    """The recording of the observations to fit on; the same call goes on.

    Args:
        host: see `policy_host`.
        out: folder.
        count: first observations; None for all.
    """
    kept = load_observations("fit")
    rows = zip(kept["observation"].split(1), kept["task"].split(1), strict=True)
    inputs = [{"observation": seen, "task": task} for seen, task in rows][:count]
    return fs.record(host, inputs, str(out), batch_size=60)


def action_errors(found: Tensor, reference: Tensor) -> Tensor:
    """Mean squared error of each chunk, `(N,)`."""
    return (found - reference).square().flatten(1).mean(1).double()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/robot"))
    parser.add_argument("--evaluations", type=int, default=5, help="of 10 per chunk")
    parser.add_argument("--observations", type=int, default=None, help="to fit on; all if left out")
    given = parser.parse_args()
    torch.set_num_threads(1)
    head = load_head()
    host = policy_host(head)
    recording = recorded(host, given.out / "recording", given.observations)
    predictor = fs.fit(recording, given.evaluations, pipeline=host)
    judged = load_observations("judge")
    reference = chunk(head, judged, judged["eps"], TIMES)
    with fs.forecasting(host, predictor) as run, run.steps(TIMES) as steps:
        found = chunk(head, judged, judged["eps"], steps)
    print(run.report())
    with fs.forecasting(host, fs.predictors.Taylor(1), predictor.anchors) as run:
        with run.steps(TIMES) as steps:
            taylor = chunk(head, judged, judged["eps"], steps)
    print(
        f"action error on {len(found)} other observations: "
        f"{action_errors(found, reference).mean():.2e}, "
        f"taylor_1 on the same steps {action_errors(taylor, reference).mean():.2e}"
    )


if __name__ == "__main__":
    main()
