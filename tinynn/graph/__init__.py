"""The graph of a model: run it once, record every op, and see which channels belong together.

Whatever must see a whole model reads this: observing, counting, drawing, pruning, the inference
plan and export.
"""

from tinynn.graph.groups import Group, Member, Reader, moved
from tinynn.graph.parts import Node, Value
from tinynn.graph.trace import Graph, trace

__all__ = ["Graph", "Group", "Member", "Node", "Reader", "Value", "moved", "trace"]
