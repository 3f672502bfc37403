"""Train the emoji editor on one thread, from the bundled text-to-image model; resumes by itself.

    python examples/emoji_editor/train_editor.py --archive ARCHIVE --out runs/editor --minutes 56

Shapes: B batch, C channels, H height, W width, L text tokens, E text channels.
"""

import argparse
import json
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FluxTransformer2DModel
from edit_pairs import ARCHIVE, KINDS, Edit, EmojiEdits, instructions
from editor import EmojiEditPipeline, edit_pipeline, editing_ids, source_tokens
from jaxtyping import Float
from torch import Tensor, nn

from foreseer.integration.pipelines.load import load_pipeline
from foreseer.integration.pipelines.pixel_pipeline import PixelFluxPipeline
from foreseer.integration.pipelines.sentence_encoder import NUM_TOKENS, SentenceEncoder

SHARES = {"skin tone": 0.4, "recolour": 0.2, "paste": 0.2, "erase": 0.2}
CHANGED_WEIGHT = 3.0  # of the error at pixels that the edit changes
DROPOUT = 0.05  # share of samples without an instruction
WARMUP = 100
HOLD = 0.4  # share of the time before the rate falls
EMA = 0.998
SAVE_EVERY = 100
VALIDATE_EVERY = 200
LOG_EVERY = 20

Weights = dict[str, Tensor]


def flow_loss(
    transformer: nn.Module,
    encoder: SentenceEncoder,
    edits: Sequence[Edit],
    generator: torch.Generator,
    dropout: float = DROPOUT,
) -> Float[Tensor, ""]:
    """Mean squared error of v at logit-normal sigma; pixels that change weigh three times as much.

    Args:
        transformer: of image and source tokens.
        encoder: knows the instructions.
        edits: a batch.
        generator: of noise, sigma and what is dropped.
        dropout: share of samples without an instruction.
    """
    x_0 = source_tokens(torch.stack([edit.target for edit in edits]))
    reference = source_tokens(torch.stack([edit.source for edit in edits]))
    changed = torch.stack([edit.changed for edit in edits])[:, None].expand(-1, 3, -1, -1).float()
    weight = 1 + (CHANGED_WEIGHT - 1) * (source_tokens(changed) + 1) / 2
    eps = torch.randn(x_0.shape, generator=generator)
    sigma = torch.randn(len(x_0), generator=generator).sigmoid()
    dropped = torch.rand(len(x_0), generator=generator) < dropout
    words = ["" if gone else edit.instruction for gone, edit in zip(dropped, edits, strict=True)]
    embeds, pooled = encoder(words)
    ids = editing_ids()
    v = transformer(
        torch.cat([torch.lerp(x_0, eps, sigma[:, None, None]), reference], 1),
        timestep=sigma,
        encoder_hidden_states=embeds,
        pooled_projections=pooled,
        img_ids=ids,
        txt_ids=ids.new_zeros(NUM_TOKENS, 3),
        return_dict=False,
    )[0][:, : x_0.shape[1]]
    return (weight * (v.float() - (eps - x_0)).square()).mean()


def batch_at(step: int, size: int, drawn: EmojiEdits) -> tuple[list[Edit], torch.Generator]:
    """The edits of a step, and the generator of its noise; both follow from its number."""
    generator = np.random.default_rng(step)
    kinds = generator.choice(len(KINDS), size, p=list(SHARES.values()))
    edits = [drawn.draw(KINDS[kind], generator, mirror=True) for kind in kinds]
    return edits, torch.Generator().manual_seed(step)


def rate_at(step: int, share: float) -> float:
    """Share of the learning rate: a linear start, constant, then half a cosine down."""
    falling = max(0.0, min((share - HOLD) / (1 - HOLD), 1.0))
    return min(1.0, (step + 1) / WARMUP) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * falling)))


HEAD = 2  # of the three in each double-stream block
SHARPNESS = 2.0  # of the normalised queries and keys in the directions below
SOURCE = 1.0  # radians that the fastest direction of the first axis turns from picture to source


def look_at_source(transformer: FluxTransformer2DModel) -> None:
    """Begin with a head per double-stream block that looks from every token at its place's source.

    The bundled model has never seen a source picture, and finding by chance that one lies at the
    same row and column takes long. Queries and keys of the head are constants in the fastest rotary
    directions of the three axes: under the rotation they agree best where row and column do and the
    first axis differs by one. Keys of text are their opposites. All of it is trained on.
    """
    channels = transformer.config.attention_head_dim
    query, key = torch.zeros(channels), torch.zeros(channels)
    starts = [sum(transformer.config.axes_dims_rope[:axis]) for axis in range(3)]
    for axis, shares in zip(starts, ((0.2,), (0.25, 0.15), (0.25, 0.15)), strict=True):
        for pair, share in enumerate(shares):
            place = axis + 2 * pair
            query[place] = key[place] = share**0.5
    turned = query[starts[0]] * torch.tensor([math.cos(SOURCE), math.sin(SOURCE)])
    query[starts[0] : starts[0] + 2] = turned
    rows = slice(HEAD * channels, (HEAD + 1) * channels)
    with torch.no_grad():
        for block in transformer.transformer_blocks:
            attention = block.attn
            constants = (attention.to_q, query), (attention.to_k, key), (attention.add_k_proj, -key)
            for layer, constant in constants:
                layer.weight[rows] = 0.0
                layer.bias[rows] = constant
            for norm in (attention.norm_q, attention.norm_k):
                norm.weight[(query != 0) | (key != 0)] = SHARPNESS


class Training:
    """The run: weights, their average, optimiser, step, minutes spent and losses so far.

    Args:
        pipe: the pipeline to start from.
        out: folder of the state and of the result.
        learning_rate: of AdamW.
    """

    def __init__(self, pipe: PixelFluxPipeline, out: Path, learning_rate: float) -> None:
        self.out, self.learning_rate = out, learning_rate
        self.transformer = pipe.transformer.train()
        look_at_source(self.transformer)
        self.average: Weights = {
            name: value.detach().clone() for name, value in self.transformer.named_parameters()
        }
        self.optimiser = torch.optim.AdamW(
            self.transformer.parameters(), learning_rate, betas=(0.9, 0.99), weight_decay=0.0
        )
        self.step, self.minutes = 0, 0.0
        self.losses: list[dict[str, float]] = []
        if (out / "state.pt").exists():
            self._resume()

    def _resume(self) -> None:
        state: dict[str, Any] = torch.load(self.out / "state.pt", weights_only=True)
        self.transformer.load_state_dict(state["transformer"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.average, self.losses = state["average"], state["losses"]
        self.step, self.minutes = state["step"], state["minutes"]

    def keep(self) -> None:
        """Write what resuming needs, whole or not at all."""
        state = {
            "transformer": self.transformer.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "average": self.average,
            "step": self.step,
            "minutes": self.minutes,
            "losses": self.losses,
        }
        torch.save(state, self.out / "state.pt.new")
        os.replace(self.out / "state.pt.new", self.out / "state.pt")
        (self.out / "loss.json").write_text(json.dumps(self.losses, indent=1) + "\n")

    def update(self, loss: Tensor, share: float) -> None:
        """One optimiser step, at a share of the run's time, and the average after it."""
        for group in self.optimiser.param_groups:
            group["lr"] = self.learning_rate * rate_at(self.step, share)
        self.optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.transformer.parameters(), 1.0)
        self.optimiser.step()
        self.step += 1
        decay = min(EMA, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for name, value in self.transformer.named_parameters():
                self.average[name].lerp_(value, 1 - decay)


def averaged(transformer: nn.Module, average: Weights) -> Weights:
    """Put the average into a transformer, and return what was there."""
    current = {name: value.detach().clone() for name, value in transformer.named_parameters()}
    transformer.load_state_dict(average)
    return current


def train(
    archive: Path, out: Path, minutes: float = 56, batch_size: int = 16, learning_rate: float = 7e-4
) -> EmojiEditPipeline:
    """Train, or go on from the last state in `out`, and write the averaged transformer in bfloat16.

    Args:
        archive: the package of emoji.
        out: folder of the state and of the result.
        minutes: of the clock, over all starts; the rate falls to their end.
        batch_size: edits of a step.
        learning_rate: of AdamW.
    """
    out.mkdir(parents=True, exist_ok=True)
    drawn, kept = EmojiEdits(archive, "train"), EmojiEdits(archive, "choose")
    words = instructions([drawn, kept])
    run = Training(load_pipeline("zoo:emoji_flux"), out, learning_rate)
    pipe = edit_pipeline(run.transformer, words)
    held_out, _ = batch_at(0, 128, kept)
    run.transformer.x_embedder.register_forward_hook(lambda module, args, tokens: tokens.float())
    run.transformer.compile_repeated_blocks()
    recent: list[float] = []
    before, began = run.minutes, time.monotonic()
    while run.minutes < minutes:
        edits, generator = batch_at(run.step, batch_size, drawn)
        with torch.autocast("cpu", torch.bfloat16):
            loss = flow_loss(run.transformer, pipe.text_encoder, edits, generator)
        run.update(loss, run.minutes / minutes)
        run.minutes = before + (time.monotonic() - began) / 60
        recent.append(loss.item())
        if run.step % LOG_EVERY == 0:
            run.losses.append({"update": run.step, "loss": round(sum(recent) / len(recent), 5)})
            recent.clear()
        if run.step % VALIDATE_EVERY == 0:
            run.losses[-1]["held_out"] = round(held_out_loss(run, pipe, held_out), 5)
            print(f"{run.minutes:6.1f} min  {run.losses[-1]}", flush=True)
        if run.step % SAVE_EVERY == 0:
            run.keep()
    run.keep()
    run.transformer.load_state_dict(run.average)
    run.transformer.to(torch.bfloat16).save_pretrained(out / "exported")
    return pipe


@torch.no_grad()
def held_out_loss(run: Training, pipe: EmojiEditPipeline, edits: list[Edit]) -> float:
    """Loss of the average on edits that are not trained on, the same noise every time."""
    current = averaged(run.transformer, run.average)
    generator = torch.Generator().manual_seed(0)
    losses = []
    with torch.autocast("cpu", torch.bfloat16):
        for start in range(0, len(edits), 32):
            batch = edits[start : start + 32]
            loss = flow_loss(run.transformer, pipe.text_encoder, batch, generator, dropout=0.0)
            losses.append(loss.item())
    run.transformer.load_state_dict(current)
    return sum(losses) / len(losses)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--archive", type=Path, default=Path(ARCHIVE))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=56.0)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--learning_rate", type=float, default=7e-4)
    torch.set_num_threads(1)
    arguments = parser.parse_args()
    train(**vars(arguments))


if __name__ == "__main__":
    main()
