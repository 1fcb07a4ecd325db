"""A graph on onnxruntime, without torch.

Shapes: n items, L tokens, D = embed_dim.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cloob.errors import InputError, one_line, require
from cloob.machine import processors
from cloob.models.tokenizer import Tokens

Rows = npt.NDArray[np.float32]

_TOGETHER = 32
"""Items a run: more are not faster on a CPU, and take memory."""
_STEP = 8
"""Lengths of texts are multiples of this, so that a session meets few shapes."""


class Graph:
    """A graph with one input and one output; onnxruntime opens and checks it when it is first used.

    Args:
        path: The file.
        embed_dim: D.
        pad: Of a text tower the padding, where the graph takes texts without it; else None.
    """

    def __init__(self, path: Path, embed_dim: int, pad: int | None = None) -> None:
        self.path, self.embed_dim, self.pad = path, embed_dim, pad
        self._session: Any = None

    def __getstate__(self) -> dict[str, Any]:
        """Without the session, which is made again where it is needed."""
        return self.__dict__ | {"_session": None}

    def __call__(self, items: npt.NDArray[Any]) -> Rows:
        """The rows of n items, at least one, which are in the dtype that the graph takes.

        Raises:
            InputError: onnxruntime cannot run it, or it gives rows of another shape.
        """
        if self.pad is None:
            return np.concatenate([self._run(items[i : i + _TOGETHER]) for i in range(0, len(items), _TOGETHER)])
        order = _lengths(items, self.pad).argsort(kind="stable")
        parts = [self._run(some) for some in self._trimmed(items[order])]
        return np.concatenate(parts)[order.argsort()]

    def _trimmed(self, rows: Tokens) -> Iterator[Tokens]:
        """Texts of about equal length go together, without the padding that they share."""
        assert self.pad is not None
        for start in range(0, len(rows), _TOGETHER):
            some = rows[start : start + _TOGETHER]
            longest = max(int(_lengths(some, self.pad).max()), 2)
            yield np.ascontiguousarray(some[:, : min(math.ceil(longest / _STEP) * _STEP, some.shape[1])])

    def _run(self, items: npt.NDArray[Any]) -> Rows:
        """The graph's output for at most ``_TOGETHER`` items."""
        try:
            if self._session is None:
                self._session = _open_session(self.path)
            [source] = self._session.get_inputs()
            [rows] = self._session.run(None, {source.name: items})
        except InputError:
            raise
        except Exception as error:  # onnxruntime's have no common class
            raise InputError(
                f"{self.path}: onnxruntime cannot run it ({one_line(error, 200 + len(str(self.path)))})"
            ) from None
        wanted = (len(items), self.embed_dim)
        if np.shape(rows) != wanted:
            raise InputError(f"{self.path}: gave {np.shape(rows)} for {len(items)} items; {wanted} wanted")
        return np.asarray(rows, np.float32)


def _open_session(path: Path) -> Any:
    """A session of onnxruntime on the CPU, with as many threads as torch has or would have."""
    runtime: Any = require("onnxruntime", "onnx")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = _threads()
    options.log_severity_level = 4
    return runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _threads() -> int:
    """Threads of a run: those of torch where it is imported, else ``OMP_NUM_THREADS`` or a thread a processor."""
    if (torch := sys.modules.get("torch")) is not None:
        return int(torch.get_num_threads())
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if asked.isascii() and asked.isdigit() and int(asked) > 0:
        return int(asked)
    return processors()


def _lengths(rows: Tokens, pad: int) -> Tokens:
    """(n,): how many tokens each row has up to its last one that is no padding."""
    lengths: Tokens = ((rows != pad) * np.arange(1, rows.shape[1] + 1)).max(1)
    return lengths
