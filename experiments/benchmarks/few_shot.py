"""Question: how well are the networks of a device predicted from 10, 20, 50 of its own, or 1000 without other devices?

Run: python experiments/benchmarks/few_shot.py [--data ../shared/data] [--quick] [--json FILE]   about 10 minutes
Three tasks, each over many random draws of the measured networks; everything is judged on networks not measured.
`nb201`: NAS-Bench-201's cells on five devices (HW-NAS-Bench, Li et al. 2021, arXiv:2103.10584; HELP, Lee et al. 2021,
arXiv:2106.08630), each from the four others; means over devices. Cells below 0.1 ms on the Raspberry Pi, which are not
connected, are left out. `accel_tpuv2`: Accel-NASBench (Ahmad et al. 2024, arXiv:2404.08005), milliseconds an image on
TPUv2 from VCK190 and RTX 3090. `ofa_2080ti_batch1`: Once-for-All networks on an RTX 2080 Ti with one image, where
launching kernels takes the time and no other device is known; beside it, ridge regressions.
Measured networks are drawn at random, chosen (`transfer.choose`) among 400 random ones, or half of each
(`transfer.design`, as `nas measure --networks` does), when errors on the random half make the intervals. The baseline,
the most similar known device scaled, gets the same ones. Intervals are 95 % bootstrap intervals of means over draws.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from sklearn.linear_model import RidgeCV

from nas.files import write_json
from nas.latency import Prediction, predictor, transfer
from nas.measure import hardware
from nas.pipeline.measure import git_commit

Floats = NDArray[np.float64]

HERE = Path(__file__).resolve()
CANDIDATES = 400


# what is known of networks


def one_hot(values: NDArray[Any]) -> Floats:
    """[n, k] values -> [n, k * different values]."""
    return (values[:, :, None] == np.unique(values)).reshape(len(values), -1).astype(np.float64)


def nb201_features(ops: NDArray[Any], edges: NDArray[Any], names: list[str], macs: NDArray[Any]) -> list[Floats]:
    """Counts of ops, all and those on a path from input to output; ops on the longest path; MACs. Then ops by edge."""
    live = ops != names.index("none")
    work = live & (ops != names.index("skip_connect"))
    fed, used, depth = (np.zeros((len(ops), 4)) for _ in range(3))
    fed[:, 0] = used[:, 3] = 1
    for edge in np.lexsort(edges.T[::-1]):  # by where they start, so that every start is known
        start, end = edges[edge]
        fed[:, end] = np.maximum(fed[:, end], fed[:, start] * live[:, edge])
    for edge in np.lexsort(edges.T)[::-1]:
        start, end = edges[edge]
        used[:, start] = np.maximum(used[:, start], used[:, end] * live[:, edge])
    active = live & (fed[:, edges[:, 0]] > 0) & (used[:, edges[:, 1]] > 0)
    for edge in np.lexsort(edges.T[::-1]):
        start, end = edges[edge]
        longer = np.where(active[:, edge], depth[:, start] + work[:, edge], 0)
        depth[:, end] = np.maximum(depth[:, end], longer)
    kinds = ops[:, :, None] == np.arange(len(names))
    counts = [kinds.sum(1), (kinds & active[:, :, None]).sum(1), depth[:, 3:], np.log(macs + 1e6)[:, None]]
    return [np.concatenate(counts, axis=1).astype(np.float64), one_hot(ops)]


def accel_features(file: Any) -> list[Floats]:
    """Totals over the network: MACs, elements, parameters, squeeze-excitations, convs; then choices by stage."""
    expand, kernel, layers, se = (file[name].astype(np.float64) for name in ("e", "k", "l", "se"))
    totals, size = np.zeros((8, len(expand))), 112
    pointwise, depthwise, hidden, output, parameters, squeezed, count, widened = totals
    for stage, stride in enumerate(file["stage_stride"]):
        for layer in range(int(layers.max())):
            there = layers[:, stage] > layer
            width = int(file["stage_out"][stage])
            channels = width if layer else int(file["stage_in"][stage])
            out = size if layer else size // int(stride)
            inner, grown = channels * expand[:, stage], expand[:, stage] > 1
            pointwise += there * (grown * size**2 * channels * inner + out**2 * inner * width)
            depthwise += there * out**2 * inner * kernel[:, stage] ** 2
            hidden += there * (grown * size**2 + out**2) * inner
            output += there * out**2 * width
            parameters += there * inner * (channels * grown + width + kernel[:, stage] ** 2)
            squeezed += there * se[:, stage] * out**2 * inner
            count += there
            widened += there * grown
            size = out
    logs = [np.log(v) for v in (pointwise, depthwise, hidden, output, parameters)]
    sums = np.stack([*logs, np.log(squeezed + 1e5), (se * layers).sum(1), count, widened], axis=1)
    stages = [np.log(expand * layers), np.log(layers), kernel == 5, se, expand == 1]
    return [sums, np.concatenate(stages, axis=1).astype(np.float64)]


def ofa_features(file: Any) -> dict[str, Floats]:
    """`structure`: depth of each stage, how many kernels and expansions of each size there are, resolution, MACs.

    Also, for ridge regressions: `depth`, layers in all; `blocks`, an indicator of each block's kernel and expansion at
    its place, and of the resolution, so that latency is any sum over blocks; `macs` of each block.
    """
    kernel, expand, depth = file["ks"].astype(int), file["e"].astype(int), file["d"].astype(int)
    active = (np.arange(4) < depth[:, :, None]).reshape(len(depth), -1)
    kernels, expands = (one_hot(v).reshape(*v.shape, -1) * active[:, :, None] for v in (kernel, expand))
    macs, size = np.zeros(kernel.shape), np.ceil(file["r"] / 2)
    for slot in range(20):
        stage, first = slot // 4, slot % 4 == 0
        width = (24, 40, 80, 112, 160)[stage]
        channels = (16, 24, 40, 80, 112)[stage] if first else width
        out = np.ceil(size / 2) if first and stage != 3 else size
        inner = channels * expand[:, slot]
        macs[:, slot] = inner * (size**2 * channels + out**2 * (kernel[:, slot] ** 2 + width)) * active[:, slot]
        size = out
    pairs = (kernels[:, :, :, None] * expands[:, :, None, :]).reshape(len(depth), -1)
    resolution = file["r"].astype(np.float64)[:, None]
    counts = [one_hot(depth), kernels.sum(1), expands.sum(1), resolution, macs.sum(1, keepdims=True)]
    return {
        "structure": np.concatenate(counts, axis=1),
        "depth": depth.sum(1, keepdims=True).astype(np.float64),
        "blocks": np.c_[pairs, one_hot(file["r"][:, None])],
        "macs": np.c_[macs, resolution],
    }


# how predictions are judged


def judged(predicted_ms: Floats, measured_ms: Floats) -> dict[str, float]:
    """Spearman correlation, and the share within 10 %."""
    rho: Any = stats.spearmanr(predicted_ms, measured_ms)
    return {
        "spearman": float(rho.statistic),
        "within_10": float((np.abs(predicted_ms / measured_ms - 1) <= 0.1).mean()),
    }


def covered(prediction: Prediction, measured_ms: Floats) -> float:
    """Share of measurements in their intervals."""
    return float(((prediction.low_ms <= measured_ms) & (measured_ms <= prediction.high_ms)).mean())


def mean_interval(values: Iterable[float]) -> dict[str, float]:
    """The mean of one value a draw, and its 95 % bootstrap interval."""
    array = np.array(list(values))
    means = array[np.random.default_rng(0).integers(0, len(array), (2000, len(array)))].mean(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return {"mean": float(array.mean()), "low": float(low), "high": float(high)}


def summary(draws: list[dict[str, dict[str, float]]], reference: str) -> dict[str, Any]:
    """Means over draws of each method's figures, and of ours less those of `reference` in the same draw."""
    out: dict[str, Any] = {
        method: {key: mean_interval(d[method][key] for d in draws) for key in figures}
        for method, figures in draws[0].items()
    }
    out["difference"] = {
        key: mean_interval(d["ours"][key] - d[reference][key] for d in draws) for key in draws[0][reference]
    }
    return out


# tasks


def few(
    features: list[Floats], latency_ms: Floats, targets: list[int], counts: list[int], seeds: int, judge: int | None
) -> dict[str, Any]:
    """Each target from all other devices: {"random 10": summary, ...}; figures of a draw are means over targets.

    `judge`: so many networks not measured are predicted; None: all.
    """
    draws: dict[str, list[list[dict[str, dict[str, float]]]]] = {}
    for target in targets:
        known, truth = np.delete(latency_ms, target, axis=1), latency_ms[:, target]
        prior = transfer.learn_prior(features, known)
        for seed in range(seeds):
            order = np.random.default_rng(seed).permutation(len(truth))
            pool = order[:CANDIDATES]
            for count in counts:
                picked = pool[transfer.choose([f[pool] for f in features], known[pool], count, prior=prior)]
                rng = np.random.default_rng([seed, count])
                half, drawn = transfer.design([f[pool] for f in features], known[pool], count, rng, prior=prior)
                ways = (("random", order[:count], None), ("chosen", picked, None), ("designed", pool[half], drawn))
                for how, measured, calibrating in ways:
                    rest = np.setdiff1d(order, measured)
                    rest = rest if judge is None else np.random.default_rng(seed).permutation(rest)[:judge]
                    fitted = transfer.fit(
                        features, known, truth[measured], measured, prior=prior, calibrating=calibrating
                    )
                    ours = fitted.predict([f[rest] for f in features], known[rest])
                    baseline = transfer.most_similar(known, truth[measured], measured)[rest]
                    figures = {
                        "ours": judged(ours.latency_ms, truth[rest]) | {"coverage_80": covered(ours, truth[rest])},
                        "baseline": judged(baseline, truth[rest]),
                    }
                    per_seed = draws.setdefault(f"{how} {count}", [[] for _ in range(seeds)])
                    per_seed[seed].append(figures)
    out = {}
    for name, per_seed in draws.items():
        means = [{m: {k: float(np.mean([d[m][k] for d in ds])) for k in ds[0][m]} for m in ds[0]} for ds in per_seed]
        out[name] = summary(means, "baseline")
        out[name]["by_device"] = [
            {
                m: {k: float(np.mean([ds[i][m][k] for ds in per_seed])) for k in per_seed[0][i][m]}
                for m in per_seed[0][i]
            }
            for i in range(len(targets))
        ]
    return out


def ridge(features: Floats, latency_ms: Floats, rest: Floats) -> Floats:
    """Ridge regression on standardised features, its penalty chosen by leave-one-out."""
    mean, spread = features.mean(0), np.maximum(features.std(0), 1e-9)
    model = RidgeCV(np.logspace(-2, 4, 13)).fit((features - mean) / spread, latency_ms)
    return model.predict((rest - mean) / spread)


def many(features: dict[str, Floats], latency_ms: Floats, counts: list[int], seeds: int) -> dict[str, Any]:
    """The learned predictor without other devices, and ridge regressions on each kind of features."""
    out = {}
    for count in counts:
        draws = []
        for seed in range(seeds):
            order = np.random.default_rng(seed).permutation(len(latency_ms))
            a, b = order[:count], order[count:]
            structure = features["structure"]
            ours = predictor.fit([structure[a]], latency_ms[a]).predict([structure[b]])
            figures = {"ours": judged(ours.latency_ms, latency_ms[b]) | {"coverage_80": covered(ours, latency_ms[b])}}
            for name, columns in features.items():
                figures[f"ridge {name}"] = judged(ridge(columns[a], latency_ms[a], columns[b]), latency_ms[b])
            draws.append(figures)
        out[f"random {count}"] = summary(draws, "ridge blocks")
    return out


def twin_spearman(classes: NDArray[Any], latency_ms: Floats) -> list[float]:
    """Of one against another random cell of each class [n], for each device: what the noise of measuring allows."""
    order = np.random.default_rng(0).permutation(len(classes))
    grouped = order[np.argsort(classes[order], kind="stable")]
    same = np.flatnonzero(classes[grouped[1:]] == classes[grouped[:-1]])
    first = same[np.r_[True, classes[grouped[same[1:]]] != classes[grouped[same[:-1]]]]]
    a, b = latency_ms[grouped[first]], latency_ms[grouped[first + 1]]
    return [judged(x, y)["spearman"] for x, y in zip(a.T, b.T, strict=True)]


def load(folder: Path) -> dict[str, Callable[[list[int], int, int | None], dict[str, Any]]]:
    """The tasks by name: functions of (numbers of measured networks, seeds, judged networks)."""
    nb201 = np.load(folder / "nb201_cifar10.npz")
    connected = nb201["latency_ms"][:, list(nb201["devices"]).index("raspi4")] >= 0.1
    cells = nb201_features(
        nb201["ops"][connected], nb201["edges"], nb201["op_names"].tolist(), nb201["macs"][connected]
    )
    cells_ms = nb201["latency_ms"][connected].astype(np.float64)
    accel = np.load(folder / "accel_nasbench_half.npz")
    whole = ~np.isnan(accel["perf"]).any(1)
    accel_ms = accel["perf"][whole].astype(np.float64)
    accel_ms[:, 1:] = 1000 / accel_ms[:, 1:]  # images a second to milliseconds an image
    nets = [f[whole] for f in accel_features(accel)]
    ofa = np.load(folder / "ofa_mbv3_latency_2080ti.npz")
    ofa_ms = ofa["latency_ms"][:, 0].astype(np.float64)

    def on_nb201(counts: list[int], seeds: int, judge: int | None) -> dict[str, Any]:
        # Isomorphic cells of the same ops, used or not, differ only in which edge has which: nearly repeats.
        twins = np.c_[nb201["iso_class"], np.sort(nb201["ops"], axis=1)][connected]
        ceiling = twin_spearman(np.unique(twins, axis=0, return_inverse=True)[1].ravel(), cells_ms)
        names = nb201["devices"].tolist()
        return few(cells, cells_ms, list(range(5)), counts, seeds, judge) | {
            "devices": names,
            "spearman_of_twins": dict(zip(names, ceiling, strict=True)),
        }

    return {
        "nb201": on_nb201,
        "accel_tpuv2": lambda counts, seeds, judge: few(nets, accel_ms, [2], counts, seeds, judge),
        "ofa_2080ti_batch1": lambda counts, seeds, judge: many(ofa_features(ofa), ofa_ms, counts, seeds),
    }


def lines(task: str, found: dict[str, Any]) -> Iterable[str]:
    """A row for each method and number of measurements."""
    for name, row in found.items():
        for method, figures in row.items() if isinstance(row, dict) and "ours" in row else ():
            if method != "by_device":
                cells = [
                    "{mean:.3f} [{low:.3f}, {high:.3f}]".format(**figures[k]) if k in figures else ""
                    for k in ("spearman", "within_10", "coverage_80")
                ]
                yield f"| {task} | {name} | {method} | {' | '.join(cells)} |"
    if ceiling := found.get("spearman_of_twins"):
        each = ", ".join(f"{device} {rho:.3f}" for device, rho in ceiling.items())
        yield f"Spearman of isomorphic cells of the same ops with one another: {each}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, default=HERE.parents[3] / "shared" / "data", help="folder of the benchmarks"
    )
    parser.add_argument("--quick", action="store_true", help="fewer draws, fewer networks judged: a minute")
    parser.add_argument("--seeds", type=int, help="draws; default 20")
    parser.add_argument("--only", help="one task")
    parser.add_argument("--json", type=Path, help="write everything there as well; other tasks in it are kept")
    options = parser.parse_args(arguments)
    known = json.loads(options.json.read_text()) if options.json and options.json.exists() else {}
    result = known.get("few_shot", {})
    print(
        "| task | measured | method | Spearman | within 10 % | coverage of 80 % intervals |\n|---|---|---|---|---|---|"
    )
    for name, task in load(options.data).items():
        if options.only in (None, name):
            alone = name.startswith("ofa")
            counts = ([100, 250] if options.quick else [100, 250, 1000]) if alone else [10, 20, 50]
            seeds = options.seeds or ((2 if alone else 3) if options.quick else 20)
            start = time.perf_counter()
            result[name] = task(counts, seeds, 2000 if options.quick else None)
            result[name] |= {"seeds": seeds, "seconds": round(time.perf_counter() - start, 1)}
            result[name] |= {"commit": git_commit(), "machine": hardware()}  # tasks of one file may differ in these
            print("\n".join(lines(name, result[name])), flush=True)
            if options.json:
                write_json(options.json, {"question": (__doc__ or "").partition("\n")[0], "few_shot": result})


if __name__ == "__main__":
    main()
