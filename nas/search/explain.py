"""Why a network costs what it costs: which choices matter over the trials of a search, and where its time goes.

An additive model of each cost, one effect for every value of every choice (ridge regression), is fitted to the
evaluated trials and judged on trials that it was not fitted on. The importance of a choice is what those predictions
lose when its value is replaced by that of other trials: permutation importance (Breiman 2001,
doi:10.1023/A:1010933404324), averaged over all replacements (Fisher et al. 2019, arXiv:1801.01489, sec. 3), which for
an additive model is exact and needs no random permutation. Half of it is told: where choices are independent, that is
the share of the variance that the choice accounts for. What choices do only together is not seen: that is in the
share of variance that the model does not explain, which is told beside.
"""

import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nas import words
from nas.drawing import FONT, WIDTH, Drawing, draw
from nas.errors import RunError
from nas.search.accuracy import is_error
from nas.search.front import Front, Setting, Trial
from nas.space import Space

if TYPE_CHECKING:
    from pandas import DataFrame

_FOLDS = 10
_PENALTIES = (0.03, 0.3, 1.0, 3.0, 10.0, 30.0)  # ridge; the one of the least error on held-out trials is taken
_FEWEST = 20  # trials, below which no importance is told
_SHOWN = 12  # choices in text and pictures
_TRUST = 0.5  # share of the variance of held-out trials, below which the text warns
_WORSE, _BETTER = "#d9534f", "#35a37a"

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Effect:
    """One choice, and one cost."""

    choice: str
    value: Any  # that the trial has; None where the choice has no effect in it
    importance: float  # share of the variance of the cost that it accounts for in held-out trials; about 0: it is idle
    contribution: float  # of the trial's value, in the cost's unit, against the mean of the trials


@dataclass(frozen=True, repr=False)
class Explanation:
    """Which choices drive each cost, most important first, and a trial's blocks over time on each device."""

    trial: Trial
    effects: dict[str, tuple[Effect, ...]]  # by cost
    explained: dict[str, float]  # by cost: share of the variance of held-out trials that the additive model explains
    networks: dict[str, Drawing]  # by cost that is a latency with known blocks: bars, one a block
    trials: int  # that it rests on

    def rows(self) -> list[dict[str, Any]]:
        """One flat row a choice: its value in this trial, and importance and contribution for each cost."""
        out: dict[str, dict[str, Any]] = {}
        for cost, effects in self.effects.items():
            for effect in effects:
                row = out.setdefault(effect.choice, {"choice": effect.choice, "value": effect.value})
                row[f"importance of {cost}"] = effect.importance
                row[f"contribution to {cost}"] = effect.contribution
        return list(out.values())

    def to_frame(self) -> "DataFrame":
        """The rows as a pandas table.

        Raises:
            RunError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as e:
            raise RunError("A table needs pandas, which is not installed: `pip install pandas`.") from e
        return pandas.DataFrame(self.rows())

    def plot(self) -> Drawing:
        """The most important choices of each cost as bars."""
        return _bars(self)

    def save(self, folder: Path | str) -> Path:
        """Writes every drawing to `folder` as SVG; returns the folder."""
        folder = Path(folder)
        self.plot().save(folder / "importance.svg")
        for cost, drawing in self.networks.items():
            drawing.save(folder / f"blocks.{cost.replace('/', '_')}.svg")
        return folder

    def __repr__(self) -> str:
        lines = [f"Explanation(trial {self.trial.trial}, from {self.trials} trials)"]
        for cost, effects in self.effects.items():
            lines.append(f"{cost} {self.trial.costs[cost]:.4g}; {self._trust(cost)}")
            lines += [
                f"  {e.importance:7.1%}  {e.choice} = {_value(e.value)}  ({e.contribution:+.3g})"
                for e in effects[:_SHOWN]
            ]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        pictures = [self.plot(), *self.networks.values()]
        return "".join(f"<p>{html.escape(p.title)}</p>{p.svg}" for p in pictures)

    def _trust(self, cost: str) -> str:
        share = self.explained[cost]
        doubt = "" if share >= _TRUST else ": read with care, choices act together or the trials are too few"
        return f"single choices explain {max(0.0, share):.0%} of the variance of held-out trials{doubt}"


def explain(front: Front, trial: Trial) -> Explanation:
    """As `Front.explain`."""
    setting = front.setting
    if setting is None:
        raise RunError(
            "It is not known what was searched: fronts of `nas.search` and of `nas.load_run` can be explained, and "
            "`nas.Front.of(trials, setting=nas.search.Setting(space))`."
        )
    sound = [t for t in front.evaluated if t.correct is not None]
    if len(sound) < _FEWEST:
        raise RunError(f"{len(sound)} trials succeeded: importances need at least {_FEWEST}. Search on.")
    genotypes = setting.space.check([t.genotype for t in sound])
    design, owner = one_hot(setting.space, genotypes)
    here = one_hot(setting.space, setting.space.check(trial.genotype)[None])[0][0]
    described = setting.space.describe(trial.genotype)
    effects, explained = {}, {}
    for cost in dict.fromkeys(("error", *front.costs)):
        y = np.array([t.costs[cost] for t in sound])
        finite = np.isfinite(y)
        penalty, explained[cost] = _penalty(design[finite], y[finite])
        importance = _importance(design[finite], owner, y[finite], penalty)
        weights, _ = _ridge(design[finite], y[finite], penalty)
        offset = (here - design[finite].mean(0)) * weights
        found = [
            Effect(c.name, described.get(c.name), float(importance[i]), float(offset[owner == i].sum()))
            for i, c in enumerate(setting.space.choices)
            if len(c.values) > 1
        ]
        effects[cost] = tuple(sorted(found, key=lambda e: -e.importance))
    return Explanation(trial, effects, explained, _networks(setting, trial), len(sound))


def one_hot(space: Space, genotypes: NDArray[np.uint8]) -> tuple[Floats, NDArray[np.intp]]:
    """[n, values of all choices], all zero for a choice without effect; and the number of each column's choice."""
    active = np.ones(genotypes.shape, bool)
    for gene, choice in enumerate(space.choices):
        for other, values in choice.conditions:
            active[:, gene] &= np.isin(genotypes[:, other], values)
    columns = [
        (genotypes[:, gene, None] == np.arange(size)) & active[:, gene, None] for gene, size in enumerate(space.sizes)
    ]
    owner = np.repeat(np.arange(len(space.sizes)), space.sizes)
    return np.concatenate(columns, axis=1).astype(np.float64), owner


def _ridge(x: Floats, y: Floats, penalty: float) -> tuple[Floats, float]:
    """Weights [k] and intercept."""
    x_mean, y_mean = x.mean(0), y.mean()
    centred = x - x_mean
    weights = np.linalg.solve(centred.T @ centred + penalty * np.eye(x.shape[1]), centred.T @ (y - y_mean))
    return weights, float(y_mean - x_mean @ weights)


def _folds(n: int) -> list[NDArray[np.intp]]:
    """The rows of each part; of neighbours in time, which resemble each other, each is in another one."""
    return [np.arange(k, n, _FOLDS) for k in range(min(_FOLDS, n))]


def _penalty(x: Floats, y: Floats) -> tuple[float, float]:
    """The best penalty, and the share of the variance that it explains of trials that it was not fitted on."""
    variance = float(np.var(y))
    if variance == 0:
        return _PENALTIES[-1], 1.0

    def share(penalty: float) -> float:
        squares = 0.0
        for rows in _folds(len(y)):
            rest = np.setdiff1d(np.arange(len(y)), rows)
            weights, intercept = _ridge(x[rest], y[rest], penalty)
            squares += float(((x[rows] @ weights + intercept - y[rows]) ** 2).sum())
        return 1 - squares / len(y) / variance

    best = max(_PENALTIES, key=share)
    return best, share(best)


def _importance(x: Floats, owner: NDArray[np.intp], y: Floats, penalty: float) -> Floats:
    """[choices]: half of what the squared error grows by without the choice, in variances of `y`."""
    variance = float(np.var(y))
    out = np.zeros(int(owner.max()) + 1)
    if variance == 0:
        return out
    for rows in _folds(len(y)):
        rest = np.setdiff1d(np.arange(len(y)), rows)
        weights, intercept = _ridge(x[rest], y[rest], penalty)
        residual = y[rows] - x[rows] @ weights - intercept
        for choice in range(len(out)):
            mine = owner == choice
            effect = x[rows][:, mine] @ weights[mine]
            without = residual + effect  # what is left to explain if the choice is not known
            # the mean of (without - effect')² over all effects' of the others, less that of residual²
            replaced = np.mean(without**2) - 2 * without.mean() * effect.mean() + np.mean(effect**2)
            out[choice] += (replaced - np.mean(residual**2)) * len(rows)
    return out / (2 * len(y) * variance)


def _networks(setting: Setting, trial: Trial) -> dict[str, Drawing]:
    """The trial's blocks over time by the model of each latency."""
    if not setting.space.positions:
        return {}
    network = setting.space.decode(trial.genotype)
    out = {}
    for cost, model in setting.models.items():
        blocks_ms, once_ms = model.parts_ms(network)
        limit = setting.limits.get(cost, np.inf)
        picture = draw(
            network,
            [*blocks_ms, once_ms] if once_ms else blocks_ms,
            positions=[p.name for p in setting.space.positions],
            limit_ms=limit if np.isfinite(limit) else None,
        )
        out[cost] = Drawing(picture, f"trial {trial.trial}, {cost}: {words.ms(trial.cheap.get(cost))} by block")
    return out


def _bars(of: Explanation) -> Drawing:
    """One column of bars a cost."""
    row, head, middle = 20, 60, 200
    columns = min(2, len(of.effects)) or 1
    width = WIDTH / columns
    shown = max(len(e[:_SHOWN]) for e in of.effects.values())
    height = head + shown * row + 12
    parts = []
    for index, (cost, effects) in enumerate(of.effects.items()):
        scale = (width - middle - 140) / max(max((e.importance for e in effects), default=0.0), 1e-9)
        x, y = index % columns * width, index // columns * height
        share = f"single choices explain {max(0.0, of.explained[cost]):.0%} of the variance of held-out trials"
        parts.append(
            f'<g transform="translate({x:.0f},{y})"><text y="16" font-weight="600">{html.escape(cost)}</text>'
            f'<text y="33" font-size="11" opacity=".65">{share}</text>'
            f"{_rows(cost, effects, row, head, middle, scale)}</g>"
        )
    rows = -(-len(of.effects) // columns)
    title = f"importance of choices over {of.trials} trials, and what this trial's values do against the mean"
    return Drawing(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {rows * height}" role="img" '
        f'aria-label="{html.escape(title, quote=True)}" {FONT}>{"".join(parts)}</svg>',
        title,
    )


def _rows(cost: str, effects: Sequence[Effect], row: int, head: int, middle: int, scale: float) -> str:
    parts = [
        f'<text y="49" font-size="11" opacity=".65">importance · this value against the mean of the trials '
        f'(<tspan fill="{_WORSE}">worse</tspan>, <tspan fill="{_BETTER}">better</tspan>)</text>'
    ]
    for i, e in enumerate(effects[:_SHOWN]):
        y, width = head + i * row, max(0.0, e.importance) * scale
        colour = _WORSE if e.contribution > 0 else _BETTER
        label = html.escape(f"{e.choice} = {_value(e.value)}")
        parts.append(
            f'<text x="{middle - 8}" y="{y + 13}" text-anchor="end" font-size="11">{label}</text>'
            f'<rect x="{middle}" y="{y + 3}" width="{width:.1f}" height="13" fill="{colour}"/>'
            f'<text x="{middle + width + 6:.1f}" y="{y + 13}" font-size="11" opacity=".8">'
            f"{e.importance:.1%} · {_signed(cost, e.contribution)}</text>"
        )
    return "".join(parts)


def _signed(cost: str, value: float) -> str:
    """A difference in a cost, errors in points of a hundred."""
    if is_error(cost):
        return f"{100 * value:+.2f} points"
    if abs(value) >= 1000:
        return ("+" if value > 0 else "-") + words.count(abs(value))
    return f"{value:+.2g}" + (" ms" if cost.startswith("latency_ms") else "")


def _value(value: Any) -> str:
    return "no effect" if value is None else str(value)
