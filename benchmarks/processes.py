"""What a process costs: CPU and wall seconds of a command from its start to its end."""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Cost(NamedTuple):
    """Seconds of a process and its children: CPU (user and system), and wall."""

    cpu_seconds: float
    seconds: float


def measure(words: Sequence[str], code: int = 0, lines: int | None = None) -> Cost:
    """Runs a command.

    Args:
        words: The command.
        code: The exit code that it must have.
        lines: How many lines it must write to stderr; None: any number.

    Raises:
        SystemExit: It ends in another way.
    """
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(words, check=False, capture_output=True, text=True, env=environment)
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode != code or (lines is not None and len(done.stderr.splitlines()) != lines):
        raise SystemExit(f"{' '.join(words)}: exit code {done.returncode}, {code} expected\n{done.stderr[-2000:]}")
    return Cost(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall)


def medians(costs: Mapping[str, Sequence[Cost]]) -> dict[str, dict[str, float]]:
    """The medians of each name's processes, by the fields of ``Cost``."""
    return {
        name: {field: statistics.median(getattr(cost, field) for cost in some) for field in Cost._fields}
        for name, some in costs.items()
    }
