"""Question: what does a zero-cost proxy tell of accuracy that MACs, parameters and a few evaluations do not?

Run: python experiments/ablations/proxies.py --data PATH --benchmark nas_bench_macro_tenth.npz [--seeds 12]
     [--json experiments/results/proxies.json]

NASWOT (nas/evaluate/proxies.py) of 64 random networks of the full space `nas_bench_macro`, from 32 images of CIFAR-10
(PATH as in experiments/cifar10.toml) and untrained weights, made additive. Printed: Kendall's tau of it and of MACs
with the published accuracies of the benchmark's networks; and of the predictions of strategy `predictor`'s process for
all others after n evaluations, with MACs and parameters as features and with the proxy beside them, mean over seeds,
and the gain with its standard error. Takes 2 minutes.
"""

import argparse
from pathlib import Path

import numpy as np

from nas import config, cost
from nas.agreement import agreement
from nas.data import load_data
from nas.evaluate.proxies import additive, naswot
from nas.files import write_json
from nas.search.gaussian_process import fit
from nas.space import load_space
from nas.supernet import Supernet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="CIFAR-10, binary version: folder or archive")
    parser.add_argument("--benchmark", required=True, type=Path, help="published accuracies, .npz")
    parser.add_argument("--seeds", type=int, default=12)
    parser.add_argument("--evaluations", type=int, nargs="+", default=[8, 12, 16, 25, 50, 100])
    parser.add_argument("--json", type=Path, help="write the result here")
    options = parser.parse_args()

    data = load_data(config.Data(source=options.data, train_images=1000))
    space = load_space("nas_bench_macro", input_shape=data.image_shape, classes=data.classes)
    published = np.load(options.benchmark)
    genotypes, accuracy = published["ops"].astype(np.uint8), published["test_acc"].mean(1)

    supernet, drawn = Supernet(space), space.sample(np.random.default_rng(1), 64)
    images = data.normalise(data.train.images[:32], space.input[:2])
    scored = additive(space, drawn, naswot(supernet, supernet.init(0), images)(drawn))
    proxy = scored(genotypes)
    macs, parameters = (space.price(genotypes, space.costs(of)) for of in (cost.macs, cost.parameters))
    alone = {"macs": agreement(macs, accuracy).tau, "naswot": agreement(proxy, accuracy).tau}
    print(f"Kendall tau with the published accuracy: MACs {alone['macs']:.3f}, NASWOT {alone['naswot']:.3f}")

    features = {"plain": np.log(np.stack([macs, parameters], 1))}
    features["proxy"] = np.column_stack([features["plain"], proxy])
    rows = []
    for n in options.evaluations:
        taus: dict[str, list[float]] = {name: [] for name in features}
        for seed in range(options.seeds):
            order = np.random.default_rng(seed).permutation(len(genotypes))
            known, others = order[:n], order[n:]
            for name, of in features.items():
                model = fit(space.sizes, genotypes[known], of[known], np.log(100 - accuracy[known]))
                mean, _ = model.predict(genotypes[others], of[others])
                taus[name].append(agreement(-mean, accuracy[others]).tau)
        gain = np.subtract(taus["proxy"], taus["plain"])
        error = gain.std(ddof=1) / len(gain) ** 0.5
        rows.append({"n": n, **{k: float(np.mean(v)) for k, v in taus.items()}, "gain": gain.mean(), "error": error})
        print(
            f"n = {n:3}: tau {rows[-1]['plain']:.3f}, with the proxy {rows[-1]['proxy']:.3f}: gain {gain.mean():+.3f} "
            f"+- {error:.3f}",
            flush=True,
        )
    if options.json:
        write_json(options.json, {"alone": alone, "rows": rows, "seeds": options.seeds, "networks": len(genotypes)})


if __name__ == "__main__":
    main()
