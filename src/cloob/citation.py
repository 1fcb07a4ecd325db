"""How to cite the paper, for model cards."""

from pathlib import Path

BIBTEX = Path(__file__).with_suffix(".bib").read_text(encoding="utf-8")
