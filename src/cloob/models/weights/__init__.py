"""Other people's checkpoints: read as data, never run, and turned into encoders; one
file a family.
"""
