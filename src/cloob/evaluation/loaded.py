"""The models of an evaluation by name: one of them loaded at a time, and what the disk knows each by."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from cloob.errors import InputError, nearest
from cloob.evaluation.cache import folder_key, module_key
from cloob.models.aligned import AlignedEncoder, share_encoders
from cloob.models.encoding import Encoder
from cloob.models.load import find_model_folder, load_model
from cloob.models.tokenizer import describe


class Models:
    """Models, loaded or to be loaded; those with equal frozen encoders share these, and what they compute.

    Args:
        sources: Models by the name they have in results: loaded, or what ``load_model`` takes.
        device: Where they are loaded to.

    Raises:
        InputError: No models.
    """

    def __init__(self, sources: Mapping[str, Encoder | str | Path], device: str | torch.device) -> None:
        if not sources:
            raise InputError("no model to evaluate")
        self.sources = dict(sources)
        self._device = device
        self._loaded: tuple[str, Encoder] | None = None
        self._frozen: dict[str, nn.Module] = {}
        self._keys: dict[str, str | None] = {}
        self._folders: dict[str, Path | None] = {}

    def encoder(self, model: str) -> Encoder:
        """The model, loaded."""
        source = self._source(model)
        if not isinstance(source, str | Path):
            return source
        if self._loaded is None or self._loaded[0] != model:
            self._loaded = None  # let go of the other one first
            encoder = load_model(self._folder(model) or source, device=self._device)
            if len(self.sources) > 1 and isinstance(encoder, AlignedEncoder):
                share_encoders(encoder, self._frozen)
            self._loaded = (model, encoder)
        return self._loaded[1]

    def key(self, model: str) -> str | None:
        """What the disk knows a model by; None for an encoder that is no module, whose weights nobody can see."""
        if model not in self._keys:
            folder = self._folder(model)
            self._keys[model] = self._module_key(model) if folder is None else folder_key(folder, self._device)
        return self._keys[model]

    def _module_key(self, model: str) -> str | None:
        encoder = self.encoder(model)
        if not isinstance(encoder, nn.Module):
            return None
        facts = {name: getattr(encoder, name, None) for name in ("config", "preprocess_cfg", "objective_config")}
        facts["tokenizer"] = describe(getattr(encoder, "tokenizer", None))
        return module_key(encoder, facts, getattr(encoder, "device", self._device))

    def _folder(self, model: str) -> Path | None:
        """The model folder, the same one however long a run goes on to write newer checkpoints; None for others."""
        if model not in self._folders:
            source = self._source(model)
            self._folders[model] = find_model_folder(source) if isinstance(source, str | Path) else None
        return self._folders[model]

    def _source(self, model: str) -> Encoder | str | Path:
        if model not in self.sources:
            raise InputError(f"no model {model!r}; {nearest(model, self.sources)}")
        return self.sources[model]
