"""EfficientViT's module."""

from nas.blocks.mbconv import mbconv
from nas.ops import Activation, Recorder, Value


def efficientvit(
    net: Recorder,
    x: Value,
    *,
    width: int,
    stride: int = 1,
    kernel: int = 3,
    expand: float = 4,
    dim: int = 16,
    scale: int = 5,
    act: Activation = "hard_swish",
) -> Value:
    """Multi-scale ReLU linear attention, then an inverted residual; both are added to what they read.

    Cai et al. 2023, arXiv:2205.14756, fig. 2 and 3. Where the shape changes, another inverted residual changes it
    first, as one does at the start of each stage there. `kernel` and `expand` are those of the inverted residuals,
    which have norms where the authors' have biases; folded, the two are the same.

    Heads are `dim` wide; there are width // dim of them, at least one. `scale` is the kernel by which neighbouring
    tokens are gathered to a second scale, which has as many heads again; 0: none.
    """
    if dim < 1:
        raise ValueError(f"efficientvit: heads are {dim} wide; at least 1 is needed")
    if stride != 1 or x.channels != width:
        x = mbconv(net.under("entry"), x, width=width, stride=stride, kernel=kernel, expand=expand, act=act)
    heads = max(1, width // dim)
    tokens = net.conv(x, "qkv", heads * 3 * dim)
    if scale:
        y = net.conv(tokens, "scale_depthwise", tokens.channels, kernel=scale, groups=tokens.channels)
        tokens = net.concat(tokens, net.conv(y, "scale_mix", tokens.channels, groups=3 * heads))
    y = net.linear_attention(tokens, dim)
    x = net.add(x, net.norm(net.conv(y, "project", width), "project_norm"))
    return mbconv(net.under("feed_forward"), x, width=width, kernel=kernel, expand=expand, act=act)
