"""An environment that sees this one's packages and has others in front of them, for
tools that do not fit beside ours.

Installing takes seconds, since torch and what else is heavy comes from here; and two
tools that are compared run on the same torch, open_clip and Pillow.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

CLIP_BENCHMARK = ("clip-benchmark==1.6.2", "requests", "numpy<2.4")
"""What CLIP_benchmark 1.6.2 needs: it does not declare requests, and fails with a
TypeError at numpy 2.4.
"""


def overlay(requirements: tuple[str, ...], root: Path | None = None) -> str:
    """Makes the environment, or finds the one that an earlier call has made.

    Args:
        requirements: What pip installs, from where pip is configured to look.
        root: Folder of such environments; None takes one in the system's folder of
            temporary files.

    Returns:
        Its python.

    Raises:
        RuntimeError: pip failed; with the end of what it said.
    """
    base = sysconfig.get_paths()["purelib"]
    root = root or Path(tempfile.gettempdir()) / "cloob-environments"
    name = hashlib.sha256(repr((requirements, base, sys.version)).encode()).hexdigest()[
        :16
    ]
    folder = root / name
    python = folder / "bin" / "python"
    if (folder / "complete").is_file():
        return str(python)
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, with_pip=True)
    minor = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = folder / "lib" / minor / "site-packages"
    (packages / "base.pth").write_text(
        f"import site; site.addsitedir({base!r})\n", encoding="utf-8"
    )
    done = subprocess.run(
        [str(python), "-m", "pip", "install", "--quiet", *requirements],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(
            f"pip install {' '.join(requirements)}:"
            f" {(done.stderr or done.stdout)[-500:]}"
        )
    (folder / "complete").touch()
    return str(python)
