"""The report: one self-contained HTML page from results.json, metrics.jsonl and example queries.

``page`` assembles it from ``headline`` (who is ahead), ``numbers`` (tables) and ``figures``.
"""

from cloob.evaluate.report.page import ExampleQuery, Found, render_report, write_report

__all__ = ["ExampleQuery", "Found", "render_report", "write_report"]
