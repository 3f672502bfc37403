"""Learned feature caching for diffusion transformers: record, train, deploy."""

__version__ = "0.1.0"
