"""What this machine has for a process."""

from __future__ import annotations

import os

_MOST_DECODERS = 16


def processors() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def decoders() -> int:
    """Threads that decode pictures, unless somebody says how many: one a processor, shared by the machine's ranks."""
    ranks = os.environ.get("LOCAL_WORLD_SIZE", "")
    return max(1, min(_MOST_DECODERS, processors() // (int(ranks) if ranks.isdecimal() and int(ranks) else 1)))
