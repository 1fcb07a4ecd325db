"""Named parts of a step, timed on the host and, where it works by itself, on the device."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

DATA, READING = "waiting for data", "reading numbers"
"""The parts that are waits: for the batch, and for the device."""


@dataclass(frozen=True)
class PartTime:
    """What a part took, without the parts inside it, in seconds.

    Attributes:
        host: On the host.
        device: On the device; None where the device is the host.
    """

    host: float
    device: float | None


@dataclass
class _Span:
    """One passage through a part: when it began and ended, and the place of the one around it, -1 for none."""

    name: str
    around: int
    began: float
    ended: float = 0.0
    device_began: Any = None
    device_ended: Any = None


class Spans:
    """Marks the parts of a step: ``with spans("forward"): …``. Does next to nothing unless it records.

    Parts may be nested. While it records they also have a name in the trace of a profiler.

    Args:
        device: Where the work is done; on CUDA parts are timed by events on its current stream.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.recording = False
        self._spans: list[_Span] = []
        self._open: list[int] = []
        self._undivided = 0

    def __call__(self, name: str, *, undivided: bool = False) -> AbstractContextManager[None]:
        """A part.

        Args:
            name: Of the part.
            undivided: The parts inside count as this one.
        """
        return self._span(name, undivided) if self.recording and not self._undivided else nullcontext()

    @contextmanager
    def _span(self, name: str, undivided: bool) -> Iterator[None]:
        place = len(self._spans)
        span = _Span(name, self._open[-1] if self._open else -1, time.perf_counter())
        self._spans.append(span)
        self._open.append(place)
        self._undivided += undivided
        span.device_began = self._event()
        try:
            with torch.profiler.record_function(f"cloob: {name}"):
                yield
        finally:
            span.device_ended = self._event()
            span.ended = time.perf_counter()
            self._undivided -= undivided
            self._open.pop()

    def _event(self) -> Any:
        if self.device.type != "cuda":
            return None
        event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def take(self) -> dict[str, PartTime]:
        """The time of each part since the last call, in the order of their first passage; waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        spans, self._spans = self._spans, []
        host, device = ([0.0] * len(spans), [0.0] * len(spans))
        for place, span in enumerate(spans):
            here = span.ended - span.began
            there = span.device_began.elapsed_time(span.device_ended) / 1000 if span.device_began is not None else 0.0
            host[place] += here
            device[place] += there
            if span.around >= 0:
                host[span.around] -= here
                device[span.around] -= there
        times: dict[str, PartTime] = {}
        on_device = self.device.type == "cuda"
        for name in dict.fromkeys(span.name for span in spans):
            of_name = [place for place, span in enumerate(spans) if span.name == name]
            there = sum(device[place] for place in of_name)
            times[name] = PartTime(sum(host[place] for place in of_name), there if on_device else None)
        return times
