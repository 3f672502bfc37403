"""Script: fit a readout on a recording of the guided DiT, alone or as one of several processes.

Usage: readout_training.py RECORDING OUT, with or without torchrun. Writes the state of the fit to
OUT/<rank>.pt, as this rank sees it.
"""

import logging
import os
import sys
from pathlib import Path

import lightning
import torch
from readout_cases import QUIET, module_of
from tiny_hosts import pipeline

from foreseer.trajectories.datamodule import ItemsDataModule


def main(recording: str, out: Path) -> None:
    world = int(os.environ.get("WORLD_SIZE", 1))
    module = module_of(recording, pipeline("dit_guided"))
    trainer = lightning.Trainer(
        max_epochs=-1,
        devices=world,
        strategy="ddp" if world > 1 else "auto",
        enable_checkpointing=False,
        **QUIET,
    )
    trainer.fit(module, datamodule=ItemsDataModule(recording, 0.25, seed=4, batch_size=2))
    torch.save(module.state_dict(), out / f"{trainer.global_rank}.pt")
    trainer.save_checkpoint(out / "last.ckpt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    main(sys.argv[1], Path(sys.argv[2]))
