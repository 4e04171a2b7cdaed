"""Peak activation memory of every network of a space: a maximum over blocks, where other costs are sums."""

import math

import numpy as np
from numpy.typing import NDArray

from nas import cost
from nas.errors import SpaceError
from nas.ops import Block, in_precision
from nas.space.space import Space


def activation_bytes(space: Space, precision: str) -> tuple[list[NDArray[np.float64]], NDArray[np.float64]]:
    """What `Space.highest` takes: for each position the bytes [branches] of each branch, and the image's [resolutions].

    Exactly `nas.cost.peak_activation_bytes` of the whole network. In int8 an activation is one byte; the image stays
    float32, and its quantised copy counts besides. (What attention computes in float32 there is not counted.) In mixed
    precision each block holds its values in its own; weights that alone are narrow change nothing.

    Args:
        precision: "float32", "int8" or "mixed".

    Raises:
        SpaceError: the first block may be left out.
    """
    first = space.positions[0]
    if any(block is None or not block.graph.ops for block in first.branches):
        raise SpaceError(
            f"peak memory is known for spaces whose first block is always there; {first.name} of space {space.name!r} "
            f"can be left out. Give it a stem, or choose another objective."
        )

    def of(block: Block | None, *, at_first: bool) -> float:
        if block is None:
            return 0.0
        graph = block.graph
        if precision == "int8":
            graph = in_precision(graph, "int8", "float32" if at_first else "int8")
        return float(cost.working_bytes(graph, count_input=not at_first))  # the image is counted beside all blocks

    parts = [np.array([of(b, at_first=p is first) for b in p.branches]) for p in space.positions]
    return parts, np.array([4.0 * math.prod(space.at(side).input) for side in space.resolutions])
