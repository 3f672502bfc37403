"""A block of diffusers' modular pipelines that forecasts while the block inside it denoises."""

import os
from collections.abc import Sequence
from typing import Any

from diffusers import LoopSequentialPipelineBlocks, ModularPipelineBlocks

from foreseer.integration.forecasting import forecasting
from foreseer.integration.report import Report
from foreseer.predictors.base import Predictor


class ForecastDenoise(ModularPipelineBlocks):
    """Runs another block with a predictor attached: `attach` and `detach` around its call.

    Stands in the place of the block that sets the timesteps and loops over them, which most
    modular pipelines name `denoise`: `blocks.sub_blocks["denoise"] = ForecastDenoise(...)` before
    `blocks.init_pipeline()`, which copies it. The calls of the guider's loop are told apart as a
    pipeline's are.

    Args:
        denoise: the block.
        predictor: see `attach`.
        anchors: see `attach`.

    Attributes:
        report: what the latest run did; None before the first.

    Raises:
        ValueError: the block is a loop, whose timesteps another one sets before it.
    """

    def __init__(
        self,
        denoise: ModularPipelineBlocks,
        predictor: Predictor | str | os.PathLike[str],
        anchors: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if isinstance(denoise, LoopSequentialPipelineBlocks):
            raise ValueError(
                f"{type(denoise).__name__} is a loop, whose timesteps another block sets before "
                "it; wrap the block around it that holds both (in most pipelines `denoise`)."
            )
        self.denoise = denoise
        self.predictor = predictor
        self.anchors = anchors
        self.report: Report | None = None

    @property
    def model_name(self) -> str | None:
        """That of the block inside, which chooses the pipeline's class."""
        name: str | None = self.denoise.model_name
        return name

    @property
    def description(self) -> str:
        """One sentence, and the description of the block inside."""
        return f"Forecasts the network's output between anchors.\n{self.denoise.description}"

    @property
    def expected_components(self) -> list[Any]:
        """Those of the block inside."""
        return list(self.denoise.expected_components)

    @property
    def expected_configs(self) -> list[Any]:
        """Those of the block inside."""
        return list(self.denoise.expected_configs)

    @property
    def inputs(self) -> list[Any]:
        """Those of the block inside."""
        return list(self.denoise.inputs)

    @property
    def required_inputs(self) -> list[str]:
        """Those of the block inside."""
        return list(self.denoise.required_inputs)

    @property
    def intermediate_outputs(self) -> list[Any]:
        """Those of the block inside."""
        return list(self.denoise.intermediate_outputs)

    @property
    def outputs(self) -> list[Any]:
        """Those of the block inside."""
        return list(self.denoise.outputs)

    def __call__(self, components: Any, state: Any) -> tuple[Any, Any]:
        """The block inside, forecasting.

        Raises:
            PredictorMismatch: see `attach`; the steps, the guidance or the latents are not those
                of the fit.
            ValueError: see `attach`.
        """
        with forecasting(components, self.predictor, self.anchors) as run:
            components, state = self.denoise(components, state)
        self.report = run.report()
        return components, state
