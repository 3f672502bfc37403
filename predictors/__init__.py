"""The forecasters: `F_hat = predictor(history, step)`. They need torch only.

`base` and `linear` say what one is and what rows are, `rules` holds the formulas, every other file
one learned family. A predictor is public once it is named here, and may be in a file once it is in
`LEARNED`.
"""

from importlib import import_module
from typing import Any

from foreseer.predictors.any_anchors import L2PGram
from foreseer.predictors.base import History, LinearPredictor, Predictor, Step
from foreseer.predictors.bounded import GapBounded
from foreseer.predictors.continuous import L2PContinuous
from foreseer.predictors.corrected_rows import CorrectedRows
from foreseer.predictors.lattice_policy import LatticePolicy
from foreseer.predictors.lesa import LesaPredictor
from foreseer.predictors.lesa_values import LesaValues
from foreseer.predictors.linear import L2P
from foreseer.predictors.neural import DiscaPredictor, OffsetDisca
from foreseer.predictors.partition import ChannelGroups
from foreseer.predictors.per_part import FreqCa, HyCa
from foreseer.predictors.pruning_policy import PruningPolicy
from foreseer.predictors.readout import Readout
from foreseer.predictors.resampled import Resampled
from foreseer.predictors.rules import (
    BDF2,
    AdamsBashforth2,
    AdamsMoulton,
    Damped,
    Foca2Point,
    FocaRecursive,
    HiCache,
    MeanCache,
    Newton,
    Reuse,
    RungeKutta2,
    ScaledTaylor,
    Spectrum,
    Taylor,
)
from foreseer.predictors.spectrum import Bands
from foreseer.predictors.token_rows import TokenRows
from foreseer.predictors.tokens import ClusterPolicy, RandomPolicy
from foreseer.predictors.tuned_block import TunedLastBlock

from .. import __version__ as __version__

LEARNED: tuple[type[Predictor], ...] = (
    L2P,
    L2PGram,
    L2PContinuous,
    HyCa,
    LesaPredictor,
    LesaValues,
    DiscaPredictor,
    OffsetDisca,
    CorrectedRows,
    Readout,
    Resampled,
    TokenRows,
    TunedLastBlock,
)
"""The classes that a predictor file may name."""

__all__ = [
    "BDF2",
    "L2P",
    "LEARNED",
    "AdamsBashforth2",
    "AdamsMoulton",
    "Bands",
    "ChannelGroups",
    "ClusterPolicy",
    "CorrectedRows",
    "Damped",
    "DiscaPredictor",
    "Foca2Point",
    "FocaRecursive",
    "FreqCa",
    "GapBounded",
    "HiCache",
    "History",
    "HyCa",
    "L2PContinuous",
    "L2PGram",
    "LatticePolicy",
    "LesaPredictor",
    "LesaValues",
    "LinearPredictor",
    "MeanCache",
    "Newton",
    "Predictor",
    "PruningPolicy",
    "RandomPolicy",
    "Readout",
    "Resampled",
    "Reuse",
    "RungeKutta2",
    "ScaledTaylor",
    "Spectrum",
    "Step",
    "Taylor",
    "TokenRows",
    "TunedLastBlock",
]


def __getattr__(name: str) -> Any:
    """A class of version 0.2 that `L2P` has taken in."""
    if name not in ("L2PBands", "L2PExperts", "L2PGroups"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("foreseer.predictors.earlier"), name)
