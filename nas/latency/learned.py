"""A latency model learned from a few networks measured whole, for devices whose blocks cannot be measured or summed.

It rests on tables of other devices (`nas.latency.transfer`): what they say of a network is most of what it knows. On
disk it is a folder of text files that diff well:

    learned.<precision>/model.json      of what, learned from whom, the hyper-parameters, a checksum over it and
    learned.<precision>/networks.csv    the networks that were measured, and
    learned.<precision>/sources/        copies of the tables it was learned from, so that it does not change with them

Weights are not kept: from the hyper-parameters and the measurements they come back in milliseconds when it is loaded.
"""

import functools
import hashlib
import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import ArrayLike, NDArray

from nas.errors import LatencyError
from nas.latency import transfer
from nas.latency.pair import read_pair, write_pair
from nas.latency.predictor import FEWEST, Kernel, Prediction, Scaling
from nas.latency.proof import Learning, Proof, prove
from nas.latency.table import Anchor, Table
from nas.latency.transfer import KnownDevices, Prior, SpaceTransfer
from nas.ops import Network
from nas.space import Space
from nas.space.space import Genotypes

Floats = NDArray[np.float64]

LEVEL = 0.8  # of the intervals
_COLUMNS = ("genotype", "latency_ms", "at_random")
_STARTS = 16  # networks from which the fastest and the slowest one are sought
_PART = 4096  # networks priced at a time, so that what is made of them stays in cache
_FAR = 100.0  # times faster or slower than every known device: more likely another unit


class Measured(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A network measured whole."""

    genotype: tuple[int, ...]
    latency_ms: float
    at_random: bool  # drawn at random, so that errors on it are like errors on others


class Source(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A known device's table."""

    device: str  # the name of its folder
    precision: str
    digest: str


class About(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What was measured, on what and how."""

    device: str  # in words
    runtime: str
    runtime_version: str
    precision: str
    threads: int
    batch: int
    hardware: str
    date: str  # ISO 8601, UTC
    command: str
    notes: tuple[str, ...] = ()
    licence: str = ""
    kind: Literal["learned"] = "learned"


class _Header(About, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Everything but the measured networks."""

    space: str
    space_digest: str
    sources: tuple[Source, ...]
    kernel: tuple[float, ...]
    mean: tuple[tuple[float, ...], ...]
    factor: tuple[tuple[float, ...], ...]
    unsupported: dict[str, str] = {}


class Learned(_Header, frozen=True, kw_only=True, eq=False, dict=True):
    """Latencies of the networks of one space on one device, with an interval for each."""

    measured: tuple[Measured, ...]
    fitted: SpaceTransfer

    @property
    def anchors(self) -> tuple[Anchor, ...]:
        """The networks it was learned from."""
        return tuple(Anchor(m.genotype, m.latency_ms) for m in self.measured)

    @property
    def digest(self) -> str:
        """Hash of everything that decides what is predicted."""
        parts = ("space_digest", "sources", "kernel", "mean", "factor", "unsupported", "measured")
        deciding = json.dumps([msgspec.to_builtins(getattr(self, name)) for name in parts], sort_keys=True)
        return hashlib.sha256(deciding.encode()).hexdigest()[:16]

    @property
    def basis(self) -> str:
        """What it was learned from, in a line."""
        share = self.fitted.transfer.share
        return (
            f"learned from {len(self.measured)} networks and {len(self.sources)} tables of known devices; the most "
            f"similar is {self.similar}, which has {1 - share:.0%} of the weight"
        )

    @property
    def caveat(self) -> str:
        """What `bound` and `reachable` are."""
        return "upper ends of 80 % intervals, the extremes as found by search, not exact"

    @property
    def similar(self) -> str:
        """The known device that orders the measured networks most like this one."""
        return _name(self.sources[self.fitted.transfer.similar])

    def predict(self, space: Space, genotypes: Genotypes) -> Prediction:
        """Of genotypes [n, genes], with 80 % intervals; infinite where the device cannot run a block.

        Raises:
            LatencyError: `space` is not the one that it was learned for.
            SpaceError: the genotypes are of another space.
        """
        self._require(space.name, space.digest)
        genotypes = space.check(genotypes)
        parts = [self.fitted.predict(genotypes[i : i + _PART], level=LEVEL) for i in range(0, len(genotypes), _PART)]
        if not parts:
            return Prediction(np.zeros(0), np.zeros(0), np.zeros(0), LEVEL)
        found = [np.concatenate([getattr(p, of) for p in parts]) for of in ("latency_ms", "low_ms", "high_ms")]
        if self.unsupported:
            cannot = space.price(genotypes, space.costs(lambda g: float(g.key in self.unsupported))) > 0
            for values in found:
                values[cannot] = np.inf
        latency_ms, low_ms, high_ms = found
        return Prediction(latency_ms, low_ms, high_ms, LEVEL)

    def price(self, space: Space, genotypes: Genotypes) -> Floats:
        """latency_ms [n] of genotypes [n, genes]; errors as of `predict`."""
        return self.predict(space, genotypes).latency_ms

    def bound(self, space: Space, genotypes: Genotypes) -> Floats:
        """The upper end of the 80 % interval [n]: 9 of 10 networks within a limit by this are within it in truth.

        A search prefers what a model underrates, so that of networks within a limit by their mean most would not be.
        """
        return self.predict(space, genotypes).high_ms

    def network_ms(self, network: Network) -> float:
        """latency_ms of one network, to the last bit as in `price`.

        Raises:
            SpaceError: it is not of the space that this was learned for.
        """
        return float(self._of(network).latency_ms[0])

    def interval_ms(self, network: Network) -> tuple[float, float]:
        """The 80 % interval of `network_ms`."""
        found = self._of(network)
        return float(found.low_ms[0]), float(found.high_ms[0])

    def parts_ms(self, network: Network) -> tuple[list[float], float]:
        """`network_ms`, divided among blocks as on the most similar known device: measured was the whole."""
        blocks_ms, once_ms = self.fitted.known.tables[self.fitted.transfer.similar].parts_ms(network)
        factor = self.network_ms(network) / (math.fsum(blocks_ms) + once_ms)
        return [ms * factor for ms in blocks_ms], once_ms * factor

    def reachable(self, space: Space) -> tuple[float, Genotypes, float, Genotypes]:
        """(smallest `bound`, its genotype, largest, its genotype), the least and greatest that a local search finds.

        From each source's own extremes and from the best random networks, one gene at a time, until none is better.
        """
        self._require(space.name, space.digest)
        return self._extremes

    def level(self, anchors_ms: Floats) -> float:
        """How fast the machine is now, given its networks measured again: 1.1 is 10 % slower than then."""
        return float(np.nanmedian(np.asarray(anchors_ms) / [m.latency_ms for m in self.measured]))

    def without(self, unsupported: dict[str, str]) -> "Learned":
        """The same, but all of these blocks (key -> why) count as ones that the device cannot run."""
        return msgspec.structs.replace(self, unsupported=unsupported)

    def save(self, folder: Path) -> Path:
        """Writes learned.<precision>/ to `folder`; returns the path of model.json.

        Raises:
            RunError: the folder cannot be written to.
        """
        where = _where(folder, self.precision)
        rows = [(" ".join(map(str, m.genotype)), repr(m.latency_ms), int(m.at_random)) for m in self.measured]
        head = {name: msgspec.to_builtins(getattr(self, name)) for name in _Header.__struct_fields__}
        for source, table in zip(self.sources, self.fitted.known.tables, strict=True):
            table.save(where / "sources" / source.device)
        write_pair(where / "networks.csv", where / "model.json", [_COLUMNS, *rows], head)
        for stale in {f.name for f in (where / "sources").iterdir()} - {s.device for s in self.sources}:
            shutil.rmtree(where / "sources" / stale)
        return where / "model.json"

    @classmethod
    def load(cls, folder: Path, precision: str, space: Space) -> "Learned":
        """What `save` wrote: it predicts the same.

        Raises:
            LatencyError: missing, damaged or edited; or learned for another space than `space`.
        """
        where = _where(folder, precision)
        rows, head = read_pair(
            where / "networks.csv", where / "model.json", what=f"learned {precision} latency model", again=_AGAIN
        )
        try:
            header = msgspec.convert(head, _Header)
            measured = tuple(
                Measured(tuple(map(int, r["genotype"].split())), float(r["latency_ms"]), r["at_random"] == "1")
                for r in rows
            )
        except (msgspec.ValidationError, KeyError, TypeError, ValueError, AttributeError) as e:
            raise LatencyError(f"{where}: this latency model is of another version of nas: {e}. {_AGAIN}") from e
        tables = [Table.load(where / "sources" / s.device, s.precision) for s in header.sources]
        for source, table in zip(header.sources, tables, strict=True):
            if table.digest != source.digest:
                raise LatencyError(
                    f"{where}/sources/{source.device}: the table is not the one that this model was learned from "
                    f"(hash {source.digest}, this one {table.digest}). {_AGAIN}"
                )
        _require_space(header, space.name, space.digest)
        arrays = (tuple(np.array(a) for a in of) for of in (header.mean, header.factor))
        prior = Prior(Kernel(np.array(header.kernel)), Scaling(*arrays))
        return cls(
            **{n: getattr(header, n) for n in _Header.__struct_fields__},
            measured=measured,
            fitted=_fit(KnownDevices(space, tuple(tables)), measured, prior),
        )

    def __repr__(self) -> str:
        return (
            f"Learned({self.device!r}, {self.runtime} {self.runtime_version}, {self.precision}, {len(self.measured)} "
            f"networks of {self.space!r} and {len(self.sources)} known devices, {self.date})"
        )

    def _of(self, network: Network) -> Prediction:
        if any(b.graph.key in self.unsupported for b in network.blocks):
            never = np.full(1, np.inf)
            return Prediction(never, never, never, LEVEL)
        return self.fitted.predict_network(network, level=LEVEL)

    def _require(self, name: str, digest: str) -> None:
        if digest != self.space_digest:
            _require_space(self, name, digest)

    @functools.cached_property
    def _extremes(self) -> tuple[float, Genotypes, float, Genotypes]:
        low, fastest = self._extreme(largest=False)
        high, slowest = self._extreme(largest=True)
        return low, fastest, high, slowest

    def _extreme(self, *, largest: bool) -> tuple[float, Genotypes]:
        """The network of smallest or largest finite `bound` that is found, and that."""
        space, sign = self.fitted.space, -1.0 if largest else 1.0

        def costs(genotypes: Genotypes) -> Floats:
            bound = self.bound(space, genotypes)
            return np.where(np.isfinite(bound), sign * bound, np.inf)

        ends = [table.reachable(space)[3 if largest else 1] for table in self.fitted.known.tables]
        pool = np.unique(np.stack([*ends, *space.sample(np.random.default_rng(0), 1024)]), axis=0)
        order = np.argsort(costs(pool), kind="stable")
        best = np.unique(np.concatenate([np.stack(ends), pool[order[:_STARTS]]]), axis=0)
        cost = costs(best)
        while True:
            around = np.stack([_neighbours(space, g) for g in best])  # [starts, neighbours, genes]
            found = costs(around.reshape(-1, around.shape[-1])).reshape(around.shape[:2])
            pick = found.argmin(1)
            better = found.min(1) < cost
            if not better.any():
                break
            rows = np.flatnonzero(better)
            best[rows], cost[rows] = around[rows, pick[rows]], found[rows, pick[rows]]
        first = int(cost.argmin())
        return float(sign * cost[first]), space.canonical(best[first])


def learn(
    about: About,
    space: Space,
    sources: Sequence[tuple[str, Table]],
    genotypes: Genotypes,
    measured_ms: ArrayLike,
    *,
    at_random: ArrayLike | None = None,
    prior: Prior | None = None,
) -> Learned:
    """The model from networks of `space` measured whole.

    Args:
        about: the device that they were measured on.
        sources: (name of the device, its table), of tables that price the space: `nas.latency.find_sources`.
        genotypes: [m, genes], different networks.
        measured_ms: [m].
        at_random: which of them were drawn at random, [m]; None: all, or nobody knows.
        prior: `transfer.space_prior` of these sources and this space, if it was learned before.

    Raises:
        LatencyError: no source, fewer than `nas.latency.predictor.FEWEST` networks, one of them twice, latencies that
            are NaN, not above 0, or all the same.
        SpaceError: genotypes of another space.
    """
    genotypes = space.canonical(space.check(genotypes))
    latency = np.asarray(measured_ms, np.float64)
    _require_different(space, genotypes, latency)
    known = KnownDevices(space, tuple(table for _, table in sources))
    prior = transfer.space_prior(known) if prior is None else prior
    drawn = np.ones(len(genotypes), bool) if at_random is None else np.asarray(at_random, bool)
    measured = tuple(
        Measured(tuple(map(int, g)), float(ms), bool(r)) for g, ms, r in zip(genotypes, latency, drawn, strict=True)
    )
    return Learned(
        **{name: getattr(about, name) for name in About.__struct_fields__},
        space=space.name,
        space_digest=space.digest,
        sources=tuple(Source(name, table.precision, table.digest) for name, table in sources),
        kernel=tuple(prior.kernel.log.tolist()),
        mean=tuple(tuple(m.tolist()) for m in prior.scaling.mean),
        factor=tuple(tuple(f.tolist()) for f in prior.scaling.factor),
        measured=measured,
        fitted=_fit(known, measured, prior),
    )


def prove_learned(
    model: Learned, genotypes: Genotypes, measured_ms: ArrayLike, *, seed: int = 0, **known: Any
) -> Proof:
    """The proof of a model on networks [n, genes] that it was not learned from, measured_ms [n].

    With fewer than two of them it is made of the networks that it was learned from, each predicted from all others.

    Args:
        seed: of the bootstrap.
        known: fields of the proof that come from measuring.
    """
    space, latency = model.fitted.space, np.array([m.latency_ms for m in model.measured])
    left_out, similar = _left_out(model)
    held_out = len(np.asarray(measured_ms)) >= 2
    if held_out:
        truth = np.asarray(measured_ms, np.float64)
        ours = model.predict(space, genotypes)
        pool = np.concatenate([[m.genotype for m in model.measured], genotypes]).astype(np.uint8)
        rows = np.arange(len(latency))
        simple = transfer.most_similar(model.fitted.known.price(pool), latency, rows)[len(latency) :]
    else:
        genotypes = np.array([m.genotype for m in model.measured], np.uint8)
        truth, ours, simple = latency, left_out, similar
    beside = prove(simple, truth, seed=seed)
    learning = Learning(
        measured=len(latency),
        held_out=held_out,
        coverage=float(((ours.low_ms <= truth) & (truth <= ours.high_ms)).mean()),
        similar=model.similar,
        similar_mape=beside.mape,
        similar_within_10=beside.within_10,
        similar_tau=beside.kendall_tau,
        left_out_mape=float(np.abs(left_out.latency_ms / latency - 1).mean()),
        left_out_similar_mape=float(np.abs(similar / latency - 1).mean()),
    )
    proof = prove(ours.latency_ms, truth, genotypes=genotypes, table=model.digest, date=model.date, seed=seed, **known)
    return msgspec.structs.replace(proof, learned=learning)


def _left_out(model: Learned) -> tuple[Prediction, Floats]:
    """Each measured network predicted from all others [m]: by the model, and by the most similar device, scaled."""
    known = model.fitted.known
    prior = Prior(model.fitted.transfer.predictor.kernel, model.fitted.transfer.predictor.scaling)
    genotypes = np.array([m.genotype for m in model.measured], np.uint8)
    known_ms, rows = known.price(genotypes), np.arange(len(genotypes))
    ours, simple = [], []
    for left in rows:
        rest = np.delete(rows, left)
        others = [model.measured[i] for i in rest]
        found = _fit(known, others, prior).predict(genotypes[[left]], level=LEVEL)
        ours.append([found.latency_ms[0], found.low_ms[0], found.high_ms[0]])
        simple.append(transfer.most_similar(known_ms, [m.latency_ms for m in others], rest)[left])
    latency_ms, low_ms, high_ms = np.array(ours).T
    return Prediction(latency_ms, low_ms, high_ms, LEVEL), np.array(simple)


def require_unit(known: KnownDevices, genotypes: Genotypes, measured_ms: Floats) -> None:
    """The latencies could be milliseconds, given what known devices take.

    Raises:
        LatencyError: they are 100 times shorter or longer than on every known device.
    """
    ratio = np.log(np.asarray(measured_ms)[:, None] / known.price(genotypes))
    nearest = float(np.exp(min(np.median(ratio, axis=0), key=abs)))
    if not 1 / _FAR <= nearest <= _FAR:
        likely = "s" if nearest < 1 else "us"
        times = f"{1 / nearest:.3g} times faster" if nearest < 1 else f"{nearest:.3g} times slower"
        raise LatencyError(
            f"read as milliseconds, these networks are {times} than on the nearest of {len(known.tables)} known "
            f"devices. If the latencies are in another unit, say so: `--unit {likely}`. If the device is like that, "
            f"`--unit ms`."
        )


def _fit(known: KnownDevices, measured: Sequence[Measured], prior: Prior) -> SpaceTransfer:
    genotypes = np.array([m.genotype for m in measured], np.uint8)
    latency = [m.latency_ms for m in measured]
    at_random = np.array([m.at_random for m in measured])
    # A quantile of so few errors does not exist; then all of them must do.
    calibrating = at_random if at_random.sum() >= LEVEL / (1 - LEVEL) - 1e-9 else None
    return transfer.fit_space(known, genotypes, latency, prior=prior, calibrating=calibrating)


def _require_different(space: Space, genotypes: Genotypes, latency_ms: Floats) -> None:
    """Networks differ, and so do their latencies; they are enough to leave one out."""
    if len(genotypes) <= FEWEST:
        raise LatencyError(f"{len(genotypes)} measured networks: at least {FEWEST + 1} are needed. Measure some more.")
    if latency_ms.shape != (len(genotypes),):
        raise LatencyError(f"latencies have shape {latency_ms.shape}: one for each of {len(genotypes)} is needed.")
    if len(np.unique(genotypes, axis=0)) < len(genotypes):
        seen: set[bytes] = set()
        twice = next(g for g in genotypes if g.tobytes() in seen or seen.add(g.tobytes()))
        raise LatencyError(
            f"network `{' '.join(map(str, twice))}` of space {space.name!r} is there twice. Leave one of them out, or "
            f"give their mean."
        )
    if len(latency_ms) > 1 and np.isfinite(latency_ms).all() and np.ptp(latency_ms) == 0:
        raise LatencyError(
            f"all {len(latency_ms)} networks take {latency_ms[0]:g} ms: nothing can be learned from that. Was it "
            f"always the same model that was timed, or is the clock too coarse? Time many inferences, and divide."
        )


def _require_space(header: _Header, name: str, digest: str) -> None:
    if header.space_digest != digest:
        raise LatencyError(
            f"the latency model of {header.device} was learned for space {header.space!r} ({header.space_digest}), and "
            f"says nothing of this {name!r} ({digest}): other images or classes, or another space. Measure networks of "
            f"this one: `nas measure {name} --networks 20`."
        )


def _neighbours(space: Space, genotype: Genotypes) -> Genotypes:
    """All genotypes [n, genes] that differ in one gene, itself included."""
    rows = np.repeat(genotype[None], sum(space.sizes), axis=0)
    at = 0
    for gene, size in enumerate(space.sizes):
        rows[at : at + size, gene] = np.arange(size)
        at += size
    return rows


def _name(source: Source) -> str:
    return f"{source.device} {source.precision}"


def _where(folder: Path, precision: str) -> Path:
    return Path(folder) / f"learned.{precision}"


_AGAIN = "Restore it, or learn it again (`nas measure SPACE --networks N`, `nas import --format networks`)."
