"""Few-step students: average velocities of a teacher under an embedded guidance.

`module.py` is the Lightning module, `meanflow.py` has the targets with their equations.
"""

from foreseer.extras import require

from .. import __version__ as __version__

require("train", "foreseer.distill")
