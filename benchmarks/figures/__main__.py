"""``python -m benchmarks.figures``: puts the tables of all records into ``docs/speed.md``. See ``page.py``."""

from pathlib import Path

from benchmarks.figures.page import PAGE, write

if __name__ == "__main__":
    write(Path(__file__).parents[2])
    print(f"written: {PAGE}")
