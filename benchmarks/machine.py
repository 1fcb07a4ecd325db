"""The machine of a benchmark, as its record names it: kind and versions, never a name
of its own.
"""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [
        line.partition(":")[2].strip()
        for line in lines
        if line.startswith("model name")
    ]
    return names[0] if names else platform.processor() or platform.machine()


def machine(*packages: str) -> dict[str, Any]:
    """CPU, cores, load (processes that wanted a core, mean of a minute), and versions
    of torch and of ``packages``.
    """
    return {
        "cpu": processor(),
        "cores": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 2),
        **{name: metadata.version(name) for name in ("torch", *packages)},
    }
