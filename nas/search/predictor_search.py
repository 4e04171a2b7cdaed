"""Predictor in the loop: a Gaussian process learns the error from few trials, and cheap costs are exact.

Every few trials the process is fitted anew, and an inner search over predictor and exact costs looks for networks that
may push the front (`_shortlist`). Each proposal is the one of them whose expected hypervolume improvement is largest,
given the proposals before it as if they had come out as predicted (a "kriging believer": Ginsbourger et al. 2010,
doi:10.1007/978-3-642-10701-6_6); so a list of proposals is diverse, and those that are under way already are not
proposed in disguise. Before the first fit a space-filling design is evaluated.

Where an error has a limit, improvement counts below it alone; where no error is minimised, the improvement of the other
costs counts by the probability that the limit is reached (constrained expected improvement: Schonlau et al. 1998,
doi:10.1214/lnms/1215456182; Gardner et al. 2014). As long as no trial reaches it, the improvement of the error that
misses it is all that counts. A second error, as of int8 networks, has a process of its own: as an objective it is taken
to be what is predicted, as a limit it enters by its probability.
"""

import functools
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

from nas.search.blas import on_one_blas_thread
from nas.search.gaussian_process import GaussianProcess, fit
from nas.search.improvement import Front, expected_improvement, expected_shortfall, front_of
from nas.search.inner_search import search_within
from nas.search.pareto import nondominated
from nas.search.problem import Problem
from nas.search.strategy import Costs, Genotype, Genotypes, Population, Strategy, check_population, mutate, uniform

Floats = NDArray[np.float64]

_ENUMERATE = 2**15  # spaces up to this size are scored to their last genotype
_REMEMBERED = 400  # trials that the predictor learns from at most
_SHORTLIST = 400
_FRESH = 100  # mutants of the front that join the shortlist for a single trial
_BELIEVED = 8  # proposals of a list that take those before them into account
_DESIGN = 256  # uniform candidates of which one joins the space-filling design
_DOUBT = 0.5  # mean of how much more unsure than the process a trial may be: where it is wrong, it does not know that
_FAR = 2.5  # standard deviations: 6 in 1,000 are further on one side
_BEYOND = 1.6  # times the worst error that counts: as bad as any error is taken to be
_SEARCHES = 8  # inner ones, each under the costs of another network of the front
_EVALUATIONS = 1500  # of each
_REFIT_AFTER = 5  # trials, or a twelfth of those that are remembered
_CHEAPEST = 0.7  # of what the front costs: bound of the last inner search where no error is minimised
_CERTAIN = -600.0  # logarithm of an error that is as good as none

Beliefs = dict[int, tuple[Floats, Floats]]  # by column of the error: mean [n] and deviation [n] of its logarithm


@dataclass(frozen=True)
class _Aim:
    """What is minimised of the columns of costs, of which the first are errors, and what errors must stay below."""

    errors: int = 1
    minimised: tuple[int, ...] | None = None  # columns; None: all
    most: tuple[float, ...] = (np.inf,)  # of each error

    @classmethod
    def of(cls, problem: Problem | None) -> "_Aim":
        if problem is None:
            return cls()
        names = problem.cost_names
        columns = tuple(names.index(n) for n in problem.objectives) if problem.objectives != names else None
        most = tuple(problem.most_errors().get(name, np.inf) for name in problem.error_names)
        return cls(len(most), columns, most)

    @property
    def limited(self) -> tuple[int, ...]:
        return tuple(i for i, most in enumerate(self.most) if most < np.inf)

    @property
    def minimised_errors(self) -> tuple[int, ...]:
        return tuple(i for i in range(self.errors) if self.minimised is None or i in self.minimised)

    @property
    def main(self) -> int:
        """The error that improvement is expected of; where none is minimised, the first with a limit."""
        return (*self.minimised_errors, *self.limited, 0)[0]

    @property
    def modelled(self) -> tuple[int, ...]:
        return tuple(sorted({self.main, *self.minimised_errors, *self.limited}))

    def cheap(self, width: int) -> list[int]:
        """Which of `width` cheap costs are minimised."""
        return [i for i in range(width) if self.minimised is None or i + self.errors in self.minimised]

    def reached(self, costs: Floats) -> NDArray[np.bool_]:
        """Which rows [n] of costs are within all limits on errors."""
        within: NDArray[np.bool_] = costs[:, : self.errors] < np.array(self.most)
        return np.logical_and.reduce(within, axis=1)

    def rows(self, costs: Floats) -> Floats:
        """[n, 1 + others] of `costs`: what is minimised, the main error first, or 0 where none is; infinite where a
        limit is missed."""
        if self.minimised is None and self.errors == 1 and not self.limited:
            return costs
        first = costs[:, self.main] if self.minimised_errors else np.where(np.isfinite(costs[:, 0]), 0.0, np.nan)
        further = [costs[:, i] for i in self.minimised_errors if i != self.main]
        cheap = costs[:, self.errors :]
        rows = np.column_stack([first, *further, cheap[:, self.cheap(cheap.shape[1])]])
        rows[~self.reached(costs)] = np.inf
        return rows

    def good(self, costs: Floats) -> NDArray[np.bool_]:
        """Which rows [n] are on the front; as long as none is within the limits, the one that misses them by least."""
        front = nondominated(self.rows(costs))
        if self.limited and not front.any() and len(costs):
            front[self.nearest(costs)] = True
        return front

    def nearest(self, costs: Floats) -> int:
        """The row that misses the limits by the least."""
        missing = np.maximum(costs[:, : self.errors] - np.array(self.most), 0.0).sum(axis=1)
        return int(np.nan_to_num(missing, nan=np.inf).argmin())


@dataclass(frozen=True)
class _Knowledge:
    """What is known without evaluating: the problem, or of it only the sizes."""

    sizes: tuple[int, ...]
    problem: Problem | None
    features: Callable[[Genotypes], Floats] | None
    aim: _Aim

    def candidates(self, genotypes: Genotypes) -> Genotypes:
        """Those that are feasible, canonical, each once."""
        if self.problem is not None:
            genotypes = self.problem.canonical(genotypes)
            genotypes = genotypes[self.problem.feasible(genotypes)]
        return np.unique(genotypes, axis=0)

    def canonical(self, genotypes: Genotypes) -> Genotypes:
        return genotypes if self.problem is None else self.problem.canonical(genotypes)

    def feasible(self, genotypes: Genotypes) -> NDArray[np.bool_]:
        return np.ones(len(genotypes), bool) if self.problem is None else self.problem.feasible(genotypes)

    @functools.cached_property
    def everything(self) -> Genotypes | None:
        """All candidates of a small space."""
        if (count := math.prod(self.sizes)) > _ENUMERATE:
            return None
        whole = np.unravel_index(np.arange(count), self.sizes)
        return self.candidates(np.stack(whole, axis=1).astype(np.uint8))


@dataclass(frozen=True, eq=False)
class _Plan:
    """What was learned from some trials. Lazy, because most states are never asked."""

    known: _Knowledge
    trials: Population
    worst_errors: tuple[float, ...]  # nothing is learned or won beyond them

    @functools.cached_property
    def cheap_models(self) -> list[GaussianProcess]:
        """Of cheap costs, where no problem tells them."""
        t = self.trials
        finite = t.take(np.flatnonzero(np.isfinite(t.costs).all(axis=1)))
        none = np.empty((len(finite), 0))
        errors = self.known.aim.errors
        return [fit(self.known.sizes, finite.genotypes, none, column) for column in finite.costs[:, errors:].T]

    def cheap(self, genotypes: Genotypes) -> Floats:
        """[n, cheap]."""
        if self.known.problem is not None:
            return self.known.problem.cheap(genotypes)[:, : self.trials.costs.shape[1] - self.known.aim.errors]
        none = np.empty((len(genotypes), 0))
        return np.stack([m.mean_of(genotypes, none) for m in self.cheap_models], 1) if self.cheap_models else none

    def features(self, genotypes: Genotypes, cheap: Floats) -> Floats:
        """[n, features]: logarithms, since costs differ by factors."""
        others = [] if self.known.features is None else [self.known.features(genotypes)]
        return np.log(np.maximum(np.concatenate([cheap, *others], axis=1), 1e-12))

    def targets(self, costs: Floats, column: int) -> Floats:
        """Logarithms of the errors [n] in a column of `costs`; failures, NaN, count as the worst.

        They end a way beyond the reference: at the reference itself, doubt would make hopeless networks promising. And
        above half of the least that was seen but 0, which has no logarithm.
        """
        seen = self.trials.costs[:, column]
        least = float(seen[seen > 0].min() / 2) if (seen > 0).any() else 1.0
        least = min(least, self.known.aim.most[column] / 2)  # none at all is within any limit
        return np.log(np.clip(np.fmin(costs[:, column], _BEYOND * self.worst_errors[column]), least, None))

    @functools.cached_property
    def models(self) -> dict[int, GaussianProcess]:
        """Of the logarithm of each error that counts, by its column."""
        genotypes, costs = self.trials.genotypes, self.trials.costs
        features = self.features(genotypes, self.cheap(genotypes))
        return {
            column: fit(self.known.sizes, genotypes, features, self.targets(costs, column))
            for column in self.known.aim.modelled
        }

    @functools.cached_property
    def reference(self) -> Floats:
        """Where the hypervolume ends [1 + others]."""
        aim, costs = self.known.aim, self.trials.costs
        finite = costs[np.isfinite(costs).all(axis=1)]
        worst = min(self.worst_errors[aim.main], aim.most[aim.main]) if aim.minimised_errors else 1.0
        # limits decide what is on the front, not what the costs of trials are
        others = replace(aim, most=(np.inf,) * aim.errors).rows(finite)[:, 1:]
        return np.array([worst, *(1.1 * others.max(axis=0))])

    def beliefs(self, genotypes: Genotypes, features: Floats) -> Beliefs:
        return {column: model.predict(genotypes, features) for column, model in self.models.items()}

    def others(self, beliefs: Beliefs, cheap: Floats) -> Floats:
        """[n, others]: further errors that are minimised, as predicted, and cheap costs that are."""
        aim = self.known.aim
        further = [np.exp(beliefs[i][0]) for i in aim.minimised_errors if i != aim.main]
        return np.column_stack([*further, cheap[:, aim.cheap(cheap.shape[1])]])

    def beside(self, rows: Floats, costs: Floats) -> Front | Floats:
        """What others are to improve on: the front of `rows` [n, 1 + others] of what is minimised; while none of them
        is within the limits, the errors [errors] of the nearest of `costs`."""
        aim = self.known.aim
        if aim.limited and not np.isfinite(rows).all(axis=1).any():
            return costs[aim.nearest(costs), : aim.errors]
        return front_of(rows, self.reference)

    def gain(self, known: Front | Floats, beliefs: Beliefs, others: Floats) -> Floats:
        """How much of an improvement is expected [n] of networks on what is known (`beside`)."""
        aim = self.known.aim
        limited = set(aim.limited)
        if not isinstance(known, Front):
            missed = {i for i in limited if not known[i] < aim.most[i]}
            out = np.sum([expected_shortfall(*beliefs[i], known[i]) for i in sorted(missed)], axis=0)
            limited -= missed
        elif aim.minimised_errors:  # the main error's limit is where the reference is
            out = expected_improvement(known, *beliefs[aim.main], others)
            limited -= {aim.main}
        else:
            out = expected_improvement(known, np.full(len(others), _CERTAIN), np.zeros(len(others)), others)
        for i in sorted(limited):
            mean, deviation = beliefs[i]
            out = out * ndtr((np.log(aim.most[i]) - mean) / np.maximum(deviation, 1e-9))
        return out

    @functools.cached_property
    def shortlist(self) -> Genotypes:
        """The candidates of largest expected improvement that the inner search found."""
        # Its randomness comes from what was learned: it belongs to the state, not to the one trial that first asks.
        told = hashlib.sha256(self.trials.genotypes.tobytes() + self.trials.costs.tobytes()).digest()
        rng = np.random.Generator(np.random.Philox(key=np.frombuffer(told[:16], np.uint64)))
        found = self.known.everything
        found = self.known.candidates(self._searched(rng)) if found is None else found
        found = _unknown(found, self.trials.genotypes)
        parts = np.array_split(found, max(1, len(found) // 2048))
        improvement = np.concatenate([self._improvements(part) for part in parts])
        best = np.argsort(-improvement, axis=0, kind="stable")[: _SHORTLIST // 2]
        return found[np.unique(best)]

    def _improvements(self, genotypes: Genotypes) -> Floats:
        """[n, 2]: as the process has it, and were it twice as unsure."""
        cheap = self.cheap(genotypes)
        beliefs = self.beliefs(genotypes, self.features(genotypes, cheap))
        others, known = (
            self.others(beliefs, cheap),
            self.beside(self.known.aim.rows(self.trials.costs), self.trials.costs),
        )
        return np.stack([self.gain(known, _doubted(beliefs, k), others) for k in (1, 2)], axis=1)

    def _searched(self, rng: np.random.Generator) -> Genotypes:
        """Candidates at least as cheap as a network of the front, that may well be more accurate."""
        seen: list[Genotypes] = []
        aim, costs = self.known.aim, self.trials.costs

        def hopes(genotypes: Genotypes) -> Floats:
            seen.append(genotypes)
            mean, deviation = self.models[aim.main].predict(genotypes, self.features(genotypes, self.cheap(genotypes)))
            return deviation - mean

        front = np.flatnonzero(aim.good(costs))
        front = front[np.argsort(costs[front, -1])]
        spread = np.linspace(0, len(front) - 1, _SEARCHES).round().astype(int)
        searches = [(index, 1.02) for index in np.unique(spread)]
        if not aim.minimised_errors:  # cheaper ones are better, not more accurate ones
            searches = list(zip(spread, np.linspace(1.02, _CHEAPEST, _SEARCHES), strict=True))
        if aim.limited and not aim.reached(costs[front]).any():  # whatever it costs
            searches = [(index, np.inf) for index in spread]
        counted = aim.cheap(costs.shape[1] - aim.errors)
        for index, share in searches:
            member = self.trials.take(front[index : index + 1])
            bound = share * np.maximum(member.costs[0, aim.errors :][counted], 1e-12)

            def cost(genotypes: Genotypes, bound: Floats = bound) -> Floats:
                cheap = self.cheap(genotypes)[:, counted]
                highest = (cheap / bound).max(axis=1) if cheap.shape[1] else np.zeros(len(genotypes))
                # Beyond the bound a cost says how far: one change may make up for another.
                return np.where(self.known.feasible(genotypes) | (highest > 1), highest, np.inf)

            search_within(
                self.known.sizes, hopes, cost, 1.0, rng=rng, evaluations=_EVALUATIONS, canonical=self.known.canonical,
                starts=np.concatenate([member.genotypes, uniform(rng, self.known.sizes, 1)]),
            )  # fmt: skip
        return np.concatenate([*seen, uniform(rng, self.known.sizes, _DESIGN)])


@dataclass(frozen=True, eq=False)
class _State:
    told: int
    trials: Population  # the remembered ones
    plan: _Plan | None = None
    planned: int = 0  # trials told by then


def predictor_search(
    sizes: tuple[int, ...],
    *,
    population: int = 12,
    problem: Problem | None = None,
    features: Callable[[Genotypes], Floats] | None = None,
) -> Strategy:
    """Expected hypervolume improvement on a Gaussian process of the error.

    Args:
        sizes: the number of values of each gene.
        population: trials of the space-filling design before the first fit; `experiments/benchmarks/search.py` has 12.
        problem: knows the cheap costs of all candidates exactly, and which are feasible; None: cheap costs are
            predicted too, and every genotype counts as feasible.
        features: [n, genes] -> [n, k], positive: what else is known of networks without evaluating them, such as MACs
            and parameters. Networks that are alike in them are taken to be alike in error.

    Raises:
        ValueError: `population` is out of range.
    """
    check_population(population)
    aim = _Aim.of(problem)
    known = _Knowledge(sizes, problem, features, aim)

    @on_one_blas_thread
    def ask(rng: np.random.Generator, state: _State, n: int) -> Genotypes:
        if state.plan is None:
            return _space_filling(rng, known, state.trials, n)
        pool = np.concatenate([state.plan.shortlist, _mutants(rng, known, state.trials)])
        pool = _unknown(np.unique(pool, axis=0), state.trials.genotypes)
        new = state.trials.take(slice(len(state.trials) - (state.told - state.planned), None))
        doubt = 1 + rng.exponential(_DOUBT)
        best = _believer(state.plan, new, pool, n, doubt)
        return np.concatenate([best, uniform(rng, sizes, n - len(best))])

    def tell(state: _State, genotype: Genotype, costs: Costs) -> _State:
        trials, told = _forget(state.trials.add(genotype, costs), aim), state.told + 1
        if told < population or np.isfinite(trials.costs).all(axis=1).sum() < 2:
            return _State(told, trials)
        if state.plan is not None and told - state.planned < max(_REFIT_AFTER, len(trials) // 12):
            return replace(state, told=told, trials=trials)
        worst = tuple(map(worst_of, trials.costs.T[: aim.errors])) if state.plan is None else state.plan.worst_errors
        return _State(told, trials, _Plan(known, trials, worst), told)

    return Strategy(
        init=lambda: _State(0, Population.empty(len(sizes))),
        ask=ask,
        tell=tell,
        identity=f"predictor(population={population}, exact={problem is not None}, features={features is not None})",
        heeds_limits=True,
    )


def worst_of(errors: Floats) -> float:
    """The error beyond which networks are all alike bad, from those of a few uniform ones.

    Networks that err at random would rule a fit, and how bad they are teaches nothing about good ones. So errors end
    `_FAR` standard deviations above the median, were their logarithms normal with the spread of the better half (as in
    the output warping of Song et al. 2022, arXiv:2207.13676).
    """
    known = errors[np.isfinite(errors)]
    logs = np.log(known[known > 0])
    if not len(logs):
        return 1.0
    middle = np.median(logs)
    spread = np.sqrt(np.mean((logs[logs <= middle] - middle) ** 2))
    return float(1.1 * np.exp(min(middle + _FAR * spread, logs.max())))


def _unknown(genotypes: Genotypes, told: Genotypes) -> Genotypes:
    """Those not among the told ones."""
    seen = {row.tobytes() for row in told}
    return genotypes[[row.tobytes() not in seen for row in genotypes]]


def _forget(trials: Population, aim: _Aim) -> Population:
    """At most `_REMEMBERED` trials: the oldest that is not on the front goes."""
    if len(trials) <= _REMEMBERED:
        return trials
    others = np.flatnonzero(~aim.good(trials.costs))
    goes = others[0] if len(others) else 0
    return trials.take(np.delete(np.arange(len(trials)), goes))


def _space_filling(rng: np.random.Generator, known: _Knowledge, trials: Population, n: int) -> Genotypes:
    """Uniform candidates, those first that differ most from every trial: in genes, and in the rank of their costs."""
    pool = known.candidates(uniform(rng, known.sizes, _DESIGN))
    if not len(pool):
        return uniform(rng, known.sizes, n)
    pool = pool[rng.permutation(len(pool))]
    if len(trials):
        distance = (pool[:, None] != trials.genotypes[None]).mean(axis=2)
        if known.problem is not None:
            cheap, told = known.problem.cheap(pool), known.problem.cheap(trials.genotypes)
            for ours, theirs in zip(cheap.T, told.T, strict=True):
                ordered = np.sort(ours)
                place, other = (np.searchsorted(ordered, v) / len(ordered) for v in (ours, theirs))
                distance += np.abs(place[:, None] - other)
        pool = pool[np.argsort(-distance.min(axis=1), kind="stable")]
    return np.concatenate([pool[:n], uniform(rng, known.sizes, max(0, n - len(pool)))])


def _mutants(rng: np.random.Generator, known: _Knowledge, trials: Population) -> Genotypes:
    """Networks of the front with one or two other genes."""
    front = trials.genotypes[known.aim.good(trials.costs)]
    if not len(front):
        return known.candidates(uniform(rng, known.sizes, _FRESH))
    parents = front[rng.integers(0, len(front), _FRESH)]
    where = rng.random(parents.shape) < 1.5 / len(known.sizes)
    return known.candidates(mutate(rng, parents, known.sizes, where))


def _believer(plan: _Plan, new: Population, pool: Genotypes, n: int, doubt: float) -> Genotypes:
    """At most `n` of `pool` by expected improvement, the first `_BELIEVED` each given those before it.

    `new` trials were told since the plan was made; the process learns them without a new fit. Deviations are taken
    `doubt` times as large as the process has them.
    """
    if not len(pool):
        return pool
    aim, models = plan.known.aim, plan.models
    if len(new):
        features = plan.features(new.genotypes, plan.cheap(new.genotypes))
        models = {i: m.observe(new.genotypes, features, plan.targets(new.costs, i)) for i, m in models.items()}
    cheap = plan.cheap(pool)
    features = plan.features(pool, cheap)
    model = models[aim.main]
    mean, deviation, solved = model.explained(pool, features)
    beliefs = {i: (mean, deviation) if i == aim.main else m.predict(pool, features) for i, m in models.items()}
    others = plan.others(beliefs, cheap)
    reached = np.all([beliefs[i][0] < np.log(aim.most[i]) for i in aim.limited] or [np.ones(len(pool), bool)], axis=0)
    with np.errstate(over="ignore"):  # infinitely bad is bad enough
        predicted = np.exp(mean) if aim.minimised_errors else np.zeros(len(pool))
    expected = np.where(reached[:, None], np.column_stack([predicted, others]), np.inf)
    variance = (deviation / model.scale) ** 2
    standard = model.standardised(features)
    costs = np.concatenate([plan.trials.costs, new.costs])
    believed = aim.rows(costs)
    order: list[int] = []
    gain = np.zeros(len(pool))
    for _ in range(min(_BELIEVED, n, len(pool))):
        beliefs[aim.main] = mean, np.sqrt(variance) * model.scale
        gain = plan.gain(plan.beside(believed, costs), _doubted(beliefs, doubt), others)
        gain[order] = -np.inf
        pick = int(gain.argmax())
        order.append(pick)
        believed = np.concatenate([believed, expected[pick : pick + 1]])
        # the posterior covariance of all with the pick, and what its result would explain
        prior = model.covariance(pool, standard, pool[pick : pick + 1], standard[pick : pick + 1])[:, 0]
        shared = (prior - solved.T @ solved[:, pick]) / np.sqrt(variance[pick] + model.noise)
        variance = np.maximum(variance - shared**2, 1e-12)
        solved = np.concatenate([solved, shared[None]])
    rest = np.argsort(-gain, kind="stable")
    rest = rest[~np.isin(rest, order)]
    return pool[np.concatenate([np.array(order, np.int64), rest])[:n]]


def _doubted(beliefs: Beliefs, times: float) -> Beliefs:
    """Beliefs whose deviations are `times` as large."""
    return {column: (mean, times * deviation) for column, (mean, deviation) in beliefs.items()}
