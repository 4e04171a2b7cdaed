"""Progressive shrinking (Once-for-All, Cai et al. 2020, arXiv:1908.09791, sec. 3.3): first large, then ever smaller.

The training has one phase for the largest network alone, and one for each option of `settings.phases`, all of one
length (the authors give them 180, 125, 150 and 150 epochs). Where they are not given, they are the paper's, as far as
the space has them, or all options of a space that has none of them. In its phase an option comes free from its largest
value down, one value more in each equal part of the phase: of three values, the middle one in the first half and the
smallest in the second, as depth and expansion do in the paper (its kernels come free all at once). Options before it in
the list are free, options after it are held at their largest value. Options that are not in the list (the kind of
block, for example) come free as soon as the first phase is over.

The paper distils from a frozen copy of the largest network as it was after its phase. Here the largest network of the
step itself teaches, as in the sandwich rule, and so goes on training.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from nas import config, cost
from nas.errors import ConfigError
from nas.space import Choice, Space
from nas.train.samplers.sampler import Draw, Genotypes, Sampler, Score, at_least


def progressive_shrinking(space: Space, settings: config.Train, *, steps: int) -> Sampler:
    """The largest network; once its phase is over, with `random_subnets` of the networks that are free so far.

    Raises:
        ConfigError: `random_subnets` is below 1, or `phases` is empty, names an option twice, or one that no choice of
            the space is about.
    """
    at_least(1, key="random_subnets", value=settings.random_subnets, sampler="progressive_shrinking")
    phases = _checked(settings.phases, space)
    largest, macs = space.largest(), space.costs(cost.macs)
    genes, sizes = np.arange(len(space.sizes)), np.asarray(space.sizes)
    due = np.array([phases.index(o) + 1 if o in phases else 0 for o in map(option, space.choices)])  # phase, by gene
    order = np.zeros((len(genes), sizes.max()), np.uint8)  # value numbers of each gene, the largest value first
    for gene in range(len(genes)):
        order[gene, : sizes[gene]] = _from_the_largest(space, largest, gene, macs)

    def draw(step: int, rng: np.random.Generator, score: Score) -> Draw:
        phase, into = divmod(step * (len(phases) + 1), steps)  # `into` / `steps` of this phase is over
        if phase == 0:
            return Draw(largest[None], distil=False)
        coming = np.minimum(2 + into * (sizes - 1) // steps, sizes)
        free = np.select([due < phase, due == phase], [sizes, coming], 1)  # number of free values of each gene
        picked = rng.integers(0, free, (settings.random_subnets, len(genes)))
        return Draw(np.concatenate([largest[None], space.canonical(order[genes, picked])]), distil=True)

    return draw


def option(choice: Choice) -> str:
    """What a choice is about: "kernel" for "stage1/layer2/kernel"."""
    return choice.name.rpartition("/")[2]


def _from_the_largest(space: Space, largest: Genotypes, gene: int, macs: list[NDArray[np.float64]]) -> list[int]:
    """The value numbers of a choice from the largest value down.

    Values that are no numbers, such as kinds of block, go by the MACs of the largest network with each of them in turn;
    of equals, its own comes first.
    """
    values = space.choices[gene].values
    size = values
    if not all(isinstance(v, int | float) for v in values):
        variants = np.repeat(largest[None], len(values), axis=0)
        variants[:, gene] = np.arange(len(values))
        size = space.price(space.canonical(variants), macs)
    return sorted(range(len(values)), key=lambda i: (size[i], i == largest[gene]), reverse=True)


def _checked(phases: Sequence[str] | None, space: Space) -> tuple[str, ...]:
    """`phases`, if each is an option that `space` lets one choose; the space's own where None is given."""
    known = list(dict.fromkeys(map(option, space.choices)))
    if phases is None:
        phases = [name for name in config.PHASES if name in known] or known
    for index, name in enumerate(phases):
        rest = [p for p in dict.fromkeys(phases) if p in known] or known
        remedy = f"Set train.phases = {list(rest)}".replace("'", '"')
        if name not in known:
            hint = config.nearest(name, known, kind="phase")
            raise ConfigError(f"train.phases names `{name}`, but space {space.name!r} leaves no such choice.{hint} "
                              f"{remedy}, or use another space.")  # fmt: skip
        if name in phases[:index]:
            raise ConfigError(f"train.phases names `{name}` twice; each option is set free once. {remedy}.")
    if not phases:
        raise ConfigError(
            f"train.phases is empty; sampler `progressive_shrinking` needs at least one option to set free. Space "
            f"{space.name!r} has: {', '.join(known)}."
        )
    return tuple(phases)
