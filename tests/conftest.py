"""Settings of Python and of hypothesis for all tests."""

from __future__ import annotations

import gc

from hypothesis import settings

# A deadline is a timing: kernels compile within an example, and other work may hold it up.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

# The modules that are imported are some 200,000 objects, and kernels add to them: the collector of
# cycles would pass through all of them again and again.
gc.set_threshold(20_000, 20, 20)


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()
