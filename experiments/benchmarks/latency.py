"""Question: how far may the latency tables of this machine be trusted, and what is predicted without measuring?

Run: python experiments/benchmarks/latency.py [--quick] [--devices NAME,...] [--pixels 32,224] [--precision float32]
     [--anew] [--json FILE]
     pip install -e '.[openvino,litert]' for devices of those runtimes; a device whose runtime is missing is left out
     wants the machine for itself: tables whose anchors drift are refused, and the refusal is printed in their place
     with --quick one table of 32 pixels and 40 networks, in less than 6 minutes

A table is proved on random networks that had no part in it, at another time than it was measured: only its anchors,
timed anew, tie the two together. The tables are those that `latency_models/` keeps of this machine's kind; where it
keeps none, or with --anew, they are made first, all of them before the first proof. `repeat_tau` is how far the
proof's own two halves agree in order: no prediction can be expected to do better.

Beside it: the time to price a million networks (price.py), a new device from a few measurements where the data folder
`../shared/data` of the checkout is present (few_shot.py; here Spearman's correlation, mean over draws and devices), and
estimates of TPUv2 latency by the TPU compiler: tpu_v2.py has made the result that is read here, it takes hours.

A table or proof that is refused at this time stops nothing else: it is listed as refused, with the reason, and in
FILE it is below `refused`, {device: {px: reason}}, not below `tables`; the exit status is 1 then. A FILE that is there
keeps the tables of devices that are not named, and what of them was refused: that can be tried again alone.
"""

import argparse
import datetime
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import few_shot
import msgspec
import numpy as np
import price

from nas import config
from nas.catalog import list_devices
from nas.config import Device
from nas.console import Console
from nas.errors import NasError, UnmeasuredBlock
from nas.files import write_json
from nas.latency import Proof, Table, find_table, load_device
from nas.measure import busiest, hardware, load, measure, prove_again, runtime_of
from nas.space import Space, load_space

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data"
SPACES = {32: "mobilenet_v3_32", 224: "mobilenet_v3"}
DEVICES = {
    "host_onnxruntime": ("float32", "int8"),
    "host_openvino": ("float32", "int8"),
    "host_litert": ("float32",),
    "host_xla": ("float32",),
}
FULL = config.Latency(seconds=90.0, min_rounds=40, patience=2.5, max_drift=0.03, max_busy=0.25)
QUICK = config.Latency(seconds=40.0, min_rounds=30, patience=1.5, max_drift=0.05, max_busy=0.5)


def space_at(pixels: int) -> Space:
    """The space that is measured at that size."""
    return load_space(SPACES[pixels], input_shape=(pixels, pixels, 3), classes=10 if pixels == 32 else 1000)


def tables(
    wanted: dict[str, tuple[str, ...]],
    pixels: list[int],
    settings: config.Latency,
    networks: int,
    console: Console,
    result: dict[str, Any],
    *,
    anew: bool,
) -> Iterator[None]:
    """Writes for each device, precision and size the proof of a table at another time than the table, or a refusal.

    They go to "tables" and "refused" of `result`. Yields after each of them, so that none is lost when the next is cut
    off.
    """
    ready: list[tuple[str, str, int, Table]] = []
    for device, precisions in wanted.items():
        about = load_device(device)
        try:
            runtime_of(about)
        except NasError as e:
            console.say(f"{device}: left out: {e}")
            continue
        for precision in precisions:
            for px in pixels:
                try:
                    table = None if anew else kept(about, precision, space_at(px))
                    if table is None:
                        console.start(f"table: {device}, {precision}, {px} pixels")
                        table, _ = measure(space_at(px), about, precision, settings, seed=0, progress=console.share)
                except NasError as e:
                    console.say(f"  refused: {e}")
                    put(result, "refused", device, precision, px, str(e))
                    yield
                    continue
                ready.append((device, precision, px, table))
    for device, precision, px, table in ready:
        console.start(f"proof: {device}, {precision}, {px} pixels, {networks} networks; table of {table.date}")
        about = load_device(device)
        try:
            proof = prove_again(table, space_at(px), about, settings, networks=networks, seed=1, progress=console.share)
        except NasError as e:
            console.say(f"  refused: {e}")
            put(result, "refused", device, precision, px, str(e))
            yield
            continue
        console.say(f"  {proof}; repeat tau {tau(proof.repeat_tau)}")
        found = {
            "table": table.date,
            "correction": table.correction.form,
            "proved": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "load": load(),
            **row(proof),
        }
        put(result, "tables", device, precision, px, found)
        yield


def kept(wanted: Device, precision: str, space: Space) -> Table | None:
    """The table in `latency_models/` of this machine's kind, with runtime, threads and batch of the device `wanted`."""
    for name in list_devices():
        device = load_device(name)
        like = (device.runtime, device.threads, device.batch) == (wanted.runtime, wanted.threads, wanted.batch)
        if like and device.hardware == hardware():
            try:
                return find_table(name, precision, space)[0]
            except UnmeasuredBlock:
                continue
    return None


def few_shots(*, quick: bool) -> dict[str, Any]:
    """What few_shot.py finds."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "few_shot.json"
        few_shot.main(["--data", str(DATA), "--json", str(path), *(["--quick"] if quick else [])])
        return json.loads(path.read_text())["few_shot"]


def spearman(task: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Of a task of few_shot.py, by number of measured networks, which were drawn at random.

    The baseline is the most similar known device; where no device is known, the best ridge on counts.
    """
    found = {}
    for label, of in task.items():
        if label.startswith("random "):
            means = {method: of[method]["spearman"]["mean"] for method in of if "spearman" in of[method]}
            ours = means.pop("ours")
            means.pop("difference", None)
            found[label.removeprefix("random ")] = {
                "ours": ours,
                "baseline": means.get("baseline", max(means.values())),
            }
    return found


def put(result: dict[str, Any], key: str, device: str, precision: str, px: int, found: Any) -> None:
    """`found` below `key`, "tables" or "refused"; what an earlier call has put below the other holds no longer."""
    name, other = f"{device}.{precision}", "refused" if key == "tables" else "tables"
    result[key].setdefault(name, {})[str(px)] = found
    if name in result[other]:
        result[other][name].pop(str(px), None)
        if not result[other][name]:
            del result[other][name]


def tau(found: float | None) -> str:
    """In words; none where there is no order to agree with."""
    return "none" if found is None else f"{found:.2f}"


def listing(result: dict[str, Any]) -> list[str]:
    """All tables and refusals as lines."""
    lines = [f"{'table':28} {'px':>4} {'nets':>5} {'mape':>6} {'<5%':>6} {'<10%':>6} {'tau':>5} {'repeat tau':>11}"]
    for name in sorted({*result["tables"], *result["refused"]}):
        for px, of in sorted(result["tables"].get(name, {}).items(), key=lambda item: int(item[0])):
            lines.append(
                f"{name:28} {px:>4} {of['networks']:5} {of['mape']:6.1%} {of['within_5']:6.0%} {of['within_10']:6.0%} "
                f"{tau(of['kendall_tau']):>5} {tau(of['repeat_tau']):>11}"
            )
        for px, why in sorted(result["refused"].get(name, {}).items(), key=lambda item: int(item[0])):
            lines.append(f"{name:28} {px:>4} refused: {why}")
    return lines


def row(proof: Proof) -> dict[str, Any]:
    """What is written of a proof."""
    names = ("networks", "mape", "within_5", "within_10", "bias", "kendall_tau", "tau_low", "tau_high", "spearman")
    found = {name: getattr(proof, name) for name in (*names, "repeat_tau", "repeat_mape", "drift")}
    errors = np.abs([r.predicted_ms / r.measured_ms - 1 for r in proof.rows])
    return {**found, "worst": float(errors.max())}


def main() -> int:
    """The command line; returns the exit status: 1 if anything that was asked for was refused."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one table, fewer networks, fewer draws")
    parser.add_argument("--devices", help=f"of {', '.join(DEVICES)}")
    parser.add_argument("--pixels", help="32, 224 or both")
    parser.add_argument("--precision", help="float32 or int8; all that a device has if not given")
    parser.add_argument("--networks", type=int, help="of each proof; 100, with --quick 40")
    parser.add_argument("--anew", action="store_true", help="measure tables, even where latency_models/ has them")
    parser.add_argument("--json", type=Path, help="write everything there as well")
    options = parser.parse_args()
    names = options.devices.split(",") if options.devices else ["host_onnxruntime"] if options.quick else list(DEVICES)
    if unknown := set(names) - DEVICES.keys():
        parser.error(f"--devices {', '.join(sorted(unknown))}: known are {', '.join(DEVICES)}")
    if options.precision:
        wanted = {name: tuple(p for p in DEVICES[name] if p == options.precision) for name in names}
        if not any(wanted.values()):
            parser.error(f"--precision {options.precision}: none of {', '.join(names)} is measured in it")
    else:
        wanted = {name: DEVICES[name][:1] if options.quick else DEVICES[name] for name in names}
    pixels = [int(p) for p in (options.pixels or ("32" if options.quick else "32,224")).split(",")]
    if unknown := set(pixels) - SPACES.keys():
        parser.error(f"--pixels {unknown}: known are {', '.join(map(str, SPACES))}")
    console = Console(sys.stdout)
    settings, networks = (QUICK, 40) if options.quick else (FULL, 100)
    result: dict[str, Any] = {
        "question": __doc__.partition("\n")[0].removeprefix("Question: "),
        "machine": {"hardware": hardware(), "using_cpu": busiest()},
        "settings": msgspec.to_builtins(settings),
        "tables": {},
        "refused": {},
        "price_million_seconds": {name: found["seconds"] for name, found in price.price_million_seconds(3).items()},
    }
    for name, seconds in result["price_million_seconds"].items():
        console.say(f"a million networks of {name} priced in {seconds:.3f} s")
    if DATA.is_dir():
        result["few_shot_in_full"] = in_full = few_shots(quick=options.quick)
        result["few_shot"] = {task: spearman(of) for task, of in in_full.items()}
        console.say(f"few_shot, Spearman: {json.dumps(result['few_shot'])}")
    else:
        console.say("few_shot: left out: the data are not beside the checkout")
    tpu = ROOT / "experiments" / "results" / "tpu_v2.json"
    if tpu.exists():
        result["tpu_v2"] = json.loads(tpu.read_text())["tpu_v2"]
        console.say(f"tpu_v2, as tpu_v2.py has found it: {result['tpu_v2']}")
    if options.json and options.json.exists():
        known = json.loads(options.json.read_text())
        proved = {name: {px: row for px, row in of.items() if "mape" in row} for name, of in known["tables"].items()}
        result |= {"tables": proved, "refused": known.get("refused", {})}  # older files had refusals among the tables
    for _ in tables(wanted, pixels, settings, options.networks or networks, console, result, anew=options.anew):
        if options.json:
            write_json(options.json, result)
    if options.json:
        write_json(options.json, result)
    for line in listing(result):
        console.say(line)
    asked = {(f"{device}.{precision}", str(px)) for device, of in wanted.items() for precision in of for px in pixels}
    return int(any((name, px) in asked for name, of in result["refused"].items() for px in of))


if __name__ == "__main__":
    sys.exit(main())
