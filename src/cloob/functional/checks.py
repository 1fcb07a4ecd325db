"""What every function of this floor asks of its tensors, and the precision in which it computes.

Shapes: N anchors or states, M candidates or stored patterns, D the embedding dimension.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def outside_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """Runs ``function`` with autocast off on the device of its first tensor argument.

    Logits of unit rows times τ⁻¹ = 30 are off by 0.1 in bfloat16; the towers may run in it, this maths does not.
    """

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        tensor = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
        if tensor is None or not torch.is_autocast_enabled(tensor.device.type):
            return function(*args, **kwargs)
        with torch.autocast(tensor.device.type, enabled=False):
            return function(*args, **kwargs)

    return wrapper


def as_rows(**named: Tensor) -> list[Tensor]:
    """Checks that all tensors are matrices of one dtype, device and width, and lifts half precision to float32.

    Args:
        **named: The matrices by the name under which the caller knows them.

    Returns:
        The matrices in the order given, float64 where they were float64 and float32 otherwise.

    Raises:
        TypeError: An argument is not a tensor.
        ValueError: Not a matrix, not floating point, or dtypes, devices or widths differ.
    """
    first_name, first = next(iter(named.items()))
    for name, tensor in named.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is a {type(tensor).__name__}; a tensor of shape (N, D) is expected")
        if tensor.ndim != 2 or not tensor.is_floating_point():
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)} and dtype {tensor.dtype}; "
                "a floating-point matrix (N, D) is expected"
            )
        for what, here, there in (
            ("dtype", tensor.dtype, first.dtype),
            ("device", tensor.device, first.device),
            ("embedding dimension", tensor.shape[1], first.shape[1]),
        ):
            if here != there:
                raise ValueError(f"{name} has {what} {here}, but {first_name} has {there}")
    return [t if t.dtype == torch.float64 else t.float() for t in named.values()]


def positive_scalar(name: str, value: float | Tensor, like: Tensor) -> Tensor:
    """A positive, finite scalar as a 0-d tensor of ``like``'s dtype and device; keeps its graph if it has one.

    Raises:
        ValueError: Not a single number, not finite or not positive, or too large or small for the dtype.
    """
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(f"{name} has shape {tuple(value.shape)}; a single positive number is expected")
    number = float(value.detach() if isinstance(value, Tensor) else value)
    range_ = torch.finfo(like.dtype)
    if not range_.tiny <= number <= range_.max:
        raise ValueError(f"{name} is {number}; a positive, finite number is expected")
    return torch.as_tensor(value, dtype=like.dtype, device=like.device).reshape(())


def check_memory(stored: Tensor) -> None:
    """Refuses an empty memory.

    Raises:
        ValueError: ``stored`` has no rows.
    """
    if len(stored) == 0:
        raise ValueError("stored has no rows: an empty memory retrieves nothing")


def check_ids(
    ids: Tensor | None, candidate_ids: Tensor | None, n: int, m: int, device: torch.device
) -> tuple[Tensor, Tensor] | None:
    """Checks the pair ids of n anchors and m candidates; ``candidate_ids`` default to ``ids`` where n = m.

    Returns:
        Both id vectors, or None if none were given.

    Raises:
        TypeError: Not a tensor.
        ValueError: Wrong length, not integers, not on ``device``, or only one of both where n ≠ m.
    """
    if ids is None:
        if candidate_ids is not None:
            raise ValueError("candidate_ids were given without ids")
        return None
    if candidate_ids is None:
        if n != m:
            raise ValueError(f"ids of {n} anchors need candidate_ids of the {m} candidates")
        candidate_ids = ids
    for name, vector, length in (("ids", ids, n), ("candidate_ids", candidate_ids, m)):
        if not isinstance(vector, Tensor):
            raise TypeError(f"{name} is a {type(vector).__name__}; a tensor of {length} integers is expected")
        if vector.shape != (length,) or vector.is_floating_point() or vector.is_complex():
            raise ValueError(
                f"{name} has shape {tuple(vector.shape)} and dtype {vector.dtype}; {length} integers are expected"
            )
        if vector.device != device:
            raise ValueError(f"{name} has device {vector.device}, but the embeddings have {device}")
    return ids, candidate_ids


def as_vector(x: Tensor, name: str) -> Tensor:
    """``x``, if it is a vector that holds something.

    Raises:
        ValueError: It is not.
    """
    if x.ndim != 1 or len(x) == 0:
        raise ValueError(f"{name}: expected a non-empty vector, got shape {tuple(x.shape)}")
    return x
