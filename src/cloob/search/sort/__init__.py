"""Pictures into classes: by the names of the classes, or by a few examples of each."""
