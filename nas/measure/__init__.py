"""Timing on a device: latency tables with their proof, and files against each other."""

from nas.measure.footprint import Footprint, footprint
from nas.measure.machine import busiest, hardware, load, pinned
from nas.measure.recipe import Progress, measure, prepare, runtime_class, runtime_of
from nas.measure.timing import Call, Samples, Timing, interleave, measure_files

__all__ = [
    "Call",
    "Footprint",
    "Progress",
    "Samples",
    "Timing",
    "busiest",
    "footprint",
    "hardware",
    "interleave",
    "load",
    "measure",
    "measure_files",
    "pinned",
    "prepare",
    "runtime_class",
    "runtime_of",
]
