"""Pairs in WebDataset tar shards, on local disks and elsewhere."""
