"""Whether a supernet orders networks as training each of them alone does: which networks to ask, and what they say.

The rank correlation of supernets is far from given (Yu et al. 2020, arXiv:1902.08142; Zela et al. 2020,
arXiv:2001.10422), and counting MACs, which needs no training, orders many spaces well. So the supernet's Kendall tau
stands beside that of MACs and of parameters. The trainings themselves are in `nas.pipeline.fidelity`.
"""

import itertools
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from nas import cost
from nas.agreement import Agreement, advantage, agreement, interval, kendall_tau, resampled
from nas.errors import RunError
from nas.space import Space
from nas.space.space import Genotypes

SCHEMA = "nas.fidelity/1"
FEWEST = 8  # networks: below, a bootstrap over them says nothing
APART = 0.2  # of the pairs must be told apart by the validation images; chance alone tells 0.05 apart
WEAK = 0.5  # a tau below it has more than one pair of four the wrong way round
MARGIN = 0.1  # of tau: a supernet that cannot be further above MACs is no better than they are

_POOL = 4096
_RESAMPLES = 1000
_GOLDEN = (5**0.5 - 1) / 2

Verdict = Literal[
    "trustworthy",
    "no better than counting MACs",
    "not worth trusting",
    "too few networks to tell",
    "too few images to tell",
]


class Scored(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One network, and how many of the validation images it classifies correctly."""

    genotype: tuple[int, ...]
    macs: int
    parameters: int
    supernet: int  # correct with the supernet's weights
    alone: tuple[int, ...]  # correct after training alone, from each seed

    @property
    def alone_mean(self) -> float:
        """Over the seeds."""
        return sum(self.alone) / len(self.alone)


class Fidelity(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """fidelity.json. Taus are with the order of training alone; None where one side has but one value."""

    schema: Literal["nas.fidelity/1"]
    verdict: Verdict  # by the rule of `verdict_of`
    epochs: float  # that each network was trained for alone
    supernet_epochs: float
    images: int  # of validation
    networks: tuple[Scored, ...]
    tau: dict[str, Agreement | None]  # of "supernet", "macs" and "parameters"
    beyond_macs: Agreement | None  # the supernet's tau less that of MACs
    ceiling: Agreement | None  # tau of training alone with itself, counted on other validation images
    between_seeds: Agreement | None  # mean tau of training alone with itself from another seed; None: one seed
    pairs: int
    told_apart: int  # pairs whose difference is more than the choice of validation images explains (95 %)
    ordered: dict[str, int]  # of those, how many "supernet", "macs" and "parameters" order as training alone does

    @property
    def seeds(self) -> int:
        """Trainings of each network."""
        return len(self.networks[0].alone)


def read_fidelity(path: Path) -> Fidelity:
    """A fidelity.json.

    Raises:
        RunError: missing or damaged.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=Fidelity)
    except (OSError, ValueError) as e:
        raise RunError(f"{path}: missing or damaged: {e}. Make it with `nas fidelity EXPERIMENT`.") from e


def draw(space: Space, networks: int, *, seed: int) -> Genotypes:
    """Networks [n, genes], no two alike, spread evenly over the logarithm of MACs from the smallest to the largest.

    n is `networks`, or as many as a small space has. Asked for more, it gives the same and others besides: the places
    are the multiples of the golden ratio, every beginning of which is spread evenly.
    """
    rng = np.random.default_rng([seed, 3])
    # Uniform networks have middling MACs, all of them. Each takes some of its genes from one of the ends, few or many.
    ends = np.stack([space.smallest(), space.largest()])
    uniform = space.sample(rng, _POOL)
    taken = rng.random(uniform.shape) < rng.random((_POOL, 1))
    pool = space.canonical(np.where(taken, ends[rng.integers(0, 2, _POOL)], uniform))
    pool = rng.permutation(np.unique(pool, axis=0))
    macs = space.costs(cost.macs)
    low, high = np.log(space.price(ends, macs))
    place = (np.log(space.price(pool, macs)) - low) / max(high - low, 1e-9)
    picked: list[int] = []
    for number in range(min(networks, len(pool))):
        distance = np.abs(place - (0.5 + number * _GOLDEN) % 1)
        distance[picked] = np.inf
        picked.append(int(distance.argmin()))
    return pool[picked]


def judge(
    space: Space,
    genotypes: Genotypes,
    supernet: list[int],
    right: NDArray[np.bool_],
    *,
    epochs: float,
    supernet_epochs: float,
    seed: int = 0,
) -> Fidelity:
    """What `genotypes` [n, genes], n >= 2, say of a supernet.

    Args:
        space: of the genotypes.
        genotypes: the networks.
        supernet: how many validation images each [n] classifies correctly with the supernet's weights.
        right: [n, seeds, images] whether each classifies each validation image correctly when trained alone.
        epochs: of training alone.
        supernet_epochs: of the supernet's.
        seed: of the resampling.
    """
    counts = right.sum(2)  # [n, seeds]
    alone = counts.mean(1)
    of = {
        "supernet": np.asarray(supernet, np.float64),
        "macs": space.price(genotypes, space.costs(cost.macs)),
        "parameters": space.price(genotypes, space.costs(cost.parameters)),
    }
    tau = {name: _known(agreement(values, alone, seed=seed)) for name, values in of.items()}
    beyond_macs = _known(advantage(of["supernet"], of["macs"], alone, seed=seed))
    apart = _told_apart(right.mean(1))
    pairs, told_apart = len(alone) * (len(alone) - 1) // 2, int(apart.sum()) // 2
    order = np.sign(alone[:, None] - alone) * apart
    ordered = {name: int((np.sign(v[:, None] - v) * order > 0).sum()) // 2 for name, v in of.items()}
    return Fidelity(
        schema=SCHEMA,
        verdict=verdict_of(tau["supernet"], beyond_macs, networks=len(alone), told_apart=told_apart / pairs),
        epochs=epochs,
        supernet_epochs=supernet_epochs,
        images=right.shape[2],
        networks=tuple(
            Scored(tuple(g.tolist()), int(m), int(p), int(s), tuple(c.tolist()))
            for g, m, p, s, c in zip(genotypes, of["macs"], of["parameters"], supernet, counts, strict=True)
        ),
        tau=tau,
        beyond_macs=beyond_macs,
        ceiling=_on_other_images(right.mean(1), np.random.default_rng([seed, 4])),
        between_seeds=_between_seeds(counts, seed),
        pairs=pairs,
        told_apart=told_apart,
        ordered=ordered,
    )


def verdict_of(tau: Agreement | None, beyond_macs: Agreement | None, *, networks: int, told_apart: float) -> Verdict:
    """The rule, on 95 % intervals of the supernet's tau and of what it is above that of MACs. The first that holds:

    too few networks to tell        fewer than `FEWEST`
    too few images to tell          the validation images tell less than a share `APART` of the pairs apart
    not worth trusting              tau may be 0, and is at most `WEAK`; or the supernet scores all networks alike
    no better than counting MACs    tau is at most `MARGIN` above that of MACs
    trustworthy                     tau is above 0, and above that of MACs
    too few networks to tell        anything else
    """
    if networks < FEWEST:
        return "too few networks to tell"
    if told_apart < APART:
        return "too few images to tell"
    if tau is None or (tau.low <= 0 and tau.high <= WEAK):
        return "not worth trusting"
    if beyond_macs is not None and beyond_macs.high <= MARGIN:
        return "no better than counting MACs"
    if tau.low > 0 and (beyond_macs is None or beyond_macs.low > 0):
        return "trustworthy"
    return "too few networks to tell"


def answer(found: Fidelity) -> str:
    """The verdict in a few sentences, with what to do next."""
    tau, beyond = found.tau["supernet"], found.beyond_macs
    figures = f"Kendall's tau is {tau}" if tau else "it scores all networks alike, or training alone does"
    figures += f", its lead over counting MACs {beyond}" if beyond else ""
    images = f"{found.images} validation images tell only {found.told_apart} of {found.pairs} pairs of networks apart"
    match found.verdict:
        case "trustworthy":
            return f"The supernet is worth trusting: {figures}. So it is better than chance and better than MACs."
        case "no better than counting MACs":
            return (
                f"The supernet is no better than counting MACs: {figures}, {MARGIN:g} at most. Train it "
                f"longer (train.epochs) or with another sampler, or rank networks by MACs."
            )
        case "not worth trusting":
            return (
                f"The supernet is not worth trusting: {figures}. Its order may be chance, and at best has every fourth "
                f"pair the wrong way round. Train it longer (train.epochs), or with another sampler."
            )
        case "too few images to tell":
            return (
                f"Too few images to tell, for these networks are nearly equal: {images}, so there is hardly an order "
                f"to agree with ({figures}). Hold out more images (data.validation, in a new run), or use harder data."
            )
    short = f"fewer than {FEWEST} show nothing"
    if len(found.networks) >= FEWEST:
        short = f"not shown to be {'above chance' if tau and tau.low <= 0 else 'better than MACs'}"
    needed = enough(found)
    more = f"If tau stays as it is, about {needed} will tell" if needed else "More may tell"
    blunt = f" And {images}." if found.told_apart < found.pairs / 2 else ""
    return (
        f"{len(found.networks)} networks are too few to tell: {figures}; {short}. {more} (fidelity.networks; those "
        f"that are trained are kept).{blunt}"
    )


def enough(found: Fidelity) -> int | None:
    """About how many networks would make tau and its advantage over MACs, if they stayed as they are, differ from 0.

    Intervals shrink with the square root of the number of networks. None: no reasonable number would.
    """
    n, asked = len(found.networks), float(FEWEST)
    for value in (found.tau["supernet"], found.beyond_macs):
        if value is None or value.tau <= 0:
            return None
        asked = max(asked, n * ((value.tau - value.low) / value.tau) ** 2)
    return None if asked > 20 * n else max(n, int(-(-asked // 4) * 4))


def limits(found: Fidelity) -> list[str]:
    """What the result does not show, each a sentence."""
    out = [
        "The networks are spread over the whole space; among networks of equal cost, such as a search compares near "
        "its limit, any order is harder to get right.",
        "Tau is about order: the supernet's accuracies themselves are not those of training alone.",
    ]
    if found.told_apart < found.pairs:
        at_most = f": expect no order to reach more than about {found.ceiling.tau:.2f}" if found.ceiling else ""
        out.append(
            f"{found.images} validation images cannot tell {found.pairs - found.told_apart} of the {found.pairs} pairs "
            f"of networks apart{at_most}."
        )
    if found.seeds == 1:
        out.append(
            "Each network was trained once; trained again from another seed, some would change places (fidelity.seeds)."
        )
    if found.epochs != found.supernet_epochs:
        out.append(
            f"The networks were trained alone for {found.epochs:g} epochs, the supernet for "
            f"{found.supernet_epochs:g}: this is not the same recipe."
        )
    else:
        out.append(
            "The recipe is the supernet's. Tuned for each network, or longer, training may order them differently."
        )
    return out


def table(found: Fidelity) -> list[str]:
    """The result as lines of text, for a terminal."""

    def share(correct: float) -> str:
        return f"{correct / found.images:.2%}"

    rows = [("network", "MACs", "parameters", "supernet", "alone")]
    for number, n in enumerate(found.networks, start=1):
        rows.append((str(number), f"{n.macs:,}", f"{n.parameters:,}", share(n.supernet), share(n.alone_mean)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  " + "  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
    taus = {
        "supernet": found.tau["supernet"],
        "MACs": found.tau["macs"],
        "parameters": found.tau["parameters"],
        "supernet above MACs": found.beyond_macs,
        "itself, on other validation images": found.ceiling,
        "itself, from another seed": found.between_seeds,
    }
    lines += ["", "  Kendall tau with training alone, and its 95 % interval:"]
    lines += [f"    {name:<36}{value}" for name, value in taus.items() if value is not None]
    lines += [
        f"  Of {found.pairs} pairs of networks {found.told_apart} are told apart by {found.images} validation images; "
        f"of these, the order is right",
        f"  in {found.ordered['supernet']} by the supernet, {found.ordered['macs']} by MACs, "
        f"{found.ordered['parameters']} by parameters.",
    ]
    return [*lines, "", answer(found), "What this does not show:", *(f"- {line}" for line in limits(found))]


def _told_apart(right: NDArray[np.float64]) -> NDArray[np.bool_]:
    """[n, n] whether two networks' difference is more than the choice of images explains, two-sided at 95 %.

    On the same images only those count that one has right and the other wrong (McNemar 1947, doi:10.1007/BF02295996).
    `right` [n, images] is the share of seeds.
    """
    out = np.zeros((len(right), len(right)), bool)
    for i, mine in enumerate(right):
        difference = mine - right
        out[i] = np.abs(difference.sum(1)) > 1.96 * np.sqrt((difference**2).sum(1))
    return out


def _on_other_images(right: NDArray[np.float64], rng: np.random.Generator) -> Agreement | None:
    """Tau-b of the order by `right` [n, images] with that on images drawn from them with replacement: mean, interval.

    Optimistic, since the accuracies of `right` differ by chance already.
    """
    networks, images = right.shape
    weights = (rng.multinomial(images, np.full(images, 1 / images)) for _ in range(_RESAMPLES))
    again = np.stack([right @ w for w in weights])  # [resamples, n]
    one, other = np.triu_indices(networks, 1)
    order = np.sign(right.sum(1)[one] - right.sum(1)[other])  # [pairs]
    orders = np.sign(again[:, one] - again[:, other])  # [resamples, pairs]
    ordered = (order != 0).sum() * (orders != 0).sum(1)
    taus = (orders @ order)[ordered > 0] / np.sqrt(ordered[ordered > 0])
    return Agreement(float(taus.mean()), *interval(taus)) if len(taus) else None


def _between_seeds(counts: NDArray[np.int64], seed: int) -> Agreement | None:
    """Mean tau of all pairs of seeds, its interval over networks; `counts` [n, seeds]."""
    of_seeds = counts.T.astype(np.float64)
    pairs = list(itertools.combinations(of_seeds, 2))
    if not pairs:
        return None
    taus = np.mean([resampled(a, b, np.random.default_rng(seed)) for a, b in pairs], axis=0)
    mean = float(np.mean([kendall_tau(a, b) for a, b in pairs]))
    return _known(Agreement(mean, *interval(taus)))


def _known(value: Agreement) -> Agreement | None:
    return None if np.isnan([value.tau, value.low, value.high]).any() else value
