"""Question: does the supernet order networks as training each of them alone does?

Run: python experiments/nas_bench_macro.py --data PATH --benchmark nas_bench_macro_tenth.npz --out runs/nas_bench_macro
     [--sampler strict_fairness_distilled] [--width 0.25] [--epochs 5] [--seed 0]
     [--json experiments/results/nas_bench_macro.json]

A supernet of the space `nas_bench_macro` is trained on CIFAR-10 (PATH as in experiments/cifar10.toml), with strict
fairness and the largest network as teacher unless --sampler names another, and every network whose published accuracy
the benchmark file has is scored with its weights, on images that it was not trained on. Printed: Kendall's tau of that
order with the published one (NAS-Bench-Macro, Su et al. 2021, arXiv:2103.11922: three trainings of 50 epochs each),
with a 95 % bootstrap interval over networks, and beside it the tau of MACs and of parameters, which need no training.
Three seeds of the published trainings agree with one another at about .88, so more than that cannot be had. "Main
effects" is the order by the sum of what each layer's choice adds, fitted to the supernet's counts: what is left out of
it is how choices go together, as far as the supernet says.

--width scales all channels: a CPU has no time for all of them. Costs are those of the published, full networks.
Cut off, the same command goes on where it was. The benchmark file: `ops` uint8 [n, 8], `test_acc` [n, seeds] in %.
"""

import argparse
import json
import os
import platform
import subprocess
import time
import tomllib
from pathlib import Path

import jax
import msgspec
import numpy as np
import tomli_w

from nas import config, cost
from nas.agreement import Agreement, agreement
from nas.data import load_data
from nas.evaluate import SubnetEvaluator
from nas.files import write_json, write_text
from nas.space import Space, load_space
from nas.space.load import space_file
from nas.supernet import Supernet
from nas.train import train_supernet
from nas.train.samplers import SAMPLERS


def narrow(width: float, folder: Path) -> Path:
    """The space with every width times `width`, as a file in `folder`."""
    raw = tomllib.loads(space_file("nas_bench_macro").read_text(encoding="utf-8"))
    for part in (raw["stem"], *raw["stage"], raw["head"]):
        part["width"] = max(8, round(part["width"] * width / 8) * 8)
    write_text(folder / "space.toml", tomli_w.dumps(raw))
    return folder / "space.toml"


def score(evaluate: SubnetEvaluator, genotypes: np.ndarray, path: Path) -> list[int]:
    """Correct answers of each genotype; those in the file at `path` are not counted again."""
    known: dict[str, int] = json.loads(path.read_text()) if path.exists() else {}
    ordered = genotypes[np.lexsort(genotypes.T[::-1])]  # those that begin alike together, which is computed once
    for start in range(0, len(ordered), 41):
        part = [g for g in ordered[start : start + 41] if g.tobytes().hex() not in known]
        if part:
            known |= {g.tobytes().hex(): c for g, c in zip(part, evaluate(np.stack(part)), strict=True)}
            write_json(path, known)
            print(f"evaluated {len(known)}/{len(genotypes)}", flush=True)
    return [known[g.tobytes().hex()] for g in genotypes]


def taus(correct: list[int], full: Space, genotypes: np.ndarray, accuracy: np.ndarray) -> dict[str, Agreement]:
    """Agreement with `accuracy` [n] of the supernet's counts, of their main effects, and of the full costs."""
    orders = {
        "supernet": np.array(correct),
        "main effects": main_effects(np.array(correct), genotypes),
        "macs": full.price(genotypes, full.costs(cost.macs)),
        "parameters": full.price(genotypes, full.costs(cost.parameters)),
    }
    return {name: agreement(values, accuracy) for name, values in orders.items()}


def main_effects(values: np.ndarray, genotypes: np.ndarray) -> np.ndarray:
    """The least-squares fit of `values` [n] by a number for each value of each gene of `genotypes` [n, genes]."""
    columns = [genotypes[:, gene] == value for gene in range(genotypes.shape[1]) for value in np.unique(genotypes)]
    design = np.stack(columns, axis=1).astype(np.float64)
    return design @ np.linalg.lstsq(design, values.astype(np.float64), rcond=None)[0]


def commit() -> str:
    """Of this checkout; says so if files were changed since."""
    try:
        there = ["git", "-C", str(Path(__file__).parent)]
        found = subprocess.run([*there, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*there, "status", "--porcelain", "-uno"], capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found + (" with changes" if changed.strip() else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="CIFAR-10, binary version: folder or archive")
    parser.add_argument("--benchmark", required=True, type=Path, help="published accuracies, .npz")
    parser.add_argument("--out", type=Path, default=Path("runs/nas_bench_macro"), help="checkpoints and counts")
    parser.add_argument("--width", type=float, default=0.25, help="of all channels; 1: the published networks")
    parser.add_argument("--sampler", default="strict_fairness_distilled", choices=SAMPLERS, help="of networks to train")
    parser.add_argument("--epochs", type=float, default=5.0, help="more make it more accurate, and its order worse")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=0.1)
    parser.add_argument("--networks", type=int, help="only so many of the published networks")
    parser.add_argument("--train-images", type=int, help="only so many of 50,000, a tenth of them for evaluation")
    parser.add_argument("--json", type=Path, help="write the result here")
    options = parser.parse_args()

    options.out.mkdir(parents=True, exist_ok=True)
    data = load_data(config.Data(source=options.data, validation=0.1, train_images=options.train_images))
    full = load_space("nas_bench_macro", input_shape=data.image_shape, classes=data.classes)
    space = load_space(str(narrow(options.width, options.out)), input_shape=data.image_shape, classes=data.classes)
    settings = config.Train(
        epochs=options.epochs,
        batch_size=options.batch_size,
        sampler=options.sampler,
        optimiser=config.Optimiser(learning_rate=options.learning_rate),
        augment=config.Augment(flip=True, shift=4),
        checkpoint_steps=100,
    )
    print(f"{data}\n{space}", flush=True)
    supernet = Supernet(space)

    def progress(done: int, total: int, values: dict[str, float]) -> None:
        if done % 100 == 0 or done == total:
            print(f"{done}/{total} " + " ".join(f"{k} {v:.3g}" for k, v in values.items()), flush=True)

    start = time.perf_counter()
    params = train_supernet(supernet, data, settings, seed=options.seed, folder=options.out, progress=progress)
    trained = time.perf_counter() - start

    published = np.load(options.benchmark)
    genotypes = published["ops"].astype(np.uint8)[: options.networks]
    accuracy = published["test_acc"].mean(1)[: options.networks]
    start = time.perf_counter()
    evaluate = SubnetEvaluator(supernet, params, data, calibration_images=1024, batch_size=256)
    correct = score(evaluate, genotypes, options.out / "correct.json")
    evaluated = time.perf_counter() - start

    found = taus(correct, full, genotypes, accuracy)
    for name, value in found.items():
        print(f"Kendall tau of {name} with the published accuracy: {value}")
    if options.json:
        result = {
            "question": __doc__.partition("\n")[0].removeprefix("Question: "),
            "kendall_tau": msgspec.to_builtins(found),
            "networks": len(genotypes),
            "images": evaluate.total,
            "top1": {
                name: round(float(f(correct)) / evaluate.total, 4)
                for name, f in (("best", max), ("mean", np.mean), ("worst", min))
            },
            "width": options.width,
            "space": space.digest,
            "data": {"source": Path(options.data).name, "digest": data.digest},
            "settings": msgspec.to_builtins(settings),
            "seed": options.seed,
            "seconds": {"train": round(trained), "evaluate": round(evaluated)},  # of this call: 0 for what was done
            "commit": commit(),
            "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, {jax.default_backend()}",
            "versions": {"jax": jax.__version__, "numpy": np.__version__, "python": platform.python_version()},
            "correct": correct,
        }
        write_json(options.json, result)


if __name__ == "__main__":
    main()
