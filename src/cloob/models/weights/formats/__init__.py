"""Readers of containers: bytes on the disk to plain values and to tensors that are still on the disk."""
