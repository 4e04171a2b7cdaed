"""Measuring networks whole, to learn a latency model from: which ones, and what becomes of their times."""

import csv
import io
import itertools

import numpy as np

from nas import config
from nas.agreement import agreement
from nas.config import Device
from nas.errors import LatencyError
from nas.latency import Learned, Proof, Table, learn, prove_learned, transfer
from nas.latency.learned import About
from nas.latency.predictor import FEWEST
from nas.latency.table import date_of
from nas.measure.plan import Plan, choose_networks
from nas.measure.recipe import accept, in_words
from nas.ondevice.results import Recording
from nas.space import Space

SHEET = "networks.csv"


def for_networks(
    space: Space,
    device: Device,
    precision: str,
    sources: list[tuple[str, Table]],
    settings: config.Latency,
    *,
    networks: int,
    seed: int,
) -> Plan:
    """`networks` networks to learn from, as anchors (`transfer.design`), and `settings.holdout` others; no block.

    Args:
        sources: `nas.latency.find_sources`.

    Raises:
        LatencyError: too few networks to learn from, or more than there are to choose from.
    """
    if networks <= FEWEST:
        raise LatencyError(f"{networks} networks to learn from: at least {FEWEST + 1} are needed; 20 do well.")
    known = transfer.KnownDevices(space, tuple(table for _, table in sources))
    prior = transfer.space_prior(known)
    chosen, _ = transfer.design_space(known, networks, prior=prior, seed=seed)
    _, random = choose_networks(space, 1, settings.holdout + networks, np.random.default_rng([seed, 2]))
    taken = {g.tobytes() for g in chosen}
    others = [number for number, g in enumerate(random) if g.tobytes() not in taken]
    # Held-out networks are spread over the space in order of MACs: every so many keeps them so.
    keep = np.linspace(0, len(others) - 1, min(settings.holdout, len(others))).round().astype(int)
    return Plan(space, device, precision, chosen, random[[others[i] for i in keep]], blocks=False, seed=seed)


def evaluate_networks(
    plan: Plan,
    recording: Recording,
    sources: list[tuple[str, Table]],
    settings: config.Latency,
    *,
    command: str,
) -> tuple[Learned, Proof]:
    """The model learned from a recording of a plan `for_networks`, and its proof on the held-out ones.

    Raises:
        LatencyError: the machine was too uneven or too busy; too few networks could be run.
    """
    notes = accept(plan, recording, settings)
    samples = recording.samples()
    timings = samples.timings()
    start = recording.starts[-1]
    anchors = [n for n in plan.anchor_names if n in timings]
    held_out = [n for n in plan.held_out_names if n in timings]
    if lost := len(plan.anchors) + len(plan.held_out) - len(anchors) - len(held_out):
        notes = (*notes, f"{lost} networks are left out, which the runtime could not run")
    rows = [plan.anchor_names.index(n) for n in anchors]
    model = learn(
        About(
            device=in_words(plan.device, start["hardware"]),
            runtime=plan.device.runtime,
            runtime_version=start["version"],
            precision=plan.precision,
            threads=plan.device.threads,
            batch=plan.device.batch,
            hardware=start["hardware"],
            date=date_of(start["time"]),
            command=command,
            notes=notes,
        ),
        plan.space,
        sources,
        plan.anchors[rows],
        np.array([timings[n].latency_ms for n in anchors]),
        at_random=transfer.at_random(len(plan.anchors))[rows],
    )
    known = {}
    if len(held_out) >= 2:
        known = {
            "p90_ms": np.array([timings[n].p90_ms for n in held_out]),
            "repeat_mape": samples.disagreement(held_out, parts=2),
            "repeat_tau": agreement(*samples.apart(held_out, parts=2)).tau,
        }
    proof = prove_learned(
        model,
        plan.held_out[[plan.held_out_names.index(n) for n in held_out]],
        np.array([timings[n].latency_ms for n in held_out]),
        seed=plan.seed,
        drift=samples.disagreement(anchors, parts=3),
        left_out=len(plan.held_out) - len(held_out),
        **known,
    )
    return model, proof


def sheet(plan: Plan, files: dict[str, str]) -> str:
    """A CSV to fill in by hand: the networks of a plan `for_networks`, their model files, and a column for latencies.

    Lines that begin with # say what is to be measured; `nas import` holds it against what it is told.

    Args:
        files: by the name of the call, relative to where the CSV lies.
    """
    space, device = plan.space, plan.device
    about = {
        "space": space.name,
        "hash": space.digest,
        "image": "x".join(map(str, space.input)),
        "classes": space.classes,
        "runtime": device.runtime,
        "precision": plan.precision,
        "threads": device.threads,
        "batch": f"{device.batch}  (images an inference; latency_ms is of an inference)",
    }
    text = io.StringIO()
    text.writelines(f"# {key}: {value}\n" for key, value in about.items())
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["model", "genotype", "role", "latency_ms"])
    roles = ["random" if drawn else "chosen" for drawn in transfer.at_random(len(plan.anchors))]
    networks = zip(plan.anchor_names, plan.anchors, roles, strict=True)
    held_out = ((n, g, "held-out") for n, g in zip(plan.held_out_names, plan.held_out, strict=True))
    for name, genotype, role in itertools.chain(networks, held_out):
        rows.writerow([files[name], " ".join(map(str, genotype)), role, ""])
    return text.getvalue()
