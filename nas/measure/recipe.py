"""From what was timed (`nas.measure.plan`) to a latency table with its proof."""

import math
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from nas import config
from nas.agreement import agreement
from nas.config import Device
from nas.errors import LatencyError
from nas.latency import Anchor, Entry, Proof, Table, calibrate, prove
from nas.latency.table import date_of
from nas.measure import bundle
from nas.measure.bundle import Progress
from nas.measure.plan import REFERENCE, REFERENCES, Plan, choose_networks, for_table, one_conv, sides_of, two_convs
from nas.ondevice.results import Recording
from nas.ondevice.stopping import combined
from nas.ondevice.timing import Timing
from nas.space import Space

RECIPE = 2  # 1 timed networks before they had settled (`nas.ondevice.timing`), which took 1.2 to 1.5 times as long
_SMALLEST_MS = 1e-6  # a block cheaper than the convs around it vary: it costs next to nothing, not less
_UNSTEADY = 0.03  # from which on it is told even where more is allowed
_ROUNDS_TO_REFUSE = 30  # in fewer, preempted samples and a drift cannot be told apart; and quiet rounds among busy ones
_BUSY = 0.25  # share of our CPUs' time that others take, from which on a round is not a quiet one
_HAMMERED = 0.15  # others may have moved an anchor where nothing tells: 0.06 to 0.14 was seen on a hammered machine


def measure(
    space: Space,
    device: Device,
    precision: str,
    settings: config.Latency,
    *,
    seed: int,
    folder: Path | None = None,
    progress: Progress | None = None,
    command: str = "nas measure",
) -> tuple[Table, Proof]:
    """The latency table of all blocks of `space` on this machine, and its proof on held-out networks.

    Args:
        device: whose runtime, threads and batch size are used; it must be the machine this runs on.
        precision: one of the device's.
        seed: of the anchors, the held-out networks, the weights and the order of rounds.
        folder: for the models and every round that is timed: a call that was cut off goes on from there.
        command: recorded in the table.

    Raises:
        DeviceError: the runtime is unknown, not installed, or does not have the precision.
        LatencyError: the machine was too uneven to measure on; `folder` holds something else.
    """
    plan = for_table(space, device, precision, settings, seed=seed)
    recording = record(plan, settings, folder=folder, progress=progress)
    with bundle.kept_if_accepted(folder):
        return evaluate(plan, recording, settings, command=command)


def record(
    plan: Plan, settings: config.Latency, *, folder: Path | None = None, progress: Progress | None = None
) -> Recording:
    """What timing `plan` on this machine gives; errors as of `measure`."""
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="nas-measure-") as temporary:
            return record(plan, settings, folder=Path(temporary), progress=progress)
    bundle.write(plan, folder, settings, progress=progress)
    return bundle.run(folder, progress=progress)


def prove_again(
    table: Table,
    space: Space,
    device: Device,
    settings: config.Latency,
    *,
    networks: int,
    seed: int,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> Proof:
    """The proof of `table` on other random networks, timed now: the table's anchors tell how fast the machine is.

    Raises:
        LatencyError: the table is of another space or runtime version; the machine was too uneven.
    """
    if table.space_digest != space.digest:
        raise LatencyError(f"the table is of space {table.space!r} ({table.space_digest}), not of this {space!r}.")
    anchors = np.array([a.genotype for a in table.anchors], np.uint8)
    _, random = choose_networks(space, 1, networks, np.random.default_rng([seed, 1]))
    held_out = random[~(random[:, None] == anchors).all(axis=2).any(axis=1)]
    if len(held_out) < 2:
        raise LatencyError(
            f"{len(random) - len(held_out)} of {len(random)} networks are anchors of the table, and a proof needs two "
            f"others: space {space.name!r} has too few networks, or --prove asks for too few."
        )
    plan = Plan(space, device, table.precision, anchors, held_out, blocks=False, seed=seed)
    recording = record(plan, settings, folder=folder, progress=progress)
    with bundle.kept_if_accepted(folder):
        accept(plan, recording, settings)
        require_version(table, recording.starts[-1]["version"])
        return proof_of(plan, recording, table, at_level=True)


def require_version(table: Table, version: str) -> None:
    """Raises:
    LatencyError: `table` was not measured with that version of its runtime, or by another recipe.
    """
    if table.recipe != RECIPE:
        raise LatencyError(
            f"the table was measured by another version of this program, which timed networks in another way (recipe "
            f"{table.recipe}, now {RECIPE}): what is timed now says nothing of it. Measure the table anew."
        )
    if version != table.runtime_version:
        raise LatencyError(
            f"the table was measured with {table.runtime} {table.runtime_version}, and here is {version}, of which "
            f"it says nothing. Install that version, or measure a table for this one."
        )


def evaluate(
    plan: Plan, recording: Recording, settings: config.Latency, *, command: str = "nas measure"
) -> tuple[Table, Proof]:
    """The table and proof that a recording of `plan` gives.

    Raises:
        LatencyError: the machine was too uneven or too busy, or the runtime cannot run what all blocks are compared
            with.
    """
    timings = recording.samples().timings()
    notes = accept(plan, recording, settings)
    start = recording.starts[-1]
    device, space = plan.device, plan.space
    table = Table(
        device=in_words(device, start["hardware"]),
        runtime=device.runtime,
        runtime_version=start["version"],
        precision=plan.precision,
        threads=device.threads,
        batch=device.batch,
        hardware=start["hardware"],
        space=space.name,
        space_digest=space.digest,
        input=space.input,
        classes=space.classes,
        recipe=RECIPE,
        date=date_of(start["time"]),
        command=command,
        notes=notes,
        unsupported={
            name.removeprefix("block "): why for name, why in recording.unsupported.items() if name.startswith("block ")
        },
        **entries(plan, timings),
    )
    return table, proof_of(plan, recording, table)


def in_words(device: Device, hardware: str) -> str:
    """What was measured: `device`, if that hardware is its own; it may be of any, or have been taken as a pattern."""
    if device.hardware == hardware:
        return device.device
    return f"{hardware}, {device.runtime}, {device.threads} thread{'s' if device.threads > 1 else ''}"


def accept(plan: Plan, recording: Recording, settings: config.Latency) -> tuple[str, ...]:
    """What to know of a recording before trusting it.

    Raises:
        LatencyError: the machine was too uneven or too busy, or the runtime cannot run what all blocks are compared
            with.
    """
    samples = recording.samples()
    lost = [name for name in recording.unsupported if name.startswith(REFERENCE)]
    if lost:
        raise LatencyError(
            f"the runtime cannot run `{lost[0]}`, with which blocks are compared: {recording.unsupported[lost[0]]}."
        )
    anchors = [name for name in plan.anchor_names if name not in recording.unsupported]
    if not anchors:
        raise LatencyError(
            f"the runtime can run none of the {len(plan.anchors)} anchor networks: "
            f"{recording.unsupported[plan.anchor_names[0]]}. Take more of them (latency.anchors), or another runtime."
        )
    others = np.array(recording.others)
    known = np.isfinite(others)
    busy = float(np.mean(others[known])) if known.any() else None
    told = f"Using CPU meanwhile: {recording.busiest or 'nothing that could be named'}."
    judged, most = len(recording.rounds) >= _ROUNDS_TO_REFUSE, settings.max_drift
    instead = (
        f"at most {most:.0%} can be used. {told} Measure when the machine is quieter, or longer (latency.seconds)."
    )
    worst = float(samples.unsteadiness(anchors).max())
    if worst > most and judged:
        raise LatencyError(
            f"the anchor networks wandered while they were timed, beyond a common factor: one of them is known to "
            f"{worst:.1%} only; {instead}"
        )
    timings = samples.timings()
    noise = float(np.sqrt(np.mean([timings[name].interval ** 2 for name in anchors])))
    if noise > most and judged:  # what takes the CPU may be invisible
        raise LatencyError(
            f"the anchor networks are known to {noise:.1%} only, after {len(recording.rounds)} rounds; {instead}"
        )
    if busy is not None and busy > settings.max_busy:
        raise LatencyError(
            f"other processes took {busy:.0%} of the time of the CPUs that were measured on; at most "
            f"{settings.max_busy:.0%} may be theirs. {told} Measure when the machine is quieter; or allow them more "
            f"(latency.max_busy), and see whether the anchors keep still."
        )
    quiet = known & (others <= _BUSY)  # a steady neighbour moves anchors without any of them wandering
    if judged and quiet.sum() >= _ROUNDS_TO_REFUSE:
        moved = float(np.hypot(samples.moved(anchors, quiet), samples.unsteadiness(anchors)).max())
    else:
        moved = _HAMMERED if judged and busy is not None and busy > _BUSY else 0.0
    if moved > most:
        why = f"one of them by {moved:.1%}" if moved != _HAMMERED else "nobody knows how far: too few rounds were quiet"
        raise LatencyError(
            f"other processes took {busy:.0%} of the time of the CPUs that were measured on, and moved the anchor "
            f"networks, {why}; {instead}"
        )
    share = "others' share of our CPUs is not known" if busy is None else f"others took {busy:.0%} of our CPUs"
    notes = [f"{recording.starts[-1]['load']} before; {len(recording.rounds)} rounds; {share}", *recording.notes]
    if worst > _UNSTEADY and judged:
        notes.append(f"uneven: one of the anchor networks is known to {worst:.0%} only")
    if not judged:
        notes.append(
            f"drift was not judged: in {len(recording.rounds)} rounds, fewer than {_ROUNDS_TO_REFUSE}, it cannot be "
            f"told from noise; longer (latency.seconds, latency.min_rounds) it would be"
        )
    if busy is not None and busy > _BUSY:
        notes.append(f"busy: {told}")
    return tuple(notes)


def proof_of(plan: Plan, recording: Recording, table: Table, *, at_level: bool = False) -> Proof:
    """Predictions of `table` against the held-out networks of a recording.

    Args:
        at_level: the recording is of another time than the table: anchors take the machine's level out.
    """
    samples = recording.samples()
    timings = samples.timings()
    names = [name for name in plan.held_out_names if name in timings]
    genotypes = plan.held_out[[plan.held_out_names.index(name) for name in names]]
    predicted = table.price(plan.space, genotypes)
    priced = np.isfinite(predicted)  # the others have a block that the runtime cannot run
    names, genotypes = [n for n, p in zip(names, priced, strict=True) if p], genotypes[priced]
    if len(names) < 2:
        raise LatencyError(
            f"of the {len(plan.held_out)} held-out networks the runtime can run {len(names)}, and a proof needs two. "
            f"Take more of them (latency.holdout)."
        )
    level = 1.0
    if at_level:
        again = [timings[n].latency_ms if n in timings else np.nan for n in plan.anchor_names]
        level = table.level(np.array(again))
    return prove(
        predicted[priced],
        np.array([timings[n].latency_ms for n in names]) / level,
        genotypes=genotypes,
        p90_ms=np.array([timings[n].p90_ms for n in names]) / level,
        repeat_mape=samples.disagreement(names, parts=2),
        repeat_tau=agreement(*samples.apart(names, parts=2)).tau,
        drift=samples.disagreement([name for name in plan.anchor_names if name in timings], parts=3),
        table=table.digest,
        date=date_of(recording.starts[-1]["time"]),
        left_out=len(plan.held_out) - len(names),
        seed=plan.seed,
    )


def entries(plan: Plan, timings: Mapping[str, Timing]) -> dict:
    """The fields of a table that come from timings."""

    def reference(name: str) -> float:
        return timings[name].latency_ms

    one = {s: float(np.mean([reference(one_conv(s, i)) for i in range(REFERENCES)])) for s in sides_of(plan.space)}
    two = {s: float(np.mean([reference(two_convs(s, i)) for i in range(REFERENCES)])) for s in one}
    of_sessions = 1.96 * _between_sessions(plan, timings)
    entries: dict[str, Entry] = {}
    for key, (block, role) in plan.space.blocks().items():
        if (timing := timings.get(f"block {key}")) is None:
            continue  # unsupported
        terms = plan.entries[f"block {key}"]
        latency_ms, interval_ms = combined(terms, timings)
        sessions_ms = of_sessions * math.hypot(*(weight * reference(name) for name, weight in terms.items()))
        interval_ms = math.hypot(interval_ms, sessions_ms)
        entries[key] = Entry(max(latency_ms, _SMALLEST_MS), interval_ms, block.label, role, timing.rounds)
    genotypes = dict(zip(plan.anchor_names, plan.anchors, strict=True))
    names = [n for n, g in genotypes.items() if n in timings and _known(plan.space, g, entries)]
    anchors = plan.anchors[[plan.anchor_names.index(n) for n in names]]
    if not names:
        raise LatencyError(
            f"every anchor has a block that the runtime cannot run; {len(plan.space.blocks()) - len(entries)} of "
            f"{len(plan.space.blocks())} blocks are so. Choose a space that this runtime supports."
        )
    measured = np.array([timings[n].latency_ms for n in names])
    networks = [[b.graph for b in plan.space.decode(g).blocks] for g in anchors]
    return {
        "entries": entries,
        "overhead_ms": max(min(2 * one[s] - two[s] for s in one), 0.0),
        "correction": calibrate(entries, networks, measured),
        "anchors": tuple(Anchor(tuple(map(int, g)), float(m)) for g, m in zip(anchors, measured, strict=True)),
    }


def _known(space: Space, genotype: np.ndarray, entries: Mapping[str, Entry]) -> bool:
    return all(b.graph.key in entries for b in space.decode(genotype).blocks)


def _between_sessions(plan: Plan, timings: Mapping[str, Timing]) -> float:
    """Standard deviation of a latency between one session of a model and another, relative, beyond sampling.

    More rounds do not lessen it. The references tell: they are the same models in several sessions.
    """
    groups = [
        [timings[name(shape, i)] for i in range(REFERENCES)]
        for shape in sides_of(plan.space)
        for name in (one_conv, two_convs)
    ]
    found = np.var([[math.log(t.latency_ms) for t in group] for group in groups], axis=1, ddof=1).mean()
    sampling = np.mean([[(t.interval / 1.96) ** 2 for t in group] for group in groups])
    return math.sqrt(max(float(found - sampling), 0.0))
