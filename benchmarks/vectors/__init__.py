"""Queries over many vectors: cloob's stores beside numpy, faiss and LanceDB; see benchmarks/search.py."""
