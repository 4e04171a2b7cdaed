"""MobileNetV2/V3's inverted residual."""

from nas.blocks.pointwise import pointwise
from nas.blocks.rounding import expanded, pruned
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
    rank: float = 1.0,
    prune: float = 0.0,
) -> Value:
    """Inverted residual: expand 1x1, depthwise kxk, squeeze-and-excite, project 1x1.

    Sandler et al. 2018, arXiv:1801.04381, fig. 3b; with SE and hard-swish Howard et al. 2019, arXiv:1905.02244, fig. 4.
    The expanded width is made divisible by 8, and loses a share `prune` of its channels, where there is an expansion;
    `rank` is that of the 1x1 convolutions (`nas.blocks.pointwise`).
    """
    whole, hidden = expanded(x.channels, expand), x.channels
    y = x
    if whole != x.channels:
        hidden = pruned(whole, prune)
        y = net.act(net.norm(pointwise(net, y, "expand", hidden, rank=rank), "expand_norm"), act)
    y = net.conv(y, "depthwise", hidden, kernel=kernel, stride=stride, groups=hidden)
    y = net.act(net.norm(y, "depthwise_norm"), act)
    if se:
        y = squeeze_excite(net, y)
    y = net.norm(pointwise(net, y, "project", width, rank=rank), "project_norm")
    return net.add(x, y) if y.shape == x.shape else y
