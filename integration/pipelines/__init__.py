"""Pipelines by name, the bundled ones of our own, and what a command calls a pipeline with.

`load.py` opens a folder, a name of the hub or `zoo:NAME`; `pipeline_call.py` reads prompts.
"""

from foreseer.integration.pipelines.load import load_pipeline

__all__ = ["load_pipeline"]
