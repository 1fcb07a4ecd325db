"""Image-caption sources, transforms and the one Batch type."""
