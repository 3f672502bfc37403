"""LESA: stage-aware KAN experts, fitted on recorded windows and then on the runs themselves.

`lesa_fit.py` is the Lightning module; `linear_equivalent.py` says what its networks add.
"""

from foreseer.training.lesa.lesa_fit import LesaModule

__all__ = ["LesaModule"]
