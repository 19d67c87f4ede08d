"""Settings of Python for all tests."""

from __future__ import annotations

import gc

# The modules that are imported are some 200,000 objects, and kernels add to them: the collector of
# cycles would pass through all of them again and again.
gc.set_threshold(20_000, 20, 20)


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()
