"""A classifier of real Fashion-MNIST, and how often it agrees with a teacher's class labels.

Shapes: B batch, C channels, H height, W width.
"""

import json
from pathlib import Path

import torch
from fashion_mnist import CLASS_NAMES, DEFAULT_FOLDER, load_split
from jaxtyping import Float, Int
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from teacher_card import judge_table, write_card
from torch import Tensor, nn
from tqdm.auto import tqdm

from foreseer.integration.pipelines.pixel_pipeline import PixelDiTPipeline
from foreseer.training.plumbing.resuming import Resumable


class ClassifierModule(Resumable):
    """A plain convolutional classifier of 32x32 images.

    Args:
        num_classes: class labels.
        width: channels of the first of three blocks; each block doubles them.
        learning_rate: peak AdamW rate of the one-cycle schedule.
    """

    def __init__(self, num_classes: int = 10, width: int = 24, learning_rate: float = 4e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.learning_rate = learning_rate
        self.network = nn.Sequential(
            *_block(1, width),
            *_block(width, 2 * width),
            *_block(2 * width, 4 * width),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(4 * width, num_classes),
        )
        # halves a CPU's time; torch's annotations do not know the argument
        self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, images: Float[Tensor, "B 1 H W"]) -> Float[Tensor, "B classes"]:
        """Logits of images in [-1, 1]."""
        return self.network(images)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Float[Tensor, ""]:
        """Cross-entropy of one batch of images `(B, 1, H, W)` and labels `(B,)`."""
        images, labels = batch
        loss = nn.functional.cross_entropy(self(images), labels)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Log loss and accuracy on the test split; nothing is selected by them."""
        images, labels = batch
        logits = self(images)
        accuracy = (logits.argmax(1) == labels).float().mean()
        self.log("test/loss", nn.functional.cross_entropy(logits, labels))
        self.log("test/accuracy", accuracy, prog_bar=True)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW on a one-cycle rate over the whole run."""
        optimizer = torch.optim.AdamW(self.parameters(), self.learning_rate, weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, self.learning_rate, int(self.trainer.estimated_stepping_batches)
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


def _block(in_channels: int, out_channels: int) -> list[nn.Module]:
    return [
        nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
        nn.MaxPool2d(2),
    ]


def judge_teacher(
    pipeline: str,
    checkpoint: str,
    num_images: int = 1000,
    guidance_scale: float = 3.0,
    num_inference_steps: int = 50,
    batch_size: int = 50,
    folder: str = DEFAULT_FOLDER,
    out: str | None = None,
) -> dict:
    """Compare a classifier's answers on drawn images with the labels they were drawn for.

    Image i has label `i // (num_images / classes)` and its own seed i, so the images do not depend
    on the batch size. The classifier's accuracy on the real test split stands beside it.

    Args:
        pipeline: folder of a `PixelDiTPipeline`.
        checkpoint: Lightning checkpoint of a `ClassifierModule`.
        num_images: images to draw; a multiple of the number of classes.
        guidance_scale: classifier-free guidance scale.
        num_inference_steps: sampler steps.
        batch_size: images drawn in one call.
        folder: folder of the Fashion-MNIST files.
        out: JSON file to write; None writes `judge.json` into the pipeline's folder and puts the
            table into its model card.

    Returns:
        What was written: settings, `generated` and `real_test` accuracies, overall and by class.

    Raises:
        ValueError: `num_images` is not a multiple of the number of classes.
    """
    classifier = load_classifier(checkpoint)
    pipe = PixelDiTPipeline.from_pretrained(pipeline, dtype=torch.float32)
    drawn = class_agreement(
        pipe, classifier, num_images, guidance_scale, num_inference_steps, batch_size
    )
    result = {
        "num_images": num_images,
        "guidance_scale": guidance_scale,
        "num_inference_steps": num_inference_steps,
        "scheduler": type(pipe.scheduler).__name__,
        "generated": drawn,
        "real_test": real_accuracy(classifier, folder),
    }
    target = Path(out) if out else Path(pipeline) / "judge.json"
    target.write_text(json.dumps(result, indent=2) + "\n")
    if out is None:
        write_card(Path(pipeline))
    print(judge_table(result))
    return result


def load_classifier(checkpoint: str) -> ClassifierModule:
    """The classifier of a Lightning checkpoint, ready to answer."""
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    arguments = {k: v for k, v in state["hyper_parameters"].items() if not k.startswith("_")}
    classifier = ClassifierModule(**arguments)
    classifier.load_state_dict(state["state_dict"])
    return classifier.eval()


def class_agreement(
    pipe: PixelDiTPipeline,
    classifier: nn.Module,
    num_images: int,
    guidance_scale: float,
    num_inference_steps: int,
    batch_size: int,
) -> dict:
    """Share of drawn images that the classifier gives the label they were drawn for.

    Returns:
        `{"overall": share, "per_class": {name: share}}`.

    Raises:
        ValueError: `num_images` is not a multiple of the number of classes.
    """
    num_classes = pipe.transformer.config.num_embeds_ada_norm
    per_class, rest = divmod(num_images, num_classes)
    if rest or per_class < 1:
        raise ValueError(
            f"num_images is {num_images}, expected a positive multiple of {num_classes} (classes)."
        )
    pipe.set_progress_bar_config(disable=True)
    labels = torch.arange(num_classes).repeat_interleave(per_class)
    answers = []
    for start in tqdm(range(0, num_images, batch_size), desc="drawing", unit="batch"):
        wanted = labels[start : start + batch_size].tolist()
        seeds = range(start, start + len(wanted))
        images = pipe(
            wanted,
            guidance_scale=guidance_scale,
            num_inference_steps=num_inference_steps,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type="pt",
            return_dict=False,
        )[0]
        answers.append(_answers(classifier, 2 * images.float() - 1))
    return _shares(torch.cat(answers), labels)


def real_accuracy(classifier: nn.Module, folder: str = DEFAULT_FOLDER) -> dict:
    """The classifier's accuracy on the real test split, as `class_agreement` reports it."""
    images, labels = load_split(Path(folder), "t10k")
    answers = [_answers(classifier, chunk) for chunk in images.split(500)]
    return _shares(torch.cat(answers), labels)


@torch.no_grad()
def _answers(classifier: nn.Module, images: Float[Tensor, "B 1 H W"]) -> Int[Tensor, " B"]:
    return classifier(images).argmax(1)


def _shares(answers: Int[Tensor, " B"], labels: Int[Tensor, " B"]) -> dict:
    right = (answers == labels).double()
    per_class = {
        name: right[labels == label].mean().item() for label, name in enumerate(CLASS_NAMES)
    }
    return {"overall": right.mean().item(), "per_class": per_class}


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(judge_teacher, as_positional=False)
