"""``--profile``: where the time of a step goes, as a table, and a trace of some steps to look into.

The table is of steps without a profiler, which would itself take time; the trace is of the steps after them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from cloob.errors import InputError
from cloob.files import write_whole
from cloob.models.runs import PROFILE_FOLDER, TABLE_FILE, TRACE_FILE
from cloob.train.watch.spans import DATA, READING, PartTime, Spans

logger = logging.getLogger(__name__)
_WARM, _TIMED, _TRACED = 5, 10, 3
_OPERATIONS = 25


class Profile:
    """Follows the first steps that this process takes: some to warm up, ten for the table, three for the trace.

    Args:
        run: The run folder, into whose ``profile/`` table and trace go; None: nothing is followed.
        spans: The parts of a step.
        steps: That this process will take; of few steps fewer are followed.
    """

    def __init__(self, run: Path | None, spans: Spans, steps: int) -> None:
        self.run, self.spans = run, spans
        warm, traced = min(_WARM, steps // 4), min(_TRACED, max(1, steps // 6))
        self._timed_from = warm
        self._traced_from = warm + min(_TIMED, max(0, steps - warm - traced))
        self._until = self._traced_from + traced
        self._done = 0
        self._began = 0.0
        self._profiler: Any = None
        self._table = ""

    def step(self) -> None:
        """To be called when a step begins.

        Raises:
            InputError: The run folder cannot be written.
        """
        if self.run is None:
            return
        if self._done == self._timed_from:
            self.spans.take()
            self.spans.recording = True
            self._began = time.perf_counter()
        if self._done == self._traced_from:
            self._begin_trace()
        if self._done == self._until:
            self.close()
        self._done += 1

    def close(self) -> None:
        """Writes what there is, if it was not written yet; to be called when the run ends, too.

        Raises:
            InputError: The run folder cannot be written.
        """
        if self.run is None:
            return
        folder, self.run = self.run / PROFILE_FOLDER, None
        if self.spans.recording and self._profiler is None:
            self._finish_table(self._done - self._timed_from)
        self.spans.recording = False
        try:
            folder.mkdir(exist_ok=True)
            if self._profiler is not None:
                self._profiler.stop()
                self._profiler.export_chrome_trace(str(folder / TRACE_FILE))
                self._table += f"\n{_operations(self._profiler, self.spans.device)}\n"
            write_whole(folder / TABLE_FILE, self._table)
        except OSError as error:
            raise InputError(f"{folder}: cannot be written ({error.strerror})") from error
        logger.info("where the time goes (%s):\n%s", folder, self._table.partition("\n\n")[0])

    def _begin_trace(self) -> None:
        self._finish_table(self._traced_from - self._timed_from)
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.spans.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._profiler = torch.profiler.profile(activities=activities)
        self._profiler.start()

    def _finish_table(self, steps: int) -> None:
        times = self.spans.take()
        if steps > 0:
            self._table = table(times, time.perf_counter() - self._began, steps)


def table(times: Mapping[str, PartTime], seconds: float, steps: int) -> str:
    """Where the time of some steps went.

    Args:
        times: Of the parts.
        seconds: Of all steps together.
        steps: How many there were.
    """
    on_device = any(part.device is not None for part in times.values())
    rest = PartTime(seconds - sum(part.host for part in times.values()), None)
    lines = [
        f"{1000 * seconds / steps:.2f} ms a step, mean of {steps} steps; a part's time without the parts inside it"
    ]
    head = f"{'part':<24}{'ms a step':>12}{'of the time':>13}"
    lines.append(head + (f"{'on the device':>15}{'of the time':>13}" if on_device else ""))
    for name, part in [*times.items(), ("all else", rest)]:
        line = f"{name:<24}{1000 * part.host / steps:>12.2f}{part.host / seconds:>13.1%}"
        if part.device is not None:
            line += f"{1000 * part.device / steps:>15.2f}{part.device / seconds:>13.1%}"
        lines.append(line)
    return "\n".join([*lines, _verdict(times, seconds, on_device), ""])


def _verdict(times: Mapping[str, PartTime], seconds: float, on_device: bool) -> str:
    """Which of data and step is waited for."""
    nothing = PartTime(0.0, None)
    data, device = (times.get(name, nothing).host / seconds for name in (DATA, READING))
    if on_device:
        slower = "data" if data > device else "the device"
        return f"waited for: {slower} (data {data:.0%} of the time, the device {device:.0%})"
    slower = "data" if data > 0.5 else "the step"
    return f"waited for: {slower} (data {data:.0%} of the time)"


def _operations(profiler: Any, device: torch.device) -> str:
    """The operations that took longest in the traced steps."""
    key = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    shown: str = profiler.key_averages().table(sort_by=key, row_limit=_OPERATIONS, max_name_column_width=60)
    return f"operations of the traced steps, {TRACE_FILE} (chrome://tracing and ui.perfetto.dev show it)\n{shown}"
