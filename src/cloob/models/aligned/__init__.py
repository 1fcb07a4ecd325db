"""Two frozen encoders of any origin with a trained head on top of both: what ``cloob
train align`` makes.
"""
