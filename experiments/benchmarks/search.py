"""Question: does the search with a predictor in the loop need fewer evaluations than others, and how many exactly?

Run: python experiments/benchmarks/search.py [--quick] [--rows FILE] [--json FILE] [--only TASK] [--seeds 20] [--jobs 2]
Everything is in ../shared/data; pymoo is needed (`pip install -e '.[benchmark]'`). Each figure is mean and standard
deviation over seeds; others run beside ours, on the same problems. `--quick` takes fewer seeds and up to 250
evaluations. `--rows` keeps every finished run, one JSON line each, and does not repeat it; with `--seeds 0` it only
sums them up, and each figure says of how many seeds it is.

`ofa_note10`: the best predicted top-1 within a latency, for the inner search alone, Once-for-All's own evolution and
    ageing, on Once-for-All's accuracy predictor and the table of the Note10. Seconds are CPU seconds of one core.
`nb201`: share of the true hypervolume of NAS-Bench-201 (error below 20 % x latency) on five devices by evaluations, and
    how many evaluations reach .98 of it (in `evaluations_to_98`: the median; null where most runs never do). Ours
    is told what is known of a cell without training it, its size and its graph; others have no use for that.
`two_devices`: error x latency on two devices of opposite character in one search: what its evaluations reach on each
    device alone (`joint`), beside a search for that device with half of them (`dedicated`, from the rows of `nb201`).
`ofa_subnets`: hypervolume (error x million MACs) over a regression of measured Once-for-All subnets.
`predictor_tau`: Kendall tau of the accuracy predictor on NAS-Bench-Macro against ridge regression on the choices.
`candidates_per_second`: priced by table and scored by accuracy predictor (the mean of a process of 100 networks) in a
    CPU second of one core; `candidates_per_second_with_deviation`: with what the process does not know.
`executors`: `search_engine.py`: what the executors and the driver cost; once, after all others, since it is timed.
"""

import argparse
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import search_engine
import search_peers as peers
import search_tasks as tasks
from numpy.typing import NDArray
from scipy import stats
from sklearn.linear_model import RidgeCV

from nas.files import write_json
from nas.search import ageing_evolution, random_search, trial_rng
from nas.search.gaussian_process import fit
from nas.search.inner_search import search_within
from nas.search.predictor_search import predictor_search
from nas.search.problem import choose
from nas.search.strategy import Strategy

Floats = NDArray[np.float64]

HERE = Path(__file__).resolve()
LIMITS_MS = (15, 20, 25, 30)
OFA_RUNS = (("ours", 5_000), ("ours", 20_000), ("ours", 50_000), ("ofa", 50_000), ("ageing", 50_000))
BUDGETS = (50, 100, 250, 500)
HALVES = (125, 250)  # evaluations of each dedicated search beside one for two devices
STRATEGIES: dict[str, Callable[[tasks.Task], Strategy]] = {
    # as they come: what is measured is what a search without further settings does
    "ours": lambda task: predictor_search(task.problem.sizes, problem=task.problem, features=task.features),
    "ageing": lambda task: ageing_evolution(task.problem.sizes),
    "random": lambda task: random_search(task.problem.sizes),
}


def costs_of(strategy: Strategy, task: tasks.Task, trials: int, seed: int) -> Floats:
    """Costs [trials, objectives] of a search as `nas.search.search` runs it, without lag."""
    state, seen, out = strategy.init(), set(), []
    for trial in range(trials):
        rng = trial_rng(seed, trial)
        genotype = choose(task.problem, rng, strategy.ask(rng, state, 64), seen)
        assert genotype is not None
        seen.add(genotype.tobytes())
        out.append(task.costs(genotype[None])[0])
        state = strategy.tell(state, genotype, out[-1])
    return np.array(out)


# runs: each is one JSON row


@cache
def _nb201(folder: Path) -> dict[str, tuple[tasks.Task, float]]:
    return tasks.nb201(folder)


@cache
def _subnets(folder: Path) -> tuple[tasks.Task, dict[str, float]]:
    return tasks.ofa_subnets(folder)


@cache
def _note10(folder: Path) -> tuple[Any, tasks.OfaPredictor, tasks.Note10]:
    return tasks.ofa_note10(folder)


def run_ofa_note10(folder: Path, seed: int, who: str, limit_ms: int, evaluations: int) -> dict[str, float]:
    space, predictor, note10 = _note10(folder)
    rng = np.random.default_rng(seed)
    predictor(space.sample(np.random.default_rng(0), 64))  # what is slow only once
    start = time.process_time()
    if who == "ours":
        found = search_within(
            space.sizes, predictor, note10, limit_ms, rng=rng, evaluations=evaluations, canonical=space.canonical
        )
        assert found is not None
        assert note10(found.genotype[None])[0] <= limit_ms
        top1 = found.score
    else:
        search = {"ofa": peers.ofa_evolution, "ageing": peers.ageing}[who]
        top1 = search(space.sizes, space.canonical, predictor, note10, limit_ms, evaluations=evaluations, rng=rng)
    return {"top1": top1, "seconds": time.process_time() - start}


def _costs(task: tasks.Task, who: str, trials: int, seed: int) -> Floats:
    if who == "nsga2":
        return peers.pymoo_nsga2(task, trials, seed)
    return costs_of(STRATEGIES[who](task), task, trials, seed)


def run_nb201(folder: Path, seed: int, who: str, device: str, trials: int) -> dict[str, Any]:
    task, whole = _nb201(folder)[device]
    costs = _costs(task, who, trials, seed)
    share = [task.volume(costs[:n]) / whole for n in range(1, trials + 1)]
    reached = next((n for n, s in enumerate(share, start=1) if s >= 0.98), None)
    return {"share": {n: share[n - 1] for n in {*BUDGETS, *HALVES} if n <= trials}, "to_98": reached}


def run_two_devices(folder: Path, seed: int, trials: int) -> dict[str, Any]:
    """The share of each device's own hypervolume after twice as many evaluations as `HALVES`."""
    costs = _costs(_nb201(folder)["+".join(tasks.PAIR)][0], "ours", trials, seed)
    out: dict[str, Any] = {}
    for column, device in enumerate(tasks.PAIR, start=1):
        task, whole = _nb201(folder)[device]
        out[device] = {n: task.volume(costs[: 2 * n, [0, column]]) / whole for n in HALVES if 2 * n <= trials}
    return {"share": out}


def run_ofa_subnets(folder: Path, seed: int, who: str, trials: int) -> dict[str, Any]:
    task, quality = _subnets(folder)
    costs = _costs(task, who, trials, seed)
    return {"volume": {n: task.volume(costs[:n]) for n in (50, 100, 200, 400) if n <= trials}} | quality


def run_predictor_tau(folder: Path, seed: int, count: int) -> dict[str, float]:
    choices, macs, top1 = tasks.nas_bench_macro(folder)
    order = np.random.default_rng(seed).permutation(len(top1))
    a, b = order[:count], order[count:]
    out = {}
    for name, features in (("ours", np.log(macs)[:, None]), ("ours_without_macs", np.empty((len(top1), 0)))):
        process = fit((3,) * choices.shape[1], choices[a], features[a], np.log(100 - top1[a]))
        out[name] = -stats.kendalltau(process.mean_of(choices[b], features[b]), top1[b]).statistic
    x = (choices[:, :, None] == np.arange(3)).reshape(len(choices), -1).astype(np.float64)
    ridge = RidgeCV(np.logspace(-3, 3, 13)).fit(x[a], top1[a])
    out["ridge"] = stats.kendalltau(ridge.predict(x[b]), top1[b]).statistic
    return {name: float(tau) for name, tau in out.items()}


def run_scoring(folder: Path, seed: int, count: int) -> dict[str, Any]:
    """Of Once-for-All's space: `count` candidates by the Note10's table and a process of 100 networks."""
    space, predictor, note10 = _note10(folder)
    rng = np.random.default_rng(seed)
    known, candidates = space.sample(rng, 100), space.sample(rng, count)
    process = fit(space.sizes, known, np.log(note10(known))[:, None], np.log(100 - predictor(known)))
    out = {}
    for name, score in (("", process.mean_of), ("_with_deviation", process.predict)):
        start = time.process_time()
        for part in np.array_split(candidates, count // 4096 or 1):
            score(part, np.log(note10(part))[:, None])
        out[f"candidates_per_second{name}"] = count / (time.process_time() - start)
    return out


RUNS: dict[str, Callable[..., dict[str, Any]]] = {
    "ofa_note10": run_ofa_note10,
    "nb201": run_nb201,
    "two_devices": run_two_devices,
    "ofa_subnets": run_ofa_subnets,
    "predictor_tau": run_predictor_tau,
    "scoring": run_scoring,
}


def planned(folder: Path, seeds: int, quick: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """(task, arguments) of every run, all tasks of one seed before the next."""
    for seed in range(seeds):
        for limit_ms in LIMITS_MS:
            for who, evaluations in OFA_RUNS:
                yield "ofa_note10", {"seed": seed, "who": who, "limit_ms": limit_ms, "evaluations": evaluations}
        for count in (25, 50, 100):
            yield "predictor_tau", {"seed": seed, "count": count}
        yield "scoring", {"seed": seed, "count": 200_000}
        yield "two_devices", {"seed": seed, "trials": 250 if quick else 500}
        for device in _nb201(folder):
            if "+" in device:
                continue
            for who in ("ours", "nsga2", "ageing", "random"):
                yield "nb201", {"seed": seed, "who": who, "device": device, "trials": 250 if quick else 500}
        for who, trials in (("ours", 100), ("nsga2", 400)):
            yield "ofa_subnets", {"seed": seed, "who": who, "trials": trials}


def run(folder: Path, task: str, arguments: dict[str, Any]) -> dict[str, Any]:
    warnings.filterwarnings("ignore", module="pymoo")
    return {"task": task, **arguments, "result": RUNS[task](folder, **arguments)}


# what the rows say


def spread(values: list[float]) -> dict[str, float | int | None]:
    """`n` is the number of seeds; one alone has no deviation."""
    sd = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "sd": sd, "n": len(values)}


def longest(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of runs that differ in `trials` alone the longest: a shorter one is its beginning."""
    out: dict[str, dict[str, Any]] = {}
    for row in sorted(rows, key=lambda row: row.get("trials", 0)):
        out[json.dumps({k: v for k, v in row.items() if k not in ("trials", "result")}, sort_keys=True)] = row
    return list(out.values())


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of the issue, each {mean, sd, n} over the seeds of the rows."""
    rows = longest(rows)

    def of(task: str, **arguments: Any) -> list[dict[str, Any]]:
        return [r["result"] for r in rows if r["task"] == task and all(r[k] == v for k, v in arguments.items())]

    def values(task: str, argument: str) -> list[Any]:
        return sorted({r[argument] for r in rows if r["task"] == task})

    out: dict[str, Any] = {}
    for limit in values("ofa_note10", "limit_ms"):
        at = {
            (who, n): {**spread([r["top1"] for r in found]), "seconds": float(np.mean([r["seconds"] for r in found]))}
            for who in ("ours", "ofa", "ageing")
            for n in (5_000, 20_000, 50_000)
            if (found := of("ofa_note10", limit_ms=limit, who=who, evaluations=n))
        }
        of_limit = dict(at.get(("ours", 50_000), {}))
        of_limit |= {
            f"at_{n}" if who == "ours" else who: v for (who, n), v in at.items() if (who, n) != ("ours", 50_000)
        }
        out.setdefault("ofa_note10", {})[str(limit)] = of_limit
    for device in values("nb201", "device"):
        whos = {who: of("nb201", device=device, who=who) for who in ("ours", "nsga2", "ageing", "random")}
        of_device: dict[str, Any] = {}
        for n in map(str, BUDGETS):
            shares = {w: [r["share"][n] for r in found if n in r["share"]] for w, found in whos.items()}
            if all(shares.values()):
                of_device[n] = {w: spread(s) for w, s in shares.items()}
        reached = {w: float(np.median([r["to_98"] or np.inf for r in found])) for w, found in whos.items() if found}
        of_device["evaluations_to_98"] = {w: n if np.isfinite(n) else None for w, n in reached.items()}
        out.setdefault("nb201", {})[device] = of_device
    for n in ("50", "100", "200", "400"):
        whos = {w: [r["volume"][n] for r in of("ofa_subnets", who=w) if n in r["volume"]] for w in ("ours", "nsga2")}
        if any(whos.values()):
            out.setdefault("ofa_subnets", {})[n] = {w: spread(v) for w, v in whos.items() if v}
    for n in values("predictor_tau", "count"):
        found = of("predictor_tau", count=n)
        out.setdefault("predictor_tau", {})[str(n)] = {name: spread([r[name] for r in found]) for name in found[0]}
    for half in map(str, HALVES):
        for device in tasks.PAIR:
            joint = [s[half] for r in of("two_devices") if half in (s := r["share"][device])]
            alone = [s[half] for r in of("nb201", device=device, who="ours") if half in (s := r["share"])]
            if joint and alone:
                budget = out.setdefault("two_devices", {}).setdefault(str(2 * int(half)), {})
                budget[device] = {"joint": spread(joint), "dedicated": spread(alone)}
    for name in ("candidates_per_second", "candidates_per_second_with_deviation"):
        if found := of("scoring"):
            out[name] = spread([r[name] for r in found])
    if found := of("executors"):
        out |= found[-1]
    return out


def provenance(arguments: list[str] | None) -> dict[str, Any]:
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=HERE.parent, capture_output=True, text=True
    ).stdout.strip()
    try:
        model = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor()
    return {
        "command": " ".join(
            ["python experiments/benchmarks/search.py", *(sys.argv[1:] if arguments is None else arguments)]
        ),
        "commit": commit,
        "machine": f"{model.partition(': ')[2] or model}, {os.cpu_count()} CPUs",
        "versions": {"python": platform.python_version()} | {n: version(n) for n in ("numpy", "scipy", "pymoo")},
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, default=HERE.parents[3] / "shared" / "data", help="folder of the benchmarks"
    )
    parser.add_argument("--quick", action="store_true", help="3 seeds, up to 250 evaluations")
    parser.add_argument("--seeds", type=int, help="default 20; 0: only sum up the rows")
    parser.add_argument("--only", choices=(*RUNS, "executors"), help="one task")
    parser.add_argument("--jobs", type=int, default=2, help="processes, of one core each")
    parser.add_argument("--rows", type=Path, help="keep every run here, and repeat none of those that it has")
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_args(arguments)

    rows = (
        [json.loads(line) for line in options.rows.read_text().splitlines()]
        if options.rows and options.rows.exists()
        else []
    )
    seeds = (3 if options.quick else 20) if options.seeds is None else options.seeds
    have = {json.dumps({k: v for k, v in row.items() if k != "result"}, sort_keys=True) for row in rows}
    runs = [
        (task, given)
        for task, given in planned(options.data, seeds, options.quick)
        if options.only in (None, task) and json.dumps({"task": task, **given}, sort_keys=True) not in have
    ]
    os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # of the processes, which load NumPy anew
    with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as pool:
        for done in as_completed([pool.submit(run, options.data, task, given) for task, given in runs]):
            rows.append(json.loads(json.dumps(done.result())))
            if options.rows:
                with options.rows.open("a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
    if options.only in (None, "executors") and seeds and not any(row["task"] == "executors" for row in rows):
        rows.append({"task": "executors", "quick": options.quick, "result": search_engine.figures(quick=options.quick)})
        if options.rows:
            with options.rows.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
    figures = summary(rows)
    print(json.dumps(figures, indent=1))
    if options.json:
        write_json(options.json, {"question": (__doc__ or "").partition("\n")[0], **provenance(arguments), **figures})


if __name__ == "__main__":
    main()
