"""Counts what a step reads from its device; the stand-in of a device is the CPU."""

import contextlib
from collections import Counter
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

READS = {
    "_local_scalar_dense",
    "is_nonzero",
    "nonzero",
    "equal",
    "masked_select",
    "_unique2",
    "unique_dim",
}
METHODS = {
    "item",
    "tolist",
    "cpu",
    "numpy",
    "__bool__",
    "__float__",
    "__int__",
    "__index__",
}


class Operations(TorchDispatchMode):
    """Counts numbers that are read, sizes that depend on values, and copies to another
    device.
    """

    def __init__(self, counts):
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        chosen = args[1] if name in ("index", "index_put_", "index_put") else ()
        out = func(*args, **(kwargs or {}))
        if name in READS or any(
            t is not None and t.dtype in (torch.bool, torch.uint8) for t in chosen
        ):
            self.counts[name] += 1
        if isinstance(out, Tensor) and name in ("_to_copy", "copy_"):
            self.counts["copy"] += any(
                isinstance(a, Tensor) and a.device != out.device for a in args
            )
        return out


class Methods(TorchFunctionMode):
    """Counts what a tensor on the CPU answers without an operation, such as
    ``tolist``.
    """

    def __init__(self, counts):
        super().__init__()
        self.counts = counts

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.counts[func.__name__] += func.__name__ in METHODS
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def reads():
    """What a device would be waited for.

    Its stand-in is the CPU, or ``meta``, whose tensors have no values to read.

    Scales that lie on the CPU are looked at, as that waits for nothing; not so inside.
    """
    counts = Counter()
    with (
        mock.patch("cloob.functional.checks.readable", return_value=False),
        Operations(counts),
        Methods(counts),
    ):
        yield counts
    for name in list(counts):
        if not counts[name]:
            del counts[name]
