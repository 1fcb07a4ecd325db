"""``python -m benchmarks.pictograms``: see ``study.py``."""

import sys

from benchmarks.pictograms.study import main

sys.exit(main())
