"""Labelled and captioned sets, and the suites that they form."""
