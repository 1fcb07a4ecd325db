"""One file a measure: zero-shot, linear probe, retrieval, geometry."""
