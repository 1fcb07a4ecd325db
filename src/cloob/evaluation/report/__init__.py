"""The report: one HTML page of the results of ``cloob.evaluate``, curves of the training, and example queries."""

from cloob.evaluation.report.page import ExampleQuery, ReportExtras, ShownPicture, render_report, write_report

__all__ = ["ExampleQuery", "ReportExtras", "ShownPicture", "render_report", "write_report"]
