"""Several models, several sets, each embedded once: what zero-shot, retrieval, geometry and examples share."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from cloob.data.batch import Skip
from cloob.data.content import content_key
from cloob.errors import InputError
from cloob.evaluation.cache import Stored, fingerprint, load, save
from cloob.evaluation.embed import (
    EmbedOptions,
    Encoder,
    ImageEmbeddings,
    PairEmbeddings,
    Progress,
    Reader,
    embed_images,
    embed_images_and_tower,
    embed_pairs,
)
from cloob.evaluation.facts import ModelFacts, model_facts
from cloob.evaluation.loaded import Models
from cloob.evaluation.measures.probe import Probe, ProbeOptions, fit_probe
from cloob.evaluation.measures.zeroshot import class_embeddings

T = TypeVar("T")


class Labelled(Reader, Protocol):
    """A set of labelled images; :class:`cloob.evaluation.sets.labelled.LabelledSet` is one."""

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


class TowerFeatures(NamedTuple):
    """What a probe is fitted and measured on.

    Attributes:
        features: (n, F) of the image tower, see :mod:`cloob.evaluation.tower`; NaN rows where unreadable.
        labels: (n,) int64.
    """

    features: Tensor
    labels: Tensor


class Embeddings:
    """The embeddings of all models and sets, computed on first use and kept, on the disk too if so wished.

    At most one of the models that are given by their source is held at a time, and none while everything that is asked
    for is on the disk already.
    """

    def __init__(
        self,
        models: Mapping[str, Encoder | str | Path],
        options: EmbedOptions | None = None,
        *,
        progress: Callable[[str, int, int], None] | None = None,
        tower: bool = False,
    ) -> None:
        """Embeds nothing yet.

        Args:
            models: Models by the name they have in results: loaded, or what ``load_model`` takes.
            options: How; None takes the defaults.
            progress: Called with ("model: set", images done, images in all) after each batch.
            tower: Keep the image tower's features of labelled sets as well, for :meth:`tower`.

        Raises:
            InputError: No models.
        """
        self._options = options or EmbedOptions()
        self._models = Models(models, self._options.device)
        self._progress = progress
        self._with_tower = tower
        self._facts: dict[str, ModelFacts] = {}
        self._kept: dict[tuple[str, str, int], tuple[Reader, Any]] = {}

    @property
    def models(self) -> Mapping[str, Encoder | str | Path]:
        """The models by the name they have in results, as they were given."""
        return self._models.sources

    def encoder(self, model: str) -> Encoder:
        """The model, loaded."""
        return self._models.encoder(model)

    def facts(self, model: str) -> ModelFacts:
        """Objective, τ⁻¹, β and fingerprint of a model."""
        if model not in self._facts:

            def compute() -> Stored:
                return Stored({}, asdict(model_facts(self.encoder(model))))

            self._facts[model] = ModelFacts(**self._stored(model, "facts", lambda: "model", compute).facts)
        return self._facts[model]

    def labelled(self, model: str, data: Labelled) -> LabelledEmbeddings:
        """The images, labels and classes of a labelled set through a model.

        Raises:
            InputError: See ``embed_images`` and ``class_embeddings``; a label without a class; labels that
                are not one an image.
        """

        def classes() -> Stored:
            embedded = class_embeddings(self.encoder(model), data.classnames, data.templates, self._options.batch_size)
            return Stored({"classes": embedded}, {})

        def prompts_key() -> str:
            return fingerprint(str(len(data.classnames)), *data.classnames, *data.templates)

        def compute() -> LabelledEmbeddings:
            labels = _labels(data)
            prompts = self._stored(model, "classes", prompts_key, classes)
            images = self._images(model, data, self._with_tower)
            return LabelledEmbeddings(_read_images(images), labels, prompts.tensors["classes"])

        return self._once("labelled", model, data, compute)

    def tower(self, model: str, data: Labelled) -> TowerFeatures:
        """The image tower's features of a labelled set, for probes; errors as of ``labelled``, classes play no part."""
        labels = _labels(data)
        return TowerFeatures(self._images(model, data, True).tensors["tower"], labels)

    def probe(self, model: str, train: Labelled, n_classes: int, options: ProbeOptions, seed: int) -> Probe:
        """A probe fitted on the tower's features of a set; errors as of ``tower`` and ``measures.probe.fit_probe``."""
        labels = _labels(train)

        def key() -> str:
            how = json.dumps([n_classes, seed, asdict(options) | {"seeds": None}, labels.tolist()])
            return fingerprint(self._content_key(train), how)

        def compute() -> Stored:
            features = self.tower(model, train)
            fitted = fit_probe(*features, n_classes, options=options, seed=seed, classnames=train.classnames)
            facts = {name: value for name, value in fitted._asdict().items() if name != "weight"}
            return Stored({"weight": fitted.weight}, facts)

        fit = self._stored(model, "probe", key, compute)
        return Probe(weight=fit.tensors["weight"], **fit.facts)

    def pairs(self, model: str, source: Reader) -> PairEmbeddings:
        """The images and captions of a source through a model; errors as of ``embed_pairs``."""

        def embed() -> Stored:
            reports = self._report(model, source.name), self._report(model, f"{source.name}, texts")
            embedded = embed_pairs(self.encoder(model), source, self._options, *reports)
            stored = _store_images(embedded.images)
            texts = {"texts": embedded.texts, "image_of_text": embedded.image_of_text}
            return Stored({**stored.tensors, **texts}, {**stored.facts, "captions": list(embedded.captions)})

        def compute() -> PairEmbeddings:
            stored = self._stored(model, "captioned", lambda: self._content_key(source), embed)
            texts, image_of_text = stored.tensors["texts"], stored.tensors["image_of_text"]
            return PairEmbeddings(_read_images(stored), texts, tuple(stored.facts["captions"]), image_of_text)

        return self._once("pairs", model, source, compute)

    def _images(self, model: str, data: Labelled, tower: bool) -> Stored:
        """The images of a labelled set, and the tower's features if they are wanted."""

        def embed() -> Stored:
            encoder, report = self.encoder(model), self._report(model, data.name)
            if not tower:
                return _store_images(embed_images(encoder, data, self._options, report))
            images, features = embed_images_and_tower(encoder, data, self._options, report)
            stored = _store_images(images)
            return Stored({**stored.tensors, "tower": features}, stored.facts)

        # A run with probes has left the embeddings too, which a run without them takes from there.
        kinds = ("images-tower",) if tower else ("images", "images-tower")
        return self._once(
            kinds[0],
            model,
            data,
            lambda: self._stored(model, kinds[0], lambda: self._content_key(data), embed, kinds[1:]),
        )

    def _once(self, kind: str, model: str, data: Reader, compute: Callable[[], T]) -> T:
        """What is computed once of a set, which is kept too, so that its id stays its own: two may have one name."""
        key = kind, model, id(data)
        if key not in self._kept:
            self._kept[key] = data, compute()
        value: T = self._kept[key][1]
        return value

    def _stored(
        self,
        model: str,
        kind: str,
        data_key: Callable[[], str],
        compute: Callable[[], Stored],
        also: Sequence[str] = (),
    ) -> Stored:
        """What the disk has, under ``also`` as well, else what ``compute`` gives, which the disk then has."""
        cache = self._options.cache
        model_key = None if cache is None else self._models.key(model)
        if cache is None or model_key is None:
            return compute()
        key = data_key()
        for name in (kind, *also):
            if (cached := load(cache, model_key, name, key)) is not None:
                return cached
        stored = compute()
        save(cache, model_key, kind, key, stored)
        return stored

    def _content_key(self, data: Reader) -> str:
        return self._once("content", "", data, lambda: content_key(data))

    def _report(self, model: str, name: str) -> Progress | None:
        call = self._progress
        return None if call is None else lambda done, total: call(f"{model}: {name}", done, total)


def _store_images(images: ImageEmbeddings) -> Stored:
    bad = [[skip.key, skip.reason, skip.detail] for skip in images.bad]
    return Stored({"images": images.features}, {"keys": list(images.keys), "bad": bad})


def _read_images(stored: Stored) -> ImageEmbeddings:
    return ImageEmbeddings(
        stored.tensors["images"], tuple(stored.facts["keys"]), [Skip(*skip) for skip in stored.facts["bad"]]
    )


def _labels(data: Labelled) -> Tensor:
    labels = torch.tensor([int(label) for label in data.labels], dtype=torch.int64)
    name = data.name
    if labels.shape != (len(data),):
        raise InputError(f"{name}: {len(data)} images, but labels of shape {tuple(labels.shape)}")
    wrong = ((labels < 0) | (labels >= len(data.classnames))).nonzero()[:, 0]
    if len(wrong):
        raise InputError(
            f"{name}: image {int(wrong[0])} has label {int(labels[wrong[0]])}, "
            f"but there are {len(data.classnames)} class names (labels 0 to {len(data.classnames) - 1})"
        )
    return labels
