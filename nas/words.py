"""Numbers and blocks in words, the same way everywhere on the page."""

import math
from collections.abc import Sequence
from itertools import groupby

from nas.ops import Block, Network

NONE = "–"
_SPACE = "\N{NO-BREAK SPACE}"


def _known(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def percent(share: float | None, decimals: int = 1, *, sign: bool = False) -> str:
    """0.981 -> "98.1 %"."""
    if share is None or not _known(share):
        return NONE
    value = round(100 * share, decimals) + 0.0  # which makes -0.0 to 0.0
    return f"{value:{'+' if sign else ''}.{decimals}f}{_SPACE}%"


def ms(value: float | None, *, unit: bool = True, like: float | None = None) -> str:
    """Milliseconds with three significant digits, 0.184 ms or 12.3 ms; with `like`, as many decimals as that has."""
    if value is None or not _known(value):
        return NONE
    measure = abs(value if like is None else like)
    decimals = max(0, 2 - math.floor(math.log10(measure))) if measure else 0
    return f"{value:.{decimals}f}" + (f"{_SPACE}ms" if unit else "")


def count(value: float | None) -> str:
    """1234567 -> "1.23 M"."""
    if value is None or not _known(value):
        return NONE
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * size:
            return f"{value / size:.3g}{_SPACE}{unit}"
    return f"{value:.0f}"


def size(size_bytes: float | None) -> str:
    """59120 -> "59.1 kB"."""
    if size_bytes is None:
        return NONE
    text = count(size_bytes)
    return f"{text}B" if text[-1].isalpha() else f"{text}{_SPACE}B"


def seconds(value: float | None) -> str:
    """75 -> "1 min 15 s"."""
    if value is None or not _known(value):
        return NONE
    if value < 59.5:
        return f"{value:.3g}{_SPACE}s" if value < 9.95 else f"{value:.0f}{_SPACE}s"
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}{_SPACE}h {minutes}{_SPACE}min"
    return f"{minutes}{_SPACE}min {rest}{_SPACE}s"


def shape(of: Sequence[int]) -> str:
    """(8, 8, 32) -> "8×8×32"."""
    return "×".join(map(str, of))


def kind(block: Block) -> str:
    """The block's type, "mbconv"; its name may end otherwise, where a space lists one type twice."""
    return block.label.partition(" ")[0]


def stage(name: str) -> str:
    """Where a block or position stands, "stage 1"."""
    group = name.split("/")[0]
    digits = group.lstrip("abcdefghijklmnopqrstuvwxyz_")
    return f"{group.removesuffix(digits)} {digits}".strip()


_WHOLE = {"rank": 1.0, "prune": 0.0}  # with these a block is as it would be without


def options(block: Block, *, all_of_them: bool = False) -> list[str]:
    """The options of the block's label, such as "5×5", "expand 4", "SE"; the activation only with `all_of_them`."""
    words = []
    for key, _, value in (word.partition("=") for word in block.label.split()[1:]):
        if key == "kernel":
            words.insert(0, f"{value}×{value}")
        elif value == "true":
            words.append("SE" if key == "se" else key)
        elif key == "act":
            words += [value] if all_of_them else []
        elif key in _WHOLE and float(value) == _WHOLE[key]:
            continue
        elif value != "false":
            words.append(f"{key} {value}")
    return words


def network(of: Network) -> list[str]:
    """One line a stage, stem and head left out: "stage 1: mbconv 3×3 expand 4, shufflenet_v2 5×5"."""
    lines = []
    for where, group in groupby(of.blocks, key=lambda block: stage(block.name)):
        if any(character.isdigit() for character in where):
            lines.append(f"{where}: " + ", ".join(" ".join([kind(block), *options(block)]) for block in group))
    return lines


def wilson(share: float, n: int) -> tuple[float, float]:
    """95 % interval of a share of `n` (Wilson 1927), such as an accuracy over `n` test images."""
    z = 1.96
    centre, spread = share + z**2 / (2 * n), z * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return (centre - spread) / (1 + z**2 / n), (centre + spread) / (1 + z**2 / n)
