"""Embed once; zero-shot, probe, retrieval and geometry are small callables on the
embeddings.
"""
