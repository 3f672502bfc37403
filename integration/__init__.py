"""Forecasting in a pipeline that somebody else wrote: sessions, schedules, hooks and clock.

`forecasting.py` is the way in. One transformer's facts and hooks are in `host/`, pipelines by name
and our own in `pipelines/`.
"""

from .. import __version__ as __version__
