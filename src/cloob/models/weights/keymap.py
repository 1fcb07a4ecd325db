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

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_SHOWN = 6
_ALIGNED = 64  # bytes, of torch's memory


@contextmanager
def without_memory(where: object, config: Mapping[str, Any]) -> Iterator[None]:
    """Inside, modules are built on the meta device, and any error is one line that
    begins with ``where``.
    """
    check_layers(config, str(where))
    with translated(str(where)), torch.device("meta"):
        yield


def build(
    config: Mapping[str, Any], preprocess_cfg: Mapping[str, Any], where: object
) -> Any:
    library = open_clip()
    options = {key: value for key, value in config.items() if key != "custom_text"}
    with without_memory(where, config):
        model = (library.CustomTextCLIP if config.get("custom_text") else library.CLIP)(
            **options
        )
    for module in model.modules():  # the causal mask, which no file holds
        if isinstance(mask := getattr(module, "attn_mask", None), Tensor):
            module.attn_mask = torch.full(mask.shape, -torch.inf).triu_(1)
    clip = preprocess(model.visual.image_size, CLIP_MEAN, CLIP_STD, "bicubic")
    model.visual.preprocess_cfg = clip | dict(preprocess_cfg)
    return model


@dataclass(frozen=True)
class Origin:
    names: tuple[
        str, ...
    ]  # keys of the file; several are joined along their first dimension
    permute: tuple[int, ...] | None = (
        None  # the file's dimensions in the weight's order
    )
    lead: int = (
        0  # dimensions of size 1 that the file has in front and the weight has not
    )


def key_map(family: str, text_layers: int, image_layers: int) -> dict[str, Origin]:
    """Which weight of a file every weight of a module is, for towers of so many blocks,
    by the family's table.
    """
    plan = {}
    for key, entry in json.loads(
        Path(__file__).with_name(f"{family}.json").read_text("utf-8")
    ).items():
        part = entry if isinstance(entry, dict) else {"names": [entry]}
        for i in range(
            (image_layers if key.startswith("visual.") else text_layers)
            if "{i}" in key
            else 1
        ):
            plan[key.format(i=i)] = Origin(
                **part | {"names": tuple(name.format(i=i) for name in part["names"])}
            )
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
    needed = {name for part in plan.values() for name in part.names}
    problems = [f"{name} is missing" for name in sorted(needed - tensors.keys())]
    # Older versions of transformers wrote position_ids, which hold nothing.
    problems += [
        f"{n} is unknown"
        for n in sorted(tensors.keys() - needed)
        if not n.endswith(".position_ids")
    ]
    for key, part in plan.items() if not problems else ():
        name, weight, shape = (
            part.names[0],
            state[key],
            tuple(tensors[part.names[0]].shape),
        )
        values = [tensors.pop(name) for name in part.names]
        try:
            value = values[0] if len(values) == 1 else torch.cat(values)
            value = value.reshape(value.shape[part.lead :])
            value = value if part.permute is None else value.permute(part.permute)
        except RuntimeError as error:
            problems.append(f"{name} has shape {shape} ({one_line(error, 100)})")
            continue
        if value.shape != weight.shape:
            problems.append(
                f"{name} has shape {shape}, {tuple(weight.shape)} is expected"
            )
        elif value.is_floating_point() != weight.is_floating_point():
            problems.append(
                f"{name} has dtype {value.dtype}, {weight.dtype} is expected"
            )
        else:
            dtype = torch.float32 if weight.is_floating_point() else weight.dtype
            value = value.contiguous()
            # An array's memory in the middle of a pickle may begin anywhere, and
            # products would round differently.
            state[key] = value.to(dtype, copy=value.data_ptr() % _ALIGNED > 0)
            # Finite, by its extremes: no other tensor of its size is made.
            if (
                value.numel()
                and not torch.isfinite(torch.stack(torch.aminmax(state[key]))).all()
            ):
                problems.append(f"{name} holds NaN or infinite values")
        del value, values  # before the next weight takes its memory
    if problems:
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise InputError(
            f"{path}: its weights do not fit:"
            f" {printable('; '.join(problems[:_SHOWN]))}{more}"
        )
    module.load_state_dict(state, assign=True)


class Towers(nn.Module):
    """What a ``DualEncoder`` uses of an open_clip module, for other towers; ``heads``
    are those on frozen encoders.
    """

    def __init__(
        self,
        visual: nn.Module,
        text: nn.Module,
        logit_scale: float,
        heads: Sequence[nn.Module | None] = (None, None),
    ) -> None:
        super().__init__()
        self.visual, self.text = visual, text
        self.logit_scale = nn.Parameter(
            torch.tensor(logit_scale, device="cpu"), requires_grad=False
        )
        self.image_head, self.text_head = heads

    def encode_image(self, images: Tensor) -> Any:
        features = self.visual(images)
        return features if self.image_head is None else self.image_head(features)

    def encode_text(self, tokens: Tensor) -> Any:
        features = self.text(tokens)
        return features if self.text_head is None else self.text_head(features)


def preprocess(size: int, mean: Any, std: Any, interpolation: str) -> dict[str, Any]:
    """open_clip's ``preprocess_cfg`` of a tower; ``interpolation`` may be ``"lanczos"``
    as well.
    """
    settings = {
        "size": size,
        "mode": "RGB",
        "mean": tuple(mean),
        "std": tuple(std),
        "interpolation": interpolation,
    }
    return settings | {"resize_mode": "shortest", "fill_color": 0}
