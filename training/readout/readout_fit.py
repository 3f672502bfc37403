"""The fit of a readout: one walk over the anchors, a segment an epoch, all in closed form.

Then, where asked for, epochs that refine all segments together on the finished sample.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import torch
from jaxtyping import Float
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from tqdm.auto import tqdm

from foreseer.errors import UnsupportedHost
from foreseer.evaluation.measure import References, opened_for, predictor_errors
from foreseer.integration.host.clock import is_flow
from foreseer.integration.session import Session
from foreseer.predictors.base import Grid
from foreseer.predictors.linear import L2P
from foreseer.predictors.readout import Readout
from foreseer.training.fit_figures import SampleLog
from foreseer.training.gauss_newton import Direction
from foreseer.training.gram_fit import ClosedForm, refuse_several_processes
from foreseer.training.readout.part import NUM_FOLDS, Part, folds_of, of_folds
from foreseer.training.readout.refine import apart, readout_moves, refine
from foreseer.training.readout.segment import (
    Segment,
    SegmentFit,
    add_up,
    fit_segment,
    left_by,
)
from foreseer.training.readout.shipped_sums import segment_tensors
from foreseer.training.readout.walk import (
    SegmentParts,
    Visited,
    Walk,
    check_header,
    check_times,
    later_times,
    sizes_of,
)
from foreseer.training.recorded import groups_of, open_recording, recorded_partition
from foreseer.training.tracking import sampler_of_loop
from foreseer.training.verdict_callbacks import RivalsVerdict, judged
from foreseer.trajectories.prompts import Item


class Detaching(Callback):
    """Takes the hooks of a fit off after an interruption, of which Lightning tells no module."""

    def on_exception(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        exception: BaseException,
    ) -> None:
        """Take them off."""
        detach: Any = pl_module.detach  # the fit brings this callback
        detach()


class LastVerdict(RivalsVerdict):
    """The verdict of a readout fit: rivals are run once the walk leaves the pipeline free."""

    def errors(self, trainer: lightning.Trainer, module: Any) -> Float[Tensor, " n"]:
        """The fit has measured them, unless it was resumed: its validation chooses nothing."""
        if module.val_errors is None:
            return super().errors(trainer, module)
        found: Tensor = module.val_errors[: len(judged(trainer))]
        return found

    def on_save_checkpoint(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        checkpoint: dict[str, Any],
    ) -> None:
        """Keep the formulas' errors in the checkpoints of a finished fit."""
        if pl_module.finished:
            super().on_save_checkpoint(trainer, pl_module, checkpoint)


TAP = "output"
NUM_TRIED = 64
"""Trajectories on which times for step 0 are compared."""
JUDGED = {0, 1}
"""Folds of them on which the error is measured."""
SUMS = "segment_sums"  # in a checkpoint


class ReadoutFit(ClosedForm):
    """Fit rows and readout of every segment on the runs that the segments before it lead to.

    For each anchor in turn: evaluate the network on all calibration trajectories, where the
    accelerated run has brought them; solve for the rows and the readout whose forecasts land their
    next states on the recorded ones (segment.py); advance with them. It takes one network
    evaluation per anchor and trajectory, and before the first anchor one per time tried there, no
    gradients, and memory for one batch: what a batch
    computed lies in a temporary file until the next anchor. A segment is an epoch, after which the
    fit can be resumed; the network then runs the anchors before it once more. Of several processes
    each walks with its share, and all solve for the same sums.

    Args:
        recording: folder of the recording, with states.
        pipeline: the pipeline, its folder or name, or `zoo:<name>`.
        anchors: steps at which the network runs.
        rank: directions of the hidden state that are read.
        neighbours: read the tokens around a token too, where the host tells their grid.
        past: read the hidden states of so many earlier anchors too.
        first_times: later flow times to try telling the network at step 0, between its own and
            the next step's in even steps, and then two beside the best; the one with the least
            error on left-out prompts is the predictor's `first_time`. 0 keeps the step's own.
        batch_size: trajectories per pipeline call.
        refine: Gauss-Newton epochs after the walk, which move the rows of all segments and how much
            is read in each together, on mean log squared error of the finished sample
            (gauss_newton.py), with the ridge that does best on 64 trajectories, a sixth at most.
            They are linearised on 32 others, an eighth at most; the walk is fitted on neither. An
            epoch costs (A^3 - A) / 6 network evaluations per branch of each.
        keep_sums: export the normal equations too, so that `foreseer refit` can add recordings
            without these trajectories: 4 MB an anchor for 64 directions and their neighbours.
        device: where to put a pipeline that is loaded; None takes this process's GPU, if any.
        dtype: dtype to load it in; None takes that of the recording.
        partition: name of recorded `TokenGroups` of the output, such as `regions`, which get rows
            and readouts of their own; None treats all tokens alike.
        groups: makes their numbers of a pipeline call's arguments.

    Raises:
        ValueError: the recording has no states, its guidance ends in mid-run, or `refine` is asked
            for beside `keep_sums` or a partition.
    """

    fit_name = "readout"
    quiet = False

    def __init__(
        self,
        recording: str,
        pipeline: Any,
        anchors: Sequence[int],
        rank: int = 64,
        neighbours: bool = True,
        past: int = 2,
        first_times: int = 4,
        batch_size: int = 16,
        refine: int = 0,
        keep_sums: bool = False,
        device: str | None = None,
        dtype: str | None = None,
        partition: str | None = None,
        groups: Callable[[Mapping[str, Any]], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.recordings = [open_recording(recording, TAP, experts=True)]
        header = self.recording.header
        check_header(header, recording)
        self.tap, self.anchors = TAP, list(anchors)
        self.save_hyperparameters(self.told(Readout, None))  # known once the network has run
        sizes = len(header.sigmas), anchors, header.num_branches, header.expert_steps
        parts = None if partition is None else recorded_partition(header, TAP, partition)
        self.token_groups = groups_of(parts, groups)
        if self.token_groups is not None and keep_sums:
            raise ValueError(
                "the sums of a readout of token groups are not kept; leave keep_sums out, and fit "
                "anew on more trajectories."
            )
        if refine and (keep_sums or self.token_groups is not None):
            beside = "keep_sums" if keep_sums else "a partition"
            raise ValueError(
                f"refine is {refine} beside {beside}, expected 0: sums tell nothing of a "
                "refinement, which moves all tokens alike."
            )
        self.rows = L2P(*sizes, parts)  # those of the formula that each segment started at
        self.predictor: Readout | None = None
        self.pipe: Any = None
        self.pipeline, self.place = pipeline, (dtype, device)
        self.rank, self.neighbours, self.past = rank, neighbours, past
        self.first_times = first_times
        self.refine = refine
        self.first_time: float | None = None
        self.batch_size = batch_size
        self.session: Session | None = None
        self.keep_sums = keep_sums
        self.sums: dict[str, Tensor] = {}  # what is kept of the segments
        self.num_trajectories: Tensor
        self.start_error: Tensor
        self.val_error: Tensor
        self.finished: Tensor
        self.val_errors: Tensor | None = None  # of every held-out sample
        self.register_buffer("num_trajectories", torch.tensor(0))
        self.register_buffer("finished", torch.tensor(False))
        for name in ("start_error", "val_error"):
            self.register_buffer(name, torch.tensor(float("inf"), dtype=torch.float64))

    def configure_callbacks(self) -> list[Callback]:
        """End the fit with its verdict, and leave the pipeline as it was, come what may."""
        return [Detaching(), LastVerdict()]

    def deployed(self) -> Readout:
        """The predictor.

        Raises:
            ValueError: not all segments are fitted yet.
        """
        if self.predictor is None or not self.finished:
            raise ValueError("not all segments of the readout are fitted yet; let the fit run on.")
        return self.predictor

    def metrics(self) -> dict[str, float]:
        """Errors in dB of the held-out samples, and those of the formulas the segments start at."""
        if not self.validation.items:
            return {}
        errors = {"val_error_db": self.val_error, "val_error_db_start": self.start_error}
        return {name: float(error) for name, error in errors.items()}

    def on_fit_start(self) -> None:
        """Load the pipeline, hook into it, and make room for what the batches compute.

        Raises:
            ValueError: the trainer ends before the last epoch, a process has nothing to do, or
                there are several where the fit is to be refined.
        """
        if self.pipe is None:
            self.pipe = opened_for(self.recording, self.pipeline, *self.place)
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if self.refine:
            refuse_several_processes(self)
        items = list(data.train_items)
        self.num_trajectories.fill_(len(items))
        walked, refined, choosing = apart(items) if self.refine else (items, [], [])
        self.calibration, self.refined, self.choosing = (
            References(self.recording, some, self.batch_size)
            for some in (walked, refined, choosing)
        )
        self.validation = References(self.recording, data.val_items, self.batch_size)
        rank, world = self.trainer.global_rank, self.trainer.world_size
        self.batches = [(batch, Visited()) for batch in self.calibration.batches[rank::world]]
        if not self.batches:
            raise ValueError(
                f"process {rank} of {world} has no batch of {self.batch_size} trajectories; use "
                "fewer processes or a smaller batch_size."
            )
        self.walk = Walk(self.rows, self.pipe.scheduler, self.past)
        first = self.calibration.batches[0][:1]
        self.walk.sampler = sampler_of_loop(self.pipe, first, self.calibration.settings)
        self.walk.predictor, self.walk.first_time = self.predictor, self.first_time
        folds = folds_of(item for batch in self.calibration.batches for item in batch)
        self.parts = SegmentParts(self.recording, self.walk, folds)
        most, count = self.trainer.max_epochs, len(self.parts.segments) + self.refine
        if most is not None and 0 <= most < count:
            raise ValueError(
                f"max_epochs is {most}, and each of the {len(self.parts.segments)} segments takes "
                f"an epoch, and {self.refine} refine them; set max_epochs: -1, the fit ends by "
                "itself."
            )
        self.trainer.fit_loop.max_epochs = count
        self.scratch = tempfile.TemporaryDirectory(prefix="foreseer_readout_")
        self.session = Session(self.pipe, self.walk, repeats=True, groups=self.token_groups)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Fit the next segment, or refine all."""
        if self.current_epoch < len(self.parts.segments):
            self._fit_segment(self.current_epoch)
        else:
            self._refine()
        self.optimizers().step()  # type: ignore[union-attr]

    def _fit_segment(self, number: int) -> None:
        """Visit an anchor with all trajectories, and solve for its segment."""
        count = len(self.parts.segments)
        anchor, end = self.parts.segments[number]
        if anchor == 0 and self.first_times:
            self._choose_first_time(end)
        self._visit(anchor, f"anchor {anchor}, segment {number + 1} of {count}")
        found = self._solve(anchor, end)
        self._keep(found.segment, self._started(found, anchor, end), anchor, end)
        self.log("train/readout_gain_db", found.gain_db, prog_bar=True, batch_size=1)
        self.print(
            f"steps {anchor} to {end}: rows from {found.origin}, readout {found.gain_db:+.2f} dB "
            f"on left-out prompts (strength {found.strength:g})"
        )

    def _refine(self) -> None:
        """Take the step that does best on the trajectories that choose, if any does."""
        self.detach()
        predictor, quiet = self.deployed(), self.quiet
        found = refine(self.pipe, predictor, self._moves(), self.refined, self._chosen_by, quiet)
        predictor.load_state_dict(found.predictor.state_dict())
        self.log("train/refine_gain_db", found.gain_db, prog_bar=True, batch_size=1)
        told = "no step is better" if found.ridge is None else f"ridge {found.ridge:g}"
        self.print(f"refined: {found.gain_db:+.2f} dB on trajectories kept for it ({told})")

    def _moves(self) -> list[Direction]:
        return readout_moves(self.recording, self.deployed(), self.refined.items)

    def _chosen_by(self, predictor: L2P) -> float:
        """Mean error in dB of the samples that choose."""
        return float(self._errors(predictor, self.choosing).mean())

    def on_train_epoch_end(self) -> None:
        """After the last segment the predictor is whole; after the last epoch, measure it."""
        done, count = self.current_epoch + 1, len(self.parts.segments)
        if done < count:
            return
        self.detach()
        self.finished.fill_(True)
        if done < count + self.refine or not self.validation.items:
            return
        predictor = self.deployed()
        if not self.quiet:
            self.start_error.fill_(self._errors(self.rows, self.validation).mean())
        self.val_errors = self._errors(predictor, self.validation)
        self.val_error.fill_(self.val_errors.mean())
        self.log("val/error_db", self.val_error)
        SampleLog(self.validation, TAP, self.anchors, self.token_groups).log(self, predictor)

    def on_fit_end(self) -> None:
        """Leave the pipeline as it was."""
        self.detach()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with the segments fitted so far."""
        super().on_load_checkpoint(checkpoint)
        if (arguments := checkpoint["hyper_parameters"]["arguments"]) is not None:
            self._make_predictor(arguments)
            self.first_time = arguments.get("first_time")
        self.sums = checkpoint.get(SUMS, {})

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the segments' sums, where they are asked for."""
        super().on_save_checkpoint(checkpoint)
        if self.keep_sums:
            checkpoint[SUMS] = self.sums

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """One that changes nothing, since segments are solved for: Lightning counts its steps."""
        return torch.optim.SGD([self.rows.weight], lr=0.0)

    def _choose_first_time(self, end: int) -> None:
        """Choose what the network is told at step 0, by the first trajectories."""
        world = self.trainer.world_size
        count = -(-NUM_TRIED // (self.batch_size * world))  # batches of every process
        tried = [item for batch in self.calibration.batches[: count * world] for item in batch]
        folds = {self.parts.folds[item.index] for item in tried}
        if not is_flow(self.pipe.scheduler) or not folds & JUDGED or not folds - JUDGED:
            return  # timesteps are no flow times, or there is nothing to judge on
        batches, few = self.batches, self.batches[:count]
        times = later_times(self.parts.sigmas, self.first_times)
        errors: dict[float | None, float] = {None: self._error_told(None, few, end)}
        try:
            check_times(self.pipe.scheduler, self.parts.sigmas[: end + 1])
            errors |= {told: self._error_told(told, few, end) for told in times}
            best = min(errors, key=errors.__getitem__)
            if best is not None:
                gap = (self.parts.sigmas[0] - times[0]) / 2
                errors |= {t: self._error_told(t, few, end) for t in (best - gap, best + gap)}
        except UnsupportedHost as reason:  # its own time was no trouble
            self.print(f"step 0 keeps its own time: {reason}")
        best = min(errors, key=errors.__getitem__)
        self.walk.first_time, self.batches = best, batches
        self._make_predictor(self.hparams["arguments"] | {"first_time": best})
        time = self.parts.sigmas[0] if best is None else best
        gain = errors[None] - errors[best]
        self.print(f"step 0 is told {time:.4f}: {gain:+.2f} dB on left-out prompts")

    def _error_told(
        self, told: float | None, few: list[tuple[list[Item], Visited]], end: int
    ) -> float:
        """Error in dB that the first segment leaves of prompts that it was not fitted on.

        Args:
            told: flow time that the network is told at step 0.
            few: batches to try it on.
            end: of the segment.
        """
        self.batches, self.walk.first_time = [(items, Visited()) for items, _ in few], told
        self._visit(0, f"step 0 told {self.parts.sigmas[0] if told is None else told:.4f}")
        guided, rank = float(self.parts.guidance(0).sum()), self._rank()
        fitted = partial(of_folds, partial(self._parts, 0, end), set(range(NUM_FOLDS)) - JUDGED)
        found = fit_segment(fitted, self.parts.formulas(0, end), rank, self._grid(), add_up, guided)
        left = of_folds(partial(self._parts, 0, end), JUDGED)
        errors = 10 * left_by(found.segment, left, self._grid(), guided).double().log10()
        total = torch.stack([errors.sum(), torch.ones_like(errors).sum()])
        add_up([total])
        for place in range(len(few)):
            self._path(place).unlink()
        return float(total[0] / total[1])

    def _visit(self, anchor: int, label: str) -> None:
        """Take every batch to an anchor."""
        bar = tqdm(self.batches, label, unit="batch", disable=self.quiet, delay=2, leave=False)
        for place, (items, visited) in enumerate(bar):
            path = self._path(place)
            if path.exists():
                visited = visited.loaded(path, self.pipe.device)
            self.walk.visited = visited
            self.walk.visit(self.pipe, items, anchor, self.calibration.settings)
            if self.predictor is None:
                sizes = sizes_of(self.rows, visited, self.rank, self.neighbours, self.past)
                self._make_predictor(sizes | {"first_time": self.walk.first_time})
            visited.save(path)
            self.batches[place] = (items, visited)

    def _parts(self, anchor: int, end: int) -> Iterator[Part]:
        """What a segment needs of every batch, from the files."""
        for place, (items, visited) in enumerate(self.batches):
            found = visited.loaded(self._path(place), self.pipe.device)
            yield self.parts.part(items, found, anchor, end)

    def _path(self, place: int) -> Path:
        """Where a batch's tensors lie between two visits."""
        return Path(self.scratch.name) / f"{place}.safetensors"

    def _make_predictor(self, arguments: dict[str, Any]) -> None:
        self.hparams["arguments"] = arguments
        self.predictor = Readout(**arguments).to(self.device)
        if hasattr(self, "walk"):
            self.walk.predictor = self.predictor

    def _grid(self) -> Grid | None:
        """On which the host's tokens lie, where neighbours are read."""
        return next(iter(self.batches[0][1].layouts.values())).grid if self.neighbours else None

    def _solve(self, anchor: int, end: int) -> SegmentFit:
        """The segment from what was visited."""
        parts, guided = partial(self._parts, anchor, end), float(self.parts.guidance(anchor).sum())
        formulas = self.parts.formulas(anchor, end)
        return fit_segment(parts, formulas, self._rank(), self._grid(), add_up, guided)

    def _rank(self) -> int:
        """Directions that are read: no more than the host's width, whatever was asked for."""
        assert self.predictor is not None  # a batch was visited
        return self.predictor.rank

    def _started(self, found: SegmentFit, anchor: int, end: int) -> Tensor:
        """The rows of a segment's steps before they moved, `(branches, *groups, steps, S)`."""
        steps = slice(anchor + 1, end)
        table = self.parts.tables[found.origin][steps]
        self.rows.weight[..., steps, :] = table.to(self.rows.weight)
        return self.rows.weight[..., steps, :]

    def _keep(self, found: Segment, started: Tensor, anchor: int, end: int) -> None:
        """Write a segment's rows and readout into the predictor."""
        predictor, known = self.predictor, self.parts.known(anchor)
        assert predictor is not None  # a batch was visited
        steps = slice(anchor + 1, end)
        lead = predictor.weight.shape[:-2]  # branches, and groups where there are some
        delta = found.delta.view(len(known), *lead).movedim(0, -1)[..., None, :]
        predictor.weight[..., steps, :] = started
        predictor.weight[..., steps, known] += delta.to(predictor.weight)
        predictor.set_readout(anchor, found.inner, found.outer, found.constant)
        if self.keep_sums:
            self.sums |= segment_tensors({anchor: found})

    def _errors(self, predictor: L2P, references: References) -> Float[Tensor, " n"]:
        """Error in dB of every sample."""
        return predictor_errors(
            self.pipe,
            predictor,
            TAP,
            self.anchors,
            references.batches,
            references.finals,
            self.token_groups,
            **references.settings,
        )

    def detach(self) -> None:
        """Take the hooks off the pipeline and the files away."""
        if self.session is not None:
            self.session.detach()
            self.session = None
            self.scratch.cleanup()
