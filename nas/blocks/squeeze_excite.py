"""Channel attention that other blocks use."""

from nas.blocks.rounding import make_divisible
from nas.ops import Recorder, Value


def squeeze_excite(net: Recorder, x: Value, *, ratio: float = 0.25) -> Value:
    """Squeeze-and-excite with ReLU and hard-sigmoid (Hu et al. 2018, arXiv:1709.01507; Howard et al. 2019, sec. 5.3).

    The squeezed width is made divisible by 8.
    """
    squeezed = make_divisible(x.channels * ratio)
    y = net.act(net.conv(net.pool(x), "se_reduce", squeezed, bias=True), "relu")
    return net.mul(x, net.act(net.conv(y, "se_expand", x.channels, bias=True), "hard_sigmoid"))
