"""Learned feature caching for diffusion transformers: record, train, deploy."""

__version__ = "0.2.0"
