"""The process group, exchanges between its ranks, and a gather of rows over ranks with
an exact gradient.

The gradient contract over W ranks: every rank computes the part of its rows in the
global loss. :func:`gather_rows` sends the gradients of gathered rows back to their
ranks; :func:`global_sum` returns the sum on every rank and scales the gradient by W.
Data-parallel wrappers (DDP, FSDP2) average over ranks, which takes W away: the
optimiser sees the gradient of one process with the full batch, for equal and unequal
parts.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import itertools
import os
import pickle
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from cloob.errors import InputError, one_line
from cloob.functional.private import backend_config, refuse_second_derivatives

T = TypeVar("T")


def is_initialized() -> bool:
    """Whether this process belongs to a process group."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """This process's rank; 0 outside a process group."""
    return dist.get_rank() if is_initialized() else 0


def world_size() -> int:
    """The number of ranks; 1 outside a process group."""
    return dist.get_world_size() if is_initialized() else 1


def resolve_device(name: str | torch.device) -> torch.device:
    """The device of a name; ``auto`` is CUDA, else the CPU; ``cuda`` is this rank's
    under torchrun.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        expected = "it must be auto, cpu, cuda, cuda:N or mps"
        raise InputError(f"device is {name!r}; {expected}") from None
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    lacking = _lacking(device)
    if lacking:
        raise InputError(f"device is {name!r}, but {lacking}")
    return device


def _lacking(device: torch.device) -> str:
    """What a sentence says of a device that this machine has not."""
    if device.type == "mps" and not torch.backends.mps.is_available():
        return "this machine has no Metal device; use cpu or auto"
    if device.type != "cuda":
        return ""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.index < count:
        return ""
    seen = "no CUDA device; use cpu or auto"
    if count:
        seen = f"{count} CUDA devices (cuda:0 … cuda:{count - 1})"
    return f"torch {torch.__version__} sees {seen}"


def _collective(name: str, former: str) -> Any:
    """A collective of ``torch.distributed`` by its name, or by that before torch 2.13,
    which warns there.
    """
    return getattr(dist, name, None) or getattr(dist, former)


_joined = itertools.count()


@functools.cache
def _meet(address: str | None, port: str | None) -> tuple[Any, int, int]:
    """The store of all ranks at an address, this rank and the number of ranks; one for
    the life of the process.
    """
    # a torch built without distributed has none
    from torch.distributed.rendezvous import rendezvous

    try:
        store, this_rank, ranks = next(rendezvous("env://"))
    except ValueError as error:  # a variable is missing, or is no number
        message = (
            f"WORLD_SIZE is set, but not by torchrun ({one_line(error)}); start by"
            " torchrun, or unset it"
        )
        raise InputError(message) from None
    return store, this_rank, ranks


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Joins torchrun's process group for the time inside; nothing without torchrun or
    when already joined.
    """
    if "WORLD_SIZE" not in os.environ or is_initialized():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store, this_rank, ranks = _meet(
        os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    )
    # Every restart has separate keys in the store: a rank that reads a dead one's
    # address waits for ever.
    attempt = f"{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}-{next(_joined)}"
    dist.init_process_group(
        # Small numbers between hosts go by gloo: on the device they would wait for all
        # work that is under way there.
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=dist.PrefixStore(f"attempt-{attempt}", store),  # type: ignore[attr-defined]
        rank=this_rank,
        world_size=ranks,
    )
    group = dist.group.WORLD
    try:
        yield
    finally:
        dist.destroy_process_group()
        # A group whose last reference is DDP's is freed with the interpreter's lock
        # held, and joins gloo threads that wait for that lock to free a tensor: now and
        # then a run hangs after its end. One that is never freed now and then aborts
        # the process at its very end, which is the lesser evil where a DDP is left, as
        # after an error.
        gc.collect()
        if any(
            DistributedDataParallel in type(candidate).__mro__
            for candidate in gc.get_objects()
        ):
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))
        del group


def host(device: torch.device) -> torch.device:
    """The CPU if the process group can send tensors from there, which waits for no
    device; else ``device``.
    """
    return torch.device("cpu") if "cpu:" in backend_config() else device


@dataclass(frozen=True)
class Layout:
    """The numbers of rows of all ranks, in the order of ranks.

    With one number nothing is exchanged.
    """

    sizes: tuple[int, ...]

    @property
    def total(self) -> int:
        """Rows over all ranks."""
        return sum(self.sizes)

    @property
    def local(self) -> slice:
        """This rank's rows among the gathered ones."""
        place = rank() if len(self.sizes) > 1 else 0
        start = sum(self.sizes[:place])
        return slice(start, start + self.sizes[place])


def gather_objects(value: T) -> list[T]:
    """The value of every rank, in the order of ranks, on every rank."""
    if world_size() == 1:
        return [value]
    return [of_rank for of_rank, _ in _exchange(value, None)]


def on_rank_zero(action: Callable[[], T], *, slow: bool = False) -> T:
    """``action()`` of rank 0 on every rank, also what it raises; ``slow``: it may take
    a day.
    """
    if world_size() == 1:
        return action()
    result: T | None = None
    fault: Exception | None = None
    with no_timeout() if slow else contextlib.nullcontext():
        if rank() == 0:
            try:
                result = action()
            except Exception as error:
                fault = error
    result, failure = _exchange(result, fault)[0]
    if failure is not None:
        raise fault or failure
    return cast(T, result)


@contextlib.contextmanager
def no_timeout() -> Iterator[None]:
    """Inside, ranks may work past the process group's timeout, up to a day; a barrier
    at the end.
    """
    if world_size() == 1:
        yield
        return
    group = dist.new_group(backend="gloo", timeout=timedelta(days=1))
    try:
        yield
    finally:
        dist.barrier(group)
        dist.destroy_process_group(group)


def agree(
    values: Mapping[str, Any], fault: Exception | None, device: torch.device
) -> dict[str, tuple[Any, ...]]:
    """The values of all ranks by name; if some have a ``fault``, all raise the first
    one's type with all messages.
    """
    ranks = _exchange(dict(values), fault, device)
    faults = {r: error for r, (_, error) in enumerate(ranks) if error is not None}
    if faults:
        message = "; ".join(f"rank {r}: {error}" for r, error in faults.items())
        raise type(next(iter(faults.values())))(message) from fault
    return {name: tuple(of_rank[name] for of_rank, _ in ranks) for name in values}


def _exchange(
    value: T, fault: Exception | None, device: torch.device | None = None
) -> list[tuple[T, Exception | None]]:
    """The value and the fault of every rank. torch's collectives for objects need
    numpy, and errors that pickle.
    """
    device = device or host(torch.device("cuda"))
    try:
        pickled = pickle.dumps((value, fault))
        if fault is not None:
            type(pickle.loads(pickled)[1])("")
    except Exception as error:
        # a fault that other ranks could not make is a RuntimeError there
        pickled = pickle.dumps((None, RuntimeError(str(fault or error))))
    sent = torch.frombuffer(bytearray(pickled), dtype=torch.uint8).to(device)
    size = torch.tensor([len(sent)], device=device)
    sizes = gather_rows(size, Layout((1,) * world_size())).tolist()
    parts = torch.split(gather_rows(sent, Layout(tuple(sizes))).cpu(), sizes)
    return [
        pickle.loads(ctypes.string_at(part.data_ptr(), len(part))) for part in parts
    ]


def gather_rows(rows: Tensor, layout: Layout) -> Tensor:
    """(N, …) rows of all ranks from (n, …) of all; a rank's gradient is the sum over
    ranks of those of its rows.
    """
    if len(layout.sizes) == 1:
        return rows
    gathered: Tensor = _GatherRows.apply(rows, layout)  # type: ignore[no-untyped-call]
    return gathered


def stack_ranks(value: Tensor, layout: Layout) -> Tensor:
    """(W, …) tensors of all ranks of a layout, which have one shape."""
    return gather_rows(value[None], Layout((1,) * len(layout.sizes)))


def global_sum(value: Tensor, layout: Layout) -> Tensor:
    """The sum of a 0-d value over ranks; its gradient is the sum of the incoming ones,
    W times that of one.
    """
    return stack_ranks(value, layout).sum()


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, layout: Layout) -> Tensor:
        ctx.layout = layout
        most = max(layout.sizes)
        padded = rows.new_zeros(most, *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = rows.new_empty(len(layout.sizes) * most, *rows.shape[1:])
        _collective("all_gather_single", "all_gather_into_tensor")(parts, padded)
        if layout.total == len(parts):
            return parts
        padded_parts = torch.split(parts, most)
        sizes = zip(padded_parts, layout.sizes, strict=True)
        return torch.cat([part[:n] for part, n in sizes])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        once = (
            "what is gathered over ranks can be differentiated once; gather=False has"
            " more derivatives"
        )
        refuse_second_derivatives(once)
        layout: Layout = ctx.layout
        equal = len(set(layout.sizes)) == 1
        if equal and grad.is_cuda and "cuda:nccl" in backend_config():
            summed = grad.new_empty(layout.sizes[0], *grad.shape[1:])
            _collective("reduce_scatter_single", "reduce_scatter_tensor")(
                summed, grad.contiguous()
            )
            return summed, None
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total[layout.local], None
