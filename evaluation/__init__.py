"""What judges: metrics, rivals, measured runs, searches over anchors, verdicts.

No Lightning here: the fits of `training/` end in these verdicts, and `foreseer bench` needs no fit.
Pages, tables and figures are in `page/`.
"""

from .. import __version__ as __version__
