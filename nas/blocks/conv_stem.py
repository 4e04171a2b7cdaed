"""The first layer of a network."""

from nas.ops import Activation, Recorder, Value


def conv_stem(
    net: Recorder, x: Value, *, width: int, stride: int = 1, kernel: int = 3, act: Activation = "hard_swish"
) -> Value:
    """A dense convolution, norm and activation."""
    return net.act(net.norm(net.conv(x, "conv", width, kernel=kernel, stride=stride), "norm"), act)
