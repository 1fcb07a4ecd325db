"""Checks of tensors and numbers that the functions here share."""

from __future__ import annotations

import torch
from torch import Tensor

from cloob.functional.private import in_transform, readable


class NonFiniteFeaturesError(ValueError):
    """A row of the embeddings is NaN, infinite or zero: training diverged, or a tower
    is broken.
    """


def as_rows(**named: Tensor) -> list[Tensor]:
    """The tensors as matrices of one device and width, in float64 if all of them are
    and in float32 if none is.
    """
    first_name, first = next(iter(named.items()))
    for name, tensor in named.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"{name} is a {type(tensor).__name__}; a tensor of shape (N, D) is"
                " expected"
            )
        if tensor.ndim != 2 or not tensor.is_floating_point():
            actual = f"{name} has shape {tuple(tensor.shape)} and dtype {tensor.dtype}"
            raise ValueError(f"{actual}; a floating-point matrix (N, D) is expected")
        expected = traits(first)
        for fact, value in traits(tensor).items():
            if value != expected[fact]:
                raise ValueError(
                    f"{name} has {fact} {value}, but {first_name} has {expected[fact]}"
                )
    return [t.to(lifted(t)) for t in named.values()]


def traits(rows: Tensor) -> dict[str, object]:
    """What matrices must have in common."""
    return {
        "dtype": lifted(rows),
        "device": rows.device,
        "embedding dimension": rows.shape[1],
    }


def lifted(tensor: Tensor) -> torch.dtype:
    """The dtype that is computed in."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def scalar(
    name: str, value: float | Tensor, like: Tensor, *, positive: bool = True
) -> Tensor:
    """A finite scalar as a 0-d tensor of ``like``'s dtype and device, with its graph;
    checked where no device waits.
    """
    if not isinstance(value, Tensor):
        check_number(name, float(value), like.dtype, positive=positive)
        return torch.full((), value, dtype=like.dtype, device=like.device)
    if value.numel() != 1:
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}; a single number is expected"
        )
    if value.device.type == "cpu" and readable():
        check_number(name, float(value.detach()), like.dtype, positive=positive)
    return value.to(dtype=like.dtype, device=like.device).reshape(())


def check_number(
    name: str, number: float, dtype: torch.dtype, *, positive: bool = True
) -> None:
    """Refuses a scalar that is no finite number of the dtype, or not a positive one."""
    range_ = torch.finfo(dtype)
    if not (range_.tiny if positive else range_.min) <= number <= range_.max:
        raise ValueError(
            f"{name} is {number}; a {'positive, ' if positive else ''}finite number is"
            " expected"
        )


def extremes(**named: Tensor) -> dict[str, tuple[float, float]]:
    """Least and greatest length of every matrix' rows (NaN if one is), or a 0-d
    tensor's value; one wait for all.
    """
    ends = [
        (t.norm(dim=1) if t.ndim else t).aminmax()
        for t in (tensor.detach() for tensor in named.values())
    ]
    flat = [end for pair in ends for end in pair]
    # torch 2.6 cannot list those
    numbers = list(map(float, flat)) if in_transform() else torch.stack(flat).tolist()
    return dict(zip(named, zip(numbers[::2], numbers[1::2], strict=True), strict=True))


def check_rows(name: str, rows: Tensor, *, zeros: bool = False) -> None:
    """Refuses a matrix with rows that are NaN, infinite or, unless ``zeros``, zero."""
    norms = rows.detach().norm(dim=1)
    bad = ~norms.isfinite() if zeros else ~(norms.isfinite() & (norms > 0))
    if bad.any():
        first = int(bad.nonzero()[0])
        what = "zero" if norms[first] == 0 else "not finite"
        raise NonFiniteFeaturesError(
            f"{name}: {int(bad.sum())} of {len(rows)} rows are bad; row {first} is"
            f" {what}"
        )


def one_of(name: str, value: str, options: tuple[str, ...]) -> None:
    """Refuses a setting that is not among its options."""
    if value not in options:
        raise ValueError(
            f"{name} is {value!r}; one of {', '.join(map(repr, options))} is expected"
        )


def check_ids(
    ids: Tensor | None,
    candidate_ids: Tensor | None,
    n: int,
    m: int,
    device: torch.device,
) -> tuple[Tensor, Tensor] | None:
    """The pair ids of n anchors and m candidates, which default to ``ids`` where n = m;
    None if none were given.
    """
    if ids is None and candidate_ids is None:
        return None
    if ids is None or (candidate_ids is None and n != m):
        raise ValueError(
            f"ids of {n} anchors and candidate_ids of {m} candidates are expected"
            " together"
        )
    if not isinstance(ids, Tensor):  # of numpy, or a list
        try:
            ids = torch.as_tensor(ids, device=device)
        except (TypeError, ValueError) as error:
            raise TypeError(
                "ids are integers; cloob.ids makes them of texts"
            ) from error
    candidate_ids = ids if candidate_ids is None else candidate_ids
    check_integers("ids", ids, n, device)
    check_integers("candidate_ids", candidate_ids, m, device)
    return ids, candidate_ids


def check_integers(name: str, vector: Tensor, n: int, device: torch.device) -> None:
    """Refuses all but n integers on the device."""
    whole = not vector.is_floating_point()
    if vector.shape != (n,) or vector.device != device or not whole:
        raise ValueError(
            f"{name} has shape {tuple(vector.shape)} and dtype {vector.dtype} on"
            f" {vector.device}; {n} integers on {device} are expected"
        )


def as_vector(x: Tensor, name: str) -> Tensor:
    """``x``, if it is a non-empty vector of finite numbers."""
    if x.ndim != 1 or len(x) == 0 or not x.isfinite().all():
        raise ValueError(
            f"{name}: expected a non-empty vector of finite numbers, got shape"
            f" {tuple(x.shape)}"
        )
    return x
