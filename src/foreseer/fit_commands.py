"""The functions behind `foreseer fit`, `search`, `export`, `refit` and `push`.

As in commands.py, their signatures are the command lines and their docstrings the help text.
"""

from collections.abc import Sequence
from typing import Any, Literal


def fit(
    recording: Any,
    evaluations: int | Sequence[int] | None = None,
    *,
    method: str | None = None,
    anchors: Sequence[int] | None = None,
    tap: str | None = None,
    pipeline: Any = None,
    out: str | None = None,
    validation_fraction: float = 0.2,
    seed: int = 0,
    **options: Any,
) -> Any:
    """Fit a predictor to a recording; what is not given is chosen.

    The anchors are searched on the recording's Grams, as `foreseer inspect` does. Nothing is
    resumed: a fit takes seconds to minutes. One of hours is a YAML file's (`--config`), which
    keeps checkpoints and logs.

    Args:
        recording: the recording or its folder; for `continuous` also a list of them.
        evaluations: network evaluations per trajectory, as in 8, or a list, as in [6, 8, 11]: a
            predictor for each in one folder, of which `forecasting(..., evaluations=8)` takes one;
            not needed where `anchors` are given.
        method: `readout`, `lstsq`, `closed_loop`, `adam`, `gram`, `continuous`, `bands`, `groups`,
            `lesa` or `disca`; None takes a readout where the recorded pipeline is given or can be
            loaded by the name in the recording, else `lstsq`, and says which.
        anchors: steps at which the network runs, starting with 0; None searches them.
        tap: feature to forecast; None takes the method's, or the one of least error.
        pipeline: the recorded pipeline, or its folder or name, for fits that run it; None takes the
            one that the recording names.
        out: folder of the predictor: weights, configuration, card, and Grams for `refit`; None
            writes nothing.
        validation_fraction: share of trajectories held out, in [0, 1).
        seed: seed of the split and of what is drawn.
        options: further arguments of the method, as in {"rank": 32} or {"ridge": 0.001}.

    Returns:
        The predictor, with its `spec`, ready for `forecasting`; of a list of evaluations a
        dictionary of them.
    """
    from foreseer.training.fits import fit_budgets

    several = recording if isinstance(recording, list | tuple) else [recording]
    return fit_budgets(
        [str(getattr(each, "folder", each)) for each in several],
        evaluations,
        method,
        anchors,
        tap,
        pipeline,
        out,
        validation_fraction,
        seed,
        options,
    )


def search(
    recording: Any,
    pipeline: Any = "zoo:fashion_dit",
    out: str = "runs/search.json",
    num_anchors: Sequence[int] = (8,),
    methods: Sequence[str] = ("newton_1|output",),
    num_samples: int = 16,
    num_moves: int = 8,
    dtype: str | None = None,
    device: str | None = None,
) -> dict[str, list[int]]:
    """Choose the steps at which the network runs: on Grams, then by the error of real samples.

    Args:
        recording: the recording or its folder.
        pipeline: the recorded pipeline, or its folder or name.
        out: JSON file for the lists; the same command resumes.
        num_anchors: network evaluations per trajectory (NFE), one search each.
        methods: `method|tap` pairs: `newton_1|hidden`, `ab2|none`, `l2p_closed_loop|output`, ...
        num_samples: calibration trajectories the lists are compared on.
        num_moves: evaluations spent on moving single anchors of the best list.
        dtype: dtype to load the pipeline in; None takes that of the recording.
        device: where to put it; None takes a GPU where there is one.

    Returns:
        The lists, by `method|tap|num_anchors`.
    """
    from foreseer.training.anchor_search import search_command

    return search_command(
        recording=str(getattr(recording, "folder", recording)),
        pipeline=pipeline,
        out=out,
        num_anchors=num_anchors,
        methods=methods,
        num_samples=num_samples,
        num_moves=num_moves,
        dtype=dtype,
        device=device,
    )


def export(
    checkpoint: str,
    out: str,
    format: Literal["predictor", "sglang-dpcache"] = "predictor",
    capture: str | None = None,
) -> None:
    """Turn a training checkpoint into a predictor, or a predictor's anchors into a schedule.

    Args:
        checkpoint: the `.ckpt` file that `foreseer fit` wrote; for `sglang-dpcache` the folder,
            `zoo:<name>` or hub name of a predictor.
        out: folder of the predictor: weights, configuration and model card; for `sglang-dpcache`
            the JSON file.
        format: `predictor`, which loads without Lightning, or `sglang-dpcache`, the schedule of
            SGLang Diffusion's DPCache.
        capture: calibration capture of the request that the schedule is for, which SGLang writes.
    """
    if format == "predictor":
        from foreseer.training.export import export_command

        export_command(checkpoint=checkpoint, out=out)
        return
    from foreseer.checkpoints.dpcache import export_dpcache

    if capture is None:
        raise ValueError("a DPCache schedule is for one request; give its --capture FILE.pt.")
    export_dpcache(checkpoint, capture, out)


def refit(
    predictor: str,
    recordings: Sequence[str],
    out: str,
    ridge: float | None = None,
    pipeline: str | None = None,
) -> None:
    """Add recordings to a predictor: it is solved for again, without its old trajectories.

    The closed form (least squares) on the sum of the Grams beside the predictor and those of the
    recordings; rows of another fit are refused. Of a readout, whose new trajectories the pipeline
    has to run, the normal equations beside it (`keep_sums`). Recordings of a LoRA make a predictor
    for it.

    Args:
        predictor: folder of the predictor, or `zoo:<name>`.
        recordings: list of folders or URLs, recorded with the predictor's settings.
        out: folder of the new predictor.
        ridge: shrinkage toward reuse; None takes the one that does best on trajectories left out.
        pipeline: of a readout: folder of the pipeline, or `zoo:<name>`; None loads the one that
            the recordings name.
    """
    from foreseer.training.refit_command import refit_command

    refit_command(predictor, recordings, out, ridge, pipeline)


def save(predictor: Any, folder: str) -> Any:
    """Write a predictor that was fitted or loaded, with its card; `fit(out=...)` adds its Grams.

    Args:
        predictor: the predictor, with its `spec`, or several in a dictionary by their evaluations.
        folder: where to; made when missing.

    Returns:
        The folder.
    """
    from foreseer.checkpoints.budgets import check_free_of_others, write_budgets
    from foreseer.checkpoints.format import check_evaluations, save_predictor
    from foreseer.errors import CheckpointError

    if isinstance(predictor, dict):
        for evaluations, each in predictor.items():
            check_evaluations(each, evaluations)
        check_free_of_others(folder, list(predictor))
        for evaluations, each in predictor.items():
            save_predictor(each, each.spec, f"{folder}/{evaluations}")
        write_budgets(folder, {n: each.spec for n, each in predictor.items()})
        return folder
    if predictor.spec is None:
        raise CheckpointError(
            f"this {type(predictor).__name__} has no spec, which says what it may be used on; "
            "expected one that was fitted or loaded. A formula needs no file."
        )
    return save_predictor(predictor, predictor.spec, folder)


def push(
    folder: str,
    repo_id: str,
    private: bool = False,
    licence: str | None = None,
    collection: bool = False,
    bench: str | None = None,
) -> str:
    """Upload a predictor, or a recording as a data set, to the Hugging Face hub, with its card.

    Args:
        folder: of the predictor, which is loaded first, or of the recording, whose shards are
            checked first: only a sound one leaves this machine.
        repo_id: `owner/name` of the repository, made when missing.
        private: make a new repository private.
        licence: as the hub calls it; None leaves apache-2.0 of a predictor, and states none of a
            recording, whose prompts have one of their own.
        collection: put a predictor into the owner's collection for its base model, too.
        bench: folder of a `foreseer bench` that the predictor was measured in, whose rows and
            contact sheet its page shows.

    Returns:
        Address of the upload.
    """
    from pathlib import Path

    from foreseer.trajectories.files.header import HEADER_FILE

    if (Path(folder) / HEADER_FILE).exists():
        from foreseer.trajectories.push_recording import push_recording

        if collection or bench is not None:
            raise ValueError(
                f"{folder} is a recording: collection and bench are a predictor's, leave them out."
            )
        address = push_recording(folder, repo_id, private, licence)
    else:
        from foreseer.checkpoints.push import push_predictor

        shown = None
        if bench is not None:
            from foreseer.evaluation.results import load_benchmark

            shown = load_benchmark(bench)
        address = push_predictor(folder, repo_id, private, licence, collection, shown)
    print(address)
    return address
