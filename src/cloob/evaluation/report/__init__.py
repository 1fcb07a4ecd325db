"""The report: one self-contained HTML page from results.json, metrics.jsonl and example queries.

``page`` assembles it from ``headline`` (who is ahead), ``numbers`` (tables), ``problems`` (what is missing),
``figures``, ``confusion`` and ``pictures``.
"""

from cloob.evaluation.report.confusion import Confusion
from cloob.evaluation.report.page import ExampleQuery, ReportExtras, ShownPicture, render_report, write_report

__all__ = ["Confusion", "ExampleQuery", "ReportExtras", "ShownPicture", "render_report", "write_report"]
