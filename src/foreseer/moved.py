"""Modules by the names they had before they were sorted into rooms: they work, with a warning.

YAML files name classes by their module (`foreseer.training.callbacks.ClockCosine`), and people keep
YAML files. `import foreseer` puts a finder behind Python's own, which is asked only for names that
no file answers to.
"""

import sys
import warnings
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from types import ModuleType
from typing import Any

MOVED = {
    "checkpoints.arguments": "checkpoints.config",
    "checkpoints.call_settings": "checkpoints.spec",
    "checkpoints.folder": "checkpoints.hub",
    "distill.export": "distill.student_export",
    "distill.points": "distill.guidance",
    "distill.runs": "distill.teacher_runs",
    "distill.sampling": "distill.few_steps",
    "distill.start": "distill.few_steps",
    "integration.adaptive": "schedules",
    "integration.average_velocity": "integration.pipelines.average_velocity",
    "integration.bench_meta": "evaluation.results",
    "integration.branches": "integration.host.branches",
    "integration.call": "integration.host.call",
    "integration.call_rows": "integration.host.call",
    "integration.call_settings": "integration.host.caller",
    "integration.clock": "integration.host.clock",
    "integration.denoisers": "integration.host.trunk",
    "integration.expert": "integration.host.expert",
    "integration.fingerprint": "integration.host.fingerprint",
    "integration.flops": "evaluation.timing",
    "integration.gate": "integration.host.gate",
    "integration.generate": "evaluation.generate",
    "integration.head_reader": "integration.forecast_model",
    "integration.held_weights": "integration.host.fingerprint",
    "integration.hook": "integration.host.hook",
    "integration.host_facts": "integration.host.proof",
    "integration.layout": "integration.host.layout",
    "integration.masks": "integration.schedule",
    "integration.metrics": "evaluation.metrics",
    "integration.partial": "integration.token_runner",
    "integration.pipeline_call": "integration.pipelines.pipeline_call",
    "integration.pixel_flux_pipeline": "integration.pipelines.pixel_pipeline",
    "integration.pixel_pipeline": "integration.pipelines.pixel_pipeline",
    "integration.prediction": "integration.host.call",
    "integration.prompt_files": "integration.pipelines.pipeline_call",
    "integration.proof": "integration.host.proof",
    "integration.report_charts": "evaluation.page.charts",
    "integration.report_compare": "evaluation.page.compare",
    "integration.report_heat": "evaluation.page.heat",
    "integration.report_html": "evaluation.page.html",
    "integration.report_rows": "evaluation.results",
    "integration.report_script": "evaluation.page.template",
    "integration.report_style": "evaluation.page.template",
    "integration.report_table": "evaluation.page.table",
    "integration.report_template": "evaluation.page.template",
    "integration.running": "integration.host.caller",
    "integration.sampler": "integration.linear_sampler",
    "integration.sentence_encoder": "integration.pipelines.sentence_encoder",
    "integration.sheet": "evaluation.page.sheet",
    "integration.side_by_side": "evaluation.page.side_by_side",
    "integration.solvers": "evaluation.solvers",
    "integration.student_pipeline": "integration.pipelines.student_pipeline",
    "integration.time_facts": "integration.host.trunk",
    "integration.timing": "evaluation.timing",
    "integration.told_sigmas": "integration.sigma_run",
    "integration.trunk_facts": "integration.host.trunk",
    "integration.verify": "evaluation.verify",
    "integration.verify_command": "evaluation.verify",
    "integration.watched": "integration.host.hook",
    "predictors.bands": "predictors.per_part",
    "predictors.damped": "predictors.rules",
    "predictors.experts": "predictors.earlier",
    "predictors.foca": "predictors.rules",
    "predictors.hermite": "predictors.rules",
    "predictors.hybrid": "predictors.per_part",
    "predictors.kept_values": "predictors.gates",
    "predictors.multistep": "predictors.rules",
    "predictors.parted": "predictors.earlier",
    "predictors.polynomial": "predictors.rules",
    "predictors.splines": "predictors.gates",
    "predictors.token_clusters": "predictors.tokens",
    "training.any_anchors": "training.l2p",
    "training.bench_curves": "evaluation.page.curves",
    "training.bench_plan": "evaluation.plan",
    "training.bench_runs": "evaluation.runs",
    "training.bench_store": "evaluation.runs",
    "training.benchmark": "evaluation.benchmark",
    "training.board": "training.plumbing.progress",
    "training.callbacks": "training.plumbing.progress",
    "training.choosing": "training.fits",
    "training.closed_form": "training.gram_fit",
    "training.continuous": "training.continuous_fit",
    "training.descent": "training.predictor_fit",
    "training.disca_gan": "training.disca.gan",
    "training.extends": "training.shipped",
    "training.frozen_runs": "training.disca.replayed_runs",
    "training.inspect_command": "evaluation.inspection",
    "training.inspect_markdown": "evaluation.page.inspect_markdown",
    "training.inspect_page": "evaluation.page.inspect_page",
    "training.left_out": "training.cross_validation",
    "training.lesa_rates": "training.lesa.lesa_start",
    "training.lesa_samples": "training.lesa.lesa_samples",
    "training.lesa_start": "training.lesa.lesa_start",
    "training.linear_equivalent": "training.lesa.linear_equivalent",
    "training.linear_refit": "training.lesa.linear_equivalent",
    "training.measure": "evaluation.measure",
    "training.offline": "evaluation.offline",
    "training.parts": "training.earlier_fits",
    "training.processes": "training.plumbing.resuming",
    "training.progress": "training.plumbing.progress",
    "training.readout_callbacks": "training.readout.readout_fit",
    "training.readout_parts": "training.readout.walk",
    "training.readout_refit": "training.readout.readout_refit",
    "training.readout_runs": "training.readout.readout_runs",
    "training.readout_segment": "training.readout.segment",
    "training.readout_shipped": "training.readout.shipped_sums",
    "training.readout_sums": "training.readout.segment",
    "training.readout_walk": "training.readout.walk",
    "training.recipes": "training.fits",
    "training.refit_command": "training.refit",
    "training.replayed_runs": "training.disca.replayed_runs",
    "training.resuming": "training.plumbing.resuming",
    "training.rows": "evaluation.rows",
    "training.same_training": "training.plumbing.resuming",
    "training.search": "evaluation.search",
    "training.search_command": "training.anchor_search",
    "training.stages": "training.lesa.stages",
    "training.verdict": "evaluation.verdict",
    "training.windows": "training.lesa.stages",
    "trajectories.estimate": "trajectories.recipe",
    "trajectories.gram_sums": "trajectories.gram",
    "trajectories.header": "trajectories.files.header",
    "trajectories.manifest": "trajectories.files.manifest",
    "trajectories.merge": "trajectories.files.repair",
    "trajectories.motion": "evaluation.motion",
    "trajectories.partitions": "trajectories.recipe",
    "trajectories.remote": "trajectories.files.storage",
    "trajectories.repair": "trajectories.files.repair",
    "trajectories.sampler": "trajectories.epoch_sampler",
    "trajectories.shards": "trajectories.files.shards",
    "trajectories.storage": "trajectories.files.storage",
    "trajectories.uploads": "trajectories.files.writer",
    "trajectories.writer": "trajectories.files.writer",
}
"""Old name of a module inside `foreseer`, and its name now."""

RECIPES = frozenset(
    f"training.{name}"
    for name in (
        "emoji fashion_mnist flow_teacher judge teacher teacher_card teacher_export text_card "
        "text_judge text_teacher"
    ).split()
)
RECIPES_MOVED = (
    "the recipes of the bundled models are no longer part of the package; in the repository: "
    "python examples/bundled_models/train.py fit --config examples/bundled_models/fashion_dit.yaml"
)


class MovedFinder(MetaPathFinder, Loader):
    """Import what an old name stands for, and warn."""

    def find_spec(
        self, fullname: str, path: Any = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """A loader for a moved module; `None` for every other name."""
        package, _, name = fullname.partition(".")
        if package == "foreseer" and name in RECIPES:
            raise ModuleNotFoundError(f"{fullname}: {RECIPES_MOVED}", name=fullname)
        return spec_from_loader(fullname, self) if package == "foreseer" and name in MOVED else None

    def create_module(self, spec: ModuleSpec) -> None:
        """Python's default: what is put in its place comes with `exec_module`."""

    def exec_module(self, module: ModuleType) -> None:
        """Put the module of today under the old name, so that its classes exist once."""
        old = module.__name__
        new = f"foreseer.{MOVED[old.removeprefix('foreseer.')]}"
        text = f"{old} is {new} now: change the name in your YAML or import."
        warnings.warn(text, DeprecationWarning, stacklevel=2)
        sys.modules[old] = import_module(new)


def install() -> None:
    """Answer to old names, once."""
    if not any(isinstance(finder, MovedFinder) for finder in sys.meta_path):
        sys.meta_path.append(MovedFinder())
