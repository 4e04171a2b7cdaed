"""What is known about latency: tables, how they are calibrated, and the proof of what they are worth."""

from nas.latency.calibration import Correction, calibrate, op_counts
from nas.latency.device import load_device
from nas.latency.imported import FORMATS, Imported, import_table
from nas.latency.proof import Proof, Row, prove
from nas.latency.shelf import device_folder, find_table
from nas.latency.table import Anchor, Entry, Table

__all__ = [
    "FORMATS",
    "Anchor",
    "Correction",
    "Entry",
    "Imported",
    "Proof",
    "Row",
    "Table",
    "calibrate",
    "device_folder",
    "find_table",
    "import_table",
    "load_device",
    "op_counts",
    "prove",
]
