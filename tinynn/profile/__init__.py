"""Where the time of a training step goes: every op's time beside the least that it could be.

Three lower bounds hold for an op: its arithmetic at the machine's peak, its bytes moved once from
the level of memory that holds them, and a call of such an op on next to nothing. The largest says
what limits it (compute, memory, overhead), and its share of the measured time how well the kernel
does within that limit. Operands that a cache still holds may pass the bound of memory.
"""

from tinynn.profile.clock import step
from tinynn.profile.command import SUMMARY, configure, run
from tinynn.profile.parts import Bound, Layer, Pass, Profile

__all__ = ["SUMMARY", "Bound", "Layer", "Pass", "Profile", "configure", "run", "step"]
