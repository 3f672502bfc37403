"""The functions behind `foreseer fit`, `search`, `export`, `refit` and `push`.

As in commands.py, their signatures are the command lines and their docstrings the help text.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
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
    from foreseer.checkpoints.hub import check_free
    from foreseer.evaluation.measure import opened_for
    from foreseer.training.fits import (
        SEVERAL,
        Recipe,
        choose_method,
        chosen,
        fit_each,
        fitted,
        recorded_pipeline,
    )
    from foreseer.trajectories.recording import Recording, split

    if not (evaluations is None or isinstance(evaluations, int)):
        given = {"method": method, "tap": tap, "pipeline": pipeline, "seed": seed, **options}
        one = partial(fit, recording, validation_fraction=validation_fraction, **given)
        return fit_each(one, evaluations, anchors, out)
    if out is not None:
        check_free(out)  # before the fit, not after it
    several = recording if isinstance(recording, list | tuple) else [recording]
    folders = [folder_of(each) for each in several]
    source, why = Recording(folders[0]), "as asked for"
    if method is None:
        method, why = choose_method(source, pipeline is not None)
    recipe = Recipe(method, options)
    if recipe.runs_pipeline and "batch_size" in recipe.takes:
        recipe.options.setdefault("batch_size", source.header.recipe.get("batch_size", 1))
    if len(folders) > 1 and method != SEVERAL:
        raise ValueError(
            f"the method {method!r} is fitted on one recording, {len(folders)} were given; join "
            f"them with `foreseer merge`, or fit {SEVERAL!r}."
        )
    arguments: dict[str, Any] = {"recording": folders[0], "recordings": folders}
    if recipe.runs_pipeline:
        name = recorded_pipeline(source, method) if pipeline is None else pipeline
        arguments["pipeline"] = opened_for(source, name)
    fitted_on = split(source.items, (1 - validation_fraction, validation_fraction), seed)[0]
    choice = chosen(recipe, source, evaluations, anchors, tap, fitted_on)
    print(f"{method} ({why}): {choice}", flush=True)
    module = recipe.module(arguments | {"anchors": choice.anchors, "tap": choice.tap})
    data = recipe.datamodule(folders, choice.tap, validation_fraction, seed)
    return fitted(recipe, module, data, seed, out)


def search(
    recording: Any,
    pipeline: Any = "zoo:fashion_dit",
    out: str = "runs/search.json",
    num_anchors: Sequence[int] = (8,),
    methods: Sequence[str] = ("newton_1|output",),
    num_samples: int | None = None,
    num_moves: int = 8,
    dtype: str | None = None,
    device: str | None = None,
    algorithm: Literal["beam", "dpcache", "budcache"] = "beam",
) -> dict[str, list[int]]:
    """Choose the steps at which the network runs: on Grams, then by the error of real samples.

    Args:
        recording: the recording or its folder.
        pipeline: the recorded pipeline, or its folder or name.
        out: JSON file for the lists; the same command resumes.
        num_anchors: network evaluations per trajectory (NFE), one search each.
        methods: `method|tap` pairs: `newton_1|hidden`, `ab2|none`, `l2p_closed_loop|output`, ...
        num_samples: calibration trajectories the lists are compared on; None takes 16, of
            `budcache` 1, as published.
        num_moves: lists tried by moving single anchors of the best one, for `beam`.
        dtype: dtype to load the pipeline in; None takes that of the recording.
        device: where to put it; None takes a GPU where there is one.
        algorithm: `beam` on Grams, then single moves; or, to compare with, the published
            `dpcache` (dynamic programme on Grams) or `budcache` (annealing on samples).

    Returns:
        The lists, by `method|tap|num_anchors`.
    """
    from foreseer.evaluation.measure import References, opened_for
    from foreseer.training.anchor_search import check_one_transformer, search_lists
    from foreseer.trajectories.recording import Recording

    source = Recording(folder_of(recording))
    check_one_transformer(source)
    pipe = opened_for(source, pipeline, dtype, device)
    asked = num_samples if num_samples is not None else 1 if algorithm == "budcache" else 16
    references = References(source, source.items[:asked])
    wanted = [f"{method}|{n}" for n in num_anchors for method in methods]
    return search_lists(pipe, references, wanted, num_moves, Path(out), algorithm)


def folder_of(recording: Any) -> str:
    """Folder or URL of a recording, given itself or by that."""
    return str(getattr(recording, "folder", recording))


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
    from foreseer.checkpoints.format import load_predictor
    from foreseer.predictors.readout import Readout
    from foreseer.training.refit import write_readout, write_rows

    old = load_predictor(predictor)
    if not isinstance(old, Readout):
        write_rows(predictor, recordings, out, ridge)
    elif ridge is None:
        write_readout(old, predictor, recordings, out, pipeline)
    else:
        raise ValueError(
            f"{predictor} is a Readout, whose fit chooses its own strengths: found ridge {ridge}, "
            "expected none."
        )


def save(predictor: Any, folder: str) -> Any:
    """Write a predictor that was fitted or loaded, with its card; `fit(out=...)` adds its Grams.

    Args:
        predictor: the predictor, with its `spec`, or several in a dictionary by their evaluations.
        folder: where to; made when missing.

    Returns:
        The folder.
    """
    from foreseer.checkpoints.budgets import check_free_of_others, write_budgets
    from foreseer.checkpoints.format import save_predictor
    from foreseer.checkpoints.spec import check_evaluations
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
