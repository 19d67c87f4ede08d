"""Settings of Python for all tests."""

from __future__ import annotations

import gc

# The modules imported are a million objects, through which the collector of cycles would pass anew
# whenever some hundred others have been made.
gc.set_threshold(20_000, 20, 20)


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()
