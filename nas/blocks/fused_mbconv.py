"""EfficientNetV2's fused inverted residual."""

from nas.blocks.pointwise import pointwise
from nas.blocks.rounding import expanded, pruned
from nas.blocks.squeeze_excite import squeeze_excite
from nas.ops import Activation, Recorder, Value


def fused_mbconv(
    net: Recorder,
    x: Value,
    *,
    width: int,
    stride: int = 1,
    kernel: int = 3,
    expand: float = 4,
    se: bool = False,
    act: Activation = "swish",
    rank: float = 1.0,
    prune: float = 0.0,
) -> Value:
    """Expand by a dense kxk convolution, squeeze-and-excite, project 1x1; with expand 1 one convolution, activated.

    Tan & Le 2021, arXiv:2104.00298, sec. 3.2 and fig. 2. The expanded width is made divisible by 8, and loses a share
    `prune` of its channels; `rank` is that of the projection (`nas.blocks.pointwise`).
    """
    hidden = width if expand == 1 else pruned(expanded(x.channels, expand), prune)
    name = "conv" if expand == 1 else "expand"  # two names: their weights have nothing in common
    y = net.act(net.norm(net.conv(x, name, hidden, kernel=kernel, stride=stride), f"{name}_norm"), act)
    if se:
        y = squeeze_excite(net, y)
    if expand != 1:
        y = net.norm(pointwise(net, y, "project", width, rank=rank), "project_norm")
    return net.add(x, y) if y.shape == x.shape else y
