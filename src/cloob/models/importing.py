"""open_clip and its parts, imported in half of the time that they take beside torch's own (``benchmarks/start.py``).

The other half was torch.compile with sympy, for two small things, and Python's search for cycles in what has just been
imported. torchvision takes one function of ``torch._dynamo.utils``, which its ``roi_align`` calls, and timm tells the
compiler to leave some methods of one tower alone. Both get the same from torch when they are called (torchvision 0.28,
timm 1.0; of versions that ask for neither or for more, nothing changes).

What stands in for torch's own meanwhile would be seen by other threads: where there are any, the import is a plain one.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import sys
import threading
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from cloob.errors import require

_COMPILER = "torch._dynamo"
_ASKED = f"{_COMPILER}.utils"
_ONE_AT_A_TIME = threading.RLock()
"""Threads that import open_clip together may be handed it half made."""


def import_open_clip(part: str = "") -> ModuleType:
    """open_clip, or a module of it.

    Args:
        part: ``".transform"``, for instance.

    Raises:
        InputError: open_clip is not installed.
    """
    with _ONE_AT_A_TIME:
        if "open_clip" not in sys.modules and threading.active_count() == 1:
            with _no_collection():
                with _no_compiler(), contextlib.suppress(ModuleNotFoundError):  # open_clip, if it is there, will say it
                    importlib.import_module("torchvision")
                with _disabled_later():
                    require("open_clip", "train")
        return require(f"open_clip{part}", "train")


class _Later(ModuleType):
    """Stands for ``torch._dynamo.utils``; whatever is asked of it but the one function brings the module itself."""

    def __init__(self) -> None:
        super().__init__(_ASKED)
        self.is_compile_supported = _is_compile_supported

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what the import system looks for, and does without
            raise AttributeError(name)
        if sys.modules.get(_ASKED) is self:
            del sys.modules[_ASKED]
        return getattr(importlib.import_module(_ASKED), name)


def _is_compile_supported(device_type: Any) -> Any:
    """``torch._dynamo.utils.is_compile_supported``, imported when it is called."""
    return importlib.import_module(_ASKED).is_compile_supported(device_type)


@contextlib.contextmanager
def _no_compiler() -> Iterator[None]:
    """Imports that name ``torch._dynamo.utils`` do not bring it, as long as they take that function alone."""
    if _COMPILER in sys.modules:
        yield
        return
    later = sys.modules[_ASKED] = _Later()
    try:
        yield
    finally:
        if sys.modules.get(_ASKED) is later:
            del sys.modules[_ASKED]


@contextlib.contextmanager
def _disabled_later() -> Iterator[None]:
    """``torch.compiler.disable`` brings the compiler when what it decorates is called, as torch's own functions do."""
    torch = importlib.import_module("torch")  # by name: who searches by an ONNX folder imports this file without torch
    compiler, later = torch.compiler, getattr(torch, "_disable_dynamo", None)
    if later is None or _COMPILER in sys.modules:
        yield
        return
    now = compiler.disable
    compiler.disable = later
    try:
        yield
    finally:
        compiler.disable = now


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """No search for cycles."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
