"""The functions behind `foreseer inspect --pipeline` and `foreseer verify --pipeline`.

As in commands.py, their signatures are the command lines and their docstrings the help text.
"""

from typing import Any, Literal


def inspect(
    pipeline: Any,
    prompts: str | None = None,
    guidance_scale: float | None = None,
    num_inference_steps: int = 50,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    device: str | None = None,
    **settings: Any,
) -> None:
    """Run one step of a pipeline and tell whether it is supported, and why not.

    Shows its trunk and head, the taps it has, its guidance branches, what a recording and a
    history of it take, and which fits serve it.

    Args:
        pipeline: folder, hub name or `zoo:<name>` of a diffusers pipeline.
        prompts: a prompt; or a .txt file with one per line, or a .safetensors file of embeddings
            by argument of the pipeline, of which the first row is taken.
        guidance_scale: guidance strength; None leaves the pipeline's default.
        num_inference_steps: sampler steps S.
        dtype: dtype a pipeline given by name is loaded in.
        device: where to; None takes a GPU where there is one.
        settings: further arguments of the pipeline's call, as in {"height": 512, "width": 512}.
    """
    from foreseer.trajectories.inspect_pipeline import inspect_pipeline_command

    inspect_pipeline_command(
        pipeline=pipeline,
        prompts=prompts,
        guidance_scale=guidance_scale,
        num_inference_steps=num_inference_steps,
        settings=settings,
        dtype=dtype,
        device=device,
    )


def verify(
    pipeline: Any,
    predictor: str | None = None,
    prompts: str | None = None,
    guidance_scale: float | None = None,
    num_inference_steps: int | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    device: str | None = None,
    **settings: Any,
) -> None:
    """Prove on a pipeline of yours that foreseer is exact, and measure what it costs there.

    Runs it some forty times at few steps: what is recorded must leave the run as it is, recorded
    features put back must give the same latents bit for bit, a run broken off must not reach the
    next one, and nothing may be left behind; then memory and cost. Exits with code 1 when a check
    fails.

    Args:
        pipeline: folder, hub name or `zoo:<name>` of a diffusers pipeline.
        predictor: also run this predictor: a folder, hub name or `zoo:<name>`.
        prompts: a prompt; or a .txt file with one per line, or a .safetensors file of embeddings
            by argument of the pipeline, of which the first row is taken.
        guidance_scale: guidance strength; None leaves the pipeline's default.
        num_inference_steps: sampler steps S; None takes the predictor's, or 8.
        dtype: dtype a pipeline given by name is loaded in.
        device: where to; None takes a GPU where there is one.
        settings: further arguments of the pipeline's call, as in {"height": 512, "width": 512}.
    """
    from foreseer.evaluation.verify_command import verify_pipeline_command

    verify_pipeline_command(
        pipeline=pipeline,
        predictor=predictor,
        prompts=prompts,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        settings=settings,
        dtype=dtype,
        device=device,
    )
