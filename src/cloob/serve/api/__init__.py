"""What can be asked: ``schemas`` (the words), ``find`` (search, classify, explain, map), ``items``, ``about``."""
