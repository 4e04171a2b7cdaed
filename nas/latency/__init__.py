"""What is known about latency: tables, how they are calibrated, their proof, and what is learned beyond them."""

from nas.latency import transfer
from nas.latency.calibration import Correction, calibrate, op_counts
from nas.latency.device import load_device
from nas.latency.features import feature_groups, features
from nas.latency.predictor import Prediction, Predictor
from nas.latency.proof import Proof, Row, prove
from nas.latency.table import Anchor, Entry, Table
from nas.latency.transfer import SpaceTransfer, Transfer

__all__ = [
    "Anchor",
    "Correction",
    "Entry",
    "Prediction",
    "Predictor",
    "Proof",
    "Row",
    "SpaceTransfer",
    "Table",
    "Transfer",
    "calibrate",
    "feature_groups",
    "features",
    "load_device",
    "op_counts",
    "prove",
    "transfer",
]
