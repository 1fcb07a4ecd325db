"""Logs, progress and trackers."""
