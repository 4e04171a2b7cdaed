"""The first layer of a network."""

from nas.ops import Activation, Recorder, Value


def conv_stem(
    net: Recorder,
    x: Value,
    *,
    width: int,
    stride: int = 1,
    kernel: int = 3,
    act: Activation = "hard_swish",
    pool: bool = False,
) -> Value:
    """A dense convolution, norm and activation.

    With `pool` half of the stride is left to a maximum over 3x3 pixels (ShuffleNetV2, arXiv:1807.11164, table 5).
    """
    if pool and stride % 2:
        raise ValueError(f"conv_stem: stride {stride} is odd; with pool a factor of 2 belongs to the pooling")
    y = net.conv(x, "conv", width, kernel=kernel, stride=stride // 2 if pool else stride)
    y = net.act(net.norm(y, "norm"), act)
    return net.pool(y, "max", window=3, stride=2) if pool else y
