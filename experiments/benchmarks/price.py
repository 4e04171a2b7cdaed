"""Question: how long does a latency table take for a million genotypes, and how long did it take in int64?

Run: python experiments/benchmarks/price.py [--rounds 5]    half a minute, on one core
Both price the same genotypes to the last bit alike. A third price is of a table whose correction has what neighbours
cost one another (`nas.latency.FORMS`): the state of each chain is carried along. They alternate within each round,
because speeds of a shared machine compare only side by side; seconds are the least of the rounds, as for anything that
only others can slow down.
"""

import argparse
import time

import msgspec
import numpy as np

from nas.latency import Correction, Entry, Table
from nas.space import Space, load_space
from nas.space.space import Genotypes

SPACES = ("mobilenet_v3_32", "ofa_mobilenet_v3")
MILLION = 1_000_000


PLAIN = Correction(1 / 0.9, -0.0031, {"add": 1 / 700, "conv": 1e-4 / 3}, weights_ms=1e-2, floor_ms=1e-4)
BORDERS = {"add > conv": 1 / 900, "conv > conv": -1e-4 / 7}


def random_table(space: Space, seed: int = 0, correction: Correction = PLAIN) -> Table:
    """Latencies that nobody measured, with every part of a correction: what is timed does not depend on them."""
    rng = np.random.default_rng(seed)
    blocks = space.blocks().items()
    return Table(
        device="none: random numbers",
        runtime="none",
        runtime_version="",
        precision="float32",
        threads=1,
        batch=1,
        hardware="none",
        space=space.name,
        space_digest=space.digest,
        date="",
        command="experiments/benchmarks/price.py",
        overhead_ms=0.0,
        correction=correction,
        anchors=(),
        entries={key: Entry(float(rng.lognormal(-5, 1)), 0.0, b.label, role, 1) for key, (b, role) in blocks},
    )


def former(table: Table, space: Space, genotypes: Genotypes) -> np.ndarray:
    """What `Table.price` was: fancy indices, and a whole population at a time."""
    array = np.asarray(genotypes)
    assert not ((array < 0) | (array >= np.asarray(space.sizes))).any()
    array = array.astype(np.uint8)
    total = np.zeros(array.shape[:-1])
    for position, cost_of in zip(space.positions, table.costs(space), strict=True):
        total = total + cost_of[position.branch_of][tuple(array[..., g] for g in position.genes)]
    return total


def price_million_seconds(rounds: int = 5) -> dict[str, dict[str, float]]:
    """For each space: seconds of `Table.price` and of its former form for a million genotypes, and their ratio."""
    out = {}
    for name in SPACES:
        space = load_space(name)
        table, genotypes = random_table(space), space.sample(np.random.default_rng(1), MILLION)
        bordered = random_table(space, correction=msgspec.structs.replace(PLAIN, border_ms=BORDERS))
        forms = {
            "seconds": table.price,
            "former_seconds": lambda *given, table=table: former(table, *given),
            "neighbours_seconds": bordered.price,
        }
        prices, seconds = {}, {form: [] for form in forms}
        for _ in range(rounds):
            for form, function in forms.items():
                start = time.perf_counter()
                prices[form] = function(space, genotypes)
                seconds[form].append(time.perf_counter() - start)
        np.testing.assert_array_equal(prices["seconds"], prices["former_seconds"])
        least = {form: min(taken) for form, taken in seconds.items()}
        out[name] = {**least, "ratio": least["former_seconds"] / least["seconds"]}
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    for name, found in price_million_seconds(parser.parse_args().rounds).items():
        print(
            f"{name:<20} a million genotypes in {found['seconds']:.3f} s; formerly {found['former_seconds']:.3f} s: "
            f"{found['ratio']:.1f} times as long; with what neighbours cost {found['neighbours_seconds']:.3f} s"
        )


if __name__ == "__main__":
    main()
