"""Peak activation memory of every network of a space: a maximum over blocks, where other costs are sums."""

import math

import numpy as np
from numpy.typing import NDArray

from nas import cost
from nas.errors import SpaceError
from nas.ops import Block
from nas.space.space import Space


def activation_bytes(space: Space, precision: str) -> tuple[list[NDArray[np.float64]], NDArray[np.float64]]:
    """What `Space.highest` takes: for each position the bytes [branches] of each branch, and the image's [resolutions].

    Of float32, exactly `nas.cost.peak_activation_bytes` of the whole network. In int8 an activation is one byte; the
    image stays float32, since whoever runs the network owns it, and its quantised copy counts besides. (What attention
    computes in float32 there is not counted.)

    Args:
        precision: "float32" or "int8".

    Raises:
        SpaceError: the first block may be left out, or the precision is "mixed".
    """
    if precision == "mixed":
        raise SpaceError(
            f"peak memory is not known of networks of mixed precision, which space {space.name!r} has. Leave it out, "
            f"or `precision` of the stages."
        )
    first = space.positions[0]
    if any(block is None or not block.graph.ops for block in first.branches):
        raise SpaceError(
            f"peak memory is known for spaces whose first block is always there; {first.name} of space {space.name!r} "
            f"can be left out. Give it a stem, or choose another objective."
        )
    int8 = precision == "int8"

    def of(block: Block | None, *, at_first: bool) -> float:
        if block is None:
            return 0.0
        count_input = int8 or not at_first  # a float32 image is counted beside all blocks
        return float(cost.working_bytes(block.graph, count_input=count_input, bytes_per_element=1 if int8 else 4))

    parts = [np.array([of(b, at_first=p is first) for b in p.branches]) for p in space.positions]
    return parts, np.array([4.0 * math.prod(space.at(side).input) for side in space.resolutions])
