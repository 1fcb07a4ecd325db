"""From the tensors of a file to a module's weights: every key accounted for, every value finite."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from cloob.errors import InputError, printable

_SHOWN = 4
_SCALING = (Tensor.__truediv__, Tensor.__mul__, Tensor.__rmul__, Tensor.div, Tensor.mul, torch.div, torch.mul)
_IN_PLACE = (Tensor.normal_, Tensor.uniform_, Tensor.fill_, Tensor.zero_, Tensor.triu_)


@contextmanager
def without_memory() -> Iterator[None]:
    """Inside, modules are built on the meta device, without what gives fresh weights their values."""
    with torch.device("meta"), _Unfilled():
        yield


class _Unfilled(TorchFunctionMode):
    """torch has the shapes of such operations from Python code that brings torch.compile, which takes a second."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.randn and "generator" not in kwargs and (empty := torch.empty(*args, **kwargs)).is_meta:
            return empty
        if func in _SCALING and len(args) == 2 and not kwargs:
            tensors = [value for value in args if isinstance(value, Tensor)]
            if len(tensors) == 1 and tensors[0].is_meta and tensors[0].is_floating_point():
                return torch.empty(tensors[0].shape, dtype=tensors[0].dtype, device="meta")
        if func in _IN_PLACE or getattr(func, "__module__", "") == nn.init.__name__:
            tensor = args[0] if args else kwargs.get("tensor")
            if isinstance(tensor, Tensor) and tensor.is_meta:
                return tensor
        return func(*args, **kwargs)


@dataclass(frozen=True)
class Part:
    """Where a weight comes from.

    Attributes:
        names: Keys of the file; several are joined along their first dimension.
        permute: Order of the file's dimensions in the weight; None: as they are.
        lead: Dimensions of size 1 that the file has in front and the weight has not.
    """

    names: tuple[str, ...]
    permute: tuple[int, ...] | None = None
    lead: int = 0

    def stored_shape(self, weight: Tensor) -> tuple[int, ...]:
        """The shape that each of the file's tensors has to have for this weight."""
        shape = tuple(weight.shape)
        if len(self.names) > 1:
            shape = (shape[0] // len(self.names), *shape[1:])
        if self.permute is None:
            return (1,) * self.lead + shape
        return tuple(shape[self.permute.index(axis)] for axis in range(len(shape)))

    def in_layout(self, value: Tensor) -> Tensor:
        """A view of one of the file's tensors in the weight's layout."""
        value = value.reshape(value.shape[self.lead :])
        return value if self.permute is None else value.permute(self.permute)


def same_names(module: nn.Module) -> dict[str, Part]:
    """The plan for a file whose keys are the module's own."""
    return {key: Part((key,)) for key in module.state_dict()}


def surplus(tensors: Mapping[str, Tensor], plan: Mapping[str, Part]) -> frozenset[str]:
    """Keys of a file of open_clip's that hold nothing: older versions of transformers wrote them."""
    return frozenset({"text.transformer.embeddings.position_ids"} & tensors.keys()) - plan.keys()


def fill(
    module: nn.Module,
    path: Path,
    tensors: dict[str, Tensor],
    plan: Mapping[str, Part],
    ignored: Iterable[str] = (),
) -> None:
    """Loads a file's tensors, as float32, into a module that may be on the meta device.

    The plan says for each of the module's keys where it comes from; what it leaves out stays as it is. Tensors that it
    names are taken out, and copied, since the file may be mapped and change later. InputError lists what is unknown,
    missing, of another shape or dtype, NaN or infinite; but for the ``ignored`` keys.
    """
    state: dict[str, Tensor] = dict(module.state_dict())
    _check_fit(state, path, tensors, plan, ignored)
    broken: list[str] = []
    for key, part in plan.items():
        dtype = torch.float32 if state[key].is_floating_point() else state[key].dtype
        state[key] = torch.empty(state[key].shape, dtype=dtype)
        pieces = state[key].chunk(len(part.names)) if len(part.names) > 1 else (state[key],)
        for name, piece in zip(part.names, pieces, strict=True):
            piece.copy_(part.in_layout(tensors.pop(name)))
            if not _is_finite(piece):
                broken.append(f"{printable(name)} holds NaN or infinite values")
    if broken:
        raise InputError(f"{path}: its weights cannot be used: {_listed(broken)}")
    trained = {name: parameter.requires_grad for name, parameter in module.named_parameters()}
    module.load_state_dict(state, assign=True)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(trained[name])


def _check_fit(
    wanted: Mapping[str, Tensor],
    path: Path,
    tensors: Mapping[str, Tensor],
    plan: Mapping[str, Part],
    ignored: Iterable[str],
) -> None:
    """Refuses tensors that ``load_state_dict`` would take by other names, broadcast or round."""
    known = {name for part in plan.values() for name in part.names}
    missing = [f"{printable(name)} is missing" for name in known if name not in tensors]
    unknown = [f"{printable(name)} is unknown" for name in tensors if name not in known | {*ignored}]
    others = []
    for key, part in plan.items():
        shape, floating = part.stored_shape(wanted[key]), wanted[key].is_floating_point()
        for name, tensor in ((name, tensors[name]) for name in part.names if name in tensors):
            if tensor.shape != shape:
                others.append(f"{printable(name)} has shape {tuple(tensor.shape)}, {shape} is wanted")
            elif tensor.is_floating_point() != floating or (not floating and tensor.dtype != wanted[key].dtype):
                others.append(f"{printable(name)} has dtype {tensor.dtype}, another kind of numbers is wanted")
    if missing or unknown or others:
        said = "; ".join(_listed(sorted(kind)) for kind in (missing, unknown, others) if kind)
        raise InputError(f"{path}: its weights do not fit: {said}")


def _is_finite(value: Tensor) -> bool:
    """Whether all of a tensor is finite; its extremes say so, without another tensor of its size."""
    return value.numel() == 0 or bool(torch.isfinite(torch.stack(torch.aminmax(value))).all())


def _listed(complaints: list[str]) -> str:
    """The first complaints, and how many more there are."""
    more = len(complaints) - _SHOWN
    return "; ".join(complaints[:_SHOWN] + ([f"and {more} more like this"] if more > 0 else []))
