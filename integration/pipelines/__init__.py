"""Pipelines by name, the bundled ones of our own, and what a command calls a pipeline with."""

from foreseer.integration.pipelines.load import load_pipeline

__all__ = ["load_pipeline"]
