"""What a benchmark runs: every method on every anchor list of every budget."""

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from foreseer.checkpoints.format import load_predictors
from foreseer.checkpoints.spec import PredictorSpec
from foreseer.evaluation.learned_solver import LearnedSolver
from foreseer.evaluation.solvers import SOLVERS
from foreseer.integration.schedule import COMMON, check_anchors, common_lists
from foreseer.predictors.base import Predictor
from foreseer.predictors.rules import RULES

BUDGETS = (11, 8, 6)
FORMULA_TAPS = ("output", "hidden")


@dataclass(frozen=True)
class Entry:
    """One method on one anchor list.

    Args:
        method: name of the solver, formula or learned predictor; `full` for the full run.
        kind: `solver`, `learned solver`, `formula`, `learned` or `full`.
        tap: tensor that is forecast; `none` where nothing is.
        anchors_name: where the list comes from.
        anchors: steps at which the network runs.
        predictor: the forecaster; None for solvers and the full run.
        solver: the numbers of a learned solver, whose anchors say where its fit began.
    """

    method: str
    kind: str
    tap: str
    anchors_name: str
    anchors: tuple[int, ...]
    predictor: Predictor | None = field(default=None, repr=False)
    solver: LearnedSolver | None = field(default=None, repr=False)

    def key(self, common: str) -> str:
        """SHA-256 of everything that decides this entry's row.

        Args:
            common: digest of what all entries share: model, items, settings.
        """
        told = [self.method, self.kind, self.tap, self.anchors_name, self.anchors, common]
        digest = hashlib.sha256(json.dumps(told).encode())
        if self.solver is not None:
            digest.update(json.dumps(self.solver.digest()).encode())
        if self.predictor is not None:
            spec = self.predictor.spec
            digest.update(json.dumps(asdict(spec) if spec else None, sort_keys=True).encode())
            digest.update(json.dumps(settings_of(self.predictor), sort_keys=True).encode())
            for name, tensor in sorted(self.predictor.state_dict().items()):
                digest.update(name.encode() + tensor.double().cpu().numpy().tobytes())
        return digest.hexdigest()


def settings_of(predictor: Predictor) -> dict[str, str]:
    """The plain values a predictor was built from, which its tensors do not tell."""
    plain = (bool, int, float, str, tuple, list, type(None))
    return {name: repr(v) for name, v in vars(predictor).items() if isinstance(v, plain)}


def plan(
    budgets: Sequence[int],
    num_steps: int,
    learned: Mapping[str, Predictor],
    searched: Mapping[str, Sequence[int]],
    methods: Sequence[str] | None = None,
    rules: Mapping[str, Predictor | Mapping[str, Predictor]] = RULES,
    common: Collection[str] = COMMON,
) -> list[Entry]:
    """Every entry of a benchmark, largest budget first.

    Solvers and formulas run on the common lists, on the lists of all learned predictors, and on
    the one searched for them. A learned predictor runs on the anchors it was fitted for.

    Args:
        budgets: numbers of network evaluations.
        num_steps: steps of the full run.
        learned: predictors with a spec, by the name they get in the tables.
        searched: `<method>|<tap>|<num_anchors>` to anchors; the tap of a solver is `none`.
        methods: solvers and formulas to run; None runs all.
        rules: the formulas by table name; one that differs between taps, or does not fit all, is
            given by tap.
        common: names of the common lists to run.

    Raises:
        ValueError: a method is unknown, a budget is no number of steps, a learned predictor has no
            spec or no budget, or anchors are not a schedule of the run.
    """
    if not all(1 <= budget <= num_steps for budget in budgets):
        raise ValueError(
            f"the budgets are {list(budgets)}, expected numbers of evaluations from 1 to "
            f"{num_steps}, the steps of the full run."
        )
    known = [*SOLVERS, *rules]
    chosen = known if methods is None else list(methods)
    if unknown := sorted(set(chosen) - set(known)):
        raise ValueError(f"unknown methods {unknown}, expected some of {', '.join(known)}.")
    own = _own_entries(budgets, num_steps, learned)
    entries = []
    for budget in sorted(set(budgets), reverse=True):
        fitted = [entry for entry in own if len(entry.anchors) == budget]
        lists = [one for one in common_lists(budget, num_steps).items() if one[0] in common]
        lists += [(entry.anchors_name, entry.anchors) for entry in fitted]
        entries += fitted
        for method in chosen:
            by_tap = _by_tap(rules[method]) if method in rules else {"none": None}
            for tap, rule in by_tap.items():
                found = searched.get(f"{method}|{tap}|{budget}")
                mine = [("searched", check_anchors(found, num_steps))] if found else []
                unique: dict[tuple[int, ...], str] = {}
                for name, anchors in [*lists, *mine]:
                    unique.setdefault(anchors, name)
                kind = "formula" if method in rules else "solver"
                for anchors, name in unique.items():
                    entries.append(Entry(method, kind, tap, name, anchors, rule))
    return entries


def _by_tap(rule: Predictor | Mapping[str, Predictor]) -> dict[str, Predictor | None]:
    if isinstance(rule, Mapping):
        return dict(rule)
    return dict.fromkeys(FORMULA_TAPS, rule)


def _own_entries(
    budgets: Sequence[int], num_steps: int, learned: Mapping[str, Predictor]
) -> list[Entry]:
    entries = []
    for name, predictor in learned.items():
        spec = spec_of(predictor)
        anchors = check_anchors(spec.anchors, num_steps)
        if len(anchors) not in budgets:
            raise ValueError(
                f"the predictor {name} has {len(anchors)} anchors, budgets are {list(budgets)}; "
                f"add {len(anchors)} to the budgets or leave it out."
            )
        shared = common_lists(len(anchors), num_steps)
        same = {known: label for label, known in reversed(shared.items())}
        label = same.get(anchors, "searched")
        entries.append(Entry(_method(name), "learned", spec.tap, label, anchors, predictor))
    return entries


def spec_of(predictor: Predictor | None) -> PredictorSpec:
    """What a learned predictor was fitted on.

    Raises:
        ValueError: it does not tell.
    """
    spec: PredictorSpec | None = None if predictor is None else predictor.spec
    if spec is None:
        raise ValueError(
            f"a learned {type(predictor).__name__} has no spec; load it with load_predictor."
        )
    return spec


def load_learned(predictors: Sequence[Any] | Mapping[str, Any]) -> dict[str, Predictor]:
    """Predictors by table name.

    Args:
        predictors: folders or names, `NAME=FOLDER`, predictors, or several of those by evaluations,
            as `foreseer.fit` returns them and writes them into one folder; or any of them by the
            name they are to have. Several taps and budgets may share a name.

    Raises:
        ValueError: two predictors share name, tap and anchors, or one was never fitted.
    """
    learned: dict[str, Predictor] = {}
    named = predictors.items() if isinstance(predictors, Mapping) else _named(predictors)
    for name, given in named:
        for each in given.values() if isinstance(given, Mapping) else [given]:
            path = isinstance(each, str | Path)
            for predictor in load_predictors(each).values() if path else [each]:
                spec = spec_of(predictor)
                key = f"{name}@{spec.tap} {' '.join(map(str, spec.anchors))}"
                if key in learned:
                    raise ValueError(
                        f"two predictors are called {key}; give one a name: NAME=FOLDER."
                    )
                learned[key] = predictor
    return learned


def budgets_of(learned: Mapping[str, Predictor]) -> list[int]:
    """The numbers of evaluations of predictors, `BUDGETS` where there is none."""
    return sorted({len(spec_of(each).anchors) for each in learned.values()}) or list(BUDGETS)


def _named(predictors: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    """What was given as a list, each with its name: that of its folder or class."""
    for given in predictors:
        if isinstance(given, str | Path):
            name, _, folder = str(given).rpartition("=")
            yield name or Path(folder).name, folder
        else:
            several = given if isinstance(given, Mapping) else {0: given}
            yield type(next(iter(several.values()))).__name__.lower(), given


def _method(name: str) -> str:
    """The name without what follows `@`, which only tells predictors of one method apart."""
    return name.split("@")[0]
