"""Towers that the caller brings: any module for which ``module(a, b)`` gives two matrices of rows."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cloob.errors import InputError, one_line
from cloob.models import runs
from cloob.models.encoder import DualEncoder, EncoderConfig
from cloob.models.importing import import_open_clip
from cloob.models.pixels import EvalTransform
from cloob.models.tokenizer import ClipTokenizer
from cloob.models.weights.containers import read_safetensors


class GivenTowers(DualEncoder):
    """A caller's module as a ``DualEncoder``, as far as training needs one.

    Of image-caption pairs it takes uint8 (n, 3, S, S) pixels and (n, 77) int64 tokens of CLIP's tokenizer.
    """

    def __init__(self, module: nn.Module, image_size: int | None = None) -> None:
        nn.Module.__init__(self)  # a DualEncoder's asks for open_clip's towers
        self.name = type(module).__qualname__
        self.model = module
        self.config = EncoderConfig("module", 0, 0, {"class": self.name})
        self.objective_config = {}
        self.image_size = image_size or 224

    @cached_property
    def preprocess(self) -> EvalTransform:  # type: ignore[override]
        return EvalTransform({"size": self.image_size})

    @cached_property
    def tokenizer(self) -> ClipTokenizer:  # type: ignore[override]
        return ClipTokenizer.of(import_open_clip(".tokenizer").SimpleTokenizer())

    @property
    def trims_texts(self) -> bool:
        return False

    @property
    def device(self) -> torch.device:
        first: nn.Parameter = next(self.model.parameters())
        return first.device

    def set_channels_last(self, enabled: bool) -> None:
        """Does nothing: the module's layout is the caller's."""

    def forward(self, images: Any, tokens: Any) -> tuple[Tensor, Tensor]:
        """Unit rows (n, D) float32 of both sides, from whatever rows the module gives."""
        rows: Any = self.model(images, tokens)
        sides = rows if isinstance(rows, tuple | list) else (rows,)
        shapes = [tuple(side.shape) if isinstance(side, Tensor) else type(side).__name__ for side in sides]
        if len(shapes) != 2 or len(shapes[0]) != 2 or shapes[0] != shapes[1]:
            raise InputError(f"{self.name}: returned {shapes}; two tensors (n, D) of the same n and D are expected")
        return F.normalize(rows[0].float(), dim=1), F.normalize(rows[1].float(), dim=1)


def fill_module(module: nn.Module, folder: Path) -> None:
    """Loads the weights of a model folder into the module that they were saved from, or one alike."""
    file = folder / runs.MODULE_FILE
    if not file.is_file():
        raise InputError(f"{folder}: holds no weights of a module of Python code; load it without towers=")
    try:
        module.load_state_dict(read_safetensors(folder / runs.TOWERS_WEIGHTS_FILE))
    except RuntimeError as error:
        raise InputError(f"{folder}: does not fit {type(module).__qualname__} ({one_line(error)})") from error
