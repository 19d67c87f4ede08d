"""Data for training and evaluation."""

from tinynn.data.batches import Batches

__all__ = ["Batches"]
