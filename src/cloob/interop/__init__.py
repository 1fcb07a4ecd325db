"""Adapters for the trainers and benchmarks people already use."""
