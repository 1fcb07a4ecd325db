"""Two frozen encoders of any origin with a projection head on each: what ``cloob train align`` makes."""
