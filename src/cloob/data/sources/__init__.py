"""Pairs in tables, folders and Arrow files, with one protocol."""
