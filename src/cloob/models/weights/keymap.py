"""From the tensors of a file to the weights of a module that was built without
memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cloob.errors import InputError, one_line, printable
from cloob.models.importing import check_layers, open_clip, translated
from cloob.models.settings import ModelConfig, Pixels

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_MAX_SHOWN = 6
_ALIGNED = 64  # bytes, of torch's memory


@contextmanager
def on_meta_device(where: object, config: Mapping[str, object]) -> Iterator[None]:
    """Inside, modules are built on the meta device, and any error is one line that
    begins with ``where``.
    """
    check_layers(config, str(where))
    with translated(str(where)), torch.device("meta"):
        yield


def build_open_clip(config: ModelConfig, preprocess_cfg: Pixels, where: object) -> Any:
    """open_clip's towers without memory, but for the causal mask, which no file
    holds.
    """
    library = open_clip()
    options = dict(config)
    make = library.CustomTextCLIP if options.pop("custom_text", False) else library.CLIP
    with on_meta_device(where, config):
        model = make(**options)
    for module in model.modules():
        mask = getattr(module, "attn_mask", None)
        if isinstance(mask, Tensor):
            module.attn_mask = torch.full(mask.shape, -torch.inf).triu_(1)
    clip = pixel_settings(model.visual.image_size, CLIP_MEAN, CLIP_STD, "bicubic")
    model.visual.preprocess_cfg = {**clip, **preprocess_cfg}
    return model


@dataclass(frozen=True)
class Origin:
    """Which tensors of a file make a weight: several are joined along their first
    dimension.
    """

    names: tuple[str, ...]
    # the file's dimensions in the weight's order
    permute: tuple[int, ...] | None = None
    # dimensions of size 1 that the file has in front and the weight has not
    lead: int = 0

    def make(self, tensors: dict[str, Tensor]) -> Tensor:
        """The weight, from tensors that are taken out, so that their memory is free."""
        parts = [tensors.pop(name) for name in self.names]
        value = parts[0] if len(parts) == 1 else torch.cat(parts)
        value = value.reshape(value.shape[self.lead :])
        return value if self.permute is None else value.permute(self.permute)

    def split(self, weight: Tensor) -> dict[str, Tensor]:
        """The file's tensors of a matrix or vector: the inverse of ``make``."""
        if self.permute is not None:
            weight = weight.permute(self.permute)
        parts = [weight] if len(self.names) == 1 else weight.chunk(len(self.names))
        return dict(zip(self.names, parts, strict=True))


def key_map(family: str, text_layers: int, image_layers: int) -> dict[str, Origin]:
    """Which weight of a file every weight of a module is, for towers of so many blocks,
    by the family's table.
    """
    table = json.loads(Path(__file__).with_name(f"{family}.json").read_text("utf-8"))
    plan = {}
    for key, entry in table.items():
        origin = entry if isinstance(entry, dict) else {"names": [entry]}
        layers = image_layers if key.startswith("visual.") else text_layers
        for i in range(layers if "{i}" in key else 1):
            names = tuple(name.format(i=i) for name in origin["names"])
            plan[key.format(i=i)] = Origin(**origin | {"names": names})
    return plan


def fill(
    module: nn.Module,
    path: Path,
    tensors: dict[str, Tensor],
    plan: Mapping[str, Origin] | None = None,
) -> None:
    """Loads a file's tensors, as float32, into a module that may be on the meta device,
    by a plan of their names.

    InputError lists what is unknown, missing, misshapen or not finite.
    """
    state: dict[str, Tensor] = dict(module.state_dict())
    plan = plan or {key: Origin((key,)) for key in state}
    problems = _misnamed(tensors, plan) or _replace(state, tensors, plan)
    if problems:
        extra = len(problems) - _MAX_SHOWN
        ellipsis = f"; and {extra} more" if extra > 0 else ""
        raise InputError(
            f"{path}: its weights do not fit:"
            f" {printable('; '.join(problems[:_MAX_SHOWN]))}{ellipsis}"
        )
    module.load_state_dict(state, assign=True)


def _replace(
    state: dict[str, Tensor], tensors: dict[str, Tensor], plan: Mapping[str, Origin]
) -> list[str]:
    """Puts a file's tensors in the place of a module's; returns what does not fit."""
    problems = []
    for key, origin in plan.items():
        name = origin.names[0]
        shape = tuple(tensors[name].shape)
        try:
            state[key] = _fitting(origin.make(tensors), state[key])
        except (RuntimeError, ValueError) as error:
            problems.append(f"{name} of shape {shape} {one_line(error, 100)}")
    return problems


def fill_towers(
    towers: Any, family: str, path: Path, tensors: dict[str, Tensor]
) -> None:
    """``fill`` by the family's table of names."""
    plan = key_map(family, len(towers.text.blocks), len(towers.visual.blocks))
    fill(towers, path, tensors, plan)


def _misnamed(tensors: Mapping[str, Tensor], plan: Mapping[str, Origin]) -> list[str]:
    needed = {name for origin in plan.values() for name in origin.names}
    missing = sorted(needed - tensors.keys())
    unknown = sorted(tensors.keys() - needed)
    problems = [f"{name} is missing" for name in missing]
    # Older versions of transformers wrote position_ids, which hold nothing.
    problems += [
        f"{name} is unknown" for name in unknown if not name.endswith(".position_ids")
    ]
    return problems


def _fitting(value: Tensor, weight: Tensor) -> Tensor:
    """A file's value as the weight that it replaces; ValueError where it cannot be."""
    if value.shape != weight.shape:
        raise ValueError(f"does not make {tuple(weight.shape)}")
    if value.is_floating_point() != weight.is_floating_point():
        raise ValueError(f"has dtype {value.dtype}, {weight.dtype} is expected")
    dtype = torch.float32 if weight.is_floating_point() else weight.dtype
    value = value.contiguous()
    # An array's memory in the middle of a pickle may begin anywhere, and products would
    # round differently.
    value = value.to(dtype, copy=value.data_ptr() % _ALIGNED > 0)
    # Finite, by its extremes: no other tensor of its size is made.
    if value.numel() and not torch.stack(torch.aminmax(value)).isfinite().all():
        raise ValueError("holds NaN or infinite values")
    return value


class Towers(nn.Module):
    """What a ``DualEncoder`` uses of an open_clip module, for other towers."""

    def __init__(self, visual: nn.Module, text: nn.Module, logit_scale: float) -> None:
        super().__init__()
        self.visual = visual
        self.text = text
        scale = torch.tensor(logit_scale, device="cpu")
        self.logit_scale = nn.Parameter(scale, requires_grad=False)

    def encode_image(self, images: Tensor) -> Tensor:
        features: Tensor = self.visual(images)
        return features

    def encode_text(self, tokens: Tensor) -> Tensor:
        features: Tensor = self.text(tokens)
        return features


def pixel_settings(
    size: int, mean: Sequence[float], std: Sequence[float], interpolation: str
) -> Pixels:
    """open_clip's ``preprocess_cfg`` of a tower; ``interpolation`` may be ``"lanczos"``
    as well.
    """
    return {
        "size": size,
        "mode": "RGB",
        "mean": tuple(mean),
        "std": tuple(std),
        "interpolation": interpolation,
        "resize_mode": "shortest",
        "fill_color": 0,
    }
