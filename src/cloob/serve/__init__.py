"""An index in the browser: an HTTP API, described by OpenAPI, and one page of our own that uses it.

Read in this order: ``settings`` (limits), ``collection`` (an index that many ask at once), ``api`` (what can be asked),
``guard`` (who may ask), ``app`` (all of it together), ``run`` (the process). ``page/`` is what the browser gets.
"""
