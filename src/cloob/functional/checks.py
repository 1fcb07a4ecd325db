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
    for name, tensor in named.items():
        check_matrix(name, tensor)
    first_name, *others = named
    expected = traits(named[first_name])
    for name in others:
        actual = traits(named[name])
        if actual == expected:
            continue
        trait = next(trait for trait in actual if actual[trait] != expected[trait])
        raise ValueError(
            f"{name} has {trait} {actual[trait]}, but {first_name} has"
            f" {expected[trait]}"
        )
    return [tensor.to(lifted(tensor)) for tensor in named.values()]


def check_matrix(name: str, tensor: Tensor) -> None:
    """Refuses all but floating-point matrices."""
    if not isinstance(tensor, Tensor):
        kind = type(tensor).__name__
        raise TypeError(f"{name} is a {kind}; a tensor of shape (N, D) is expected")
    if tensor.ndim != 2 or not tensor.is_floating_point():
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)} and dtype {tensor.dtype}; a"
            " floating-point matrix (N, D) is expected"
        )


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
    numbers = torch.finfo(dtype)
    least = numbers.tiny if positive else numbers.min
    if not least <= number <= numbers.max:
        kind = "positive, finite" if positive else "finite"
        raise ValueError(f"{name} is {number}; a {kind} number is expected")


def extremes(**named: Tensor) -> dict[str, tuple[float, float]]:
    """Least and greatest length of every matrix' rows (NaN if one is), or a 0-d
    tensor's value; one wait for all.
    """
    ends: list[Tensor] = []
    for tensor in named.values():
        values = tensor.detach()
        ends += (values.norm(dim=1) if values.ndim else values).aminmax()
    if in_transform():  # torch 2.6 cannot list those
        numbers = [float(end) for end in ends]
    else:
        numbers = torch.stack(ends).tolist()
    pairs = zip(numbers[::2], numbers[1::2], strict=True)
    return dict(zip(named, pairs, strict=True))


def check_rows(name: str, rows: Tensor, *, zeros: bool = False) -> None:
    """Refuses a matrix with rows that are NaN, infinite or, unless ``zeros``, zero."""
    norms = rows.detach().norm(dim=1)
    bad = ~norms.isfinite()
    if not zeros:
        bad |= norms == 0
    if not bad.any():
        return
    first = int(bad.nonzero()[0])
    what = "zero" if norms[first] == 0 else "not finite"
    raise NonFiniteFeaturesError(
        f"{name}: {int(bad.sum())} of {len(rows)} rows are bad; row {first} is {what}"
    )


def one_of(name: str, value: str, options: tuple[str, ...]) -> None:
    """Refuses a setting that is not among its options."""
    if value not in options:
        choices = ", ".join(map(repr, options))
        raise ValueError(f"{name} is {value!r}; one of {choices} is expected")


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
    is_fit = vector.shape == (n,) and vector.device == device
    if not is_fit or vector.is_floating_point():
        raise ValueError(
            f"{name} has shape {tuple(vector.shape)} and dtype {vector.dtype} on"
            f" {vector.device}; {n} integers on {device} are expected"
        )


def as_vector(x: Tensor, name: str) -> Tensor:
    """``x``, if it is a non-empty vector of finite numbers."""
    if x.ndim != 1 or len(x) == 0 or not x.isfinite().all():
        expected = "expected a non-empty vector of finite numbers"
        raise ValueError(f"{name}: {expected}, got shape {tuple(x.shape)}")
    return x
