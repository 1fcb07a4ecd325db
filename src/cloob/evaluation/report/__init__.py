"""The report: one HTML page of the results of ``cloob.evaluate``, curves of the training, and example queries."""

from cloob.evaluation.report.page import ExampleQuery, ReportExtras, ShownPicture, render_report, write_report
from cloob.evaluation.report.pictures import Confusion

__all__ = ["Confusion", "ExampleQuery", "ReportExtras", "ShownPicture", "render_report", "write_report"]
