"""Configuration, optimisation, checkpoints and the loop."""
