"""What is known about latency: tables, how they are calibrated, their proof, and what is learned beyond them."""

from nas.latency import transfer
from nas.latency.calibration import FORMS, Correction, Tried, calibrate, op_counts
from nas.latency.device import load_device, precisions_of
from nas.latency.entry import Entry
from nas.latency.features import feature_groups, features
from nas.latency.imported import FORMATS, Imported, Learnt, import_file, import_networks, import_table
from nas.latency.learned import About, Learned, learn, prove_learned
from nas.latency.model import LatencyModel
from nas.latency.predictor import Prediction, Predictor
from nas.latency.proof import Learning, Proof, Row, prove
from nas.latency.shelf import (
    device_folder,
    find_model,
    find_models,
    find_sources,
    find_table,
    load_model,
    own_folder,
    place,
    preferred,
    proof_beside,
    read_proof,
    table_folder,
)
from nas.latency.table import Anchor, Table
from nas.latency.transfer import SpaceTransfer, Transfer

__all__ = [
    "FORMATS",
    "FORMS",
    "About",
    "Anchor",
    "Correction",
    "Entry",
    "Imported",
    "LatencyModel",
    "Learned",
    "Learning",
    "Learnt",
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
    "find_model",
    "find_models",
    "find_sources",
    "find_table",
    "import_file",
    "import_networks",
    "import_table",
    "learn",
    "load_device",
    "load_model",
    "op_counts",
    "own_folder",
    "place",
    "precisions_of",
    "preferred",
    "proof_beside",
    "prove",
    "prove_learned",
    "read_proof",
    "table_folder",
    "transfer",
]
