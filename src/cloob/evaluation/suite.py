"""An evaluation: several models on several sets, side by side, into results.json."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from cloob.data.batch import Skip
from cloob.errors import InputError, message
from cloob.evaluation import measures
from cloob.evaluation.embed import Encoder, Reader
from cloob.evaluation.embeddings import Embeddings, Labelled, ModelTraits
from cloob.evaluation.probe import fit_probe, probe_ranks
from cloob.evaluation.protocols import Candidates, candidate_numbers, embed_listed
from cloob.evaluation.results import Difference, Failure, Numbers, Results, Row
from cloob.functional import protocols, ranking
from cloob.functional.bootstrap import by_group, stratified_bootstrap
from cloob.models.vectors import embed_pairs

if TYPE_CHECKING:  # it brings pyarrow
    from cloob.data.vectors import VectorPairs

Hits = dict[tuple[str, str], dict[str, Tensor]]
"""(metric, set) -> model -> (n,) whether every sample is right, texts by picture."""
_Task = tuple[str, Callable[[Row], None]]
"""The name of a set, and what writes a model's numbers on it into the model's row."""


def evaluate(
    models: Mapping[str, Encoder | str | Path] | Embeddings,
    zeroshot: Sequence[Labelled] = (),
    retrieval: Sequence[Reader] = (),
    *,
    vectors: Sequence[VectorPairs] = (),
    candidates: Mapping[str, Candidates] | None = None,
    training: Mapping[str, Labelled] | None = None,
) -> Results:
    """Evaluates models on labelled sets (zero-shot and linear probe) and on pairs
    (retrieval and geometry).

    Args:
        models: Models by name, or an ``Embeddings`` over them, which has the device,
            workers and progress.
        zeroshot: Labelled sets.
        retrieval: Sources of pairs; pairs of equal caption count as correct for each
            other.
        vectors: Pairs of vectors, for models of vectors.
        candidates: Name of pairs of vectors -> the rows of b that every row of a is
            also ranked among.
        training: Name of a labelled set -> its training images; these sets get a linear
            probe as well.

    Returns:
        ``{"rows": [...], "differences": [...], "level": 0.95}`` as in results.json. A
        row has ``model``, ``objective`` (None if unknown), ``settings``,
        ``fingerprint`` and, by set, ``zeroshot``, ``retrieval``,
        ``geometry``, ``probe`` and ``vectors``; ``unreadable`` in them counts samples
        by reason. ``differences`` has the paired bootstrap of every two models.
        ``failures``, if any, lists ``model``, ``set`` (None for a model that cannot be
        loaded, which has no row) and ``error``.

    Raises:
        InputError: Nothing to evaluate, two sets of one name, or nothing that could be
            measured.

    Example:
        >>> import cloob
        >>> model = cloob.create_model("tiny-vit", seed=0)
        >>> results = cloob.evaluate(
        ...     {"untrained": model}, retrieval=[cloob.open_source("demo:val")]
        ... )
        >>> recall = results["rows"][0]["retrieval"]["demo:val"]
        >>> recall["n"], recall["image_to_text@10"] < 0.1
        (500, True)
    """
    training = training or {}
    if not isinstance(models, Embeddings):
        models = Embeddings(models, tower=bool(training))
    check_names(zeroshot, retrieval, vectors)
    measured = _Measured(models, training, candidates or {})
    tasks = measured.tasks(zeroshot, retrieval, vectors)
    rows: list[Row] = []
    failures: list[Failure] = []
    for model in models.models:
        try:
            row = _new_row(model, models.traits(model), bool(training), bool(vectors))
        except (InputError, OSError) as error:
            failures.append({"model": model, "set": None, "error": message(error)})
            continue
        failures += _measure(tasks, row)
        rows.append(row)
    if not measured.hits:
        reasons = dict.fromkeys(failure["error"] for failure in failures)
        raise InputError(f"nothing could be measured; {'; '.join(reasons)}")
    differences = paired_differences(measured.hits)
    results: Results = {"rows": rows, "differences": differences, "level": 0.95}
    if failures:
        results["failures"] = failures
    return results


def check_names(*kinds: Sequence[Reader | VectorPairs]) -> None:
    """Raises InputError without any set, or where two sets of a kind have one name."""
    if not any(kinds):
        raise InputError("nothing to evaluate: no labelled set and no pairs were given")
    for sets in kinds:
        for name, n in Counter(data.name for data in sets).items():
            if n > 1:
                raise InputError(
                    f"{n} sets are called {name!r}, and results are kept by name;"
                    " rename a folder"
                )


def _new_row(
    model: str, traits: ModelTraits, has_probes: bool, has_vectors: bool
) -> Row:
    """What is known of a model before it is measured."""
    row: Row = {
        "model": model,
        "objective": traits.objective,
        "settings": dict(traits.settings),
        "fingerprint": traits.fingerprint,
        "zeroshot": {},
        "retrieval": {},
        "geometry": {},
    }
    if has_probes:
        row["probe"] = {}
    if has_vectors:
        row["vectors"] = {}
    return row


def _measure(tasks: Sequence[_Task], row: Row) -> list[Failure]:
    """Measures a model on all sets; returns what failed."""
    failures: list[Failure] = []
    for name, measure in tasks:
        try:
            measure(row)
        except ValueError as error:  # an InputError, or too few pairs for a geometry
            text = str(error)
            if not text.startswith(name):
                text = f"{name}: {text}"
            failures.append({"model": row["model"], "set": name, "error": text})
    return failures


class _Measured:
    """Writes the numbers of a model on a set into the model's row, and keeps which
    samples are right.
    """

    def __init__(
        self,
        embeddings: Embeddings,
        training: Mapping[str, Labelled],
        candidates: Mapping[str, Candidates],
    ) -> None:
        self.embeddings = embeddings
        self.training, self.candidates = training, candidates
        self.hits: Hits = defaultdict(dict)

    def tasks(
        self,
        zeroshot: Sequence[Labelled],
        retrieval: Sequence[Reader],
        vectors: Sequence[VectorPairs],
    ) -> list[_Task]:
        """What is measured of each model, in the order of results.json."""
        probed = [data for data in zeroshot if data.name in self.training]
        return [
            *((data.name, partial(self.classify, data)) for data in zeroshot),
            *((data.name, partial(self.probe, data)) for data in probed),
            *((source.name, partial(self.retrieve, source)) for source in retrieval),
            *((pairs.name, partial(self.match, pairs)) for pairs in vectors),
        ]

    def classify(self, data: Labelled, row: Row) -> None:
        images, labels, classes = self.embeddings.labelled(row["model"], data)
        ranks = measures.zeroshot_ranks(images.features, labels, classes)
        numbers = measures.accuracies(ranks, labels, len(data.classnames))
        recalls = measures.class_recalls(ranks, labels, data.classnames)
        numbers["per_class"] = recalls
        row["zeroshot"][data.name] = numbers | _unreadable(images.bad)
        self.hits["acc1", data.name][row["model"]] = ranks < 1

    def probe(self, data: Labelled, row: Row) -> None:
        """Fits a linear probe on the training images, and adds its accuracy."""
        train = self.training[data.name]
        names = itertools.zip_longest(data.classnames, train.classnames)
        for label, (tested, trained) in enumerate(names):
            if tested != trained:  # no number would show it
                raise InputError(
                    f"label {label} is {tested!r} to test, but {trained!r} to train"
                )
        n_classes = len(data.classnames)
        fit = fit_probe(
            *self.embeddings.tower_and_labels(row["model"], train), n_classes
        )
        features, labels = self.embeddings.tower_and_labels(row["model"], data)
        ranks = probe_ranks(fit.weight, features, labels)
        row["probe"][data.name] = measures.accuracies(ranks, labels, n_classes) | {
            "n_train": fit.n_train,
            "strength": fit.strength,
            "validation_acc1": fit.validation_acc1,
        }
        self.hits["probe_acc1", data.name][row["model"]] = ranks < 1

    def retrieve(self, source: Reader, row: Row) -> None:
        """Adds the retrieval and the geometry of a set of captioned pictures to the
        row.
        """
        name, model = source.name, row["model"]
        pairs = self.embeddings.pairs(model, source)
        images = pairs.images.features
        ranks = measures.retrieval_ranks(
            images, pairs.texts, pairs.image_of_text, pairs.captions
        )
        numbers = measures.retrieval_numbers(ranks, pairs.image_of_text)
        if pairs.unreadable:
            numbers["unreadable"] = pairs.unreadable
        row["retrieval"][name] = numbers
        self.hits["image_to_text@1", name][model] = ranks.image_to_text < 1
        self.hits["text_to_image@1", name][model] = by_group(
            ranks.text_to_image < 1, pairs.image_of_text
        )
        texts = pairs.texts[pairs.first_texts]
        row["geometry"][name] = self.geometry(model, images, texts)

    def match(self, pairs: VectorPairs, row: Row) -> None:
        """Adds the retrieval and the geometry of pairs of vectors to the row."""
        encoder = self.embeddings.encoder(row["model"])
        a, b = embed_pairs(encoder, pairs)
        ids = torch.from_numpy(pairs.ids)
        units = pairs.units_of_ids()
        ranks = ranking.mutual_ranks_of_ids(a, b, ids)
        numbers = protocols.pair_numbers(ranks, ids, units=units)
        listed = self.candidates.get(pairs.name)
        if listed is not None:
            rows = embed_listed(encoder, pairs, listed)
            numbers |= candidate_numbers(a, rows, listed, ids, units)
        row["vectors"][pairs.name] = numbers | _unreadable(pairs.skipped)
        for metric, right in measures.vector_hits(ranks, ids, units).items():
            self.hits[metric, pairs.name][row["model"]] = right
        first = np.unique(pairs.ids, return_index=True)[1]
        row["geometry"][pairs.name] = {
            key.replace("image", "a").replace("text", "b"): value
            for key, value in self.geometry(row["model"], a[first], b[first]).items()
        }

    def geometry(self, model: str, a: Tensor, b: Tensor) -> Numbers:
        traits = self.embeddings.traits(model)
        return measures.geometry(a, b, traits.inv_tau, traits.beta)


def _unreadable(skipped: Sequence[Skip]) -> Numbers:
    counts = dict(sorted(Counter(skip.reason for skip in skipped).items()))
    return {"unreadable": counts} if counts else {}


def paired_differences(hits: Hits) -> list[Difference]:
    """Compares every two models (``model`` minus the earlier ``baseline``) by paired
    bootstrap, on every set.

    The means over the sets that all models with a metric share follow, with ``set``
    None.
    """
    entries: list[Difference] = []
    for metric in dict.fromkeys(metric for metric, _ in hits):
        by_set = {name: hits[key, name] for key, name in hits if key == metric}
        for name, by_model in by_set.items():
            entries += _compare([by_model], metric, name)
        everyone = {model for by_model in by_set.values() for model in by_model}
        shared = [each for each in by_set.values() if each.keys() == everyone]
        if len(shared) > 1:
            entries += _compare(shared, metric, None)
    return entries


def _compare(
    sets: Sequence[Mapping[str, Tensor]], metric: str, name: str | None
) -> Iterator[Difference]:
    """An entry for every two models that these sets have."""
    for baseline, model in itertools.combinations(sets[0], 2):
        gaps = [each[model].double() - each[baseline].double() for each in sets]
        difference, low, high = stratified_bootstrap(gaps)
        yield {
            "metric": metric,
            "set": name,
            "model": model,
            "baseline": baseline,
            "difference": difference,
            "low": low,
            "high": high,
        }
