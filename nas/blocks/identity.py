"""A layer left out."""

from nas.ops import Recorder, Value


def identity(net: Recorder, x: Value, *, width: int, stride: int = 1) -> Value:
    """`x` itself; where the shape changes a 1x1 convolution and a norm, nothing else.

    As in NAS-Bench-Macro (Su et al. 2021, arXiv:2103.11922, sec. 5.1).
    """
    if stride == 1 and x.channels == width:
        return x
    return net.norm(net.conv(x, "shortcut", width, stride=stride), "shortcut_norm")
