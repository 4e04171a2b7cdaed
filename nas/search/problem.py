"""What is searched: genotypes, their exact cheap costs, what is feasible, and how a wish becomes a trial."""

import math
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from nas.search.accuracy import Least, error_of
from nas.search.strategy import Costs, Genotype, Genotypes, Strategy, uniform

_ENUMERATE = 2**16  # spaces up to this size are searched to their very last genotype
_TRIES = 64  # batches of random walks through a larger space before it counts as exhausted
_BATCH = 64


@dataclass(frozen=True)
class Problem:
    """A space under limits. Its functions are pure, vectorised and quick: they run for thousands of genotypes a
    trial."""

    sizes: tuple[int, ...]  # number of values of each gene
    canonical: Callable[[Genotypes], Genotypes]  # [n, g] -> [n, g]: genes that have no effect set to 0
    cheap: Callable[[Genotypes], NDArray[np.float64]]  # [n, g] -> [n, c]: exact costs that need no evaluation
    feasible: Callable[[Genotypes], NDArray[np.bool_]]  # [n, g] -> [n]: within every limit
    smallest: Genotype  # [g], feasible: infeasible wishes are walked towards it
    digest: str  # of space, latency table, limits and evaluation: a journal of another digest is not continued
    total: int  # images that a whole evaluation counts over: error = 1 - correct / total
    cheap_names: tuple[str, ...] = ("latency_ms",)  # of the c cheap costs; a journal sorts them, so best sorted here
    accuracies: tuple[str, ...] = ("top1",)  # what is counted, as journal and tables call it, "top1_int8" of int8
    least: Mapping[str, Least] = field(default_factory=dict)  # of accuracies: limits, known only after an evaluation
    minimised: tuple[str, ...] | None = None  # of `cost_names`, in their order; None: all
    reach: Mapping[str, tuple[float, float]] = field(default_factory=dict)  # of cheap costs, where there are limits
    picks_share: bool = False  # the last gene picks a share of the images, ascending (`with_shares`)

    def __post_init__(self) -> None:
        unknown = [n for n in self.least if n not in self.accuracies]
        unknown += [n for n in self.objectives if n not in self.cost_names]
        if self.least:
            unknown += [n for n in self.objectives if n in self.cheap_names and n not in self.reach]
        if unknown or not self.objectives:
            raise ValueError(f"problem: {unknown or 'no objective'}: names of accuracies and costs, with their reach")

    @property
    def error_names(self) -> tuple[str, ...]:
        """The errors of what is counted, as costs."""
        return ("error", *map(error_of, self.accuracies[1:]))

    @property
    def cost_names(self) -> tuple[str, ...]:
        """All that is known of a trial, errors first; a journal has these."""
        return (*self.error_names, *self.cheap_names)

    @property
    def objectives(self) -> tuple[str, ...]:
        """The costs that are minimised."""
        return self.cost_names if self.minimised is None else self.minimised

    def most_errors(self, images: int | None = None) -> dict[str, float]:
        """What an error on so many images, all if None, must stay below, by the name of that cost."""
        of = dict(zip(self.accuracies, self.error_names, strict=True))
        total = self.total if images is None else images
        return {of[name]: least.most_error(total) for name, least in self.least.items()}

    def told(self, strategy: Strategy, costs: Costs, images: int | None = None) -> Costs:
        """What a strategy is told of a trial with these costs, in the order of `cost_names`, on so many images.

        `images` are all if None. On a share of them, as many must be right as that share of a limit is.

        One that heeds limits on accuracy by itself (`Strategy.heeds_limits`) is told all of them; any other the
        objectives. Of a network that misses such a limit these are worse than any that reaches it has, as far as
        `reach` is exact, the more so the more it misses: it is dominated by all that reach it, and by those that miss
        less (Deb 2000, doi:10.1016/S0045-7825(99)00389-8; Deb et al. 2002, sec. VI).
        """
        if len(costs) != len(self.cost_names):
            raise ValueError(
                f"costs of a trial are {costs.tolist()}: one of each is needed: {', '.join(self.cost_names)}"
            )
        if strategy.heeds_limits or (not self.least and self.objectives == self.cost_names):
            return costs
        values = dict(zip(self.cost_names, costs.tolist(), strict=True))
        told = np.array([values[name] for name in self.objectives])
        if np.isnan(costs).any():
            return np.full_like(told, np.nan)
        missing = sum(max(0.0, values[name] - most) for name, most in self.most_errors(images).items())
        if missing == 0:
            return told
        reach = np.array([(0.0, 1.0) if name in self.error_names else self.reach[name] for name in self.objectives])
        return reach[:, 1] + missing * np.maximum(reach[:, 1] - reach[:, 0], 1e-12)


def with_shares(problem: Problem, shares: Sequence[float]) -> Problem:
    """`problem` for a strategy that chooses among `shares` of the images: one gene more, without cost or limit.

    With a single share it is `problem` itself.
    """
    if len(shares) == 1:
        return problem

    def canonical(genotypes: Genotypes) -> Genotypes:
        return np.concatenate([problem.canonical(genotypes[:, :-1]), genotypes[:, -1:]], axis=1)

    return replace(
        problem,
        sizes=(*problem.sizes, len(shares)),
        canonical=canonical,
        cheap=lambda genotypes: problem.cheap(genotypes[:, :-1]),
        feasible=lambda genotypes: problem.feasible(genotypes[:, :-1]),
        smallest=np.append(problem.smallest, np.uint8(0)),
        picks_share=True,
    )


def without_share(genotype: Genotype, shares: Sequence[float], total: int) -> tuple[Genotype, int]:
    """The network's genes of a genotype of `with_shares`, and how many of `total` images it is evaluated on."""
    if len(shares) == 1:
        return genotype, total
    return genotype[:-1], images_of(shares[genotype[-1]], total)


def images_of(share: float, total: int) -> int:
    """How many of `total` images a share is; at least one."""
    return max(1, round(total * share))


def choose(problem: Problem, rng: np.random.Generator, wishes: Genotypes, seen: Container[bytes]) -> Genotype | None:
    """The genotype to evaluate next: canonical, feasible and not in `seen`; None if the space is exhausted.

    The first of `wishes` [n, g] that will do; else the first on the walks from each of them to the smallest network,
    one gene at a time in random order; else any other. Up to 65,536 genotypes "any other" is exact, beyond that it is
    4,096 random walks.

    A network that nobody wished for gets as few images as any wish has: only the strategy knows what earned more. So
    walks start from the wishes on fewest images and stay on them, and others come on more images only when no network
    is left on fewer.
    """
    genes = len(problem.sizes)
    on_fewest = wishes[wishes[:, -1] == wishes[:, -1].min()] if problem.picks_share and len(wishes) else wishes

    def first_new(genotypes: Genotypes) -> Genotype | None:
        genotypes = problem.canonical(genotypes)
        for genotype in genotypes[problem.feasible(genotypes)]:
            if genotype.tobytes() not in seen:
                return genotype
        return None

    def walks(starts: Genotypes) -> Genotypes:
        """[n * g, g]: each start with 1, 2, ... g genes of the smallest."""
        turn = np.argsort(rng.random(starts.shape), axis=1)  # [n, g]: when each gene gives way
        given_way = turn[:, None, :] <= np.arange(genes)[None, :, None]
        given_way[..., -1] &= not problem.picks_share
        return np.where(given_way, problem.smallest, starts[:, None, :]).reshape(-1, genes).astype(np.uint8)

    for candidates in (wishes, walks(on_fewest)):
        if (found := first_new(candidates)) is not None:
            return found
    count = math.prod(problem.sizes)
    if count <= _ENUMERATE:
        everything = np.stack(np.unravel_index(rng.permutation(count), problem.sizes), axis=1).astype(np.uint8)
        if problem.picks_share:
            everything = everything[np.argsort(everything[:, -1], kind="stable")]
        return first_new(everything)
    for share in range(problem.sizes[-1]) if problem.picks_share else (None,):
        for _ in range(_TRIES):
            starts = uniform(rng, problem.sizes, _BATCH)
            if share is not None:
                starts[:, -1] = share
            if (found := first_new(walks(starts))) is not None:
                return found
    return None
