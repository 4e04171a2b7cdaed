"""Numbers of channels that hardware likes."""


def make_divisible(channels: float, by: int = 8) -> int:
    """The multiple of `by` nearest to `channels`: at least `by`, and never more than a tenth below.

    As MobileNet's authors round (github.com/tensorflow/models, research/slim/nets/mobilenet), and Once-for-All's.
    """
    rounded = max(by, int(channels + by / 2) // by * by)
    return rounded if rounded >= 0.9 * channels else rounded + by


def expanded(channels: int, expand: float) -> int:
    """Width inside an inverted residual: `expand` times `channels`, made divisible by 8 unless `expand` is 1.

    Raises:
        ValueError: `expand` is not above 0.
    """
    if expand <= 0:
        raise ValueError(f"expand {expand} is not above 0")
    return channels if expand == 1 else make_divisible(channels * expand)


def pruned(channels: int, share: float) -> int:
    """What is left of so many inner channels without a `share` of them: the leading ones, made divisible by 8.

    Raises:
        ValueError: `share` is not within [0, 1).
    """
    if not 0 <= share < 1:
        raise ValueError(f"prune {share} is not within [0, 1); 0.0 leaves all channels")
    return min(channels, make_divisible(channels * (1 - share))) if share else channels
