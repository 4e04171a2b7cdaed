"""Grid search: the full factorial design, every genotype once, in an order whose every beginning is spread evenly."""

import math

import numpy as np

from nas.search.strategy import Costs, Genotype, Genotypes, Strategy

_WINDOW = 4096  # proposals ahead in which a told genotype is looked for


def grid(sizes: tuple[int, ...], *, population: int = 0) -> Strategy:
    """Visits genotype number `k * step mod count` for k = 0, 1, ..., genes being the digits of that number.

    The step is next to the golden section of the number of genotypes and has no divisor in common with it: that visits
    each once, and leaves no large gap at any time (Knuth 1998, TAOCP vol. 3, sec. 6.4, theorem S). It is for small
    spaces, and a bar without chance: beyond what can be visited wholly, random search is as good or better (Bergstra &
    Bengio 2012, sec. 2).

    State: the k of the next proposal. It goes on behind the last trial that was one of its next 4,096 proposals, and by
    one otherwise: infeasible proposals are passed over once, not again for every trial. What a canonical form made it
    pass over comes when it begins again.

    Args:
        sizes: the number of values of each gene.
        population: taken for the sake of the common signature; nothing is remembered.
    """
    count = math.prod(sizes)
    step = max(1, count * 618_034 // 1_000_000)
    while math.gcd(step, count) > 1:
        step += 1
    back = pow(step, -1, count) if count > 1 else 0
    places = [math.prod(sizes[i + 1 :]) for i in range(len(sizes))]

    def ask(rng: np.random.Generator, state: int, n: int) -> Genotypes:
        numbers = [(state + i) * step % count for i in range(n)]
        digits = [[number // place % size for place, size in zip(places, sizes, strict=True)] for number in numbers]
        return np.array(digits, np.uint8).reshape(n, len(sizes))

    def tell(state: int, genotype: Genotype, costs: Costs) -> int:
        number = sum(int(gene) * place for gene, place in zip(genotype, places, strict=True))
        ahead = (number * back - state) % count
        return (state + (ahead if ahead < _WINDOW else 0) + 1) % count

    return Strategy(init=lambda: 0, ask=ask, tell=tell, identity="grid()")
