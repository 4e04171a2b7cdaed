"""A toy problem, one-max under a latency limit, and evaluators that break on purpose."""

import contextlib
import ctypes
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil

from nas.search import STRATEGIES, Problem
from nas.search.problem import without_share

SIZES = (4,) * 10
TOTAL = 1000


def problem(sizes=SIZES, *, limit_ms=18.0, digest="toy") -> Problem:
    """Accuracy and latency both grow with the genes; gene 1 has no effect while gene 0 is 0."""
    weights = 1.0 + 0.1 * np.arange(len(sizes))

    def canonical(genotypes):
        out = genotypes.copy()
        out[out[:, 0] == 0, 1] = 0
        return out

    def cheap(genotypes):
        return (1.0 + genotypes @ weights)[:, None]

    return Problem(
        sizes=sizes,
        canonical=canonical,
        cheap=cheap,
        feasible=lambda genotypes: cheap(genotypes)[:, 0] <= limit_ms,
        smallest=np.zeros(len(sizes), np.uint8),
        digest=digest,
        total=TOTAL,
    )


def shares_of(strategy):
    """Of the strategy called so."""
    return STRATEGIES[strategy](SIZES, population=10).shares


def correct(genotype) -> int:
    """Saturating in the first genes, so that not all milliseconds are worth the same."""
    gain = np.sqrt(np.asarray(genotype, float)) / (1 + np.arange(len(genotype)) % 5)
    return int(TOTAL * gain.sum() / (np.sqrt(3) * len(genotype)))


def evaluator(delay_seconds=0.0, log=None, weights=None, shares=(1.0,)):
    """Counts, on the share of images that a last gene picks; appends one line a call to `log` if given."""
    bonus = 0 if weights is None else int(weights["bonus"].sum())

    def evaluate(genotypes):
        time.sleep(delay_seconds)
        if log is not None:
            with open(log, "a") as file:
                file.writelines("-".join(map(str, g.tolist())) + "\n" for g in genotypes)
        seen = [without_share(g, shares, TOTAL) for g in genotypes]
        return [correct(g) * images // TOTAL + bonus for g, images in seen]

    return evaluate


def two_counts():
    """The count, and that of int8: the smaller, the larger the last gene."""

    def evaluate(genotypes):
        return [(correct(g), max(0, correct(g) - 9 * int(g[-1]))) for g in genotypes]

    return evaluate


def choosy_evaluator(weights=None):
    """As `evaluator`, with whatever share of the images; every seventh genotype is refused."""

    def evaluate(genotypes):
        (genotype,) = genotypes
        if genotype[: len(SIZES)].sum() % 7 == 6:
            raise ValueError(f"no {'-'.join(map(str, genotype.tolist()))}")
        return [correct(genotype[: len(SIZES)]) // 9]

    return evaluate


def bad_evaluator(log, timeout_seconds=60.0):
    """Raises, hangs or kills its process, as the first gene says."""

    def evaluate(genotypes):
        (genotype,) = genotypes
        with open(log, "a") as file:
            file.write(f"{os.getpid()} {genotype[0]}\n")
        print("noise on stdout")
        print("noise on stderr", file=sys.stderr)
        if genotype[0] == 1:
            raise ValueError("no such network")
        if genotype[0] == 2:
            time.sleep(timeout_seconds)
        if genotype[0] == 3:
            os._exit(1)
        return [correct(genotype)]

    return evaluate


def hungry_evaluator(how):
    """Runs out of memory where the first gene is 1: as Python says it, or as the system ends it."""

    def evaluate(genotypes):
        (genotype,) = genotypes
        if genotype[0] == 1 and how == "python":
            resource.setrlimit(resource.RLIMIT_AS, (2**31, resource.getrlimit(resource.RLIMIT_AS)[1]))
            np.ones(2**33, np.uint8)
        if genotype[0] == 1:
            os.kill(os.getpid(), signal.SIGKILL)  # as Linux does
        return [correct(genotype)]

    return evaluate


def rude_evaluator():
    """Prints more than a pipe holds, reads standard input, starts a process that outlives it."""

    def evaluate(genotypes):
        print("x" * 300_000, flush=True)
        os.write(2, b"y" * 300_000)
        assert sys.stdin.read() == ""
        subprocess.Popen(["sleep", "77.77"])
        return [correct(g) for g in genotypes]

    return evaluate


def silent_evaluator():
    """Closes what it could print on."""

    def evaluate(genotypes):
        for descriptor in (1, 2):
            with contextlib.suppress(OSError):  # the second time
                os.close(descriptor)
        time.sleep(0.05)
        return [correct(g) for g in genotypes]

    return evaluate


def unstartable(how):
    """Dies or hangs in place of being built."""
    if how == "hangs":
        time.sleep(60)
    os.write(2, b"noise\nno such driver\n")
    os._exit(7)


def broken_evaluator():
    raise FileNotFoundError("no weights here")


def mapped_evaluator(path, weights):
    """Notes where in which mapping of its process the weights are, and whether they can be changed; for two workers."""
    address = weights["bonus"].__array_interface__["data"][0]
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(part, 16) for part in line.split()[0].split("-"))
        if start <= address < end:
            place = [*line.split()[2:5], address - start, weights["bonus"].flags.writeable]
            with open(path, "a") as file:
                file.write(json.dumps([os.getpid(), place]) + "\n")

    def evaluate(genotypes):
        while Path(path).read_text().count("\n") < 2:  # until the other worker has them too
            time.sleep(0.05)
        return [0]

    return evaluate


def facts_evaluator(path):
    """Notes what the worker's process is like."""
    Path(path).write_text(
        repr((sorted(os.sched_getaffinity(0)), os.environ["OMP_NUM_THREADS"], os.environ["XLA_FLAGS"]))
    )
    return evaluator()


def sleeper(seconds, spread=1.0):
    """Sleeps for `seconds` on average, of which the longest are `spread` times the shortest, by the first gene."""
    shortest = 2 * seconds / (1 + spread)

    def evaluate(genotypes):
        (genotype,) = genotypes
        time.sleep(shortest * (1 + (spread - 1) * int(genotype[0]) / 3))
        return [0]

    return evaluate


def wild_evaluator(log):
    """Does the worst that a candidate can, as the first gene says."""

    def evaluate(genotypes):
        (genotype,) = genotypes
        with open(log, "a") as file:
            file.write(json.dumps([os.getpid(), "-".join(map(str, genotype.tolist()))]) + "\n")
        match genotype[0]:
            case 1:
                os.kill(os.getpid(), signal.SIGKILL)
            case 2:
                hoard = []
                limits = resource.getrlimit(resource.RLIMIT_AS)
                resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + 2**28, limits[1]))
                try:
                    while True:
                        hoard.append(bytearray(2**24))
                finally:
                    resource.setrlimit(resource.RLIMIT_AS, limits)
            case 3:
                return [float("nan")]
            case 4:
                time.sleep(3600)
            case 5:
                ctypes.string_at(0)
            case 6:
                sys.exit("enough")
        return [correct(genotype)]

    return evaluate
