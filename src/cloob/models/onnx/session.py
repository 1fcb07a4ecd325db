"""A graph on onnxruntime, without torch.

Shapes: n items, L tokens, D = embed_dim.
"""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cloob.errors import InputError, one_line, require
from cloob.machine import processors

Rows = npt.NDArray[np.float32]

_BATCH = 32
"""Items a run: more are not faster on a CPU, and take memory."""
_STEP = 8
"""Lengths of texts are multiples of this, so that a session meets few shapes."""


class Graph:
    """A graph with one input and one output; onnxruntime opens and checks it when it is first used.

    ``pad`` is the padding of a text tower that takes texts without it.
    """

    def __init__(self, path: Path, embed_dim: int, pad: int | None = None) -> None:
        self.path, self.embed_dim, self.pad = path, embed_dim, pad
        self._session: Any = None

    def __getstate__(self) -> dict[str, Any]:
        """Without the session, which is made again where it is needed."""
        return self.__dict__ | {"_session": None}

    def __call__(self, items: npt.NDArray[Any]) -> Rows:
        """The rows of n items, at least one, in the dtype that the graph takes; InputError where it cannot be run."""
        rows: Rows
        starts = range(0, len(items), _BATCH)
        if self.pad is None:
            return np.concatenate([self._run(items[i : i + _BATCH]) for i in starts])
        # Texts of about equal length go together, without the padding that they share.
        lengths = ((items != self.pad) * np.arange(1, items.shape[1] + 1)).max(1)
        order = lengths.argsort(kind="stable")
        parts = []
        for some in (order[i : i + _BATCH] for i in starts):
            longest = math.ceil(max(int(lengths[some].max()), 2) / _STEP) * _STEP
            parts.append(self._run(np.ascontiguousarray(items[some, :longest])))
        rows = np.concatenate(parts)[order.argsort()]
        return rows

    def _run(self, items: npt.NDArray[Any]) -> Rows:
        """The graph's output for at most ``_BATCH`` items."""
        try:
            self._session = self._session or _open_session(self.path)
            [source] = self._session.get_inputs()
            [rows] = self._session.run(None, {source.name: items})
        except InputError:
            raise
        except Exception as error:  # onnxruntime's have no common class
            reason = one_line(error, 200 + len(str(self.path)))
            raise InputError(f"{self.path}: onnxruntime cannot run it ({reason})") from None
        wanted = (len(items), self.embed_dim)
        if np.shape(rows) != wanted:
            raise InputError(f"{self.path}: gave {np.shape(rows)} for {len(items)} items; {wanted} wanted")
        return np.asarray(rows, np.float32)


def _open_session(path: Path) -> Any:
    """A session on the CPU with the threads of torch, where it is imported, else ``OMP_NUM_THREADS`` or all."""
    runtime: Any = require("onnxruntime", "export")
    options = runtime.SessionOptions()
    torch: Any = sys.modules.get("torch")
    asked = os.environ.get("OMP_NUM_THREADS", "")
    threads = torch.get_num_threads() if torch else int(asked) if asked.isdecimal() else 0
    options.intra_op_num_threads = threads or processors()
    options.log_severity_level = 4
    return runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
