"""Measuring on a device: latency tables with their proof, here or from a bundle, and files against each other."""

from nas.measure.bundle import Progress
from nas.measure.footprint import Footprint, footprint
from nas.measure.plan import Plan, for_table, model_of, prepare, runtime_class, runtime_of
from nas.measure.recipe import RECIPE, evaluate, measure, proof_of, prove_again, record
from nas.ondevice.machine import busiest, hardware, load, pinned
from nas.ondevice.timing import Call, Samples, Timing, interleave, measure_files

__all__ = [
    "RECIPE",
    "Call",
    "Footprint",
    "Plan",
    "Progress",
    "Samples",
    "Timing",
    "busiest",
    "evaluate",
    "footprint",
    "for_table",
    "hardware",
    "interleave",
    "load",
    "measure",
    "measure_files",
    "model_of",
    "pinned",
    "prepare",
    "proof_of",
    "prove_again",
    "record",
    "runtime_class",
    "runtime_of",
]
