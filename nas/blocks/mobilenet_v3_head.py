"""MobileNetV3's last layers."""

from nas.ops import Activation, Recorder, Value


def mobilenet_v3_head(
    net: Recorder, x: Value, *, width: int, classes: int, features: int = 1280, act: Activation = "hard_swish"
) -> Value:
    """1x1 convolution to `width` channels, mean over the image, 1x1 convolution to `features`, logits.

    Howard et al. 2019, arXiv:1905.02244, sec. 5.1. The second convolution has neither norm nor bias, as Once-for-All's.
    """
    y = net.act(net.norm(net.conv(x, "conv", width), "norm"), act)
    y = net.act(net.conv(net.pool(y), "mix", features), act)
    return net.dense(y, "logits", classes)
