"""A graph on onnxruntime, without torch.

Shapes: n items, L tokens, D = embed_dim.
"""

from __future__ import annotations

import functools
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
_UNKNOWN_MEMORY = 8 << 30


class Graph:
    """A graph with one input and one output; opened when it is first used.

    Args:
        path: The file, which :func:`cloob.models.onnx.graph.check_graph` has looked at.
        source: Name of its input.
        result: Name of its output.
        embed_dim: D.
        pad: Of a text tower the padding, where the graph takes texts without it; else None.
    """

    def __init__(self, path: Path, source: str, result: str, embed_dim: int, pad: int | None = None) -> None:
        self.path, self.source, self.result, self.embed_dim, self.pad = path, source, result, embed_dim, pad
        self._session: Any = None

    def __getstate__(self) -> dict[str, Any]:
        """Without the session, which is made again where it is needed."""
        return self.__dict__ | {"_session": None}

    def __call__(self, items: npt.NDArray[Any]) -> Rows:
        """The rows of n items, at least one, which are in the dtype that the graph takes.

        Raises:
            InputError: onnxruntime cannot run it, or its output is not what its file says.
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
                self._session = open_session(self.path)
            found = self._session.run([self.result], {self.source: items})[0]
        except Exception as error:  # onnxruntime's have no common class
            raise InputError(f"{self.path}: onnxruntime cannot run it ({one_line(error, 200)})") from None
        rows: Rows = np.asarray(found)
        if rows.shape != (len(items), self.embed_dim) or rows.dtype != np.float32:
            wanted = f"float32 {(len(items), self.embed_dim)} wanted"
            raise InputError(f"{self.path}: gave {rows.dtype} {rows.shape} for {len(items)} items; {wanted}")
        return rows


def open_session(path: Path) -> Any:
    """A session of onnxruntime on the CPU, with as many threads as torch has or would have.

    Its runs together take no more than half of the machine's memory: a graph of a few bytes can ask for any amount.
    Constants are not folded when it opens, which would take memory that nobody counts; exports have folded theirs.
    """
    runtime: Any = require("onnxruntime", "onnx")
    _limit_memory()
    options = runtime.SessionOptions()
    options.intra_op_num_threads = _threads()
    options.log_severity_level = 4
    options.add_session_config_entry("session.use_env_allocators", "1")
    return runtime.InferenceSession(
        str(path), options, providers=["CPUExecutionProvider"], disabled_optimizers=["ConstantFolding"]
    )


@functools.cache
def _limit_memory() -> None:
    """Bounds what all sessions of this process take, once."""
    runtime: Any = require("onnxruntime", "onnx")
    kind = runtime.OrtAllocatorType.ORT_ARENA_ALLOCATOR
    place = runtime.OrtMemoryInfo("Cpu", kind, 0, runtime.OrtMemType.DEFAULT)
    runtime.create_and_register_allocator(place, runtime.OrtArenaCfg({"max_mem": _memory() // 2}))


def _memory() -> int:
    """Bytes of this machine's memory."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows
        return _UNKNOWN_MEMORY


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
