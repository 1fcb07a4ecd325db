"""The page of figures: ``docs/speed.md``, its tables recomputed from the records under ``benchmarks/results/``."""
