"""A graph on onnxruntime in the place of a tower of torch's.

Shapes: n items, L tokens, D = embed_dim.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cloob.errors import InputError, one_line, require

_TOGETHER = 32
"""Items a run: more are not faster on a CPU, and take memory."""
_STEP = 8
"""Lengths of texts are multiples of this, so that a session meets few shapes."""
_UNKNOWN_MEMORY = 8 << 30


class GraphTower(nn.Module):
    """A graph with one input and one output; opened when it is first used.

    Args:
        path: The file, which :func:`cloob.models.onnx.graph.check_graph` has looked at.
        source: Name of its input.
        result: Name of its output.
    """

    def __init__(self, path: Path, source: str, result: str) -> None:
        super().__init__()
        self.path, self.source, self.result = path, source, result
        self._session: Any = None

    def __getstate__(self) -> dict[str, Any]:
        """Without the session, which is made again where it is needed."""
        return self.__dict__ | {"_session": None}

    def _run(self, items: Tensor) -> Tensor:
        """The graph's output for at most ``_TOGETHER`` items."""
        try:
            if self._session is None:
                self._session = open_session(self.path)
            rows = self._session.run([self.result], {self.source: items.numpy()})[0]
        except Exception as error:  # onnxruntime's have no common class
            raise InputError(f"{self.path}: onnxruntime cannot run it ({one_line(error, 200)})") from None
        return torch.from_numpy(rows)


class GraphImages(GraphTower):
    """The image tower.

    Args:
        path: As above.
        source: As above.
        result: As above.
        preprocess_cfg: open_clip's.
    """

    def __init__(self, path: Path, source: str, result: str, preprocess_cfg: dict[str, Any]) -> None:
        super().__init__(path, source, result)
        self.preprocess_cfg = preprocess_cfg

    def forward(self, images: Tensor) -> Tensor:
        """(n, 3, H, W) normalised pixels to (n, D)."""
        pixels = images.detach().to("cpu", torch.float32).contiguous()
        return torch.cat([self._run(some) for some in torch.split(pixels, _TOGETHER)]).to(images.device)


class GraphTexts(GraphTower):
    """The text tower.

    Args:
        path: As above.
        source: As above.
        result: As above.
        pad: The padding, where the graph takes texts without it; None where it takes L tokens alone.
    """

    def __init__(self, path: Path, source: str, result: str, pad: int | None) -> None:
        super().__init__(path, source, result)
        self.pad = pad

    def forward(self, tokens: Tensor) -> Tensor:
        """(n, L) tokens to (n, D); texts of about equal length go together, without the padding that they share."""
        rows = tokens.detach().to("cpu", torch.int64).contiguous()
        if self.pad is None:
            return torch.cat([self._run(some) for some in torch.split(rows, _TOGETHER)]).to(tokens.device)
        order = _lengths(rows, self.pad).argsort()
        parts = [self._run(some) for some in self._trimmed(rows[order])]
        return torch.cat(parts)[order.argsort()].to(tokens.device)

    def _trimmed(self, rows: Tensor) -> Iterator[Tensor]:
        assert self.pad is not None
        for some in torch.split(rows, _TOGETHER):
            longest = max(int(_lengths(some, self.pad).max()), 2)
            yield some[:, : min(math.ceil(longest / _STEP) * _STEP, some.shape[1])].contiguous()


def open_session(path: Path) -> Any:
    """A session of onnxruntime on the CPU, with as many threads as torch has.

    Its runs together take no more than half of the machine's memory: a graph of a few bytes can ask for any amount.
    Constants are not folded when it opens, which would take memory that nobody counts; exports have folded theirs.
    """
    runtime: Any = require("onnxruntime", "onnx")
    _limit_memory()
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
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


def _lengths(rows: Tensor, pad: int) -> Tensor:
    """(n,): how many tokens each row has up to its last one that is no padding."""
    places = torch.arange(1, rows.shape[1] + 1)
    return ((rows != pad) * places).amax(1)
