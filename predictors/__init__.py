"""The forecasters: `F_hat = predictor(history, step)`. They need torch only."""

from .. import __version__ as __version__
from .any_anchors import L2PGram
from .bands import FreqCa
from .base import History, LinearPredictor, Predictor, Step
from .bounded import GapBounded
from .continuous import L2PContinuous
from .damped import Damped
from .experts import L2PExperts
from .foca import Foca2Point, FocaRecursive
from .hermite import HiCache, ScaledTaylor
from .hybrid import HyCa
from .lesa import LesaPredictor
from .lesa_values import LesaValues
from .linear import L2P
from .multistep import BDF2, AdamsBashforth2, AdamsMoulton, RungeKutta2
from .neural import DiscaPredictor
from .parted import L2PBands, L2PGroups
from .polynomial import Newton, Reuse, Taylor
from .readout import Readout
from .tokens import ClusterPolicy, RandomPolicy

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
