"""The fit of a readout: a walk over the anchors, a segment an epoch, all in closed form.

`readout_fit.py` is the Lightning module; the equations are in `segment.py`.
"""

from foreseer.training.readout.readout_fit import ReadoutFit

__all__ = ["ReadoutFit"]
