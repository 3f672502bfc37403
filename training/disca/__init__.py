"""DisCa: a neural predictor fitted on recorded features, against a discriminator, in closed loop.

`disca_fit.py` is the Lightning module; `replayed_runs.py` gives it recorded runs to forecast in.
"""

from foreseer.training.disca.disca_fit import DiscaModule

__all__ = ["DiscaModule"]
