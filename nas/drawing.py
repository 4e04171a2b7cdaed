"""Pictures made by hand: a network as a chain of blocks over time, a limit within what a space can reach, bars.

All are SVG without a style sheet: text takes the colour of the page around it, so light and dark both work.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path

from nas import cost, words
from nas.blocks import BLOCKS
from nas.errors import RunError
from nas.files import write_text
from nas.ops import Block, Network

WIDTH = 880  # of all drawings, in their own units
BARS = (306, 800)  # left and right end of the time axis
_STAGE, _SPINE, _WORDS = 0, 72, 88  # where the three columns of text stand
_ROW, _BAR, _BETWEEN, _SKIPPED = 26, 16, 20, 15  # heights
_TIME = 80  # room for a time and share beside a bar; as much is left beside the longest

_ENDS = ("#7d8794", "#9aa3ae")  # stem and head
_COLOURS = ("#4a8fe0", "#ee8434", "#35a37a", "#a077d6", "#d9668c", "#b59a2c", "#3aa6b9")
FONT = 'font-family="system-ui, sans-serif" font-size="12.5" fill="currentColor"'


@dataclasses.dataclass(frozen=True, repr=False)
class Drawing:
    """A picture that notebooks show, and that can be saved."""

    svg: str
    title: str

    def save(self, path: Path | str) -> Path:
        """Writes it as SVG; returns the path.

        Raises:
            RunError: the path ends otherwise, or cannot be written.
        """
        path = Path(path)
        if path.suffix != ".svg":
            raise RunError(f"{path}: drawings are SVG: give a path that ends in .svg. Browsers and editors convert it.")
        write_text(path, self.svg + "\n")
        return path

    def _repr_svg_(self) -> str:
        return self.svg

    def __repr__(self) -> str:
        return f'Drawing({self.title}; `.save("x.svg")`)'


def draw(
    network: Network,
    latency_ms: Sequence[float],
    *,
    positions: Sequence[str] = (),
    limit_ms: float | None = None,
    limit_name: str = "limit",
    span_ms: float | None = None,
) -> str:
    """A network as SVG, top to bottom as it runs; each block's bar starts when the one before it ends.

    Args:
        network: what is drawn, one `<rect>` a block.
        latency_ms: of each block; one more, at the end, is what comes once a network, which may be below 0: a bar of
            its own, hollow, that goes back then. The bars end at the sum.
        positions: names of all positions of the space in order; those that the network skips are drawn as gaps.
        limit_ms: drawn as a line across, with the words `limit_name`.
        span_ms: the time at the right end, to draw several networks to one scale (at least `reach` of each); by
            default just enough.
    """
    blocks = network.blocks
    if len(latency_ms) - len(blocks) not in (0, 1):
        raise ValueError(
            f"{len(latency_ms)} latencies for {len(blocks)} blocks: one each is needed, and at most one for the network"
        )
    total = math.fsum(latency_ms)
    span = max(span_ms or limit_ms or 0.0, reach(latency_ms)) or 1.0
    left, right = BARS
    scale = (right - left) / span

    limit = left + limit_ms * scale if limit_ms is not None and limit_ms <= span else math.inf

    parts: list[str] = []
    y, now, here = 24.0, 0.0, ""
    spine_top = y
    time_of = dict(zip(blocks, latency_ms[: len(blocks)], strict=True))
    for name, block in _rows(network, positions):
        if words.stage(name) != here:
            before, here = here, words.stage(name)
            stage_input = block.graph.input if block else None
            if stage_input:
                y = _shape_row(parts, y, stage_input, rule=bool(before))
            middle = y + _ROW / 2
            parts.append(f'<text x="{_STAGE}" y="{middle + 4:.1f}" opacity=".65">{escape(here)}</text>')
        if block is None:
            middle = y + _SKIPPED / 2
            parts.append(
                f'<g opacity=".55"><title>{escape(name)} is skipped</title>'
                f'<circle cx="{_SPINE}" cy="{middle:.1f}" r="2" fill="none" stroke="currentColor"/>'
                f'<text x="{_WORDS}" y="{middle + 3.5:.1f}" font-size="10.5" font-style="italic">skipped</text></g>'
            )
            y += _SKIPPED
        else:
            bar = _span(now, now + time_of[block], scale)
            parts.append(_block(block, time_of[block], total, bar=bar, y=y, limit=limit))
            now += time_of[block]
            y += _ROW
    y = _shape_row(parts, y, blocks[-1].graph.shape, rule=True)
    spine_end = y
    if len(latency_ms) > len(blocks):
        parts.append(_once(latency_ms[-1], total, bar=_span(now, total, scale), y=y, limit=limit))
        y += _ROW

    axis = "".join(
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="20" y2="{y:.0f}" stroke="currentColor" opacity=".12"/>'
        f'<text x="{x:.1f}" y="14" text-anchor="middle" font-size="11" opacity=".65">{tick}</text>'
        for x, tick in ((left + value * scale, f"{value:g}") for value in ticks(0.0, span))
    )
    axis += f'<text x="{left - 14}" y="14" text-anchor="end" font-size="11" opacity=".65">predicted, ms</text>'
    if math.isfinite(limit):
        clear = limit >= left + total * scale and limit + 7.5 * len(limit_name) < WIDTH  # of bars, and of the border
        beside, anchor = (limit + 6, "start") if clear else (limit - 6, "end")
        axis += (
            f'<line x1="{limit:.1f}" x2="{limit:.1f}" y1="20" y2="{y:.0f}" stroke="#d9534f" stroke-width="1.5" '
            f'stroke-dasharray="5 3"/><text x="{beside:.1f}" y="{spine_end - 14:.0f}" text-anchor="{anchor}" '
            f'font-size="11">{escape(limit_name)}</text>'
        )
    spine = (
        f'<line x1="{_SPINE}" x2="{_SPINE}" y1="{spine_top + 4:.0f}" y2="{spine_end - 4:.0f}" stroke="currentColor" '
        'opacity=".25" stroke-width="1.5"/>'
    )
    label = escape(f"{len(blocks)} blocks, {words.ms(total)} predicted", quote=True)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y:.0f}" role="img" aria-label="{label}" '
        f"{FONT}>{axis}{spine}{''.join(parts)}</svg>"
    )


def reach(latency_ms: Sequence[float]) -> float:
    """How far to the right the bars of `draw` go, in milliseconds: beyond their sum where the last goes back."""
    return max(itertools.accumulate(latency_ms), default=0.0)


def strip(reachable_ms: tuple[float, float], limit_ms: float | None, p10: float, median: float, p90: float) -> str:
    """Where the answer lies between the fastest and the slowest network of its space, as SVG."""
    low, high = min(reachable_ms[0], p10), max(reachable_ms[1], p90, limit_ms or 0.0)
    left, right, y = 4, WIDTH - 4, 40

    def x(value: float) -> float:
        return left + (value - low) / ((high - low) or 1.0) * (right - left)

    parts = [
        f'<line x1="{x(reachable_ms[0]):.1f}" x2="{x(reachable_ms[1]):.1f}" y1="{y}" y2="{y}" stroke="currentColor" '
        'opacity=".25" stroke-width="6" stroke-linecap="round"/>',
        f'<text x="{left - 4}" y="{y + 24}" opacity=".65">fastest of the space, {words.ms(reachable_ms[0])}</text>',
        f'<text x="{right + 4}" y="{y + 24}" text-anchor="end" opacity=".65">slowest, {words.ms(reachable_ms[1])}'
        "</text>",
        f'<path d="M{x(p10):.1f},{y - 8} H{max(x(p90), x(p10) + 2):.1f} V{y + 8} H{x(p10):.1f} Z" fill="#ee7733" '
        f'opacity=".4"><title>p10 to p90: {words.ms(p10)} to {words.ms(p90)}</title></path>',
        f'<line x1="{x(median):.1f}" x2="{x(median):.1f}" y1="{y - 11}" y2="{y + 11}" stroke="#ee7733" '
        'stroke-width="3"/>',
    ]
    answer_side, limit_side = ("end", "start") if limit_ms is None or median <= limit_ms else ("start", "end")
    parts.append(_beside(x(median), y - 20, f"measured {words.ms(median)}", answer_side))
    if limit_ms is not None:
        parts.append(
            f'<line x1="{x(limit_ms):.1f}" x2="{x(limit_ms):.1f}" y1="{y - 18}" y2="{y + 14}" stroke="#d9534f" '
            f'stroke-width="1.5" stroke-dasharray="5 3"/>'
        )
        parts.append(_beside(x(limit_ms), y - 20, f"limit {words.ms(limit_ms)}", limit_side))
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} 70" role="img" {FONT}>{"".join(parts)}</svg>'


def colour(block: Block) -> str:
    """Of the block's type: greys for stem and head, else by its place in the table of blocks."""
    kind = words.kind(block)
    if not any(character.isdigit() for character in block.name.split("/")[0]):
        return _ENDS[block.name.startswith("head")]
    known = list(BLOCKS)
    return _COLOURS[known.index(kind) % len(_COLOURS)] if kind in known else _ENDS[0]


def _rows(network: Network, positions: Sequence[str]) -> list[tuple[str, Block | None]]:
    """Blocks in order, and None where a position is skipped."""
    at = {block.name.rpartition("/")[0]: block for block in network.blocks}
    if set(at) <= set(positions):
        return [(name, at.get(name)) for name in positions]
    return [(block.name, block) for block in network.blocks]


def _span(start_ms: float, end_ms: float, scale: float) -> tuple[float, float]:
    """Left end and width of a bar."""
    return BARS[0] + min(start_ms, end_ms) * scale, abs(end_ms - start_ms) * scale


def _block(block: Block, time_ms: float, total_ms: float, *, bar: tuple[float, float], y: float, limit: float) -> str:
    """One row: dot, words, bar (its left end and width) and time, which keeps clear of the line at `limit`."""
    middle, fill = y + _ROW / 2, colour(block)
    (x, width), share = bar, time_ms / total_ms if total_ms else 0.0
    title = "\n".join(
        [
            block.name,
            f"{words.shape(block.graph.input)} → {words.shape(block.graph.shape)}",
            ", ".join(words.options(block, all_of_them=True)),
            f"{words.ms(time_ms)}, {words.percent(share)} of the network",
            f"{words.count(cost.macs(block.graph))} MACs, {words.count(cost.parameters(block.graph))} parameters",
        ]
    )
    return (
        f'<g class="block"><title>{escape(title)}</title>'
        f'<circle cx="{_SPINE}" cy="{middle:.1f}" r="4.5" fill="{fill}"/>'
        f'<text x="{_WORDS}" y="{middle + 4:.1f}">{escape(words.kind(block))}'
        f'<tspan dx="7" opacity=".65">{escape(", ".join(words.options(block)))}</tspan></text>'
        f'<rect x="{x:.2f}" y="{middle - _BAR / 2:.1f}" width="{width:.2f}" height="{_BAR}" fill="{fill}"/>'
        f"{_time(time_ms, total_ms, bar=bar, middle=middle, limit=limit)}</g>"
    )


def _once(time_ms: float, total_ms: float, *, bar: tuple[float, float], y: float, limit: float) -> str:
    """The row of what comes once a network, whatever its blocks are."""
    middle, (x, width) = y + _ROW / 2, bar
    title = (
        f"{words.ms(time_ms)} come once a network, whatever its blocks are: what a call costs, and what blocks gain or "
        "lose in company. Fitted on networks that were measured whole."
    )
    return (
        f'<g class="once"><title>{escape(title)}</title>'
        f'<text x="{_WORDS}" y="{middle + 4:.1f}" opacity=".65">once a network</text>'
        f'<rect x="{x:.2f}" y="{middle - _BAR / 4:.1f}" width="{width:.2f}" height="{_BAR / 2}" fill="none" '
        f'stroke="currentColor" opacity=".65"/>{_time(time_ms, total_ms, bar=bar, middle=middle, limit=limit)}</g>'
    )


def _time(time_ms: float, total_ms: float, *, bar: tuple[float, float], middle: float, limit: float) -> str:
    """A time and its share beside a bar, on the side where it does not stand on the line at `limit`."""
    x, width = bar
    share = time_ms / total_ms if total_ms else 0.0
    crossed = x + width < limit < x + width + _TIME and x - _TIME > BARS[0]
    beside, anchor = (x - 7, "end") if crossed else (x + width + 7, "start")
    return (
        f'<text x="{beside:.1f}" y="{middle + 4:.1f}" text-anchor="{anchor}" font-size="11" opacity=".8">'
        f"{words.ms(time_ms, like=total_ms, unit=False)} · {words.percent(share, 0)}</text>"
    )


def _shape_row(parts: list[str], y: float, of: Sequence[int], *, rule: bool) -> float:
    """The size of what flows here, between two stages; returns where the next row starts."""
    middle = y + _BETWEEN / 2
    name = words.shape(of) if len(of) > 1 else f"{of[0]} classes"
    if rule:
        parts.append(
            f'<line x1="{_WORDS + 84}" x2="{WIDTH}" y1="{middle:.1f}" y2="{middle:.1f}" stroke="currentColor" '
            'opacity=".12"/>'
        )
    parts.append(
        f'<line x1="{_SPINE - 5}" x2="{_SPINE + 5}" y1="{middle:.1f}" y2="{middle:.1f}" stroke="currentColor" '
        f'opacity=".5"/><text x="{_WORDS}" y="{middle + 4:.1f}" font-size="11" opacity=".65">{name}</text>'
    )
    return y + _BETWEEN


def _beside(x: float, y: float, text: str, side: str) -> str:
    """Text that ends at or starts from `x`, whichever is asked, but stays within the drawing."""
    room = 7.5 * len(text)
    side = "start" if x < room else "end" if x > WIDTH - room else side
    return f'<text x="{x:.1f}" y="{y}" text-anchor="{side}">{text}</text>'


def ticks(low: float, high: float) -> list[float]:
    """Round values within `low` to `high`, about five."""
    span = (high - low) or 1.0
    step = 10 ** math.floor(math.log10(span / 4))
    step *= next(m for m in (1, 2, 2.5, 5, 10) if span / (step * m) <= 5)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(k * step, 12) for k in range(first, last + 1)]
