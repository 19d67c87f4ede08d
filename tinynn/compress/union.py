"""The members of a group of channels that additions tie together.

"Blocks tied by identity additions form a group; keep the union of the channels that any member
keeps" (Çallı 2017, section 2.4.3): each member is judged alone, and `prune.channels(union=True)`
removes what none of them keeps.
"""

from __future__ import annotations

from tinynn.graph import Graph, Group


def members(group: Group, graph: Graph) -> list[Group]:
    """Each layer that makes the group's channels, with what follows it up to the next addition.

    Every member is a Group of the same channels, whose writers are the layer and what normalises
    or filters its result, and whose readers read that result; after an addition nobody's channels
    are one member's own. A group that no addition ties is its only member.
    """
    parent = {index: index for index in group.places}

    def find(index: int) -> int:
        while parent[index] != index:
            index = parent[index]
        return index

    inside = [node for node in graph.nodes if node.output.index in parent]
    makers = []
    for node in inside:
        data = [v.index for v in node.inputs if v.is_data and v.index in parent]
        rule = node.op.rule(*(v.shape for v in node.inputs))
        if rule == "mix":
            makers.append(node.output.index)
        elif rule != "tie" or len(data) == 1:
            for index in data:
                parent[find(node.output.index)] = find(index)
    found = []
    for root in dict.fromkeys(find(index) for index in makers):
        names = {v.name for node in inside if find(node.output.index) == root for v in node.inputs}
        found.append(
            Group(
                group.size,
                values=[v for v in group.values if find(v.index) == root],
                writers=[m for m in group.writers if m.name in names],
                readers=[r for r in group.readers if find(r.value.index) == root],
                places={i: places for i, places in group.places.items() if find(i) == root},
                fixed=group.fixed,
            )
        )
    return found
