"""Loadstone: measure how many concurrent requests a model server takes."""

__version__ = "0.1.0"
