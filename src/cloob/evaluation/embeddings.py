"""Several models, several sets, embedded once and kept in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from cloob.cache import Cache
from cloob.errors import InputError
from cloob.evaluation.embed import (
    EmbedOptions,
    Encoder,
    ImageEmbeddings,
    PairEmbeddings,
    Progress,
    Reader,
    embed_images,
    embed_pairs,
)
from cloob.evaluation.measures import class_embeddings
from cloob.family import member_name
from cloob.models.aligned.encoders import FeatureMemory
from cloob.models.aligned.model import AlignedEncoder
from cloob.models.load import fingerprint, load_model
from cloob.models.source import find_model_folder

T = TypeVar("T")
_PAPER_BETA = 8.0


class Labelled(Reader, Protocol):
    """A set of labelled images; :class:`cloob.evaluation.sets.pictures.LabelledSet` is
    one.
    """

    @property
    def classnames(self) -> Sequence[str]: ...  # C names; a label is an index into them

    @property
    def templates(
        self,
    ) -> Sequence[str]: ...  # prompts with ``{c}`` in the place of the class name

    @property
    def labels(self) -> Iterable[int]: ...  # n integers


class LabelledEmbeddings(NamedTuple):
    """A labelled set through one model: n images, their (n,) int64 labels, and (C, D)
    class embeddings.
    """

    images: ImageEmbeddings
    labels: Tensor
    classes: Tensor


@dataclass(frozen=True)
class ModelTraits:
    objective: str | None  # the member of the family that it was trained with, if known
    settings: Mapping[str, object]  # its ``objective.json``
    # of its objective, else of its ``logit_scale``, else CLIP's initial 1/0.07
    inv_tau: float
    beta: float  # of its objective if it retrieves, else the paper's
    fingerprint: str | None


class Embeddings:
    """The embeddings of all models and sets, computed on first use and kept. Of models
    given by their source at most one is loaded at a time.

    Args:
        models: Models by the name they have in results: loaded, or what ``load_model``
            takes.
        options: How to embed.
        progress: Called with ("model: set", images done, images in all) after every
            batch.
        tower: Keep the image tower's features of labelled sets too.
    """

    def __init__(
        self,
        models: Mapping[str, Encoder | str | Path],
        options: EmbedOptions | None = None,
        *,
        progress: Callable[[str, int, int], None] | None = None,
        tower: bool = False,
    ) -> None:
        self.models = dict(models)
        self._options = options or EmbedOptions()
        self._progress = progress
        self._with_tower = tower
        self._loaded: tuple[str, Encoder] | None = None
        self._memories: dict[str, FeatureMemory] = {}
        self._folders: dict[str, Path | None] = {}
        self._values: dict[tuple[str, str, int], tuple[object, Any]] = {}

    def encoder(self, model: str) -> Encoder:
        """The encoder of a model; the last one stays loaded.

        Of a run it is the same checkpoint again even if the run has gone on.
        """
        source = self.models[model]
        if not isinstance(source, str | Path):
            return source
        if self._loaded is None or self._loaded[0] != model:
            self._loaded = None  # frees the other one first
            if model not in self._folders:
                self._folders[model] = find_model_folder(source)
            encoder = load_model(
                self._folders[model] or source, device=self._options.device
            )
            if encoder.config.kind == "aligned":
                assert isinstance(encoder, AlignedEncoder)
                self._share_features(encoder)
            self._loaded = model, encoder
        return self._loaded[1]

    def _share_features(self, encoder: AlignedEncoder) -> None:
        """Gives it the features that training kept of its frozen encoders, and that
        other models computed with equal ones.
        """
        image_key, text_key = encoder.encoder_keys()
        encoder.memories = (
            self._memory(image_key, "images"),
            self._memory(text_key, "texts"),
        )

    def _memory(self, key: str, side: str) -> FeatureMemory:
        if key not in self._memories:
            memory = self._memories[key] = FeatureMemory()
            for file in Cache().named("features", f"-{key}-"):
                memory.add_file(file, side)
        return self._memories[key]

    def traits(self, model: str) -> ModelTraits:
        return self._once("traits", model, None, _traits_of)

    def labelled(self, model: str, data: Labelled) -> LabelledEmbeddings:
        """The images, labels and classes of a set through a model; InputError too if a
        label has no class.
        """
        embed = partial(
            class_embeddings,
            classnames=data.classnames,
            templates=data.templates,
            batch_size=self._options.batch_size,
        )
        labels = _labels(data)
        classes = self._once("classes", model, data, embed)
        return LabelledEmbeddings(self._images(model, data), labels, classes)

    def tower_and_labels(self, model: str, data: Labelled) -> tuple[Tensor, Tensor]:
        """The (n, F) features of the image tower on a labelled set, for probes, and the
        (n,) labels.
        """
        features = self._images(model, data).tower
        assert features is not None
        return features, _labels(data)

    def pairs(self, model: str, source: Reader) -> PairEmbeddings:
        embed = partial(
            embed_pairs,
            source=source,
            options=self._options,
            progress=self._report(model, source.name),
            text_progress=self._report(model, f"{source.name}, texts"),
        )
        return self._once("captioned", model, source, embed)

    def _images(self, model: str, data: Labelled) -> ImageEmbeddings:
        embed = partial(
            embed_images,
            reader=data,
            options=self._options,
            progress=self._report(model, data.name),
            tower=self._with_tower,
        )
        return self._once("images", model, data, embed)

    def _once(
        self, kind: str, model: str, data: object, compute: Callable[[Encoder], T]
    ) -> T:
        """A value that is computed once of a model and a set.

        The set is kept with it, so that its id stays unique: two sets may have one
        name.
        """
        place = kind, model, id(data)
        if place not in self._values:
            self._values[place] = data, compute(self.encoder(model))
        value: T = self._values[place][1]
        return value

    def _report(self, model: str, name: str) -> Progress | None:
        if self._progress is None:
            return None
        return partial(self._progress, f"{model}: {name}")


def _traits_of(encoder: Encoder) -> ModelTraits:
    """What a loaded encoder says of its objective; where it says nothing, τ⁻¹ is its
    ``logit_scale`` or CLIP's, and β the paper's.
    """
    settings = getattr(encoder, "objective_config", None) or {}
    member = member_name(settings.get("contrast"), settings.get("hopfield"))
    beta = settings.get("beta") if settings.get("hopfield") else None
    inv_tau = settings.get("inv_tau")
    if inv_tau is None:
        scale = getattr(getattr(encoder, "model", None), "logit_scale", None)
        inv_tau = scale.detach().exp() if isinstance(scale, Tensor) else 1 / 0.07
    has_weights = isinstance(encoder, nn.Module) or hasattr(encoder, "fingerprint")
    return ModelTraits(
        objective=member or settings.get("closed_form"),
        settings=settings,
        inv_tau=float(inv_tau),
        beta=float(_PAPER_BETA if beta is None else beta),
        fingerprint=fingerprint(encoder) if has_weights else None,
    )


def _labels(data: Labelled) -> Tensor:
    """(N,) int64 labels of a set; refuses those that name no class."""
    labels = [int(label) for label in data.labels]
    n = len(data.classnames)
    for image, label in enumerate(labels):
        if not 0 <= label < n:
            raise InputError(
                f"{data.name}: image {image} has label {label}, but there are {n} class"
                f" names (labels 0 to {n - 1})"
            )
    return torch.tensor(labels, dtype=torch.int64)
