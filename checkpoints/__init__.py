"""The file a predictor is exchanged as: written, read, checked, pushed and found by name.

`format.py` reads and writes, `spec.py` says what a predictor was fitted on and refuses anything
else; the bundled pipelines and predictors are in `zoo/`.
"""

from .. import __version__ as __version__
