"""An index in the browser: an HTTP API, described by OpenAPI, and a page that uses it.

Read in this order: ``collection`` (an index for many clients, with
``uploads``), ``routes`` (the API), ``guard`` (who may use it), ``app`` (the
application). ``page/`` is sent to the browser.
"""
