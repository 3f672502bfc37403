"""Recordings: what a full run computed, kept as features or as their sums.

`recorder.py` writes, `recording.py` reads, `gram.py` has the sufficient statistic of every linear
forecaster; files and their checks are in `files/`.
"""

from .. import __version__ as __version__
