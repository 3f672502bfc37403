"""What a benchmark keeps while it runs: the full run's samples, and every finished row.

A kill loses at most the row in progress; the same command goes on from there.
"""

import json
import os
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from foreseer.evaluation.results import BenchRow, from_record, to_record
from foreseer.evaluation.runs import Samples

ROWS_FILE = "rows.partial.jsonl"


class RowLog:
    """Finished rows by key, one JSON line each, on disk before `add` returns.

    Args:
        path: the file; begun when missing. A last line torn by a kill is cut off.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, BenchRow] = {}
        text = path.read_bytes() if path.exists() else b""
        whole = text[: text.rfind(b"\n") + 1]
        if len(whole) < len(text):
            os.truncate(path, len(whole))
        for number, line in enumerate(whole.decode().splitlines(), 1):
            record = json.loads(line)
            self.rows[record["key"]] = from_record(record["row"], f"{path}, line {number}")

    def add(self, key: str, row: BenchRow) -> None:
        """Append a row."""
        line = json.dumps({"key": key, "row": to_record(row)}, allow_nan=False)
        with self.path.open("a") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.rows[key] = row


def save_samples(samples: Samples, path: Path) -> None:
    """Write the full run's samples, under a temporary name first."""
    tensors = {
        "images": samples.images.contiguous(),
        "latents": samples.latents.contiguous().cpu(),
        "sigmas": torch.tensor(samples.sigmas, dtype=torch.float64),
        "seconds": torch.tensor(samples.seconds, dtype=torch.float64),
    }
    unfinished = path.with_suffix(".tmp")
    save_file(tensors, unfinished)
    unfinished.replace(path)


def load_samples(path: Path) -> Samples:
    """What `save_samples` wrote."""
    tensors = load_file(path)
    sigmas, seconds = tensors["sigmas"].tolist(), float(tensors["seconds"])
    return Samples(tensors["images"], tensors["latents"], sigmas, seconds)
