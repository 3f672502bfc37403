"""Arithmetic, not measurements: what the recipes for real models take on one GPU.

    python benchmarks/recipe_estimates.py [--share 0.35] [--price 2.5] [--peak 989]

Builds every transformer with its published configuration on torch's meta device, where tensors have
shapes and no contents, and counts the matrix products of one call at the recipe's size. Everything
else follows from shapes, the recipe's own YAML and three assumptions: the GPU's peak, the share of
it that is reached, and its price. Writes `results/recipes.json` and tables into `docs/recipes.md`.
"""

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import yaml
from pipelines_page import fill
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from foreseer.evaluation.timing import StepFlops, run_flops, step_flops
from foreseer.integration.schedule import uniform
from foreseer.trajectories.recipe import GRAM_BYTES, STATE_BYTES

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "configs" / "recipes"
RESULT = ROOT / "benchmarks" / "results" / "recipes.json"
PAGE = ROOT / "docs" / "recipes.md"
BUDGETS = (11, 8)
BYTES = 2  # of a bfloat16 number
VERIFY_EVALUATIONS = 40 * 8  # `foreseer verify` calls the pipeline some forty times at 8 steps

Shapes = Mapping[str, Any]  # the keyword arguments of one call of the transformer
Counted = tuple[StepFlops, Tensor]  # of one call, and what enters its head: the hidden tap


@dataclass(frozen=True)
class Model:
    """One recipe's model.

    Args:
        recipe: its folder.
        label: model and size.
        transformer: class in diffusers.
        config: what its published configuration has other than the class's defaults.
        call: arguments of one call at the recipe's height, width and frames.
        branches: guidance branches per step.
        branches_per_call: of these in one call of the transformer.
        transformers: with their own weights, of which one runs at a step.
        others: billions of parameters of text encoders and decoder, as published.
        count: counts one call.
    """

    recipe: str
    label: str
    transformer: str
    config: dict[str, Any]
    call: Callable[[Shapes], Shapes]
    branches: int
    branches_per_call: int
    transformers: int
    others: float
    count: Callable[[nn.Module, Shapes], Counted]


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """A tensor of a shape and no contents."""
    return torch.empty(shape, dtype=dtype, device="meta")


def counted(transformer: nn.Module, call: Shapes) -> Counted:
    """One call, counted as a whole."""
    entering: list[Tensor] = []
    head = transformer.get_submodule("norm_out")
    handle = head.register_forward_pre_hook(lambda _, args: entering.append(args[0]))
    try:
        return step_flops(transformer, ((), dict(call)), "output"), entering[0]
    finally:
        handle.remove()


def counted_in_parts(transformer: Any, call: Shapes) -> Counted:
    """One call of HunyuanVideo 1.5, by module: its forward sorts tokens by their contents."""
    latents, timestep = call["hidden_states"], call["timestep"]
    entering = transformer.x_embedder(latents)
    temb = transformer.time_embed(timestep)
    rope = transformer.rope(latents)
    text = meta(1, sum(call[name].shape[1] for name in TEXTS), entering.shape[-1])
    mask = meta(1, text.shape[1], dtype=torch.bool)
    texts = [call[name] for name in TEXTS]
    block = transformer.transformer_blocks[0]
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as once:
        transformer.x_embedder(latents)
        transformer.time_embed(timestep)
        transformer.context_embedder(texts[0], timestep, meta(*texts[0].shape[:2]))
        transformer.context_embedder_2(texts[1])
        transformer.image_embedder(texts[2])
        output = transformer.proj_out(transformer.norm_out(entering, temb))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as each:
        block(entering, text, temb, mask, rope)
    blocks = len(transformer.transformer_blocks)
    total = once.get_total_flops() + blocks * each.get_total_flops()
    return StepFlops(total, 0, output.numel()), entering


TEXTS = ("encoder_hidden_states", "encoder_hidden_states_2", "image_embeds")


def flux(size: Shapes) -> Shapes:
    """Packed 2 x 2 latents and 512 text tokens."""
    tokens = size["height"] // 16 * (size["width"] // 16)
    return {
        "hidden_states": meta(1, tokens, 64),
        "encoder_hidden_states": meta(1, 512, 4096),
        "pooled_projections": meta(1, 768),
        "timestep": meta(1),
        "guidance": meta(1, dtype=torch.float32),
        "img_ids": meta(tokens, 3),
        "txt_ids": meta(512, 3),
        "return_dict": False,
    }


def sd35(size: Shapes) -> Shapes:
    """Both branches, with 77 tokens of CLIP and 256 of T5."""
    return {
        "hidden_states": meta(2, 16, size["height"] // 8, size["width"] // 8),
        "encoder_hidden_states": meta(2, 333, 4096),
        "pooled_projections": meta(2, 2048),
        "timestep": meta(2),
        "return_dict": False,
    }


def qwen(size: Shapes) -> Shapes:
    """Packed 2 x 2 latents and 64 text tokens: prompts are not padded."""
    height, width = size["height"] // 16, size["width"] // 16
    return {
        "hidden_states": meta(1, height * width, 64),
        "encoder_hidden_states": meta(1, 64, 3584),
        "timestep": meta(1),
        "img_shapes": [[(1, height, width)]],
        "return_dict": False,
    }


def wan(size: Shapes) -> Shapes:
    """A frame of latents per four frames and one, 512 text tokens."""
    frames = (size["num_frames"] - 1) // 4 + 1
    return {
        "hidden_states": meta(1, 16, frames, size["height"] // 8, size["width"] // 8),
        "encoder_hidden_states": meta(1, 512, 4096),
        "timestep": meta(1),
        "return_dict": False,
    }


def hunyuan(size: Shapes) -> Shapes:
    """A frame of latents per four frames and one; 1,000 + 256 text and 729 picture tokens."""
    frames = (size["num_frames"] - 1) // 4 + 1
    return {
        "hidden_states": meta(1, 65, frames, size["height"] // 16, size["width"] // 16),
        "encoder_hidden_states": meta(1, 1000, 3584),
        "encoder_hidden_states_2": meta(1, 256, 1472),
        "image_embeds": meta(1, 729, 1152),
        "timestep": meta(1),
    }


SD35_LARGE = {
    "sample_size": 128,
    "num_layers": 38,
    "num_attention_heads": 38,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 2432,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
    "qk_norm": "rms_norm",
}
MODELS = (
    Model(
        recipe="flux_dev",
        label="FLUX.1-dev, 1024 x 1024",
        transformer="FluxTransformer2DModel",
        config={"guidance_embeds": True},
        call=flux,
        branches=1,
        branches_per_call=1,
        transformers=1,
        others=5.0,
        count=counted,
    ),
    Model(
        recipe="sd35_large",
        label="Stable Diffusion 3.5 Large, 1024 x 1024",
        transformer="SD3Transformer2DModel",
        config=SD35_LARGE,
        call=sd35,
        branches=2,
        branches_per_call=2,
        transformers=1,
        others=5.7,
        count=counted,
    ),
    Model(
        recipe="qwen_image",
        label="Qwen-Image, 1328 x 1328",
        transformer="QwenImageTransformer2DModel",
        config={},
        call=qwen,
        branches=2,
        branches_per_call=1,
        transformers=1,
        others=8.4,
        count=counted,
    ),
    Model(
        recipe="wan22_t2v",
        label="Wan 2.2 T2V A14B, 832 x 480, 81 frames",
        transformer="WanTransformer3DModel",
        config={},
        call=wan,
        branches=2,
        branches_per_call=1,
        transformers=2,
        others=5.8,
        count=counted,
    ),
    Model(
        recipe="hunyuan_video15",
        label="HunyuanVideo 1.5, 848 x 480, 121 frames",
        transformer="HunyuanVideo15Transformer3DModel",
        config={},
        call=hunyuan,
        branches=2,
        branches_per_call=1,
        transformers=1,
        others=8.6,
        count=counted_in_parts,
    ),
)


def recipe_of(model: Model) -> dict[str, Any]:
    """The recipe's own settings."""
    folder = RECIPES / model.recipe
    files = (folder / "call.yaml", folder / "record.yaml")
    return {k: v for file in files for k, v in yaml.safe_load(file.read_text()).items()}


def facts(model: Model) -> dict[str, Any]:
    """What the meta device tells of a model; the only slow part."""
    told = recipe_of(model)
    with torch.device("meta"), torch.no_grad():
        transformer = getattr(diffusers, model.transformer)(**model.config).to(torch.bfloat16)
        cost, hidden = model.count(transformer, model.call(told["settings"]))
    calls = model.branches // model.branches_per_call
    return {
        "recipe": model.recipe,
        "model": model.label,
        "transformer_parameters": sum(p.numel() for p in transformer.parameters()),
        "transformers": model.transformers,
        "other_parameters": round(model.others * 1e9),
        "branches": model.branches,
        "tokens": hidden.shape[1],
        "step_flops": calls * cost.full,
        "output_elements": calls * cost.elements,  # of all branches
        "output_bytes": calls * BYTES * cost.elements,
        "hidden_bytes": calls * hidden.numel() * hidden.element_size(),  # in Wan of float32
    }


def derived(fact: Mapping[str, Any], told: Mapping[str, Any], given: Mapping[str, float]) -> dict:
    """What follows from a model's facts, its recipe and the assumptions."""
    steps, count, taps = told["num_inference_steps"], told["num_trajectories"], told["taps"]
    cost = StepFlops(fact["step_flops"], 0, fact["output_elements"])
    runs = {n: run_flops(cost, uniform(n, steps), steps, None) for n in BUDGETS}
    step_s = fact["step_flops"] / (given["peak_tflops"] * 1e12 * given["share"])
    gram = GRAM_BYTES * fact["branches"] * steps**2
    latents = fact["output_elements"] // fact["branches"]
    held = sum(fact[f"{tap}_bytes"] for tap in taps)
    weights = fact["transformers"] * fact["transformer_parameters"] + fact["other_parameters"]
    record_s = count * steps * step_s
    return {
        **fact,
        "steps": steps,
        "trajectories": count,
        "taps": taps,
        "weights_bytes": BYTES * weights,
        "run_flops": steps * fact["step_flops"],
        "shares": {str(n): fast / full for n, (fast, full) in runs.items()},
        "history_bytes": {
            tap: {str(n): n * fact[f"{tap}_bytes"] for n in BUDGETS} for tap in ("output", "hidden")
        },
        "recorder_bytes": {
            "as recorded": steps * held,
            "hidden alone": steps * fact["hidden_bytes"],
        },
        "trajectory_bytes": len(taps) * gram + STATE_BYTES * latents,
        "recording_bytes": count * (len(taps) * gram + STATE_BYTES * latents),
        "run_s": steps * step_s,
        "forecast_run_s": {
            str(n): fast / full * steps * step_s for n, (fast, full) in runs.items()
        },
        "record_hours": record_s / 3600,
        "record_cost": record_s / 3600 * given["price_per_hour"],
        "verify_hours": VERIFY_EVALUATIONS * step_s / 3600,
    }


def table(rows: list[tuple[str, ...]], head: tuple[str, ...]) -> str:
    """Markdown."""
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def size(count: float) -> str:
    """Bytes in the decimal unit a person would choose."""
    for unit, power in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= power:
            return f"{count / power:,.1f} {unit}"
    return f"{count:.0f} B"


def seconds(count: float) -> str:
    """Seconds, with a decimal while it tells something."""
    return f"{count:,.0f} s" if count >= 100 else f"{count:.1f} s"


def overview(content: Mapping[str, Any]) -> str:
    """One row per model."""
    head = ("estimate", "a full run", *(f"at {n} evaluations" for n in BUDGETS))
    head += ("recording", "GPU hours to record", "US$")
    rows = []
    for row in content["rows"]:
        fast = [seconds(row["forecast_run_s"][str(n)]) for n in BUDGETS]
        record = f"{row['trajectories']} runs, {size(row['recording_bytes'])}"
        hours, cost = f"{row['record_hours']:.2f}", f"{row['record_cost']:.2f}"
        rows.append((row["model"], seconds(row["run_s"]), *fast, record, hours, cost))
    return table(rows, head)


def details(row: Mapping[str, Any]) -> str:
    """One model's numbers."""
    transformer = f"{row['transformer_parameters'] / 1e9:.1f} billion parameters"
    if row["transformers"] > 1:
        transformer = f"{row['transformers']} of {transformer} each, one of them at a step"
    output, hidden = row["history_bytes"]["output"], row["history_bytes"]["hidden"]
    history = [
        f"{size(output[str(n)])} ({size(hidden[str(n)])} on `hidden`) at {n}" for n in BUDGETS
    ]
    shares = [f"{row['shares'][str(n)]:.1%} at {n}" for n in BUDGETS]
    held, alone = row["recorder_bytes"]["as recorded"], row["recorder_bytes"]["hidden alone"]
    rows = [
        ("transformer", f"{transformer}; {row['tokens']:,} tokens"),
        ("all weights in bfloat16", size(row["weights_bytes"])),
        ("one evaluation, all branches", f"{row['step_flops'] / 1e12:,.0f} TFLOP"),
        (f"a full run of {row['steps']} steps", f"{row['run_flops'] / 1e15:,.2f} PFLOP"),
        ("FLOPs left, by evaluations", ", ".join(shares)),
        ("history kept by a forecast run", ", ".join(history)),
        ("held while a run is recorded", f"{size(held)}; `hidden` alone takes {size(alone)}"),
        ("stored of a trajectory", f"{size(row['trajectory_bytes'])}: Grams and final latents"),
        ("stored in all", f"{size(row['recording_bytes'])} of {row['trajectories']} trajectories"),
        ("recording", f"{row['record_hours']:.2f} GPU hours, US$ {row['record_cost']:.2f}"),
        ("`foreseer verify`, once", f"{row['verify_hours']:.2f} GPU hours"),
    ]
    return table(rows, ("estimate", row["model"]))


def assumptions(content: Mapping[str, Any]) -> str:
    """What the numbers rest on, in a sentence."""
    given = content["assumptions"]
    return (
        f"Assumed: {given['gpu']} with {given['peak_tflops']:g} TFLOP/s in dense bfloat16, of "
        f"which {given['share']:.0%} are reached, at US$ {given['price_per_hour']:.2f} an hour."
    )


def tables(content: Mapping[str, Any]) -> dict[str, str]:
    """Everything that stands between marks on the page, by mark."""
    found = {"assumptions": assumptions(content), "overview": overview(content)}
    return found | {row["recipe"]: details(row) for row in content["rows"]}


def main() -> None:
    """Count, write the JSON, fill the page."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--gpu", default="one H100 SXM")
    parser.add_argument("--peak", type=float, default=989.0, help="TFLOP/s, dense bfloat16")
    parser.add_argument("--share", type=float, default=0.35, help="of the peak that is reached")
    parser.add_argument("--price", type=float, default=2.5, help="US dollars per GPU hour")
    asked = parser.parse_args()
    given = {"peak_tflops": asked.peak, "share": asked.share, "price_per_hour": asked.price}
    rows = [derived(facts(model), recipe_of(model), given) for model in MODELS]
    content = {"estimate": True, "assumptions": {"gpu": asked.gpu, **given}, "rows": rows}
    RESULT.write_text(json.dumps(content, indent=1) + "\n")
    for name, text in tables(content).items():
        fill(PAGE, name, text)


if __name__ == "__main__":
    main()
