"""Makes an environment that holds torch, what the objective's tests run with, and
nothing else.

``python tests/torch_alone.py FOLDER`` links the packages of this environment into a new
one: those that torch, pytest, pytest-timeout and hypothesis require, and no numpy. A
second download of torch would take minutes.
"""

import re
import shutil
import sys
import venv
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement

WANTED = ("torch", "pytest", "pytest-timeout", "hypothesis")


def required(wanted):
    """The names of these packages and of all that they require here, without extras."""
    names = set()
    to_visit = list(wanted)
    while to_visit:
        name = re.sub(r"[-_.]+", "-", to_visit.pop()).lower()
        if name not in names:
            names.add(name)
            each = (Requirement(line) for line in distribution(name).requires or [])
            to_visit += [
                need.name
                for need in each
                if need.marker is None or need.marker.evaluate({"extra": ""})
            ]
    return names


def link(names, site):
    """Links the files of packages into a folder of packages, each by what is outermost
    of it.
    """
    for name in sorted(names):
        found = distribution(name)
        for outermost in {
            file.parts[0]
            for file in found.files or []
            if file.parts[0] not in ("..", "__pycache__")
        }:
            target = site / outermost
            if not target.exists():
                target.symlink_to(Path(str(found.locate_file(outermost))).resolve())


def main():
    folder = Path(sys.argv[1])
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, with_pip=False, symlinks=True)
    names = required(WANTED)
    assert "numpy" not in names, names
    link(names, next(folder.glob("lib/python*/site-packages")))


if __name__ == "__main__":
    main()
