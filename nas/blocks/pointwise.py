"""1x1 convolutions that other blocks use, plain or of low rank."""

from nas.blocks.rounding import make_divisible
from nas.ops import Recorder, Value


def pointwise(net: Recorder, x: Value, name: str, features: int, *, rank: float = 1.0) -> Value:
    """1x1 convolution; below rank 1.0 as two, `name`_a and `name`_b, with fewer channels and nothing between them.

    A factorised matrix as in Jaderberg et al. 2014, arXiv:1405.3866, and Denton et al. 2014, arXiv:1404.0736. `rank` is
    its share of the full rank, min(x.channels, features), made divisible by 8. Where the two would have no fewer
    weights than one, it is one.

    Raises:
        ValueError: `rank` is not within (0, 1].
    """
    if not 0 < rank <= 1:
        raise ValueError(f"rank {rank} is not within (0, 1]; 1.0 is the plain convolution")
    inner = make_divisible(rank * min(x.channels, features))
    if rank == 1 or inner * (x.channels + features) >= x.channels * features:
        return net.conv(x, name, features)
    return net.conv(net.conv(x, f"{name}_a", inner), f"{name}_b", features)
