"""The report: one HTML page that needs nothing but a browser, made from the files of a finished run."""

from nas.report.drawing import draw
from nas.report.page import write_report

__all__ = ["draw", "write_report"]
