"""The best network within a limit, where scoring one takes microseconds: an accuracy predictor, an additive table.

Cheap scores still have many local optima under a limit: what one block gains, others must give back at the same
latency. So the moves are not single changes but exchanges. Around a genotype every single change is scored; on these
gains and their exact costs a knapsack is solved by dynamic programming, which gives the best exchange of 1, 2, ...
changes as if gains added up; these are then scored and priced as they are, and the best is where to go on. Where none
is better, the genotype is a local optimum of a large neighbourhood. Optima found so far are crossed and mutated to
start again (a memetic algorithm: Moscato 1989, Caltech C3P 826).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nas.search.strategy import Genotype, Genotypes, uniform

Floats = NDArray[np.float64]
Function = Callable[[Genotypes], Floats]  # [n, genes] -> [n]

_BUCKETS = 96  # of cost in the knapsack; what it finds is priced exactly afterwards
_CHANGES = 6  # at most, of one exchange
_STARTS = 4  # uniform ones, before optima are crossed
_POOL = 8  # optima that are crossed
_STEPS = 30  # of one descent; it takes 2 to 10


@dataclass(frozen=True)
class Found:
    """The best genotype within the limit and how it was found."""

    genotype: Genotype
    score: float
    evaluations: int  # genotypes that were scored


class _Spent(Exception):
    """All evaluations are used."""


@dataclass
class _Scorer:
    """Scores within a budget, and remembers the best genotype within the limit."""

    score: Function
    left: int
    used: int = 0
    best: Genotype | None = None
    best_score: float = -np.inf

    def __call__(self, genotypes: Genotypes, within: NDArray[np.bool_]) -> Floats:
        """Scores [n] of canonical genotypes [n, genes], of which `within` [n] are within the limit."""
        if len(genotypes) > self.left:
            raise _Spent
        self.left -= len(genotypes)
        self.used += len(genotypes)
        scores = np.asarray(self.score(genotypes), np.float64)
        allowed = np.where(within & ~np.isnan(scores), scores, -np.inf)
        if len(allowed) and allowed.max() > self.best_score:
            self.best_score, self.best = float(allowed.max()), genotypes[allowed.argmax()]
        return scores


def search_within(
    sizes: tuple[int, ...],
    score: Function,
    cost: Function,
    limit: float,
    *,
    rng: np.random.Generator,
    evaluations: int,
    canonical: Callable[[Genotypes], Genotypes] = lambda genotypes: genotypes,
    starts: Genotypes | None = None,
) -> Found | None:
    """The genotype of the highest `score` whose `cost` is at most `limit`, as far as `evaluations` reach.

    Args:
        sizes: the number of values of each gene.
        score: of canonical genotypes; higher is better. Its calls are what is counted.
        cost: of canonical genotypes, exact and far cheaper than a score. The nearer it is to a sum over genes, the
            better the exchanges; no result depends on it.
        limit: of the cost.
        rng: of all randomness.
        evaluations: genotypes to score at most.
        canonical: genes without effect set to 0.
        starts: genotypes [n, genes] to descend from first, within the limit or not; None: uniform ones.

    Returns:
        None if no genotype within the limit was met.
    """
    scorer = _Scorer(score, evaluations)
    pool: list[tuple[float, Genotype]] = []  # local optima, best first
    first = list(uniform(rng, sizes, _STARTS) if starts is None else np.asarray(starts, np.uint8))
    space = _Moves(sizes, cost, limit, canonical)
    fruitless = 0
    try:
        while fruitless < 100:
            before = scorer.used
            start = first.pop(0) if first else _child(rng, sizes, pool)
            optimum, value = _descend(start, space, scorer)
            # Equal scores are nearly always the same network with other genes that have no effect.
            if np.isfinite(value) and all(value != known for known, _ in pool):
                pool = sorted([*pool, (value, optimum)], key=lambda one: -one[0])[:_POOL]
            fruitless = fruitless + 1 if scorer.used == before else 0
    except _Spent:
        pass
    if scorer.best is None:
        return None
    return Found(scorer.best, scorer.best_score, scorer.used)


class _Moves:
    """All single changes of a genotype, and the best exchanges made of them."""

    def __init__(
        self, sizes: tuple[int, ...], cost: Function, limit: float, canonical: Callable[[Genotypes], Genotypes]
    ) -> None:
        self.gene = np.repeat(np.arange(len(sizes)), sizes)  # [moves]
        self.value = np.concatenate([np.arange(size) for size in sizes]).astype(np.uint8)
        self.cost, self.limit, self.canonical = cost, limit, canonical

    def around(self, genotype: Genotype) -> Genotypes:
        """[moves, genes]: `genotype` with each gene set to each value, also the one that it has."""
        out = np.repeat(genotype[None], len(self.gene), axis=0)
        out[np.arange(len(out)), self.gene] = self.value
        return out

    def together(self, genotype: Genotype, moves: list[int]) -> Genotype:
        out = genotype.copy()
        out[self.gene[moves]] = self.value[moves]
        return out


def _descend(start: Genotype, moves: _Moves, scorer: _Scorer) -> tuple[Genotype, float]:
    """The local optimum that `start` leads to and its score; -inf if the limit was not reached.

    Genes without effect keep their values on the way: a layer that comes back is the one that went.
    """
    here = start
    own = moves.canonical(here[None])
    own_cost = float(moves.cost(own)[0])
    within = own_cost <= moves.limit
    own_score = float(scorer(own, np.array([within]))[0])
    for _ in range(_STEPS):
        changed = moves.canonical(moves.around(here))
        move = np.flatnonzero((changed != own).any(axis=1))
        costs = moves.cost(changed[move])
        gain = np.full(len(changed), -np.inf)
        gain[move] = scorer(changed[move], costs <= moves.limit) - own_score
        rise = np.zeros(len(changed))
        with np.errstate(invalid="ignore"):  # infinite less infinite is no number, and such a move is not taken
            rise[move] = costs - own_cost
        exchanges = best_exchanges(gain, rise, moves.gene, moves.limit - own_cost)
        if len(single := move[costs <= moves.limit]):
            exchanges.append([int(single[gain[single].argmax()])])
        if not exchanges:
            return here, own_score if within else -np.inf
        wishes = np.stack([moves.together(here, exchange) for exchange in exchanges])
        wished = moves.canonical(wishes)
        costs = moves.cost(wished)
        allowed = costs <= moves.limit
        if allowed.any():
            scores = np.full(len(wished), -np.inf)
            scores[allowed] = scorer(wished[allowed], allowed[allowed])
            best = int(np.nan_to_num(scores, nan=-np.inf).argmax())
            if within and not scores[best] > own_score:
                return here, own_score
            own_score = float(scores[best])
        elif within:
            return here, own_score
        else:  # the exchanges fall short of the limit: on from the cheapest
            best = int(costs.argmin())
            if costs[best] >= own_cost:
                return here, -np.inf
            own_score = float(scorer(wished[best : best + 1], np.zeros(1, bool))[0])
        here, own, own_cost, within = wishes[best], wished[best : best + 1], float(costs[best]), bool(allowed[best])
    return here, own_score if within else -np.inf


def best_exchanges(
    gain: Floats, rise: Floats, gene: NDArray[np.integer], slack: float, changes: int = _CHANGES
) -> list[list[int]]:
    """For each number of changes 1..`changes`, the moves of the largest sum of gains that keep within `slack`.

    A multiple-choice knapsack with weights of either sign, solved by dynamic programming over genes. Costs are rounded
    up to buckets, so that what is returned keeps within `slack` wherever costs add up.

    Args:
        gain: of each move [moves]; not finite: no move.
        rise: of the cost by each move [moves].
        gene: that each move changes [moves], ascending; at most one move of a gene is taken.
        slack: how much the cost may rise; negative: by how much it must fall.
        changes: the most moves of one exchange.

    Returns:
        Lists of moves, by number of changes; those that no moves can reach are left out.
    """
    useful = np.flatnonzero(np.isfinite(gain) & np.isfinite(rise) & ((gain > 0) | (rise < 0)))
    if not len(useful):
        return []
    slack = min(slack, float(np.abs(rise[useful]).sum()))  # more room than all moves take is no limit
    # What is given back and what is gained pass through costs on either side of the present one, but not far.
    reach = max(1.25 * abs(slack), 3 * float(np.sqrt((rise[useful] ** 2).mean()))) or 1.0
    unit, zero = 2 * reach / _BUCKETS, _BUCKETS // 2
    weight = np.ceil(np.where(np.isfinite(rise), rise, 0.0) / unit - 1e-9).astype(np.int64)
    useful = useful[np.abs(weight[useful]) <= _BUCKETS]
    useful = useful[np.lexsort((-gain[useful], weight[useful], gene[useful]))]
    moves_of: dict[int, list[tuple[int, int, float]]] = {}
    for move in useful.tolist():
        moves_of.setdefault(int(gene[move]), []).append((move, int(weight[move]), float(gain[move])))
    best = np.full((changes + 1, _BUCKETS + 1), -np.inf)  # by changes and bucket of cost
    best[0, zero] = 0
    before = []  # `best` as it was before each gene, and the gene's moves
    for of_gene in moves_of.values():
        before.append((best, of_gene))
        best = best.copy()
        highest = -np.inf
        for _, w, value in of_gene:  # the cheapest first
            if value <= highest:
                continue  # another one gains as much and costs no more
            highest = value
            low, high = max(w, 0), _BUCKETS + 1 + min(w, 0)
            target = best[1:, low:high]
            np.maximum(target, before[-1][0][:-1, low - w : high - w] + value, out=target)
    last = min(zero + int(np.floor(slack / unit + 1e-9)), _BUCKETS)
    out = []
    for count in range(1, changes + 1) if last >= 0 else ():
        bucket = int(best[count, : last + 1].argmax())
        value, left, moves = best[count, bucket], count, []
        if value == -np.inf:
            continue  # out of reach
        for table, of_gene in reversed(before):
            if table[left, bucket] == value:
                continue  # the gene stays
            for move, w, gained in of_gene:
                source = bucket - w
                if 0 <= source <= _BUCKETS and table[left - 1, source] + gained == value:
                    moves.append(move)
                    value, left, bucket = table[left - 1, source], left - 1, source
                    break
            if not left:
                break
        out.append(moves[::-1])
    return out


def _child(rng: np.random.Generator, sizes: tuple[int, ...], pool: list[tuple[float, Genotype]]) -> Genotype:
    """Two optima crossed, with two genes drawn anew on average; uniform where there are not two."""
    anew = uniform(rng, sizes, 1)[0]
    if len(pool) < 2:
        return anew
    a, b = rng.choice(len(pool), 2, replace=False)
    child = np.where(rng.random(len(sizes)) < 0.5, pool[a][1], pool[b][1])
    return np.where(rng.random(len(sizes)) < 2 / len(sizes), anew, child).astype(np.uint8)
