"""Counts found again by content, and the compact containers of the driver."""

import json
import logging
import random

import numpy as np
import pytest
import search_toy as toy
from test_driver import go

from nas.errors import RunError
from nas.search import Cache, InlineExecutor, Trial, Trials
from nas.search.journal import read
from nas.search.seen import Seen


def evaluations(log) -> int:
    return len(log.read_text().split()) if log.exists() else 0


@pytest.mark.parametrize("strategy", ["nsga2", "successive_halving"])
def test_a_search_with_a_cache_finds_the_same_and_evaluates_only_what_is_new(strategy, tmp_path):
    log, shares = tmp_path / "log", toy.shares_of(strategy)
    recipe = {"log": str(log), "shares": shares}
    whole = go(tmp_path / "without", strategy=strategy)

    def cached(name, *, meaning="m", **more):
        log.unlink(missing_ok=True)
        executor = InlineExecutor(toy.evaluator, recipe)
        trials = go(tmp_path / name, strategy=strategy, executor=executor, cache=Cache(tmp_path / "c", meaning), **more)
        return trials, evaluations(log)

    assert cached("part", trials=25) == (whole[:25], 25)
    assert cached("first") == (whole, 35)
    assert cached("second") == (whole, 0)
    assert cached("first") == (whole, 0)  # read from its journal
    assert cached("other meaning", meaning="n") == (whole, 60)
    known = {(t.genotype, t.total) for t in whole}
    limited, evaluated = cached("other limit", problem=toy.problem(limit_ms=15.0, digest="15"))
    assert evaluated == len({(t.genotype, t.total) for t in limited} - known) < 60
    assert len(Cache(tmp_path / "c", "m")) == len(known | {(t.genotype, t.total) for t in limited})


def test_failures_are_not_cached(tmp_path):
    go(tmp_path / "failing", executor=InlineExecutor(lambda: lambda genotypes: [1 / 0]), cache=Cache(tmp_path, "m"))
    assert len(Cache(tmp_path, "m")) == 0
    assert go(tmp_path / "again", cache=Cache(tmp_path, "m")) == go(tmp_path / "without")


def test_damage_makes_a_cache_forget_and_never_err(tmp_path, caplog):
    with Cache(tmp_path, "m") as cache:
        for i in range(5):
            cache.put(np.array([i, 1], np.uint8), 100, 50 + i)
    data = bytearray(cache.path.read_bytes())
    for place in range(len(data)):
        damaged = data.copy()
        damaged[place] ^= 4
        cache.path.write_bytes(damaged)
        found = Cache(tmp_path, "m")
        assert len(found) in (3, 4)
        for i in range(5):
            assert found.get(np.array([i, 1], np.uint8), 100) in (None, 50 + i)
    assert "damaged" in caplog.text
    cache.path.write_bytes(data[:-3])  # torn; what is written next does not continue that line
    with Cache(tmp_path, "m") as torn:
        torn.put(np.array([9, 9], np.uint8), 100, 1)
    assert len(Cache(tmp_path, "m")) == 5


def test_two_searches_may_write_at_once(tmp_path):
    with Cache(tmp_path, "m") as one, Cache(tmp_path, "m") as two:
        for i in range(50):
            for cache, last in ((one, 1), (two, 2)):
                cache.put(np.array([i, last], np.uint8), 7, i)
    assert len(Cache(tmp_path, "m")) == 100


def test_a_cache_that_cannot_be_written_is_told_once_and_the_search_goes_on(tmp_path, caplog):
    (tmp_path / "file").write_text("no folder")
    with caplog.at_level(logging.WARNING):
        assert go(tmp_path / "j", cache=Cache(tmp_path / "file" / "below", "m")) == go(tmp_path / "without")
    assert caplog.text.count("cannot write the cache") == 1


def test_a_cache_that_cannot_be_read_is_an_error(tmp_path):
    Cache(tmp_path, "m").path.mkdir()
    with pytest.raises(RunError, match="cannot read the cache"):
        Cache(tmp_path, "m")


def test_a_set_of_what_was_seen_is_a_set():
    seen, expected, draw = Seen(3), set(), random.Random(0)
    for _ in range(6000):
        key = bytes(draw.randrange(64) for _ in range(3))
        assert (key in seen) == (key in expected)
        seen.add(key)
        expected.add(key)
        assert len(seen) == len(expected)
    assert all(key in seen for key in expected)


def test_trials_are_a_list_of_trials_in_little_room(tmp_path):
    rng = np.random.default_rng(0)
    listed = [
        Trial(
            int(n),
            tuple(rng.integers(0, 256, 7).tolist()),
            None if n % 3 == 0 else int(rng.integers(0, 100)),
            100,
            {"latency_ms": float(rng.random()), "macs": 1e9 * float(rng.random())},
            f"failed {n}" if n % 3 == 0 else None,
            float(rng.random()),
        )
        for n in range(2500)
    ]
    trials = Trials(listed)
    assert trials == listed
    assert listed == trials
    assert repr(trials) == repr(listed)
    assert trials[-1] == listed[-1]
    assert trials[10:2000:7] == listed[10:2000:7]
    assert trials[::-1] == listed[::-1]
    assert [t.seconds for t in trials] == [t.seconds for t in listed]
    assert [json.dumps(t.record) for t in trials] == [json.dumps(t.record) for t in listed]
    assert listed[5] in trials
    assert trials != listed[:-1]
    assert Trials() == []
    with pytest.raises(IndexError):
        trials[2500]
    other = Trial(0, (1, 2), 3, 100, {"latency_ms": 1.0, "macs": 1.0})
    with pytest.raises(ValueError, match="another search"):
        trials.append(other)


def test_what_a_cache_knew_is_journalled_like_any_other_result(tmp_path):
    go(tmp_path / "a", cache=Cache(tmp_path, "m"))
    go(tmp_path / "b", cache=Cache(tmp_path, "m"))

    def outcome(name):
        header, records = read(tmp_path / name)
        return header, [{k: v for k, v in r.items() if k != "seconds"} for r in records]

    assert outcome("a") == outcome("b")
    assert {r["seconds"] for r in read(tmp_path / "b")[1]} == {0.0}
