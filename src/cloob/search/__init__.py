"""Index, query and page."""
