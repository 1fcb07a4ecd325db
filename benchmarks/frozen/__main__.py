"""``python -m benchmarks.frozen``: see ``study.py``."""

import sys

from benchmarks.frozen.study import main

sys.exit(main())
