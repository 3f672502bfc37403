"""Upload a recording to the Hugging Face hub, as a data set that `hf://` reads where it lies."""

from pathlib import Path

from foreseer.checkpoints.config import CheckpointError
from foreseer.checkpoints.hub import CARD_FILE, upload
from foreseer.checkpoints.page import with_licence
from foreseer.checkpoints.strict import REPO_ID
from foreseer.trajectories.files.header import HEADER_FILE, RecordingError
from foreseer.trajectories.files.storage import Folder
from foreseer.trajectories.recording import Recording

SHOWN = 3  # damaged shards that an error names

CARD = """# Recording of {name}

What the network of a diffusion model computed in {count} full sampling runs, recorded to fit
learned feature caching.

| what | value |
| --- | --- |
{facts}

## Use

```python
import foreseer as fs

predictor = fs.fit("hf://datasets/{repo_id}", evaluations=8, out="predictor")
```

`recording.json` says what was asked for and on which weights; every line of a manifest is a
trajectory with its shard, hash, seed and prompt; shards are safetensors files.

Prompts, and what the model made of them, come under terms that whoever recorded them states: the
licence is the one in the head of this card, and none where it names none.
"""


def push_recording(
    folder: str | Path, repo_id: str, private: bool = False, licence: str | None = None
) -> str:
    """Upload what is finished of a recording to a data set on the hub, in one commit.

    A `README.md` in the folder is taken as the card. A recorder may be at work meanwhile; pushing
    again adds what it has finished since, and sends nothing twice.

    Args:
        folder: of the recording; the hash of every shard is checked first.
        repo_id: `owner/name`, made when missing.
        private: make a new data set private.
        licence: as the hub calls it; None states none.

    Returns:
        Address of the upload.

    Raises:
        RecordingError: the folder holds no sound recording, or the hub refused.
    """
    recording = Recording(folder)
    if not isinstance(recording.store, Folder):
        raise RecordingError(f"{folder} is not on a disk of this machine; push a folder.")
    if not len(recording):
        raise RecordingError(f"{folder} has no finished trajectory; record some first.")
    damaged = recording.verify()
    if damaged:
        raise RecordingError(
            f"{len(damaged)} shards of {folder} are damaged ({'; '.join(damaged[:SHOWN])}); "
            "nothing was uploaded. Run `foreseer verify --repair`, and record them again."
        )
    files: dict[str, Path | bytes] = {HEADER_FILE: recording.store.header() or b""}
    for name, lines in recording.store.manifests().items():
        files[name] = lines[: lines.rfind(b"\n") + 1]  # without the line that is being written
    files |= {e.file: recording.store.shard(e) for e in recording.entries.values()}
    own = recording.store.path / CARD_FILE
    card = own.read_text() if own.is_file() else recording_card(recording, repo_id)
    files[CARD_FILE] = (card if licence is None else with_licence(card, licence)).encode()
    try:
        return upload(repo_id, files, "Recording for foreseer", private, "dataset")
    except CheckpointError as error:
        raise RecordingError(str(error)) from error


def recording_card(recording: Recording, repo_id: str) -> str:
    """The card of a recording as a data set: what was recorded, how, and how much of it.

    Args:
        recording: the recording.
        repo_id: where it is to lie.
    """
    from huggingface_hub import DatasetCard, DatasetCardData

    header = recording.header
    shards = [entry.bytes for entry in recording.entries.values()]
    host = header.host
    hub_name = REPO_ID.fullmatch(header.pipeline) and not Path(header.pipeline).exists()
    name = header.pipeline if hub_name else str(host.get("class", "a diffusion model"))
    told = {
        "model": header.pipeline if hub_name else "not of the hub",
        "transformer": f"{host.get('class', 'unnamed')}, {host.get('parameters', '?')} parameters",
        "scheduler": header.scheduler.get("class", "unnamed"),
        "steps": header.num_steps,
        "guidance_scale": header.scheduler.get("guidance_scale", "not told"),
        "guidance branches": header.num_branches,
        "dtype": header.dtype,
        "latents of a sample": " x ".join(map(str, header.latent_shape)),
        "taps": ", ".join(header.taps),
        "features": header.features,
        "sampler states": "kept" if header.states else "not kept",
        "trajectories": len(shards),
        "bytes of all shards": f"{sum(shards):,}",
        "bytes of a trajectory": f"{sum(shards) // len(shards):,}",
        "recipe hash": header.recipe_hash,
    }
    data = DatasetCardData(
        pretty_name=f"Recording of {name}",
        tags=["foreseer", "feature-caching", "diffusion"],
        configs=[{"config_name": "trajectories", "data_files": "manifest.*.jsonl"}],
    )
    text = CARD.format(
        name=name,
        count=len(shards),
        facts="\n".join(f"| {key} | {value} |" for key, value in told.items()),
        repo_id=repo_id,
    )
    return str(DatasetCard(f"---\n{data.to_yaml()}\n---\n\n{text}"))
