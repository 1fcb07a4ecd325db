"""The report: one HTML page of the results of ``cloob.evaluate``, curves of the training, and example queries."""

from cloob.evaluation.report.page import ExampleQuery, ShownPicture, write_report

__all__ = ["ExampleQuery", "ShownPicture", "write_report"]
