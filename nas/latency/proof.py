"""What a table is worth: predicted against measured, on networks that had no part in making it. Shares, not percent."""

import math
from collections.abc import Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from nas.agreement import interval, kendall_tau, resampled, resampled_rho, spearman_rho

Floats = NDArray[np.float64]


class Row(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One network."""

    genotype: tuple[int, ...]
    predicted_ms: float
    measured_ms: float
    p90_ms: float | None = None  # of single samples, on the machine as busy as it was


class Learning(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of a learned model, beside the simplest answer: the most similar known device, scaled."""

    measured: int  # networks that it was learned from
    held_out: bool  # False: the proof is of those very networks, each predicted from all others
    coverage: float  # share of the proof's networks whose latency is in their 80 % interval
    similar: str  # that device, and its precision
    similar_mape: float  # on the proof's networks
    similar_within_10: float
    similar_tau: float | None  # None where it predicts one value for all
    left_out_mape: float  # of the networks that it was learned from, each predicted from all others
    left_out_similar_mape: float

    def __str__(self) -> str:
        crossed = (
            f"; each of the {self.measured} measured predicted from the others {self.left_out_mape:.1%} (against "
            f"{self.left_out_similar_mape:.1%})"
        )
        order = "no order" if self.similar_tau is None else f"Kendall tau {self.similar_tau:.2f}"
        return (
            f"80 % intervals hold {self.coverage:.0%}; the most similar known device ({self.similar}), scaled: error "
            f"{self.similar_mape:.1%}, {self.similar_within_10:.0%} within 10 %, {order}"
            f"{crossed if self.held_out else ''}"
        )


class Proof(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Errors are relative to the measured latency. Worth only as much as `repeat_mape` lets it be."""

    networks: int
    mape: float  # mean absolute error
    within_5: float  # share of networks with an error of at most 5 %
    within_10: float
    bias: float  # mean error; positive: predictions are too slow
    kendall_tau: float | None  # rank agreement (tau-b); None where there is no order to agree with: `no_order`
    tau_low: float | None  # 95 % bootstrap interval over networks
    tau_high: float | None
    repeat_mape: float | None = None  # of one half of the measuring against the other, a common factor set aside
    repeat_tau: float | None = None  # of one half of the measuring with the other
    drift: float | None = None  # the same for the anchors, first third against last
    rows: tuple[Row, ...] = ()
    spearman: float | None = None  # rank correlation, with the same kind of interval
    spearman_low: float | None = None
    spearman_high: float | None = None
    no_order: str = ""  # why there are no ranks to compare
    date: str = ""  # of the measuring, ISO 8601, UTC: that of the table, or a later one
    table: str = ""  # `Table.digest` of the table that it is of; empty in proofs that are older than this field
    doubt: str = ""  # why it says nothing of the table that it lies beside
    learned: Learning | None = None  # of a learned model
    left_out: int = 0  # held-out networks that the runtime could not run

    def __str__(self) -> str:
        repeat = "" if self.repeat_mape is None else f"; measured against itself {self.repeat_mape:.1%}"
        if self.learned is not None:
            repeat += f"; {self.learned}"
        held_out = self.learned is None or self.learned.held_out
        networks = "held-out networks" if held_out else "networks, each predicted from all others"
        order = f"no order: {self.no_order}"
        if self.kendall_tau is not None:
            order = f"Kendall tau {_within(self.kendall_tau, self.tau_low, self.tau_high)}"
        if self.spearman is not None:
            order += f", Spearman {_within(self.spearman, self.spearman_low, self.spearman_high)}"
        doubt = f"{self.doubt}: " if self.doubt else ""
        if self.left_out:
            repeat += f"; {self.left_out} more could not be run, and are left out"
        return (
            f"{doubt}{self.networks} {networks}: error {self.mape:.1%} ({self.bias:+.1%} on average), "
            f"{self.within_5:.0%} within 5 %, {self.within_10:.0%} within 10 %, {order}{repeat}"
        )

    def beside(self, table: str) -> "Proof":
        """The same, with a doubt where the table that it was found beside, of that digest, is not the one it is of."""
        if self.table in ("", table):
            return self
        doubt = f"PROOF OF ANOTHER TABLE (hash {self.table}; the table here has {table})"
        return msgspec.structs.replace(self, doubt=doubt)


def _within(value: float, low: float | None, high: float | None) -> str:
    return f"{value:.2f}" + ("" if low is None or high is None else f" [{low:.2f}, {high:.2f}]")


def prove(
    predicted_ms: Floats,
    measured_ms: Floats,
    *,
    genotypes: Sequence[Sequence[int]] | NDArray[np.uint8] | None = None,
    p90_ms: Floats | None = None,
    repeat_mape: float | None = None,
    repeat_tau: float | None = None,
    drift: float | None = None,
    table: str = "",
    date: str = "",
    left_out: int = 0,
    seed: int = 0,
) -> Proof:
    """The proof of predictions [n] against measurements [n]; the rows are left out when no genotypes are given.

    Args:
        table: digest of the table that predicts.
        date: of the measuring.
        left_out: networks that the runtime could not run.
        seed: of the resampling.

    Raises:
        ValueError: fewer than two networks, or unequal lengths.
    """
    predicted, measured = np.asarray(predicted_ms, np.float64), np.asarray(measured_ms, np.float64)
    if predicted.shape != measured.shape or predicted.ndim != 1 or len(predicted) < 2:
        raise ValueError(
            f"predicted {predicted.shape} and measured {measured.shape}: two equal lengths >= 2 are needed"
        )
    error = predicted / measured - 1
    tau, rho = _number(kendall_tau(predicted, measured)), _number(spearman_rho(predicted, measured))
    taus, rhos = (of(predicted, measured, np.random.default_rng(seed)) for of in (resampled, resampled_rho))
    tau_low, tau_high = map(_number, interval(taus))
    rho_low, rho_high = map(_number, interval(rhos))
    same = "predicted" if len(set(predicted.tolist())) == 1 else "measured"
    rows = ()
    if genotypes is not None:
        p90 = [None] * len(measured) if p90_ms is None else [float(v) for v in p90_ms]
        rows = tuple(
            Row(tuple(int(v) for v in g), float(p), float(m), q)
            for g, p, m, q in zip(genotypes, predicted, measured, p90, strict=True)
        )
    return Proof(
        networks=len(measured),
        mape=float(np.abs(error).mean()),
        within_5=float((np.abs(error) <= 0.05).mean()),
        within_10=float((np.abs(error) <= 0.10).mean()),
        bias=float(error.mean()),
        kendall_tau=tau,
        tau_low=tau_low,
        tau_high=tau_high,
        repeat_mape=_number(repeat_mape),
        repeat_tau=_number(repeat_tau),
        drift=_number(drift),
        rows=rows,
        spearman=rho,
        spearman_low=rho_low,
        spearman_high=rho_high,
        no_order=f"all {same} latencies are one value" if tau is None else "",
        date=date,
        table=table,
        left_out=left_out,
    )


def _number(value: float | None) -> float | None:
    """JSON knows no NaN."""
    return None if value is None or not math.isfinite(value) else float(value)
