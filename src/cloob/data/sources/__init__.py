"""Pairs in tables, folders and Arrow files, behind one protocol."""
