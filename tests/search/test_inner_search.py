"""The inner search: exchanges are the best ones, and small spaces are solved exactly."""

import itertools

import numpy as np
import pytest

from nas.search.inner_search import best_exchanges, search_within


def brute_force(gain, rise, gene, slack, changes):
    """The largest sum of gains of at most `changes` moves of different genes, by trying all."""
    best = 0.0
    for count in range(1, changes + 1):
        for moves in itertools.combinations(range(len(gain)), count):
            moves = list(moves)
            if len(set(gene[moves])) == count and rise[moves].sum() <= slack:
                best = max(best, gain[moves].sum())
    return best


def test_exchanges_keep_within_the_slack_and_gain_nearly_as_much_as_any():
    """Costs are rounded up to buckets, and a sum may leave the range of buckets on its way."""
    share = []
    for seed in range(30):
        rng = np.random.default_rng(seed)
        gene = np.repeat(np.arange(6), 2)
        gain, rise, slack = rng.normal(size=12), rng.normal(size=12), rng.random()
        exchanges = best_exchanges(gain, rise, gene, slack, changes=3)
        for moves in exchanges:
            assert len(moves) == len(set(gene[moves])) <= 3
            assert rise[moves].sum() <= slack + 1e-9
        found = max(gain[moves].sum() for moves in exchanges)
        assert found <= brute_force(gain, rise, gene, slack, 3) + 1e-9
        share.append(found / brute_force(gain, rise, gene, slack, 3))
    assert np.mean(share) > 0.97


def test_an_exchange_gives_back_what_it_must():
    gain, rise, gene = np.array([5.0, -1.0, -3.0]), np.array([2.0, -1.0, -1.0]), np.array([0, 1, 2])
    assert best_exchanges(gain, rise, gene, slack=-0.9, changes=3)[0] == [1]
    assert [0, 1] in best_exchanges(gain, rise, gene, slack=1.2, changes=3)
    assert best_exchanges(gain, rise, gene, slack=-9.0, changes=3) == []


def test_moves_that_are_none_are_never_taken():
    nan = np.array([np.nan, -np.inf, 1.0])
    assert best_exchanges(nan, np.zeros(3), np.arange(3), 0.0) == [[2]]
    assert best_exchanges(np.ones(2), np.array([np.inf, 0.0]), np.arange(2), 0.0) == [[1]]


def rugged(sizes, seed):
    """A score with interactions and an additive cost, over all genotypes of a space."""
    rng = np.random.default_rng(seed)
    main = [rng.normal(size=size) for size in sizes]
    pairs = {(a, b): rng.normal(size=(sizes[a], sizes[b])) for a, b in itertools.combinations(range(len(sizes)), 2)}
    price = [rng.random(size) for size in sizes]

    def score(genotypes):
        out = sum(m[genotypes[:, g]] for g, m in enumerate(main))
        return out + 0.5 * sum(p[genotypes[:, a], genotypes[:, b]] for (a, b), p in pairs.items())

    return score, lambda genotypes: sum(p[genotypes[:, g]] for g, p in enumerate(price))


@pytest.mark.parametrize("share", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("seed", range(4))
def test_small_spaces_are_solved_exactly(seed, share):
    sizes = (3, 4, 2, 3, 4, 1, 3)
    score, cost = rugged(sizes, seed)
    everything = np.stack(np.unravel_index(np.arange(np.prod(sizes)), sizes), 1).astype(np.uint8)
    limit = float(np.quantile(cost(everything), share))
    best = score(everything[cost(everything) <= limit]).max()
    found = search_within(sizes, score, cost, limit, rng=np.random.default_rng(seed), evaluations=3000)
    assert found is not None
    assert found.score == pytest.approx(best, abs=1e-12)
    assert cost(found.genotype[None])[0] <= limit
    assert found.evaluations <= 3000


def test_a_score_is_asked_for_as_often_as_said_and_only_of_canonical_genotypes():
    asked = []

    def canonical(genotypes):
        out = genotypes.copy()
        out[out[:, 0] == 0, 1] = 0
        return out

    def score(genotypes):
        asked.append(genotypes)
        return genotypes.sum(1).astype(float)

    found = search_within((3,) * 6, score, lambda g: g.sum(1).astype(float), 5, rng=np.random.default_rng(0),
                          evaluations=400, canonical=canonical)  # fmt: skip
    every = np.concatenate(asked)
    assert found is not None
    assert found.evaluations == len(every) <= 400
    np.testing.assert_array_equal(canonical(every), every)


def test_a_limit_that_nothing_keeps_is_none_found_and_not_a_loop():
    args = {"rng": np.random.default_rng(0), "evaluations": 500}
    assert search_within((3, 3), lambda g: g.sum(1), lambda g: 1.0 + g.sum(1), 0.5, **args) is None
    assert search_within((1, 1), lambda g: np.ones(len(g)), lambda g: np.zeros(len(g)), 0.5, **args).score == 1
    assert search_within((3, 3), lambda g: np.full(len(g), np.nan), lambda g: np.zeros(len(g)), 1, **args) is None


def test_the_same_generator_the_same_answer():
    score, cost = rugged((4,) * 12, 0)
    runs = [search_within((4,) * 12, score, cost, 5.0, rng=np.random.default_rng(3), evaluations=600) for _ in range(2)]
    np.testing.assert_array_equal(runs[0].genotype, runs[1].genotype)


def test_without_a_limit_the_best_of_all_is_found():
    """An infinite limit is no number of buckets, and must not become one."""
    weight = np.array([3.0, 1.0, 2.0, 5.0])
    found = search_within(
        (4,) * 4,
        lambda genotypes: genotypes @ weight,
        lambda genotypes: genotypes.sum(axis=1).astype(float),
        np.inf,
        rng=np.random.default_rng(0),
        evaluations=500,
    )
    assert found.genotype.tolist() == [3, 3, 3, 3]
