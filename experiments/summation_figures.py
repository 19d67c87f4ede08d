"""placeholder"""

from pathlib import Path


def draw(out, records):
    return []
