"""Channel attention that other blocks use."""

from nas.ops import Recorder, Value


def squeeze_excite(net: Recorder, x: Value, *, ratio: float = 0.25) -> Value:
    """Squeeze-and-excite with ReLU and hard-sigmoid (Hu et al. 2018, arXiv:1709.01507; Howard et al. 2019, sec. 5.3).

    The squeezed width is rounded to a multiple of 8, at least 8.
    """
    squeezed = max(8, int(x.channels * ratio + 4) // 8 * 8)
    y = net.act(net.conv(net.pool(x), "se_reduce", squeezed, bias=True), "relu")
    return net.mul(x, net.act(net.conv(y, "se_expand", x.channels, bias=True), "hard_sigmoid"))
