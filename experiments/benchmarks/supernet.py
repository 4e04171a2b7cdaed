"""Question: what does the elastic program cost, beside each network compiled alone and beside PyTorch?

Run: python experiments/benchmarks/supernet.py [--quick] [--only memory_ratio,recompilations] [--json FILE]
     on 2 cores about 25 minutes, with --quick less than 6; wants the machine for itself, and says if it was busy
     pip install -e '.[benchmark]' for the figures `*_vs_torch`: PyTorch, compared on CPU; without it they are left out
     on a GPU all else in float32 and bfloat16; --json FILE then writes a second file, FILE's stem.bfloat16.json

Every figure is a ratio within one run. Contestants take turns, round by round; a figure is the median over rounds of
the ratio within each round, with its quartiles. The space is mbconv_32.toml beside this file (5.8 to 21.6 MMACs), in
batches of 64 images. "Alone" is `nas.run` over the network's own graph: forward, backward and update in one program,
with nothing elastic about it.

PyTorch's supernet (torch_supernet.py) lives in a process of its own, which sleeps on a pipe while ours runs, as ours
sleeps while it runs. Two pools of threads in one process would take the cores from each other: OpenMP's spin for a
while after each loop.
"""

import argparse
import dataclasses
import functools
import importlib.util
import multiprocessing
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # on a GPU: leaves room for the process that compiles

import jax
import jax.numpy as jnp
import numpy as np
import psutil
from contestants import BATCH, Alone, Case, Ours, Torch

from nas import config, cost, native
from nas.evaluate import SubnetEvaluator
from nas.evaluate.batches import calibration_batches, labelled_batches
from nas.files import write_json
from nas.measure import busiest, hardware
from nas.search import nsga2, trial_rng
from nas.space import Space
from nas.space.load import space_file
from nas.train.precision import PRECISIONS

SPACE = Path(__file__).with_name("mbconv_32.toml")
SPACE_32 = "mobilenet_v3_32"
CALIBRATION = 2048  # images, of the figure that says so
BUSY = 0.2  # CPUs that other processes use, from which on a round counts as disturbed
TARGETS = {  # at most; of rates, at least
    "step_ratio_alone.smallest": 1.1,
    "step_ratio_alone.random": 1.1,
    "step_ratio_alone.largest": 1.1,
    "memory_ratio": 1.3,
    "compile_seconds": 120,
    "recompilations": 0,
    "train_time_vs_torch.xla": 1.5,
    "train_time_vs_torch.native": 0.9,
    "eval_rate_vs_torch": 1.7,
    "eval_rate_prefix_vs_torch": 4,
}
NEEDS_TORCH = ("train_time_vs_torch", "eval_rate_vs_torch", "eval_rate_prefix_vs_torch")
PARTS = (*dict.fromkeys(name.partition(".")[0] for name in TARGETS), "candidates_a_minute")

Seconds = Callable[[int], float]  # does the work of round number ... and says how long that took


@dataclasses.dataclass(frozen=True)
class Size:
    """How long the benchmark takes."""

    rounds: int  # of training steps
    evaluations: int  # rounds of the evaluation one by one
    steps: int  # a contestant and round
    candidates: int  # that a search proposes at a time
    generations: int  # of them: rounds of the evaluation by prefix
    calibration: int  # images for batch-norm statistics
    validation: int  # images
    searched: Path | str = SPACE_32  # whose candidates a minute are counted
    resolutions: tuple[int, ...] = (24, 32)  # of the space whose programs are counted
    extras: bool = True  # what has no target too: depth 8, rematerialisation, the share of time between passes
    subnets: int = 200  # trained and evaluated while programs are counted


FULL = Size(rounds=25, evaluations=15, steps=2, candidates=32, generations=3, calibration=2048, validation=5000)
QUICK = Size(
    rounds=9,
    evaluations=11,
    steps=1,
    candidates=24,
    generations=2,
    calibration=256,
    validation=512,
    searched=SPACE,
    resolutions=(32,),
    extras=False,
    subnets=100,
)


# figures


@dataclasses.dataclass(frozen=True)
class Figure:
    """Samples of one figure, one for each round, and the state of the machine meanwhile."""

    samples: tuple[float, ...]
    load: float  # 1-minute load average at the end, our own threads included
    busy: int = 0  # rounds before which other processes used `BUSY` CPUs or more
    more: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # what else is worth keeping

    @classmethod
    def once(cls, value: float, **more: Any) -> "Figure":
        """Of something that was measured, or counted, a single time."""
        return cls((value,), psutil.getloadavg()[0], int(others() >= BUSY), more)

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def quartiles(self) -> tuple[float, float]:
        low, high = np.quantile(self.samples, [0.25, 0.75])
        return float(low), float(high)

    def as_json(self) -> dict[str, Any]:
        """Rounded to what the clock can tell."""
        numbers = {"median": self.median, "quartiles": self.quartiles, "rounds": len(self.samples)}
        return rounded({**numbers, "load": self.load, "busy_rounds": self.busy, **self.more})


def rounded(value: Any) -> Any:
    """All floats inside `value` to four digits."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, Mapping):
        return {k: rounded(v) for k, v in value.items()}
    return [rounded(v) for v in value] if isinstance(value, list | tuple) else value


@dataclasses.dataclass(frozen=True)
class Rounds:
    """Seconds of each contestant, [rounds], measured in turns."""

    seconds: dict[str, np.ndarray]
    load: float
    busy: int

    def ratio(self, above: str, below: str, **more: Any) -> Figure:
        """Time of `above` over that of `below`, round by round."""
        samples = self.seconds[above] / self.seconds[below]
        return Figure(tuple(samples.tolist()), self.load, self.busy, more)

    def ms(self, name: str) -> float:
        """Median milliseconds of a contestant."""
        return 1e3 * float(np.median(self.seconds[name]))


def take_turns(contestants: Mapping[str, Seconds], rounds: int) -> Rounds:
    """Times `contestants` in each of so many rounds, in an order that rotates; one round before them warms up."""
    names = list(contestants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    busy = 0
    for name in names:
        contestants[name](0)
    for number in range(rounds):
        busy += others() >= BUSY
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            seconds[name].append(contestants[name](number))
    return Rounds({name: np.array(values) for name, values in seconds.items()}, psutil.getloadavg()[0], busy)


def others(seconds: float = 0.1) -> float:
    """CPUs that other processes use right now, while this one waits."""
    time.sleep(0.05)  # until our own threads have gone to sleep
    return psutil.cpu_percent(interval=seconds) / 100 * (psutil.cpu_count() or 1)


# what is measured


def step_ratio_alone(case: Case, size: Size) -> dict[str, Figure]:
    """Forward, backward and update of one subnet by the elastic program, over those of its network alone."""
    ours, out = Ours(case), {}
    for name, genotype in case.ends().items():
        alone = Alone(case, genotype)
        steps = size.steps * (6 if name == "smallest" else 2)
        rounds = take_turns(
            {
                "elastic": lambda _, g=genotype, n=steps: ours.train(g[None], n),
                "alone": lambda _, a=alone, n=steps: a.train(n),
            },
            size.rounds,
        )
        more = {"ms_elastic": rounds.ms("elastic"), "ms_alone": rounds.ms("alone")}
        out[name] = rounds.ratio("elastic", "alone", **more, images_per_second=1e3 * BATCH / rounds.ms("elastic"))
    return out


def memory_ratio(case: Case, size: Size) -> Figure:
    """What a step allocates beyond what it is given, elastic over the largest network alone."""
    largest = case.space.largest()
    ours, alone = Ours(case), Alone(case, largest)
    elastic = allocated(ours.step, lambda: ours.train(largest[None], 1))
    below = allocated(alone, lambda: alone.train(1))
    more = {"mib_elastic": elastic / 2**20, "mib_alone": below / 2**20}
    if size.extras:
        frugal = Ours(case, rematerialise=True)
        forms = {"kept": ours, "computed again": frugal}
        rounds = take_turns({name: lambda _, o=o: o.train(largest[None], 1) for name, o in forms.items()}, 5)
        more["rematerialise_time"] = rounds.ratio("computed again", "kept").median
        more["rematerialise_memory"] = allocated(frugal.step, lambda: frugal.train(largest[None], 1)) / elastic
    return Figure.once(elastic / below, **more)


def allocated(holder: Any, step: Callable[[], object]) -> int:
    """Bytes that the compiled functions among the attributes of `holder` allocate in one call of `step`.

    Results that do not take the place of an argument, of all functions, as if none were freed before the end; and the
    temporary memory of the function that needs most. As XLA reports them, for one call of each function.
    """
    seen: dict[str, Any] = {}

    def recorded(name: str, function: Any) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if name not in seen:
                seen[name] = function.lower(*args, **kwargs).compile().memory_analysis()
            return function(*args, **kwargs)

        return call

    step()  # attributes that are made when they are first asked for
    jitted = {name: f for name, f in vars(holder).items() if hasattr(f, "lower")}
    with mock.patch.dict(vars(holder), {name: recorded(name, f) for name, f in jitted.items()}):
        step()
    results = sum(m.output_size_in_bytes - m.alias_size_in_bytes for m in seen.values())
    return results + max(m.temp_size_in_bytes for m in seen.values())


def compile_seconds(case: Case, size: Size) -> Figure:
    """Cold compilation of the training step of `SPACE_32`, sandwich and distillation included, in a fresh process."""
    text = space_file(SPACE_32).read_text(encoding="utf-8")
    precision = case.settings.precision
    with tempfile.TemporaryDirectory() as folder:
        deeper = Path(folder) / "depth_8.toml"
        deeper.write_text(re.sub(r"^depth = .*$", "depth = [2, 3, 4, 5, 6, 7, 8]", text, flags=re.MULTILINE))
        seconds = compile_cold(SPACE_32, precision)
        if not size.extras:
            return Figure.once(seconds, space=SPACE_32, depth=4)
        seconds_deeper = compile_cold(str(deeper), precision)
    return Figure.once(
        seconds, space=SPACE_32, depth=4, seconds_depth_8=seconds_deeper, depth_8_over_4=seconds_deeper / seconds
    )


def compile_cold(space: str, precision: str) -> float:
    """Seconds that the first step takes longer than the second, in a new process without a compilation cache."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(first_step, space, precision).result()


def first_step(space: str, precision: str) -> float:
    """What `compile_cold` does in the new process."""
    jax.config.update("jax_enable_compilation_cache", False)
    case = Case.of(space, precision=precision)
    ours, genotypes = Ours(case), case.sandwich(np.random.default_rng(0))
    cold = ours.train(genotypes, 1)
    return cold - ours.train(genotypes, 1)


def recompilations(case: Case, size: Size) -> Figure:
    """Programs that XLA makes while random subnets are trained and evaluated, after one subnet with all layers of each
    resolution."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / SPACE.name
        path.write_text(f"resolution = {list(size.resolutions)}\n" + SPACE.read_text(encoding="utf-8"))
        case = Case.of(path, precision=case.settings.precision, images=BATCH)  # few: it is programs that count
    space = case.space
    ours = Ours(case)
    evaluate = SubnetEvaluator(case.supernet, case.params, case.data, calibration_images=BATCH, batch_size=BATCH)
    drawn = space.sample(np.random.default_rng(1), size.subnets)
    made = 0

    def count(event: str, *_: Any, **__: Any) -> None:
        nonlocal made
        made += event == "/jax/core/compile/backend_compile_duration"

    jax.monitoring.register_event_duration_secs_listener(count)
    for _ in range(8 * len(space.resolutions)):  # a step draws its resolution
        ours.train(space.without_resolution(drawn[:1]), 1)
    whole = np.repeat(space.largest()[None], len(space.resolutions), axis=0)
    if len(space.resolutions) > 1:
        whole[:, 0] = np.arange(len(space.resolutions))
    evaluate(whole)
    first, made = made, 0
    for genotype in drawn:
        ours.train(space.without_resolution(genotype[None]), 1)
    evaluate(drawn)
    return Figure.once(made, subnets=size.subnets, resolutions=len(space.resolutions), before_them=first)


def train_time_vs_torch(case: Case, size: Size, torch: Torch) -> dict[str, Figure]:
    """A sandwich step: the largest network, and the smallest and two random ones distilled from it."""
    images, labels = case.batch()
    normal = case.data.normalise(images)
    forms = {"xla": Ours(case, native_kernels=False)}
    if native.available():
        forms["native"] = Ours(case)
    rng = np.random.default_rng(2)
    drawn = [case.sandwich(rng) for _ in range(size.rounds)]
    contestants: dict[str, Seconds] = {
        name: lambda number, o=ours: o.train(drawn[number], size.steps) for name, ours in forms.items()
    }
    for form in ("channels_last", "default"):
        contestants[f"torch {form}"] = lambda number, f=form: statistics.fmean(
            torch(f, "train", drawn[number], normal, labels) for _ in range(size.steps)
        )
    rounds = take_turns(contestants, size.rounds)
    theirs = rounds.ms("torch channels_last")
    return {
        name: rounds.ratio(
            name,
            "torch channels_last",
            ms=rounds.ms(name),
            ms_torch=theirs,
            over_torch_default_format=rounds.ratio(name, "torch default").median,
        )
        for name in forms
    }


def eval_rates_vs_torch(case: Case, size: Size, torch: Torch) -> tuple[Figure, Figure]:
    """Images/s of candidates that a search proposes, statistics recalibrated for each, over those of PyTorch.

    One by one, and all candidates of a generation in one call.
    """
    case = dataclasses.replace(case, images=size.validation)
    evaluate = evaluator(case, size.calibration)
    batch, side = evaluate.batch_size, case.space.input[:2]
    calibration = calibration_batches(case.data, images=size.calibration, batch_size=batch, size=side)
    images, labels = labelled_batches(case.data, case.data.val, batch_size=batch, size=side)
    for form in ("channels_last", "default"):
        torch(form, "keep", mirrored(calibration), mirrored(images), labels)
    generations = proposed(case.space, size.candidates, size.generations)
    each = [g[None] for generation in generations for g in generation]
    counts: dict[str, list[int]] = {}

    def ours(genotypes: np.ndarray) -> float:
        start = time.perf_counter()
        counts["ours"] = evaluate(genotypes)
        return time.perf_counter() - start

    def theirs(genotypes: np.ndarray, form: str = "channels_last") -> float:
        seconds, counts[form] = torch(form, "evaluate", genotypes)
        return seconds

    ours(each[0]), theirs(each[0])
    difference = abs(counts["ours"][0] - counts["channels_last"][0]) / size.validation
    if difference > 0.01:
        raise SystemExit(f"PyTorch's supernet answers {difference:.1%} of the images otherwise: the two are not one.")
    singly = take_turns(
        {
            "ours": lambda number: ours(each[number]),
            "channels_last": lambda number: theirs(each[number]),
            "default": lambda number: theirs(each[number], "default"),
        },
        size.evaluations,
    )
    together = take_turns(
        {
            "ours": lambda number: ours(generations[number]),
            "channels_last": lambda number: theirs(generations[number]),
        },
        size.generations,
    )
    per_candidate = calibration.shape[0] * calibration.shape[1] + size.validation
    return (
        singly.ratio(
            "channels_last",
            "ours",
            images_per_second=1e3 * per_candidate / singly.ms("ours"),
            images_per_second_torch=1e3 * per_candidate / singly.ms("channels_last"),
            over_torch_default_format=singly.ratio("default", "ours").median,
        ),
        together.ratio(
            "channels_last",
            "ours",
            candidates=size.candidates,
            images_per_second=1e3 * per_candidate * size.candidates / together.ms("ours"),
        ),
    )


def candidates_a_minute(case: Case, size: Size) -> Figure:
    """Candidates a minute, one by one, with 2,048 images of calibration and 5,000 of validation."""
    evaluate = evaluator(case, CALIBRATION)
    (generation,) = proposed(case.space, size.candidates, 1)

    def seconds(genotypes: np.ndarray) -> float:
        start = time.perf_counter()
        evaluate(genotypes)
        return time.perf_counter() - start

    first = seconds(generation[:1])
    contestants: dict[str, Seconds] = {"whole": lambda number: seconds(generation[number : number + 1])}
    if size.extras:
        passes = bare_passes(case, evaluate)
        contestants["passes"] = lambda number: passes(generation[number])
    rounds = take_turns(contestants, size.rounds // 3)
    more = {
        "space": case.space.name,
        "a_generation_at_once": 60 * len(generation) / seconds(generation),
        "seconds_to_compile": first - rounds.ms("whole") / 1e3,
    }
    if size.extras:
        more["share_outside_passes"] = 1 - rounds.ratio("passes", "whole").median
    return Figure(tuple((60 / rounds.seconds["whole"]).tolist()), rounds.load, rounds.busy, more)


def bare_passes(case: Case, evaluate: SubnetEvaluator) -> Callable[[np.ndarray], float]:
    """Seconds of the forward passes that a genotype is evaluated by, with everything else taken away."""
    x = jnp.zeros((evaluate.batch_size, *case.space.input))
    params = dict(evaluate.params) | evaluate.statistics(case.space.largest())
    counts = {"calibrate": CALIBRATION // len(x), "infer": -(-evaluate.total // len(x))}
    apply = {mode: jax.jit(functools.partial(case.supernet.apply, mode=mode)) for mode in counts}

    def passes(genotype: np.ndarray) -> float:
        branches = case.supernet.branches(genotype)
        start = time.perf_counter()
        logits = [apply[mode](params, branches, x)[0] for mode, count in counts.items() for _ in range(count)]
        jax.block_until_ready(logits)
        return time.perf_counter() - start

    return passes


def evaluator(case: Case, calibration: int) -> SubnetEvaluator:
    """Of subnets with the weights of `case`, in batches of the size that a run takes by default."""
    params = jax.tree.map(jnp.asarray, case.params)
    return SubnetEvaluator(case.supernet, params, case.data, calibration, case.settings.eval_batch_size)


def proposed(space: Space, count: int, generations: int) -> list[np.ndarray]:
    """Genotypes [count, genes] that NSGA-II asks for, `generations` times, once it has found its way.

    It searches few MACs and the least of a cost that adds up over layers at random, which takes it as far from uniform
    sampling as an accuracy would.
    """
    rng = np.random.default_rng(3)
    macs = space.costs(cost.macs)
    other = [rng.normal(size=len(p.branches)) for p in space.positions]
    strategy = nsga2(space.sizes)
    state, out = strategy.init(), []
    for trial in range(config.Search().trials + generations * count):
        (wish, *_) = space.canonical(strategy.ask(trial_rng(0, trial), state, 1))
        state = strategy.tell(state, wish, np.array([space.price(wish[None], c)[0] for c in (other, macs)]))
        out.append(wish)
    return list(np.stack(out[-generations * count :]).reshape(generations, count, -1))


def mirrored(images: np.ndarray) -> np.ndarray:
    """Images [..., height, width, channels] as PyTorch's supernet wants them, to give our logits."""
    return np.ascontiguousarray(images[..., ::-1, ::-1, :])


# the whole


def measure(case: Case, size: Size, wanted: list[str]) -> Iterator[tuple[str, Figure]]:
    """Name and figure, one after the other, as they are known."""
    if jax.default_backend() != "cpu" or importlib.util.find_spec("torch") is None:
        for name in [name for name in NEEDS_TORCH if name in wanted]:
            print(f"{name}: left out, it needs a CPU and `pip install -e '.[benchmark]'`.", file=sys.stderr)
        wanted = [name for name in wanted if name not in NEEDS_TORCH]
    if "step_ratio_alone" in wanted:
        for name, figure in step_ratio_alone(case, size).items():
            yield f"step_ratio_alone.{name}", figure
    if "memory_ratio" in wanted:
        yield "memory_ratio", memory_ratio(case, size)
    if "recompilations" in wanted:
        yield "recompilations", recompilations(case, size)
    if any(name in wanted for name in NEEDS_TORCH):
        with Torch(SPACE, case.params, case.settings.optimiser) as torch:
            for name, genotype in case.ends().items():
                graph = case.space.decode(genotype).flat()
                mine = cost.macs(graph), cost.parameters(graph)
                if (theirs := torch("default", "size", genotype)) != mine:
                    raise SystemExit(f"{name}: (MACs, parameters) {theirs} in PyTorch and {mine} in ours differ.")
            if "train_time_vs_torch" in wanted:
                for name, figure in train_time_vs_torch(case, size, torch).items():
                    yield f"train_time_vs_torch.{name}", figure
            if "eval_rate_vs_torch" in wanted or "eval_rate_prefix_vs_torch" in wanted:
                names = ("eval_rate_vs_torch", "eval_rate_prefix_vs_torch")
                yield from zip(names, eval_rates_vs_torch(case, size, torch), strict=True)
    if "candidates_a_minute" in wanted:
        yield (
            "candidates_a_minute",
            candidates_a_minute(Case.of(size.searched, precision=case.settings.precision), size),
        )
    if "compile_seconds" in wanted:
        yield "compile_seconds", compile_seconds(case, size)


def report(figures: Mapping[str, Figure]) -> str:
    """A Markdown table of all figures, and what else is known of them."""
    lines = ["| figure | median | quartiles | target | rounds | busy rounds | load |", "|---|" + "---|" * 6]
    for name, f in figures.items():
        low, high = f.quartiles
        wish = f"{'>=' if 'rate' in name else '<='} {TARGETS[name]:g}" if name in TARGETS else "-"
        cells = [name, f"{f.median:.4g}", f"{low:.4g} to {high:.4g}", wish, len(f.samples), f.busy, f"{f.load:.2f}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines.append("")
    for name, f in figures.items():
        if f.more:
            lines.append(f"- {name}: " + ", ".join(f"{k.replace('_', ' ')} {rounded(v)}" for k, v in f.more.items()))
    return "\n".join(lines)


def as_json(figures: Mapping[str, Figure]) -> dict[str, Any]:
    """The figures that have targets; a name with a dot is one level down. None: was not measured."""
    out: dict[str, Any] = {}
    for name in TARGETS:
        key, _, part = name.partition(".")
        value = figures[name].as_json() if name in figures else None
        if part:
            out.setdefault(key, {})[part] = value
        else:
            out[key] = value
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_cpu = jax.default_backend() == "cpu"
    parser.add_argument("--quick", action="store_true", help="fewer rounds, candidates and images, one compilation")
    parser.add_argument("--only", default=",".join(PARTS), help=f"some of {', '.join(PARTS)}", metavar="NAME,...")
    parser.add_argument("--precision", nargs="+", choices=sorted(PRECISIONS), metavar="NAME",
                        default=["float32"] if on_cpu else ["float32", "bfloat16"])  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures that have targets here")
    options = parser.parse_args()
    wanted = options.only.split(",")
    if unknown := [name for name in wanted if name not in PARTS]:
        parser.error(f"--only: `{unknown[0]}` is none of {', '.join(PARTS)}")

    device = hardware() if on_cpu else jax.devices()[0].device_kind
    print(f"{device}; jax {jax.__version__} on {jax.default_backend()}; C++ kernels: {native.status()}")
    print(f"load average {psutil.getloadavg()[0]:.2f}; others: {busiest() or 'quiet'}\n", flush=True)
    with tempfile.TemporaryDirectory() as cache:
        if jax.config.jax_compilation_cache_dir is None:  # several figures are of one program
            jax.config.update("jax_compilation_cache_dir", cache)
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
        for name in options.precision:
            figures: dict[str, Figure] = {}
            began = time.perf_counter()
            for key, figure in measure(Case.of(SPACE, precision=name), QUICK if options.quick else FULL, wanted):
                figures[key] = figure
                print(f"{time.perf_counter() - began:5.0f} s  {key} {figure.median:.4g}", flush=True)
            print(f"\n{name}\n\n{report(figures)}\n")
            if options.json:
                path = options.json if name == options.precision[0] else options.json.with_suffix(f".{name}.json")
                write_json(path, as_json(figures))


if __name__ == "__main__":
    main()
