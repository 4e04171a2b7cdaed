"""What is known about latency: tables, how they are calibrated, and the proof of what they are worth."""

from nas.latency.calibration import Correction, calibrate, op_counts
from nas.latency.device import load_device
from nas.latency.proof import Proof, Row, prove
from nas.latency.table import Anchor, Entry, Table

__all__ = [
    "Anchor",
    "Correction",
    "Entry",
    "Proof",
    "Row",
    "Table",
    "calibrate",
    "load_device",
    "op_counts",
    "prove",
]
