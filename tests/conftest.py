"""What all tests share."""

from hypothesis import settings

# A deadline is a timing: kernels compile within an example, and other work may hold it up.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
