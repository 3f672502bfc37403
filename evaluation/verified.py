"""The checks of verify.py as a table and a verdict."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm.auto import tqdm

from foreseer.evaluation.verify import EXACT_TAPS, Check, verify_pipeline
from foreseer.integration.host.trunk import UnsupportedHost
from foreseer.integration.pipelines.pipeline_call import joined
from foreseer.predictors.base import Predictor

DEFAULT_STEPS = 8
WORDS = {True: "ok", False: "FAILED", None: ""}


@dataclass(frozen=True)
class Verified:
    """What checking a pipeline came to; true where no check failed.

    Args:
        checks: every check, in the order made.
    """

    checks: tuple[Check, ...]

    def __bool__(self) -> bool:
        return all(check.passed is not False for check in self.checks)

    def __str__(self) -> str:
        return f"{table(self.checks)}\n\n{verdict(self.checks)}"


def verified(pipe: Any, run: Callable[[], Any], predictor: Predictor | None) -> Verified:
    """Check a pipeline under a bar; one that cannot be hooked has failed the check `host`.

    Args:
        pipe: a pipeline with nothing attached.
        run: calls it on one sample, the same inputs and noise every time.
        predictor: to be run too.
    """
    checks: list[Check] = []
    try:
        with tqdm(desc="verify", unit="check", leave=False) as bar:
            for check in verify_pipeline(pipe, run, predictor):
                checks.append(check)
                bar.update()
    except UnsupportedHost as error:
        checks.append(Check("host", False, str(error)))
    return Verified(tuple(checks))


def num_steps_of(predictor: Predictor | None) -> int:
    """The steps a predictor was fitted on; a few where there is none."""
    if predictor is None or predictor.spec is None:
        return DEFAULT_STEPS
    return len(predictor.spec.sigmas)


def one_call(
    pipe: Any, sample: Mapping[str, Any], settings: Mapping[str, Any]
) -> Callable[[], Any]:
    """A call of the pipeline on one sample, the same inputs and noise every time.

    Args:
        pipe: a pipeline.
        sample: its per-sample arguments.
        settings: the other ones.
    """
    return functools.partial(_call, pipe, joined([sample]), settings)


def _call(pipe: Any, inputs: Mapping[str, Any], given: Mapping[str, Any]) -> Any:
    generator = torch.Generator().manual_seed(0)
    return pipe(**inputs, **given, generator=generator, output_type="latent")


def table(checks: Sequence[Check]) -> str:
    """A line per check."""
    width = max(len(check.name) for check in checks)
    return "\n".join(f"{c.name:<{width}}  {WORDS[c.passed]:<6}  {c.found}" for c in checks)


def verdict(checks: Sequence[Check]) -> str:
    """One sentence: what this pipeline can be used with."""
    failed = [check.name for check in checks if check.passed is False]
    exact = [tap for tap in EXACT_TAPS if not any(name.endswith(tap) for name in failed)]
    others = [name for name in failed if not name.endswith(EXACT_TAPS)]
    if "repeatable" in failed:
        return (
            "VERDICT: nothing can be said, since two plain runs differ: fix the seed, or turn on "
            "torch.use_deterministic_algorithms."
        )
    if others:
        return f"VERDICT: do not use it yet: {', '.join(others)}."
    if not exact:
        return "VERDICT: not supported: no tap of this pipeline can be put back exactly."
    if failed:
        return f"VERDICT: works on the tap {exact[0]!r} only; the others are refused on attaching."
    return "VERDICT: works, and is exact, on the taps " + " and ".join(map(repr, exact)) + "."
