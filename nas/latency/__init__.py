"""What is known about latency: tables, how they are calibrated, their proof, and what is learned beyond them."""

from nas.latency import transfer
from nas.latency.calibration import FORMS, Correction, Tried, calibrate, op_counts
from nas.latency.device import load_device
from nas.latency.entry import Entry
from nas.latency.features import feature_groups, features
from nas.latency.imported import FORMATS, Imported, import_table
from nas.latency.predictor import Prediction, Predictor
from nas.latency.proof import Proof, Row, prove
from nas.latency.shelf import device_folder, find_table, read_proof
from nas.latency.table import Anchor, Table
from nas.latency.transfer import SpaceTransfer, Transfer

__all__ = [
    "FORMATS",
    "FORMS",
    "Anchor",
    "Correction",
    "Entry",
    "Imported",
    "Prediction",
    "Predictor",
    "Proof",
    "Row",
    "SpaceTransfer",
    "Table",
    "Transfer",
    "Tried",
    "calibrate",
    "device_folder",
    "feature_groups",
    "features",
    "find_table",
    "import_table",
    "load_device",
    "op_counts",
    "prove",
    "read_proof",
    "transfer",
]
