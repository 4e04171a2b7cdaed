"""The search loop. Its outcome depends on problem, strategy, lag and seed, not on executor, worker count or timing.

That takes three rules. Trial k is proposed from the results of trials 0..k-lag and no others, told in order, even if
more are known (a deterministic lag: workers stay busy without generations). Results enter the journal in order of
trial, those from a cache too. And a search that goes on after a crash asks for every journalled trial again and
compares.

It can hold no further than the strategy's own arithmetic does. `predictor` and `bananas` solve linear systems, and the
last bits of that differ between BLAS libraries and kinds of CPU; where two proposals are nearly as good, another
machine may take the other one. A journal then says where it diverged, and is not continued there. All others give the
same trials everywhere.

What holds for every strategy is done here, and needs no wrapper: a genotype is evaluated once, only where it is within
the limits, `initial` ones come first, and `trials` is the budget.
"""

import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from nas.errors import JournalError, LimitError
from nas.search.cache import Cache
from nas.search.executor import Count, Executor, Result
from nas.search.journal import SEVERAL, Journal, Record
from nas.search.problem import Problem, choose, with_shares, without_share
from nas.search.seen import Seen
from nas.search.strategy import Genotype, Strategy, trial_rng
from nas.search.trials import Trial, Trials

_PROPOSALS = 64  # asked of the strategy for each trial, or twice the lag: the first that is feasible and new is taken
_COMMIT_SECONDS = 0.1  # results wait at most so long for others to share their fsync, unless an evaluation blocks first

logger = logging.getLogger(__name__)


def search(
    problem: Problem,
    strategy: Strategy,
    executor: Executor,
    *,
    trials: int,
    lag: int,
    seed: int,
    journal_path: Path | str,
    initial: Sequence[Genotype] = (),
    cache: Cache | None = None,
    on_trial: Callable[[Trial], None] | None = None,
) -> Trials:
    """Runs, or goes on with, the search of `journal_path` until it has `trials` trials; closes the executor.

    Args:
        problem: what is searched; its limits hold for every genotype that is evaluated.
        strategy: proposes genotypes.
        executor: evaluates them; not touched if the journal already has all trials.
        trials: how many; a later call with more continues the same search.
        lag: trial k sees the results of trials 0..k-lag; below `executor.slots` workers stay idle.
        seed: of all randomness.
        journal_path: the journal, new or of this very search.
        initial: genotypes to evaluate first; infeasible ones are skipped, and the journal's header lists them.
        cache: of counts that need no evaluation; closed like the executor. The outcome is the same with and without.
        on_trial: called for each trial in order, also for those read from the journal.

    Returns:
        The trials in order. `status` is "exhausted" if the space has no more feasible genotypes than that.

    Raises:
        LimitError: not even the smallest network is feasible.
        JournalError: the journal is damaged, in use, or of another search.
        ExecutorError: the workers cannot do their work.
    """
    if lag < 1 or trials < 0 or seed < 0:
        raise ValueError(f"lag {lag}, trials {trials}, seed {seed}: lag >= 1, trials >= 0 and seed >= 0 are needed")
    if not problem.feasible(problem.canonical(problem.smallest[None]))[0]:
        raise LimitError("Not even the smallest network of the space is within the limits. Raise the limits.")
    first, skipped = _starters(problem, initial)
    header = {
        "problem": problem.digest,
        "strategy": strategy.identity,
        "lag": lag,
        "seed": seed,
        "initial": [g.tolist() for g in first],
        "skipped": [g.tolist() for g in skipped],
        # older journals say nothing of it
        **({} if problem.accuracies == ("top1",) else {"accuracy": "+".join(problem.accuracies)}),
        **({} if len(problem.accuracies) == 1 else {"schema": SEVERAL}),
    }
    shares = strategy.shares
    wide = with_shares(problem, shares)
    first = [g if wide is problem else np.append(g, np.uint8(len(shares) - 1)) for g in first]
    proposals = max(_PROPOSALS, 2 * lag)  # as many as `lag` may be under way, of which the strategy does not know
    with executor, cache or contextlib.nullcontext(), Journal(journal_path, header) as journal:
        replay, journal.records = deque(journal.records[:trials]), []  # let go of one by one
        replayed = len(replay)
        asked, told = 0, 0
        untold: dict[int, Genotype] = {}  # asked for, and not told to the strategy yet
        seen = Seen(len(wide.sizes))
        done = Trials()
        finished: dict[int, Result] = {}
        state = strategy.init()
        committed_at = time.monotonic()

        while len(done) < trials:
            # ask as far ahead as the lag allows
            while asked < min(trials, len(done) + lag) and done.status != "exhausted":
                k = asked
                while told <= k - lag:
                    trial = done[told]
                    costs = problem.told(strategy, np.array(list(trial.costs.values())), trial.total)
                    state, told = strategy.tell(state, untold.pop(told), costs), told + 1
                rng = trial_rng(seed, k)
                genotype = first[k] if k < len(first) else choose(wide, rng, strategy.ask(rng, state, proposals), seen)
                if genotype is None:
                    done.status = "exhausted"
                    logger.warning("The space is exhausted after %d trials: no other feasible genotype was found.", k)
                    break
                asked += 1
                untold[k] = genotype
                seen.add(genotype.tobytes())
                network, images = without_share(genotype, shares, problem.total)
                if k < replayed:
                    finished[k] = _replayed(journal, replay.popleft(), k, network, images)
                elif cache is not None and (count := cache.get(network, images)) is not None:
                    finished[k] = Result(count, 0.0)
                else:
                    executor.submit(k, genotype)

            if len(done) == asked:
                break  # exhausted, and nothing is under way
            if time.monotonic() - committed_at > _COMMIT_SECONDS:
                journal.commit()
                committed_at = time.monotonic()
            if len(done) not in finished:
                number, result = executor.next()
                finished[number] = result

            # record what is next in order
            while len(done) in finished:
                k = len(done)
                network, images = without_share(untold[k], shares, problem.total)
                trial = _trial(problem, k, network, images, finished.pop(k))
                if k >= replayed:
                    journal.append(trial.record)
                if cache is not None and (count := _count(trial)) is not None:
                    cache.put(network, images, count)
                done.append(trial)
                if on_trial is not None:
                    on_trial(trial)
        if len(done) < replayed:
            raise _diverged(journal, len(done), "the journal has further trials where the space is exhausted now")
        return done


def _starters(problem: Problem, initial: Sequence[Genotype]) -> tuple[list[Genotype], list[Genotype]]:
    """The initial genotypes to evaluate, canonical and each once, and the infeasible ones."""
    first: dict[bytes, Genotype] = {}
    skipped: dict[bytes, Genotype] = {}
    for genotype in initial:
        genotype = problem.canonical(np.asarray(genotype, np.uint8)[None])
        chosen = first if problem.feasible(genotype)[0] else skipped
        chosen.setdefault(genotype[0].tobytes(), genotype[0])
    for genotype in skipped.values():
        logger.info("Initial genotype %s is outside the limits and skipped.", "-".join(map(str, genotype)))
    return list(first.values()), list(skipped.values())


def _trial(problem: Problem, number: int, genotype: Genotype, images: int, result: Result) -> Trial:
    found, failure, names = result.correct, result.failure, problem.accuracies
    counts = () if found is None else found if isinstance(found, tuple) else (found,)
    if counts and (len(counts) != len(names) or not all(0 <= n <= images for n in counts)):
        failure = f"the evaluator counted {found} of {images} images correct"
        if len(counts) != len(names):
            failure += f", and {len(names)} counts are needed: {', '.join(names)}"
        counts = ()
    correct, *further = counts or [None] * len(names)
    values = problem.cheap(genotype[None])[0]
    cheap = {name: float(value) for name, value in zip(problem.cheap_names, values, strict=True)}
    also = dict(zip(names[1:], further, strict=True))
    return Trial(number, tuple(genotype.tolist()), correct, images, cheap, failure, result.seconds, also)


def _count(trial: Trial) -> Count | None:
    """As an executor gives it."""
    if trial.correct is None or not trial.also:
        return trial.correct
    return (trial.correct, *(n for n in trial.also.values() if n is not None))


def _replayed(journal: Journal, record: Record, number: int, genotype: Genotype, images: int) -> Result:
    found = [record.get(name) for name in ("trial", "genotype", "total")]
    if found != [number, genotype.tolist(), images]:
        raise _diverged(
            journal,
            number,
            f"it has {record.get('genotype')} on {record.get('total')} images, the strategy proposes "
            f"{genotype.tolist()} on {images}",
        )
    return Result(_count(Trial.of(record)), record["seconds"], record["failure"])


def _diverged(journal: Journal, number: int, how: str) -> JournalError:
    return JournalError(
        f"{journal.path}: diverged at trial {number}: {how}. The strategy or the space has changed since; "
        f"go on with the version that wrote the journal, or start anew in another run folder."
    )
