"""An index in the browser: an HTTP API, described by OpenAPI, and one page of our own that uses it.

Read in this order: ``guard`` (who may ask, and how much), ``collection`` (an index that many ask at once), ``routes``
(what can be asked), ``app`` (all of it together). ``page/`` is what the browser gets.
"""
