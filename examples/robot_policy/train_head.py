"""Train the action head on demonstrations, in minutes on one thread; the same command goes on.

python examples/robot_policy/train_head.py --demonstrations runs/robot/demonstrations
    --out runs/robot/head

Source: Liu et al., arXiv 2209.03003 (rectified flow).
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch
from action_head import ActionHead
from demonstrations import load_demonstrations
from safetensors.torch import save_file
from torch import Tensor

EMA = 0.999
HELD_OUT = 0.1  # last pairs of every task
SHOWN = 100  # updates between two points of the loss curve


def split(pairs: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Pairs to train on, and the last of every task to validate on.

    Args:
        pairs: see `load_demonstrations`.
    """
    task = pairs["task"]
    place = torch.cat([torch.arange(n) / n for n in task.bincount().tolist()])
    last = place >= 1 - HELD_OUT
    return (
        {name: values[~last] for name, values in pairs.items()},
        {name: values[last] for name, values in pairs.items()},
    )


def flow_loss(head: ActionHead, batch: dict[str, Tensor], generator: torch.Generator) -> Tensor:
    """Mean squared error of v at uniform flow times.

    Args:
        head: network.
        batch: `observation`, `actions` and `task`.
        generator: of times and noise.
    """
    x_0 = batch["actions"]
    sigma = torch.rand(len(x_0), generator=generator)
    eps = torch.randn(x_0.shape, generator=generator)
    x_t = torch.lerp(x_0, eps, sigma[:, None, None])
    v = head(x_t, sigma, batch["observation"], batch["task"])
    return (v - (eps - x_0)).square().mean()


class Training:
    """Network, average, optimizer and place of a training.

    Args:
        pairs: demonstrations.
        updates: at which the rate has fallen to zero.
        batch: samples per update.
        rate: AdamW's highest.
    """

    def __init__(self, pairs: dict[str, Tensor], updates: int, batch: int, rate: float) -> None:
        torch.manual_seed(0)
        self.train, self.validation = split(pairs)
        self.updates, self.batch, self.rate = updates, batch, rate
        self.head = ActionHead()
        seen = self.train["observation"]
        self.head.observation_mean.copy_(seen.mean(0))
        self.head.observation_scale.copy_(seen.std(0).clamp(min=0.01))
        self.average = {name: v.clone() for name, v in self.head.state_dict().items()}
        self.optimizer = torch.optim.AdamW(
            self.head.parameters(), rate, betas=(0.9, 0.99), weight_decay=1e-4
        )
        self.generator = torch.Generator().manual_seed(0)
        self.done = 0
        self.curve: list[dict[str, float]] = []
        self.losses: list[float] = []

    def update(self) -> None:
        """One step of AdamW, and of the average of the weights."""
        warm = min(1.0, (self.done + 1) / 200)
        cosine = 0.5 * (1 + torch.cos(torch.tensor(torch.pi * self.done / self.updates))).item()
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * warm * cosine
        rows = torch.randint(len(self.train["task"]), (self.batch,), generator=self.generator)
        batch = {name: values[rows] for name, values in self.train.items()}
        self.optimizer.zero_grad()
        loss = flow_loss(self.head, batch, self.generator)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.head.parameters(), 1.0)
        self.optimizer.step()
        self.done += 1
        with torch.no_grad():
            kept = min(EMA, self.done / (self.done + 10))
            for name, value in self.head.state_dict().items():
                self.average[name].lerp_(value, 1 - kept)
        self.losses.append(loss.item())
        if self.done % SHOWN == 0:
            self.curve.append({"update": self.done, "loss": sum(self.losses) / len(self.losses)})
            self.losses = []

    @torch.no_grad()
    def validate(self) -> float:
        """Loss of the averaged weights on 1,024 pairs that were not trained on."""
        head = ActionHead()
        head.load_state_dict(self.average)
        generator = torch.Generator().manual_seed(1)
        rows = torch.randperm(len(self.validation["task"]), generator=generator)[:1024]
        batch = {name: values[rows] for name, values in self.validation.items()}
        return flow_loss(head, batch, generator).item()

    def state(self) -> dict[str, Any]:
        """Everything that goes on where it stopped."""
        return {
            "head": self.head.state_dict(),
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "done": self.done,
            "curve": self.curve,
            "losses": self.losses,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a `state`."""
        self.head.load_state_dict(state["head"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.average, self.done = state["average"], state["done"]
        self.curve, self.losses = state["curve"], state["losses"]


def save(training: Training, out: Path) -> None:
    """The state, the averaged weights in half precision and the loss curve, each in one go."""
    torch.save(training.state(), out / "state.unfinished")
    os.replace(out / "state.unfinished", out / "state.pt")
    half = {
        name: value if name.startswith("observation_") else value.half()
        for name, value in training.average.items()
    }
    save_file(half, out / "action_head.unfinished")
    os.replace(out / "action_head.unfinished", out / "action_head.safetensors")
    (out / "loss.json").write_text(json.dumps(training.curve, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--demonstrations", type=Path, default=Path("runs/robot/demonstrations"))
    parser.add_argument("--out", type=Path, default=Path("runs/robot/head"))
    parser.add_argument("--updates", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--save-every", type=int, default=500, help="updates")
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.out.mkdir(parents=True, exist_ok=True)
    pairs = load_demonstrations(given.demonstrations)
    training = Training(pairs, given.updates, given.batch, given.rate)
    if (given.out / "state.pt").exists():
        training.load(torch.load(given.out / "state.pt", weights_only=True))
    while training.done < training.updates:
        training.update()
        if training.done % given.save_every == 0 or training.done == training.updates:
            training.curve[-1]["validation"] = training.validate()
            save(training, given.out)
            print({"update": training.done, **training.curve[-1]}, flush=True)


if __name__ == "__main__":
    main()
