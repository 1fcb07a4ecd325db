"""Geometry of a run's checkpoints on pairs; example queries of a report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import TypeGuard

import torch
from torch import Tensor

from cloob.data.batch import caption_id
from cloob.errors import message
from cloob.evaluation.embed import EmbedOptions, Reader
from cloob.evaluation.embeddings import Embeddings, Labelled
from cloob.evaluation.measures import geometry
from cloob.evaluation.report.page import ExampleQuery, ShownPicture
from cloob.evaluation.results import Checkpoint, Failure, Numbers
from cloob.models.runs import checkpoint_step, epoch_of, list_checkpoints


def geometry_of_checkpoints(
    runs: Mapping[str, Path],
    source: Reader,
    options: EmbedOptions | None = None,
    *,
    progress: Callable[[str, int, int], None] | None = None,
) -> tuple[dict[str, list[Checkpoint]], list[Failure]]:
    """Measures every checkpoint of run folders; returns by run what was found, and what
    could not be measured.
    """
    found: dict[str, list[Checkpoint]] = {}
    failures: list[Failure] = []
    for name, run in runs.items():
        found[name] = []
        for checkpoint in list_checkpoints(run):
            step = checkpoint_step(checkpoint)
            label = f"{name}, step {step}"
            try:
                embeddings = Embeddings({label: checkpoint}, options, progress=progress)
                numbers = _geometry(embeddings, label, source)
            except (ValueError, OSError) as error:
                text = message(error)
                failures.append({"model": label, "set": source.name, "error": text})
                continue
            found[name].append(
                {
                    "step": step,
                    "epoch": epoch_of(run, step),
                    "effective_eigenvalues_image": numbers[
                        "effective_eigenvalues_image"
                    ],
                    "effective_eigenvalues_text": numbers["effective_eigenvalues_text"],
                    "ajne_image": numbers["ajne_image"],
                    "ajne_text": numbers["ajne_text"],
                }
            )
    return found, failures


def _geometry(embeddings: Embeddings, model: str, source: Reader) -> Numbers:
    """The geometry of a model on pictures and the first caption of each."""
    pairs = embeddings.pairs(model, source)
    traits = embeddings.traits(model)
    texts = pairs.texts[pairs.first_texts]
    return geometry(pairs.images.features, texts, traits.inv_tau, traits.beta)


@dataclass(frozen=True)
class _Gallery:
    """A set as one model sees it.

    A concept is a class, or all captions that are equal; a text queries its concept.
    """

    images: Tensor  # (n, D), the embeddings of n pictures
    concepts_of_image: Sequence[set[int]]
    labels: Sequence[str]
    texts: Tensor  # (T, D)
    concept_of_text: Sequence[int]
    words: Sequence[str]

    def draw(self, n: int) -> list[int]:
        """At most ``n`` texts, drawn at random, of different concepts that have a
        readable picture; a concept's first text stands for it.
        """
        readable = torch.isfinite(self.images).all(dim=1).tolist()
        with_picture = set().union(*compress(self.concepts_of_image, readable))
        first_text: dict[int, int] = {}
        for text, concept in enumerate(self.concept_of_text):
            if concept in with_picture and self.words[text]:
                first_text.setdefault(concept, text)
        candidates = list(first_text.values())
        generator = torch.Generator().manual_seed(0)
        order = torch.randperm(len(candidates), generator=generator)
        return [candidates[place] for place in order[:n].tolist()]

    def nearest(
        self, row: Tensor, right: int, data: Labelled | Reader, k: int
    ) -> list[ShownPicture]:
        """The ``k`` readable pictures nearest to the row of a text, of which those of
        the concept ``right`` answer it.
        """
        scores = (self.images @ row).nan_to_num(nan=-torch.inf)
        best = scores.sort(descending=True, stable=True).indices[:k]
        shown = []
        for image in best[scores[best] > -torch.inf].tolist():
            sample = data.read(image)
            picture = sample[1] if isinstance(sample, tuple) else sample.image
            is_right = right in self.concepts_of_image[image]
            score = float(scores[image])
            shown.append(ShownPicture(picture, self.labels[image], is_right, score))
        return shown


def example_queries(
    embeddings: Embeddings,
    data: Labelled | Reader,
    *,
    n: int = 8,
    k: int = 5,
    models: Sequence[str] | None = None,
) -> list[ExampleQuery]:
    """The ``k`` nearest pictures of a set that every model finds for ``n`` class names
    or captions of the set that a picture answers, the same for all models.

    Of equal cosines the earlier picture in the set comes first.
    """
    names = models or list(embeddings.models)
    galleries = {model: _gallery(embeddings, model, data) for model in names}
    first = galleries[names[0]]
    queries = []
    for text in first.draw(n):
        right = first.concept_of_text[text]
        answers = {
            model: gallery.nearest(gallery.texts[text], right, data, k)
            for model, gallery in galleries.items()
        }
        queries.append(ExampleQuery(first.words[text], answers))
    return queries


def _gallery(embeddings: Embeddings, model: str, data: Labelled | Reader) -> _Gallery:
    """The pictures of a set with their texts, and which of them belong together."""
    if _is_labelled(data):
        labelled = embeddings.labelled(model, data)
        names = data.classnames
        labels = labelled.labels.tolist()
        return _Gallery(
            images=labelled.images.features,
            concepts_of_image=[{label} for label in labels],
            labels=[names[label] for label in labels],
            texts=labelled.classes,
            concept_of_text=range(len(names)),
            words=names,
        )
    pairs = embeddings.pairs(model, data)
    # An unreadable caption has no words and equals no other.
    concepts_of_text = [
        caption_id(caption) if caption else -1 - row
        for row, caption in enumerate(pairs.captions)
    ]
    concepts_of_image: list[set[int]] = [set() for _ in pairs.images.keys]
    for image, concept in zip(
        pairs.image_of_text.tolist(), concepts_of_text, strict=True
    ):
        concepts_of_image[image].add(concept)
    return _Gallery(
        images=pairs.images.features,
        concepts_of_image=concepts_of_image,
        labels=[pairs.captions[text] for text in pairs.first_texts.tolist()],
        texts=pairs.texts,
        concept_of_text=concepts_of_text,
        words=pairs.captions,
    )


def _is_labelled(data: Labelled | Reader) -> TypeGuard[Labelled]:
    return hasattr(data, "classnames")
