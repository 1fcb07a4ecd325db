"""``--profile``: torch's profiler over three steps, and the names of their parts."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from cloob.errors import InputError
from cloob.models.runs import PROFILE_FOLDER, TABLE_FILE, TRACE_FILE

logger = logging.getLogger(__name__)


def part(name: str) -> contextlib.AbstractContextManager[object]:
    """A named part of a step in the trace of a profiler, this one or a user's; costs nothing where none is running."""
    profiled = torch.autograd._profiler_enabled()  # type: ignore[attr-defined]
    return torch.profiler.record_function(f"cloob: {name}") if profiled else contextlib.nullcontext()


@contextlib.contextmanager
def profile(run: Path | None, steps: int) -> Iterator[Callable[[], None]]:
    """Writes a trace and a table of three steps to ``run/profile``; yields what is to be called after each step."""
    if run is None:
        yield lambda: None
        return
    folder = run / PROFILE_FOLDER

    def write(profiler: torch.profiler.profile) -> None:
        try:
            folder.mkdir(exist_ok=True)
            profiler.export_chrome_trace(str(folder / TRACE_FILE))
            by = "cuda_time_total" if torch.cuda.is_available() else "cpu_time_total"
            table = profiler.key_averages().table(sort_by=by, row_limit=-1, max_name_column_width=60)
            (folder / TABLE_FILE).write_text(table, encoding="utf-8")
        except OSError as error:
            raise InputError(f"{folder}: cannot be written ({error.strerror})") from error
        logger.info("%s: a table of operations by their time, and a trace for ui.perfetto.dev", folder)

    schedule = torch.profiler.schedule(wait=5 if steps > 8 else 0, warmup=1, active=3, repeat=1)
    with torch.profiler.profile(schedule=schedule, on_trace_ready=write, acc_events=True) as profiler:
        yield profiler.step
