"""The errors of the package: what was found, what was expected, and what to do about it.

Arguments out of range are plain `ValueError`s, and missing files `FileNotFoundError`s, whose
sentences say the same.
"""

import difflib
from collections.abc import Iterable


class ForeseerError(Exception):
    """Anything of this package's own that was refused or could not be read."""


class PredictorMismatch(ForeseerError, ValueError):
    """A learned predictor meets a host, grid, guidance mode or dtype it was not fitted on."""


class UnsupportedHost(ForeseerError, ValueError):
    """The transformer's trunk and head could not be found, or replaying its tap is not exact."""


class RecordingError(ForeseerError, ValueError):
    """A recording folder that cannot be read, or is not the one that was asked for."""


class CheckpointError(ForeseerError, ValueError):
    """A predictor checkpoint that cannot be trusted."""


def meant(name: str, known: Iterable[str]) -> str:
    """The end of a sentence that refuses a name: a full stop, or what was probably meant."""
    near = difflib.get_close_matches(name, list(known), 1)
    return f"; did you mean {near[0]!r}?" if near else "."
