"""Importers of published CLOOB and CLIP weights, one file a family."""
