"""The picture of a front: accuracy over each cost, with what was tried, the limit and the knee."""

import itertools
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

from nas import words
from nas.drawing import FONT, WIDTH, Drawing, ticks
from nas.errors import LimitError
from nas.search.front import Front, Trial

_HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM, _LEGEND = 300, 56, 16, 30, 44, 22
_DOTS = 2000  # of trials beside the front; of more, evenly chosen ones are drawn
_TRIAL, _FRONT, _KNEE, _LIMIT = "#8f99a8", "#4a8fe0", "#ee7733", "#d9534f"
_OTHERS = ("#35a37a", "#a077d6", "#b59a2c", "#d9668c", "#3aa6b9")

Point = tuple[float, float]


def plot(front: Front, against: Mapping[str, Front]) -> Drawing:
    """As `Front.plot`: one panel a counted cost, two beside each other.

    Raises:
        LimitError: the front is empty, has no cost beside the error, or another one lacks one of its costs.
    """
    costs = [name for name in front.costs if name != "error"]
    if not front.trials and front.least:
        front.knee()  # says how near the nearest came
    if not front.trials or not costs:
        raise LimitError(
            f"Nothing to draw: the front has {len(front)} trials of {', '.join(front.costs) or 'no cost'}."
        )
    columns = min(len(costs), 2)
    rows = -(-len(costs) // columns)
    width = WIDTH / columns
    parts = [
        f'<g transform="translate({i % columns * width:.0f},{_LEGEND + i // columns * _HEIGHT})">'
        f"{_panel(front, name, against, width)}</g>"
        for i, name in enumerate(costs)
    ]
    title = f"{len(front)} undominated of {len(front.evaluated)} trials: top-1 over {', '.join(costs)}"
    height = _LEGEND + rows * _HEIGHT
    return Drawing(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="{escape(title, quote=True)}" {FONT}>{_legend(front, against)}{"".join(parts)}</svg>',
        title,
    )


def _panel(front: Front, cost: str, against: Mapping[str, Front], width: float) -> str:
    """One front in two costs, the error upside down."""
    pair = front.counting("error", cost)
    others = [other.counting("error", cost) for other in against.values()]
    tried = [t for t in front.evaluated if t.correct is not None and np.isfinite(t.costs[cost])]
    tried = tried[:: -(-len(tried) // _DOTS)] if tried else []
    limit = front.setting.limits.get(cost, np.inf) if front.setting is not None else np.inf

    on_fronts = [t for f in (pair, *others) for t in f]
    x_low, x_high = _span([t.costs[cost] for t in (*tried, *on_fronts)])
    if np.isfinite(limit):
        x_low, x_high = min(x_low, limit), max(x_high, limit)
    least = next((100 * n.asked for name, n in front.least.items() if name == front.accuracy), None)
    # a few hopeless networks must not flatten the rest
    y_low, y_high = _span([100 * t.top1 for t in on_fronts])
    spread = [100 * t.top1 for t in tried or on_fronts]
    y_low = min(y_low, float(np.percentile(spread, 10)))
    if (half := y_high - float(np.median(spread))) > 0:
        y_low = max(y_low, y_high - 4 * half)
    if front.least:  # better ones may miss another limit
        y_high = max(y_high, *spread)
    if least is not None:
        y_low, y_high = min(y_low, least), max(y_high, least)
    x_low, x_high = x_low - 0.03 * (x_high - x_low), x_high + 0.03 * (x_high - x_low)
    y_low, y_high = y_low - 0.04 * (y_high - y_low), y_high + 0.04 * (y_high - y_low)
    right, bottom = width - _RIGHT, _HEIGHT - _BOTTOM

    def at(t: Trial) -> Point:
        return (
            _LEFT + (t.costs[cost] - x_low) / (x_high - x_low) * (right - _LEFT),
            min(bottom, bottom - (100 * t.top1 - y_low) / (y_high - y_low) * (bottom - _TOP)),  # hopeless ones: below
        )

    parts = [_axes(cost, (x_low, x_high), (y_low, y_high), right=right, bottom=bottom)]
    seen = [at(t) for t in tried if 100 * t.top1 >= y_low]
    parts.append(f'<g fill="{_TRIAL}" opacity=".45">')
    parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.2"/>' for x, y in seen]
    parts.append("</g>")
    if np.isfinite(limit):
        x = _LEFT + (limit - x_low) / (x_high - x_low) * (right - _LEFT)
        parts.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{bottom}" stroke="{_LIMIT}" stroke-width="1.5" '
            f'stroke-dasharray="5 3"/><text x="{x - 5:.1f}" y="{bottom - 6}" text-anchor="end" font-size="11">'
            f"at most {_short(limit)}</text>"
        )
    if least is not None:
        y = bottom - (least - y_low) / (y_high - y_low) * (bottom - _TOP)
        parts.append(
            f'<line x1="{_LEFT}" x2="{right:.1f}" y1="{y:.1f}" y2="{y:.1f}" stroke="{_LIMIT}" stroke-width="1.5" '
            f'stroke-dasharray="5 3"/><text x="{_LEFT + 5}" y="{y - 5:.1f}" font-size="11">at least {least:g} %</text>'
        )
    for other, colour in zip(others, itertools.cycle(_OTHERS), strict=False):
        parts.append(_steps([at(t) for t in other], colour, dashed=True))
    parts.append(_steps([at(t) for t in pair], _FRONT))
    knee = pair.knee() if len(pair) > 2 else None
    for t in pair:
        x, y = at(t)
        told = f"<title>{escape(_told(t))}</title>"
        if t is knee:
            parts.append(f'<path d="M{x:.1f},{y - 6:.1f} l6,6 l-6,6 l-6,-6 Z" fill="{_KNEE}">{told}</path>')
        else:
            fill = "none" if 100 * t.top1 < y_low else _FRONT  # hollow: it lies below
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{fill}" stroke="{_FRONT}">{told}</circle>')
    return "".join(parts)


def _axes(cost: str, x_range: Point, y_range: Point, *, right: float, bottom: float) -> str:
    parts = []
    for value in ticks(*x_range):
        x = _LEFT + (value - x_range[0]) / (x_range[1] - x_range[0]) * (right - _LEFT)
        parts.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{bottom}" stroke="currentColor" opacity=".1"/>'
            f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle" font-size="11" opacity=".65">'
            f"{_short(value)}</text>"
        )
    for value in ticks(*y_range):
        y = bottom - (value - y_range[0]) / (y_range[1] - y_range[0]) * (bottom - _TOP)
        parts.append(
            f'<line x1="{_LEFT}" x2="{right:.1f}" y1="{y:.1f}" y2="{y:.1f}" stroke="currentColor" opacity=".1"/>'
            f'<text x="{_LEFT - 7}" y="{y + 4:.1f}" text-anchor="end" font-size="11" opacity=".65">{value:g}</text>'
        )
    middle = (_LEFT + right) / 2
    parts.append(f'<text x="{middle:.0f}" y="{bottom + 34}" text-anchor="middle">{escape(cost)}</text>')
    parts.append(f'<text x="{_LEFT}" y="{_TOP - 8}" font-size="11" opacity=".65">top-1, %</text>')
    return "".join(parts)


def _steps(points: Sequence[Point], colour: str, *, dashed: bool = False) -> str:
    """From each point to the next better one at the same accuracy: nothing between them is known to be there."""
    if not points:
        return ""
    (x, y), *rest = points
    path = f"M{x:.1f},{y:.1f}" + "".join(f"H{x:.1f}V{y:.1f}" for x, y in rest)
    style = ' stroke-dasharray="4 3"' if dashed else ""
    return f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="1.8"{style}/>'


def _legend(front: Front, against: Mapping[str, Front]) -> str:
    marks = [("trials", _TRIAL), ("front", _FRONT), ("knee", _KNEE)]
    marks += list(zip(against, itertools.cycle(_OTHERS), strict=False))
    parts, x = [], float(_LEFT)
    for word, colour in marks:
        parts.append(f'<circle cx="{x:.0f}" cy="11" r="4.5" fill="{colour}"/>')
        parts.append(f'<text x="{x + 9:.0f}" y="15">{escape(word)}</text>')
        x += 28 + 7.2 * len(word)
    return "".join(parts)


def _told(trial: Trial) -> str:
    cheap = [f"{name} {value:.6g}" for name, value in trial.cheap.items()]
    return "\n".join([f"trial {trial.trial}", f"top-1 {trial.top1:.2%}", *cheap, "-".join(map(str, trial.genotype))])


def _short(value: float) -> str:
    return words.count(value) if abs(value) >= 10_000 else f"{value:.4g}"


def _span(values: Sequence[float]) -> Point:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5 * (abs(low) or 1.0), high + 0.5 * (abs(high) or 1.0))
