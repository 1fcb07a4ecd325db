"""Several models, several sets, each embedded once: what zero-shot, retrieval, geometry and examples share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from cloob.errors import InputError, nearest
from cloob.evaluate.embed import (
    Encoder,
    ImageEmbeddings,
    PairEmbeddings,
    Progress,
    Reader,
    embed_images,
    embed_pairs,
    set_name,
)
from cloob.evaluate.zeroshot import class_embeddings
from cloob.objective import OBJECTIVES, make_objective

PAPER_BETA = 8.0
"""β of the retrievals that are measured for a model that has none of its own."""


class Labelled(Reader, Protocol):
    """A set of labelled images; :class:`cloob.data.labelled.LabelledSet` is one."""

    @property
    def name(self) -> str:
        """What results call the set."""
        ...

    @property
    def classnames(self) -> Sequence[str]:
        """C names; a label is an index into them."""
        ...

    @property
    def templates(self) -> Sequence[str]:
        """Prompts with ``{c}`` in the place of the class name."""
        ...

    @property
    def labels(self) -> Any:
        """(n,) integers, an array or a sequence."""
        ...


class LabelledEmbeddings(NamedTuple):
    """A labelled set through one model.

    Attributes:
        images: The n images.
        labels: (n,) int64.
        classes: (C, D) class embeddings.
    """

    images: ImageEmbeddings
    labels: Tensor
    classes: Tensor


@dataclass(frozen=True)
class ModelFacts:
    """What evaluation reports of a model besides its numbers.

    Attributes:
        objective: Name of the family's member that it was trained with, None if unknown.
        settings: Its ``objective.json``; empty if unknown.
        inv_tau: τ⁻¹ of its objective, else of its ``logit_scale``, else CLIP's initial 1/0.07.
        beta: β of its objective if it retrieves, else the paper's 8.
    """

    objective: str | None
    settings: Mapping[str, Any]
    inv_tau: float
    beta: float


class Embeddings:
    """The embeddings of all models and sets, computed on first use and kept.

    At most one of the models that are given by their source is held at a time. A cache on disk belongs here.
    """

    def __init__(
        self,
        models: Mapping[str, Encoder | str | Path],
        *,
        device: str | torch.device = "cpu",
        batch_size: int = 256,
        workers: int = 0,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> None:
        """Embeds nothing yet.

        Args:
            models: Models by the name they have in results: loaded, or what ``load_model`` takes.
            device: Where models are loaded to.
            batch_size: Images or texts a forward pass.
            workers: Decoding threads, see :func:`cloob.evaluate.embed.embed_images`.
            progress: Called with ("model: set", images done, images in all) after each batch.

        Raises:
            InputError: No models.
        """
        if not models:
            raise InputError("no model to evaluate")
        self.models = dict(models)
        self._device, self._batch_size, self._workers = device, batch_size, workers
        self._progress = progress
        self._loaded: tuple[str, Encoder] | None = None
        self._facts: dict[str, ModelFacts] = {}
        self._labelled: dict[tuple[str, str], LabelledEmbeddings] = {}
        self._pairs: dict[tuple[str, str], PairEmbeddings] = {}

    def encoder(self, model: str) -> Encoder:
        """The model, loaded."""
        if model not in self.models:
            raise InputError(f"no model {model!r}; {nearest(model, self.models)}")
        found = self.models[model]
        if not isinstance(found, str | Path):
            return found
        if self._loaded is None or self._loaded[0] != model:
            from cloob.models.store import load_model

            self._loaded = None  # let go of the other one first
            self._loaded = (model, load_model(found, device=self._device))
        return self._loaded[1]

    def facts(self, model: str) -> ModelFacts:
        """Objective, τ⁻¹ and β of a model."""
        if model not in self._facts:
            self._facts[model] = _facts(self.encoder(model))
        return self._facts[model]

    def labelled(self, model: str, data: Labelled) -> LabelledEmbeddings:
        """The images, labels and classes of a labelled set through a model.

        Raises:
            InputError: See ``embed_images`` and ``class_embeddings``; a label without a class; labels that
                are not one an image.
        """
        key = (model, short_name(data))
        if key not in self._labelled:
            labels = torch.tensor([int(label) for label in data.labels], dtype=torch.int64)
            _check_labels(data, labels)
            encoder = self.encoder(model)
            classes = class_embeddings(encoder, data.classnames, data.templates, self._batch_size)
            images = embed_images(encoder, data, self._batch_size, self._workers, self._report(*key))
            self._labelled[key] = LabelledEmbeddings(images, labels, classes)
        return self._labelled[key]

    def pairs(self, model: str, source: Reader) -> PairEmbeddings:
        """The images and captions of a source through a model.

        Raises:
            InputError: See ``embed_pairs``.
        """
        key = (model, short_name(source))
        if key not in self._pairs:
            encoder = self.encoder(model)
            found = embed_pairs(encoder, source, self._batch_size, self._workers, self._report(*key))
            self._pairs[key] = found
        return self._pairs[key]

    def _report(self, model: str, name: str) -> Progress | None:
        call = self._progress
        return None if call is None else lambda done, total: call(f"{model}: {name}", done, total)


def short_name(data: object) -> str:
    """A set's name without the folders that lead to it, which are the machine's and not the set's.

    Of a pattern of shards the folder stays: ``/data/cc3m/*.tar`` is ``cc3m/*.tar``.
    """
    path = PurePath(set_name(data))
    is_pattern = any(sign in path.name for sign in "*?[{")
    return "/".join(path.parts[-2:]) if is_pattern else path.name


def _facts(encoder: Encoder) -> ModelFacts:
    settings: Mapping[str, Any] = getattr(encoder, "objective", None) or {}
    members = {}
    for name in OBJECTIVES:
        config = make_objective(name).config()
        members[config["contrast"], config["hopfield"]] = name
    objective = members.get((settings.get("contrast"), settings.get("hopfield")))
    scale = getattr(getattr(encoder, "model", None), "logit_scale", None)
    trained_scale = float(scale.detach().exp()) if isinstance(scale, Tensor) else 1 / 0.07
    return ModelFacts(
        objective=objective,
        settings=settings,
        inv_tau=float(settings.get("inv_tau", trained_scale)),
        beta=float(settings["beta"]) if settings.get("hopfield") else PAPER_BETA,
    )


def _check_labels(data: Labelled, labels: Tensor) -> None:
    name = short_name(data)
    if labels.shape != (len(data),):
        raise InputError(f"{name}: {len(data)} images, but labels of shape {tuple(labels.shape)}")
    wrong = ((labels < 0) | (labels >= len(data.classnames))).nonzero()[:, 0]
    if len(wrong):
        raise InputError(
            f"{name}: image {int(wrong[0])} has label {int(labels[wrong[0]])}, "
            f"but there are {len(data.classnames)} class names (labels 0 to {len(data.classnames) - 1})"
        )
