"""What a pipeline is called with from the command line: prompts or labels, and settings.

Shapes: n or B samples, C channels, H height, W width.
"""

import codecs
import inspect
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import torch
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor

from foreseer.integration.host.module_host import has_loop
from foreseer.integration.pipelines.load import device_of

READ = (".txt", ".safetensors")
DATA = "csv|tsv|jsonl?|ya?ml|toml|xml|parquet|arrow|txt|safetensors|pt|pth|ckpt|np[yz]|pkl|md|zip"
PATHS = (
    r"\S*[^\s.]\.[A-Za-z]\w{0,11}",  # one word with an ending
    rf".*\.(?:{DATA})",  # several with a known one
    r"\S*[/\\]\S*",  # one word with a slash
    r"(?:\.{0,2}|~|[A-Za-z]:)[/\\].*",  # the start of a path
)


def is_path(words: str) -> bool:
    """Whether a string is, or looks like, the path of something."""
    looks = any(re.fullmatch(path, words.strip(), re.IGNORECASE) for path in PATHS)
    return looks or _exists(words)


def _exists(words: str) -> bool:
    try:
        return os.path.exists(words)
    except ValueError:  # a null character
        return False


def prompts_of(prompts: str | os.PathLike[str] | Sequence[str]) -> Path | list[str]:
    """The prompts asked for, or the file of embeddings that holds them.

    Args:
        prompts: words; a list of them; or a path, of a text file with a prompt per line or of a
            safetensors file.

    Raises:
        ValueError: a path of another kind, an entry of a list that looks like a path or is no
            string, or a text file that holds no prompt or cannot be read as text.
        FileNotFoundError: the file does not exist.
    """
    if not isinstance(prompts, str | os.PathLike):
        for words in prompts:
            if not isinstance(words, str):
                raise ValueError(
                    f"found {words!r} among the prompts, a {type(words).__name__}; expected words, "
                    "or no prompts at all for a pipeline that draws classes."
                )
            if is_path(words):
                raise ValueError(_refusal(words, "an entry of a list of prompts"))
        return list(prompts)
    if isinstance(prompts, str) and not is_path(prompts):
        return [prompts]
    path = Path(prompts)
    if path.suffix.lower() not in READ:
        raise ValueError(_refusal(str(prompts), "a folder" if path.is_dir() else "a path"))
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no file {path}; expected one with a prompt per line (.txt), or of prompt "
            "embeddings (.safetensors)."
        )
    return path if path.suffix.lower() == ".safetensors" else lines(path)


def _refusal(found: str, kind: str) -> str:
    return (
        f"found the prompt {found!r}, which is or looks like {kind}; expected words, or a file "
        "that ends in .txt (a prompt per line) or .safetensors (prompt embeddings). To draw these "
        "very words, end them with a full stop."
    )


def lines(path: Path) -> list[str]:
    """The prompts of a text file, one per line, without empty lines and without its mark.

    Args:
        path: UTF-8, or UTF-16 with its byte-order mark.

    Raises:
        ValueError: it is in another encoding, or holds no prompt.
    """
    content = path.read_bytes()
    wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = content.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is no text in UTF-8: {error}. Save it as UTF-8, with a prompt per line."
        ) from error
    found = [line.strip() for line in re.split(r"\r\n|\r|\n", text)]
    if not any(found):
        raise ValueError(f"{path} holds no prompt; expected one per line.")
    return [line for line in found if line]


DEFAULT_STEPS = 50
DEFAULT_PROMPT = "a photo of a cat"
CLASS_GUIDANCE = 3.0
EMBEDDED = re.compile("prompt|embeds")
"""In the names of arguments: prompt embeddings, pooled or not, and their masks."""


def samples(
    pipe: Any,
    prompts: str | os.PathLike[str] | Sequence[str] | None = None,
    class_labels: Sequence[int] | None = None,
) -> list[dict[str, Any]]:
    """Per-sample arguments of a pipeline, one entry per sample.

    Args:
        pipe: the pipeline.
        prompts: words or a list of them; or a text file with a prompt per line; or a safetensors
            file of prompt embeddings by argument, such as `prompt_embeds`, `(n, tokens, width)`.
        class_labels: labels, for pipelines that draw classes.

    Raises:
        ValueError: the pipeline takes something else, or a path is of neither kind.
        FileNotFoundError: a file does not exist.
    """
    takes = inspect.signature(pipe.__call__).parameters
    name = type(pipe).__name__
    if prompts is None and class_labels is not None and takes_labels(pipe):
        return [{"class_labels": int(label)} for label in class_labels]
    if prompts is None:
        asked = "class_labels" if "class_labels" in takes else "prompts"
        raise ValueError(f"{name} draws from {asked}; give --{asked}.")
    found = prompts_of(prompts)
    if isinstance(found, Path):
        home = device_of(pipe)
        return [embeddings_on(home, row) for row in _rows(found, set(takes), name)]
    if "prompt" not in takes:
        raise ValueError(f"{name} takes no prompts; it takes {', '.join(takes)}.")
    return [{"prompt": prompt} for prompt in found]


def first_samples(pipe: Any, prompts: Any) -> dict[str, Any]:
    """Per-sample arguments of one sample: the first asked for, or a default one.

    Raises:
        ValueError: a host is asked for something else than inputs of its own.
    """
    if has_loop(pipe):
        if not isinstance(prompts, Mapping):
            raise ValueError(
                f"{pipe.name} is run on inputs of its own; give those of one sample as a mapping, "
                "a row each: prompts={'observation': tensor}."
            )
        return dict(prompts)
    if prompts is None and takes_labels(pipe):
        return samples(pipe, class_labels=[0])[0]
    return samples(pipe, default_prompt(pipe) if prompts is None else prompts)[0]


def default_prompt(pipe: Any) -> str:
    """A prompt that a pipeline can draw as it is; one that it stores, where it stores some."""
    known = getattr(getattr(pipe, "text_encoder", None), "known", {})
    return next((prompt for prompt in known if prompt), DEFAULT_PROMPT)


def takes_labels(pipe: Any) -> bool:
    """Whether a pipeline draws classes and not prompts."""
    return "class_labels" in inspect.signature(pipe.__call__).parameters


def joined(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The per-sample arguments of several samples as those of one call.

    One sample's are those of the call as a person makes it: its picture is no list of one picture.
    Labels are a list even so, since DiT pipelines take nothing else.

    Args:
        entries: a mapping per sample, all with the same names: tensors with a leading axis of one,
            lists of one entry, pictures, or plain values.
    """
    if len(entries) == 1:
        listed = {"class_labels": [entries[0].get("class_labels")]}
        return {**entries[0], **(listed if isinstance(listed["class_labels"][0], int) else {})}
    return {name: _join([entry[name] for entry in entries]) for name in entries[0]}


def embeddings_on(device: torch.device, given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a call with its prompt embeddings and their masks where the pipeline runs.

    Pipelines move what they encode themselves; few move embeddings that they are given.
    """
    return {
        name: _moved(value, device) if EMBEDDED.search(name) else value
        for name, value in given.items()
    }


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, list):
        return [_moved(each, device) for each in value]
    return value.to(device) if isinstance(value, Tensor) else value


def generators(seeds: Sequence[int]) -> torch.Generator | list[torch.Generator]:
    """A generator for each sample of a call; of one sample itself, since not all take a list."""
    made = [torch.Generator().manual_seed(seed) for seed in seeds]
    return made[0] if len(made) == 1 else made


def _join(values: list[Any]) -> Any:
    if isinstance(values[0], Tensor):
        return torch.cat(values)
    if isinstance(values[0], list):
        return [entry for value in values for entry in value]
    return values


def _rows(path: Path, takes: set[str], name: str) -> list[dict[str, Any]]:
    """The rows of a file of embeddings, each with a leading axis of one."""
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file: {error}.") from error
    unknown = sorted(tensors.keys() - takes)
    lengths = {len(tensor) for tensor in tensors.values()}
    if unknown or len(lengths) != 1:
        raise ValueError(
            f"{path} holds {', '.join(sorted(tensors))} with {sorted(lengths)} rows; expected "
            f"arguments of {name} with one row per sample (unknown: {unknown})."
        )
    return [
        {key: tensor[row : row + 1] for key, tensor in tensors.items()}
        for row in range(lengths.pop())
    ]


def drawn(output: Any) -> Float[Tensor, "B *frames C H W"]:
    """What a pipeline drew with `output_type="pt"`, in [0, 1], float32, on the CPU.

    Args:
        output: the pipeline's output: images, or videos with an axis of frames after the samples'.
    """
    samples: Tensor = output[0]
    return samples.float().cpu().clamp(0, 1)


SMALLEST = 11  # pixels of a side, which SSIM's window fits into


def heat_maps(
    values: Float[Tensor, " B *shape"], reference: Float[Tensor, " B *shape"]
) -> Float[Tensor, "B 1 H W"]:
    """Results of any shape as pictures: grey from the reference's least value to its largest.

    Args:
        values: what runs came to.
        reference: what the full runs came to.

    Returns:
        A row of a picture per entry of the first axis, enlarged to 11 pixels at least.
    """
    low, high = reference.min(), reference.max()
    rows = values.shape[1] if values.ndim > 2 else 1
    scaled = ((values - low) / (high - low).clamp(min=1e-12)).float().clamp(0, 1)
    maps = scaled.reshape(len(values), 1, rows, -1)
    factor = -(-SMALLEST // min(maps.shape[2:]))
    return maps.repeat_interleave(factor, 2).repeat_interleave(factor, 3)


def middle(samples: Float[Tensor, "B *frames C H W"]) -> Float[Tensor, "B C H W"]:
    """The images themselves, of videos the middle frames."""
    return samples[:, samples.shape[1] // 2] if samples.ndim == 5 else samples


def pictures(output: Any) -> Float[Tensor, "B C H W"]:
    """What a pipeline drew with `output_type="pt"`, of a video its middle frame.

    Args:
        output: the pipeline's output.

    Returns:
        Images in [0, 1], float32, on the CPU.
    """
    return middle(drawn(output))


def guidance_of_call(pipe: Any, settings: Mapping[str, Any]) -> float:
    """The guidance strength of a call: what is given, else the pipeline's default, else 1.

    Args:
        pipe: the pipeline.
        settings: keyword arguments of the call.
    """
    parameter = inspect.signature(pipe.__call__).parameters.get("guidance_scale")
    default = 1.0 if parameter is None else parameter.default
    given = settings.get("guidance_scale", default)
    return float(given) if isinstance(given, (int, float)) else 1.0


def call_settings(
    pipe: Any,
    num_inference_steps: int | None,
    guidance_scale: float | None = None,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Arguments of every call of a pipeline, or of a host.

    Args:
        pipe: the pipeline; or a host, whose loop says its own steps and guidance.
        num_inference_steps: sampler steps; None takes 50, and of a host what it makes.
        guidance_scale: guidance strength; None leaves the pipeline's default, 3 for one that draws
            classes.
        settings: further arguments, such as `height`, `true_cfg_scale`, `num_frames`.

    Raises:
        ValueError: the pipeline does not take one of them.
    """
    if has_loop(pipe):
        return pipe.settings(num_inference_steps, guidance_scale, settings or {})
    num_inference_steps = num_inference_steps or DEFAULT_STEPS
    given: dict[str, Any] = {"num_inference_steps": num_inference_steps, **(settings or {})}
    if guidance_scale is None and takes_labels(pipe):
        guidance_scale = CLASS_GUIDANCE
    if guidance_scale is not None:
        given.setdefault("guidance_scale", guidance_scale)
    takes = inspect.signature(pipe.__call__).parameters
    unknown = sorted(given.keys() - takes.keys())
    if unknown:
        raise ValueError(f"{type(pipe).__name__} takes no {unknown}; it takes {', '.join(takes)}.")
    return given
