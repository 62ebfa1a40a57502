"""Analyses: of a sweep's runs (`command`), of what routers chose, token by token (`routing`)."""

from experiments.analyze.command import main

__all__ = ["main"]
