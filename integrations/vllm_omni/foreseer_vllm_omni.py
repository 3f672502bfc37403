"""A cache backend of vLLM-Omni that forecasts with a predictor of foreseer.

Written against vllm-omni 0.30.0: `CacheBackend` (diffusion/cache/base.py), `get_cache_backend`
(diffusion/cache/selector.py), which knows its own backends only, and the entry-point group
`vllm_omni.general_plugins`, whose functions run in every process, maybe several times.

    vllm serve Qwen/Qwen-Image --omni --cache-backend foreseer \
        --cache-config '{"predictor": "runs/qwen_8"}'
"""

import functools
from collections.abc import Callable
from typing import Any

from vllm_omni.diffusion.cache import selector
from vllm_omni.diffusion.cache.base import CacheBackend
from vllm_omni.diffusion.data import DiffusionCacheConfig
from vllm_omni.diffusion.worker import diffusion_model_runner

import foreseer as fs
from foreseer.integration.served import ServedNetwork

NAME = "foreseer"


class ForeseerBackend(CacheBackend):
    """Runs a pipeline's transformer at the predictor's anchors only.

    The calls of one step are its guidance branches, in their order; a worker that makes one of two
    (cfg_parallel_size=2) is refused, since it sees one branch where the fit had two. Weights are
    compared by their values in any layout: this engine lays them out in its own way.

    Args:
        config: `predictor`, a folder, `zoo:<name>` or hub name of one on the tap `output`.

    Raises:
        ValueError: no predictor is named.
    """

    def __init__(self, config: DiffusionCacheConfig) -> None:
        super().__init__(config)
        name = getattr(config, "predictor", None)
        if not name:
            raise ValueError(
                'the cache backend foreseer needs a predictor: --cache-config \'{"predictor": '
                '"folder, zoo:name or owner/name"}\'.'
            )
        self.predictor = fs.load(name)
        self.served: ServedNetwork | None = None
        self.step = -1
        self.calls = 0  # of the step in progress

    def enable(self, pipeline: Any) -> None:
        """Put the predictor around the transformer's forward.

        Raises:
            PredictorMismatch: it was fitted on another model, sampler or tap.
            ValueError: the pipeline has several transformers.
        """
        if getattr(pipeline, "transformer_2", None) is not None:
            raise ValueError(
                f"{type(pipeline).__name__} has two transformers that take turns; this backend "
                "serves pipelines with one. Run it without --cache-backend foreseer."
            )
        network = pipeline.transformer
        self.served = ServedNetwork(self.predictor, network, pipeline.scheduler)
        network.forward = functools.partial(self._call, self.served, network.forward)
        self.enabled = True

    def refresh(self, pipeline: Any, num_inference_steps: int, verbose: bool = True) -> None:
        """Forget the run before; a request of other steps than the fit's is refused by its grid.

        Args:
            pipeline: the one that was enabled.
            num_inference_steps: steps of the request.
            verbose: unused; there is nothing to tell.
        """
        assert self.served is not None  # enabled
        self.served.reset()
        self.step, self.calls = -1, 0

    def _call(
        self, served: ServedNetwork, forward: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """One call of the transformer, computed or forecast.

        Raises:
            PredictorMismatch: the request leaves the fit's grid, guidance, dtype or latents.
        """
        index = served.scheduler.step_index or 0
        self.calls = self.calls + 1 if index == self.step else 0
        self.step = index
        return served(index, self.calls, forward, *args, **kwargs)


def register() -> None:
    """Teach the engine the backend's name; once, however often it is called."""
    if getattr(selector.get_cache_backend, "knows_foreseer", False):
        return
    others = selector.get_cache_backend

    @functools.wraps(others)
    def get_cache_backend(cache_backend: str | None, cache_config: Any) -> CacheBackend | None:
        if cache_backend != NAME:
            return others(cache_backend, cache_config)
        if isinstance(cache_config, dict):
            cache_config = DiffusionCacheConfig.from_dict(cache_config)
        return ForeseerBackend(cache_config)

    get_cache_backend.knows_foreseer = True
    selector.get_cache_backend = get_cache_backend
    diffusion_model_runner.get_cache_backend = get_cache_backend
