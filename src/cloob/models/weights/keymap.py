"""From the tensors of a file to a module's weights: every key accounted for, every value looked at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from cloob.errors import InputError, printable

_NAMED = 4


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

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape that each of the file's tensors has to have for a weight of this shape."""
        one = (shape[0] // len(self.names), *shape[1:]) if len(self.names) > 1 else shape
        if self.permute is None:
            return (1,) * self.lead + one
        return tuple(one[self.permute.index(axis)] for axis in range(len(one)))

    def turned(self, value: Tensor) -> Tensor:
        """One of the file's tensors in the weight's layout."""
        value = value.reshape(value.shape[self.lead :])
        return value if self.permute is None else value.permute(self.permute).contiguous()


def same_names(module: nn.Module) -> dict[str, Part]:
    """The plan for a file whose keys are the module's own."""
    return {key: Part((key,)) for key in module.state_dict()}


def surplus(tensors: Mapping[str, Tensor], plan: Mapping[str, Part]) -> frozenset[str]:
    """Keys of a file of open_clip's that hold nothing: older versions of transformers wrote them."""
    return frozenset({"text.transformer.embeddings.position_ids"} & tensors.keys()) - plan.keys()


def check_fit(
    module: nn.Module,
    path: Path,
    tensors: Mapping[str, Tensor],
    plan: Mapping[str, Part],
    ignored: frozenset[str] = frozenset(),
) -> None:
    """Refuses a file whose keys, shapes or dtypes are not the module's, and lists how; arguments as of ``fill``."""
    misfits = _misfits(module.state_dict(), tensors, plan, ignored)
    if any(misfits):
        raise InputError(f"{path}: its weights do not fit: {listed(misfits)}")


def fill(
    module: nn.Module,
    path: Path,
    tensors: dict[str, Tensor],
    plan: Mapping[str, Part],
    ignored: frozenset[str] = frozenset(),
) -> None:
    """Gives a module, built on the meta device, the weights of a file as float32.

    Args:
        module: Its parameters and persistent buffers are replaced.
        path: The file, or the index of several.
        tensors: What it holds; those that the plan names are taken out.
        plan: For each of the module's keys, where it comes from; what it leaves out stays as it is.
        ignored: Keys of the file that nothing needs.

    Raises:
        InputError: A key is unknown or missing, a shape or dtype is another one, a value is NaN or infinite; the line
            lists them.
    """
    check_fit(module, path, tensors, plan, ignored)
    broken: list[str] = []
    state: dict[str, Tensor] = {key: value for key, value in module.state_dict().items() if key not in plan}
    assert not any(value.is_meta for value in state.values()), list(state)
    for key, part in plan.items():
        values = []
        for name in part.names:
            value = tensors.pop(name)  # may be mapped from the file, which may change; and is not needed twice
            value = value.to(torch.float32 if value.is_floating_point() else value.dtype, copy=True)
            if not _is_finite(value):
                broken.append(f"{printable(name)} holds NaN or infinite values")
            values.append(part.turned(value))
        state[key] = values[0] if len(values) == 1 else torch.cat(values)
    if broken:
        raise InputError(f"{path}: its weights cannot be used: {listed([broken])}")
    trained = {name: parameter.requires_grad for name, parameter in module.named_parameters()}
    module.load_state_dict(state, assign=True)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(trained[name])


def _is_finite(value: Tensor) -> bool:
    """Whether all of a tensor is finite; its extremes say so, without another tensor of its size."""
    return value.numel() == 0 or bool(torch.isfinite(torch.stack(torch.aminmax(value))).all())


def listed(kinds: list[list[str]]) -> str:
    """Some complaints of each kind, and how many more of it there are."""
    parts = []
    for complaints in kinds:
        more = len(complaints) - _NAMED
        parts += complaints[:_NAMED] + ([f"and {more} more like this"] if more > 0 else [])
    return "; ".join(parts)


def _misfits(
    wanted: Mapping[str, Tensor], tensors: Mapping[str, Tensor], plan: Mapping[str, Part], ignored: frozenset[str]
) -> list[list[str]]:
    used = [name for part in plan.values() for name in part.names]
    known = set(used) | ignored
    missing = [f"{printable(name)} is missing" for name in used if name not in tensors]
    unknown = [f"{printable(name)} is unknown" for name in tensors if name not in known]
    shapes: list[str] = []
    dtypes: list[str] = []
    for key, part in plan.items():
        shape, floating = part.stored_shape(tuple(wanted[key].shape)), wanted[key].is_floating_point()
        for name in part.names:
            tensor = tensors.get(name)
            if tensor is None:
                continue
            if tensor.shape != shape:
                shapes.append(f"{printable(name)} has shape {tuple(tensor.shape)}, {shape} is wanted")
            elif tensor.dtype.is_floating_point != floating or (not floating and tensor.dtype != wanted[key].dtype):
                kind = "floating-point numbers" if floating else str(wanted[key].dtype)
                dtypes.append(f"{printable(name)} has dtype {tensor.dtype}, {kind} is wanted")
    return [missing, unknown, shapes, dtypes]
