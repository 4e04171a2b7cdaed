"""ShuffleNetV2's unit."""

from nas.blocks.rounding import pruned
from nas.ops import Activation, Recorder, Value


def shufflenet_v2(
    net: Recorder,
    x: Value,
    *,
    width: int,
    stride: int = 1,
    kernel: int = 3,
    act: Activation = "relu",
    prune: float = 0.0,
) -> Value:
    """Split, 1x1 - depthwise kxk - 1x1 on one half, concat, shuffle (Ma et al. 2018, arXiv:1807.11164, fig. 3c, d).

    Where the shape changes both branches read the whole input and neither is split (fig. 3d). Between the two 1x1
    convolutions a share `prune` of the channels is left away.
    """
    half = width // 2
    inner = pruned(half, prune)
    if width % 2:
        raise ValueError(f"shufflenet_v2: width {width} is odd; halves are needed")

    def branch(y: Value) -> Value:
        y = net.act(net.norm(net.conv(y, "expand", inner), "expand_norm"), act)
        y = net.norm(net.conv(y, "depthwise", inner, kernel=kernel, stride=stride, groups=inner), "depthwise_norm")
        return net.act(net.norm(net.conv(y, "project", half), "project_norm"), act)

    if stride == 1 and x.channels == width:
        return net.shuffle(net.concat(net.split(x, 0, half), branch(net.split(x, half, width))), 2)
    left = net.conv(x, "shortcut_depthwise", x.channels, kernel=kernel, stride=stride, groups=x.channels)
    left = net.norm(left, "shortcut_depthwise_norm")
    left = net.act(net.norm(net.conv(left, "shortcut_project", half), "shortcut_project_norm"), act)
    return net.shuffle(net.concat(left, branch(x)), 2)
