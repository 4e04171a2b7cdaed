"""The report: one HTML page that needs nothing but a browser, made from the files of a finished run, or of a table."""

from nas.drawing import draw
from nas.report.page import write_report
from nas.report.selftest import table_folders, write_table_report

__all__ = ["draw", "table_folders", "write_report", "write_table_report"]
