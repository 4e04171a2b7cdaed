"""The last layers of a network."""

from nas.ops import Activation, Recorder, Value


def classifier(net: Recorder, x: Value, *, width: int, classes: int, act: Activation = "hard_swish") -> Value:
    """1x1 convolution to `width` channels (0: none), mean over the image, logits."""
    if width:
        x = net.act(net.norm(net.conv(x, "conv", width), "norm"), act)
    return net.dense(net.pool(x), "logits", classes)
