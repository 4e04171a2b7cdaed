"""What `search.py` searches: published accuracies and latencies as problems, read from ../shared/data."""

import itertools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from sklearn.model_selection import cross_val_predict
from sklearn.svm import SVR

from nas import cost
from nas.latency import import_table
from nas.search.pareto import hypervolume
from nas.search.problem import Problem
from nas.search.strategy import Genotype, Genotypes
from nas.space import Space, load_space

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Task:
    """A problem, the true error [n] of genotypes, and where its hypervolume (error x costs) ends."""

    problem: Problem
    error: Callable[[Genotypes], Floats]
    reference: tuple[float, ...]
    features: Callable[[Genotypes], Floats]  # MACs, parameters ... [n, k]

    def costs(self, genotypes: Genotypes) -> Floats:
        """[n, 1 + cheap]."""
        return np.c_[self.error(genotypes), self.problem.cheap(genotypes)]

    def volume(self, costs: Floats) -> float:
        return hypervolume(costs, self.reference)


def problem_of(
    sizes: tuple[int, ...], cheap: Callable[[Genotypes], Floats], smallest: Genotype, **kinds: Any
) -> Problem:
    """A problem without limits, of cheap costs [n] or [n, c]."""
    return Problem(
        sizes=sizes,
        canonical=kinds.get("canonical", lambda genotypes: genotypes),
        cheap=lambda genotypes: cheap(genotypes).reshape(len(genotypes), -1),
        feasible=lambda genotypes: np.ones(len(genotypes), bool),
        smallest=smallest,
        digest="benchmark",
        total=10_000,
    )


# NAS-Bench-201


PAIR = ("edgegpu", "2080ti_256")  # of the five devices those that order cells least alike: Spearman .51


def nb201(folder: Path) -> dict[str, tuple[Task, float]]:
    """By device, and for the two of `PAIR` together: the task, and the hypervolume of all cells.

    The volume ends at 80 % accuracy and the slowest cell. Cells count as different although isomorphic ones are not.
    """
    file = np.load(folder / "nb201_cifar10.npz")
    sizes = (len(file["op_names"]),) * 6
    order = np.argsort(np.ravel_multi_index(file["ops"].T.astype(int), sizes))
    error = 1 - file["test_acc"].astype(np.float64)[order] / 100
    latency = dict(zip(file["devices"].tolist(), file["latency_ms"].astype(np.float64)[order].T, strict=True))
    known = np.c_[file["macs"], file["params"], cell_features(file["ops"], file["edges"])].astype(np.float64)[order]

    def number(genotypes: Genotypes) -> NDArray[np.intp]:
        return np.ravel_multi_index(genotypes.T.astype(int), sizes)

    out = {}
    for devices in [*((device,) for device in latency), PAIR]:
        columns = np.stack([latency[device] for device in devices], axis=1)
        smallest = np.array(np.unravel_index(int(columns[:, 0].argmin()), sizes), np.uint8)
        problem = problem_of(sizes, lambda g, columns=columns: columns[number(g)], smallest)
        reference = (0.2, *columns.max(axis=0).tolist())
        task = Task(problem, lambda g: error[number(g)], reference, lambda g: known[number(g)])
        out["+".join(devices)] = task, task.volume(np.c_[error, columns])
    return out


def cell_features(ops: Genotypes, edges: NDArray[np.integer]) -> Floats:
    """What the graph of a cell says [n, 4], each plus 1: how many paths lead from its input to its output, how many
    convolutions are on them, and the most and the fewest convolutions on one (as many as edges where no path leads).

    Choices alone tell a predictor nothing of edges: an operation whose output is not used has no effect. (White et al.
    2021, arXiv:1910.11858, encode cells by their paths.)
    """
    number = {(a, b): i for i, (a, b) in enumerate(edges.tolist())}
    nodes = ((0, 3), (0, 1, 3), (0, 2, 3), (0, 1, 2, 3))
    paths = [[number[step] for step in itertools.pairwise(path)] for path in nodes]
    convolution = (ops == 2) | (ops == 3)
    leads = np.stack([(ops[:, path] != 0).all(axis=1) for path in paths], axis=1)  # [n, paths]; 0 is "none"
    depth = np.stack([convolution[:, path].sum(axis=1) for path in paths], axis=1)
    used = np.stack([leads[:, [i in path for path in paths]].any(axis=1) for i in range(len(number))], axis=1)
    most = np.where(leads, depth, 0).max(axis=1)
    fewest = np.where(leads, depth, len(number)).min(axis=1)
    return 1.0 + np.stack([leads.sum(axis=1), (used & convolution).sum(axis=1), most, fewest], axis=1)


# Once-for-All's accuracy predictor and the table of the Note10


class OfaPredictor:
    """Once-for-All's accuracy predictor (Cai et al. 2020, arXiv:1908.09791): predicted top-1 in %.

    A network is given to its first layer as a sum of rows: one for the resolution, one for the kernel and expansion of
    each layer that is there.
    """

    def __init__(self, folder: Path, space: Space) -> None:
        file = np.load(folder / "ofa_acc_predictor.npz")
        weight = [np.ascontiguousarray(file[f"w{i}"].T, np.float32) for i in range(4)]
        self.bias = [file[f"b{i}"].astype(np.float32) for i in range(4)]
        self.weight = weight[1:]
        gene = {choice.name: i for i, choice in enumerate(space.choices)}
        rows = [weight[0][120:][(np.array(space.resolutions) - 112) // 16] + self.bias[0]]
        genes = []  # of kernel, expansion and depth
        for slot in range(20):
            stage, layer = f"stage{slot // 4 + 2}", slot % 4
            kernel, expand = weight[0][3 * slot : 3 * slot + 3], weight[0][60 + 3 * slot : 63 + 3 * slot]
            rows.append((kernel[:, None] + expand).reshape(9, -1))
            names = f"layer{layer + 1}/kernel", f"layer{layer + 1}/expand", "depth"
            genes.append([gene[f"{stage}/{name}"] for name in names])
        self.kernels, self.expands, self.depths = np.array(genes).T
        self.least = np.arange(20) % 4 - 1  # depth with which a layer is there
        self.first_rows = 5 + 9 * np.arange(20)
        self.rows = np.concatenate(rows)  # [5 + 20 * 9, 400]

    def __call__(self, genotypes: Genotypes) -> NDArray[np.float32]:
        out = [self._scores(self.first_layer(part)) for part in _parts(genotypes)]
        return np.concatenate(out) if out else np.zeros(0, np.float32)

    def first_layer(self, genotypes: Genotypes) -> NDArray[np.float32]:
        """[n, 400], before its ReLU."""
        index = self.first_rows + 3 * genotypes[:, self.kernels].astype(np.intp) + genotypes[:, self.expands]
        count = np.arange(len(genotypes))
        one_hot = np.zeros((len(count), len(self.rows)), np.float32)
        one_hot[count, genotypes[:, 0]] = 1
        one_hot[count[:, None], index] = genotypes[:, self.depths] >= self.least
        return one_hot @ self.rows

    def _scores(self, hidden: NDArray[np.float32]) -> NDArray[np.float32]:
        for weight, bias in zip(self.weight, self.bias[1:], strict=True):
            np.maximum(hidden, 0, out=hidden)
            hidden = hidden @ weight
            hidden += bias
        return hidden[:, 0] * 100


def _parts(genotypes: Any) -> list[Any]:
    """1,024 at a time stay in cache."""
    return [genotypes[i : i + 1024] for i in range(0, len(genotypes), 1024)]


class Note10:
    """Latencies of Once-for-All networks of width 1.2 on the Note10, summed as its authors do: by resolution.

    (The whole space's own table has one entry for blocks that are equal at two resolutions; theirs has two.)
    """

    def __init__(self, folder: Path, space: Space) -> None:
        tables = []
        for resolution in space.resolutions:
            at = space.at(resolution)
            with tempfile.TemporaryDirectory() as out:
                file = folder / "lut_ofa_mbv3_note10.json"
                table = import_table(file, form="ofa", space=at, device="note10", out=Path(out) / "note10").table
            tables.append([c[p.branch_of] for p, c in zip(at.positions, table.costs(at), strict=True)])
        self.strides = np.zeros(
            (len(space.sizes), len(space.positions)), np.float32
        )  # of genes in each position's table
        sizes = []
        for i, position in enumerate(space.positions):
            milliseconds = np.stack([t[i] for t in tables])
            strides = np.cumprod((1, *milliseconds.shape[:0:-1]))[::-1]
            np.add.at(self.strides[:, i], list(position.genes), strides)
            sizes.append(milliseconds.ravel())
        self.first = np.cumsum([0, *(len(of) for of in sizes[:-1])])
        self.milliseconds = np.concatenate(sizes)

    def __call__(self, genotypes: Genotypes) -> Floats:
        """latency_ms [n] of canonical genotypes."""
        # A product of matrices finds all entries at once; whole numbers of this size are exact in float32.
        parts = [(part @ self.strides).astype(np.intp) + self.first for part in _parts(genotypes.astype(np.float32))]
        return np.concatenate([np.zeros(0), *(self.milliseconds.take(index).sum(axis=1) for index in parts)])


def ofa_note10(folder: Path) -> tuple[Space, OfaPredictor, Note10]:
    space = load_space("ofa_mobilenet_v3_w12", classes=1000)
    return space, OfaPredictor(folder, space), Note10(folder, space)


# measured Once-for-All subnets


def ofa_subnets(folder: Path) -> tuple[Task, dict[str, float]]:
    """Accuracy x MACs, the accuracy that of a support vector regression on all measured subnets; and how good that is.

    DyNAS-T (Cummings et al. 2022, arXiv:2205.10358) uses such a regression; it is of another kind than ours.
    """
    space = load_space("ofa_mobilenet_v3", classes=1000)
    file = np.load(folder / "ofa_mbv3_top1_half.npz")
    values: dict[str, Any] = {"resolution": file["r"]}
    for stage in range(5):
        values[f"stage{stage + 2}/depth"] = file["d"][:, stage]
        for layer in range(4):
            for name, array in (("kernel", file["ks"]), ("expand", file["e"])):
                values[f"stage{stage + 2}/layer{layer + 1}/{name}"] = array[:, 4 * stage + layer]
    known = np.array([[c.values.index(v) for v in values[c.name].tolist()] for c in space.choices]).T.astype(np.uint8)
    x, y = one_hot_active(space, known), file["top1"].astype(np.float64)
    regression = SVR(C=10.0, gamma=0.01, epsilon=0.05)
    held_out = cross_val_predict(regression, x, y, cv=10)
    regression.fit(x, y)
    macs, parameters = space.costs(cost.macs), space.costs(cost.parameters)
    problem = problem_of(space.sizes, lambda g: space.price(g, macs) / 1e6, space.smallest(), canonical=space.canonical)
    reference = (1 - float(y.min()) / 100, float(file["macs"].max()) / 1e6)
    quality = {"held_out_tau": float(stats.kendalltau(held_out, y).statistic), "networks": len(y)}
    task = Task(
        problem,
        lambda g: 1 - regression.predict(one_hot_active(space, g)) / 100,
        reference,
        lambda g: np.stack([space.price(g, macs), space.price(g, parameters)], axis=1),
    )
    return task, quality


def one_hot_active(space: Space, genotypes: Genotypes) -> Floats:
    """[n, values of all choices]: choices without effect are all zero."""
    active = np.ones(genotypes.shape, bool)
    for gene, choice in enumerate(space.choices):
        for other, values in choice.conditions:
            active[:, gene] &= np.isin(genotypes[:, other], values)
    columns = [
        (genotypes[:, gene, None] == np.arange(size)) & active[:, gene, None] for gene, size in enumerate(space.sizes)
    ]
    return np.concatenate(columns, axis=1).astype(np.float64)


# NAS-Bench-Macro


def nas_bench_macro(folder: Path) -> tuple[Genotypes, Floats, Floats]:
    """Choices [n, 8], MACs [n] and test accuracy [n] in %, the mean of three trainings."""
    file = np.load(folder / "nas_bench_macro_tenth.npz")
    return file["ops"], file["flops"].astype(np.float64), file["test_acc"].mean(axis=1).astype(np.float64)
