"""Queries over many vectors: cloob's store beside numpy and faiss; see benchmarks/search.py."""
