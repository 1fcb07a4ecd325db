"""``python -m cloob``, and ``torchrun … -m cloob``: the command line."""

import sys

from cloob.cli import main

if __name__ == "__main__":
    sys.exit(main())
