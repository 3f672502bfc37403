"""Record a model, fit a predictor for it, export it and forecast with it: the whole road.

    python examples/record_fit_export.py FOLDER

Few trajectories and few steps, so that it takes seconds; the README and configs/ have real sizes.
"""

import sys
from pathlib import Path

import torch
from lightning import Trainer

from foreseer.checkpoints.format import load_predictor
from foreseer.integration.forecasting import forecasting
from foreseer.integration.pipelines.load import load_pipeline
from foreseer.training.export import export_predictor
from foreseer.training.l2p import L2PLeastSquares
from foreseer.trajectories.datamodule import GramDataModule
from foreseer.trajectories.prompts import class_items
from foreseer.trajectories.recorder import record

folder = Path(sys.argv[1])
settings = {"num_inference_steps": 20, "guidance_scale": 3.0}
pipe = load_pipeline("zoo:fashion_dit")

record(pipe, class_items(14, 10), folder / "recording", taps=["hidden"], states=False, **settings)

anchors = (0, 2, 4, 7, 10, 14)
module = L2PLeastSquares(str(folder / "recording"), anchors, tap="hidden")
data = GramDataModule(str(folder / "recording"), tap="hidden", validation_fraction=0.25)
trainer = Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False)
trainer.fit(module, datamodule=data)  # ends with a verdict

export_predictor(module, folder / "predictor", metrics={})
with forecasting(pipe, load_predictor(folder / "predictor")) as run:
    pipe([3, 7], generator=torch.Generator().manual_seed(1), **settings)
print(run.report())
