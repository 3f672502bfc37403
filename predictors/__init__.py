"""The forecasters: `F_hat = predictor(history, step)`. They need torch only.

`base.py` is the contract and the weighted sum that most of them are; rules compute their weights,
the learned ones of `linear.py`, `readout.py`, `lesa.py` and `neural.py` load them.
"""

from foreseer.predictors.any_anchors import L2PGram
from foreseer.predictors.bands import FreqCa
from foreseer.predictors.base import History, LinearPredictor, Predictor, Step
from foreseer.predictors.bounded import GapBounded
from foreseer.predictors.continuous import L2PContinuous
from foreseer.predictors.damped import Damped
from foreseer.predictors.experts import L2PExperts
from foreseer.predictors.foca import Foca2Point, FocaRecursive
from foreseer.predictors.hermite import HiCache, ScaledTaylor
from foreseer.predictors.hybrid import HyCa
from foreseer.predictors.lesa import LesaPredictor
from foreseer.predictors.lesa_values import LesaValues
from foreseer.predictors.linear import L2P
from foreseer.predictors.multistep import BDF2, AdamsBashforth2, AdamsMoulton, RungeKutta2
from foreseer.predictors.neural import DiscaPredictor
from foreseer.predictors.parted import L2PBands, L2PGroups
from foreseer.predictors.polynomial import Newton, Reuse, Taylor
from foreseer.predictors.readout import Readout
from foreseer.predictors.tokens import ClusterPolicy, RandomPolicy

from .. import __version__ as __version__

__all__ = [
    "BDF2",
    "L2P",
    "AdamsBashforth2",
    "AdamsMoulton",
    "ClusterPolicy",
    "Damped",
    "DiscaPredictor",
    "Foca2Point",
    "FocaRecursive",
    "FreqCa",
    "GapBounded",
    "HiCache",
    "History",
    "HyCa",
    "L2PBands",
    "L2PContinuous",
    "L2PExperts",
    "L2PGram",
    "L2PGroups",
    "LesaPredictor",
    "LesaValues",
    "LinearPredictor",
    "Newton",
    "Predictor",
    "RandomPolicy",
    "Readout",
    "Reuse",
    "RungeKutta2",
    "ScaledTaylor",
    "Step",
    "Taylor",
]
