"""Passes that make a model smaller. Each returns a new model and leaves the old one alone."""

from tinynn.compress import importance, merge, prune, select
from tinynn.compress.distort import distort

__all__ = ["distort", "importance", "merge", "prune", "select"]
