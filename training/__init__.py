"""The fits: from a recording to a predictor, in closed form or by descent.

`fits.py` is `foreseer.fit`; what every Lightning run needs is in `plumbing/`, readouts, LESA and
DisCa have a folder each.
"""

from foreseer.extras import require

from .. import __version__ as __version__

require("train", "foreseer.training (fits and searches)")
