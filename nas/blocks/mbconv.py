"""MobileNetV2/V3's inverted residual."""

from nas.blocks.squeeze_excite import squeeze_excite
from nas.ops import Activation, Recorder, Value


def mbconv(
    net: Recorder,
    x: Value,
    *,
    width: int,
    stride: int = 1,
    kernel: int = 3,
    expand: float = 6,
    se: bool = False,
    act: Activation = "hard_swish",
) -> Value:
    """Inverted residual: expand 1x1, depthwise kxk, squeeze-and-excite, project 1x1.

    Sandler et al. 2018, arXiv:1801.04381, fig. 3b; with SE and hard-swish Howard et al. 2019, arXiv:1905.02244, fig. 4.
    """
    if expand <= 0:
        raise ValueError(f"mbconv: expand {expand} is not above 0")
    hidden = round(x.channels * expand)
    y = x
    if hidden != x.channels:
        y = net.act(net.norm(net.conv(y, "expand", hidden), "expand_norm"), act)
    y = net.conv(y, "depthwise", hidden, kernel=kernel, stride=stride, groups=hidden)
    y = net.act(net.norm(y, "depthwise_norm"), act)
    if se:
        y = squeeze_excite(net, y)
    y = net.norm(net.conv(y, "project", width), "project_norm")
    return net.add(x, y) if y.shape == x.shape else y
