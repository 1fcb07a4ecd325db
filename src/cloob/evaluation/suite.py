"""An evaluation: several models on several sets, side by side, into results.json and
per_class/.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from cloob.data.batch import Skip
from cloob.errors import InputError, message, refuse
from cloob.evaluation import measures
from cloob.evaluation.embed import Encoder, Reader
from cloob.evaluation.embeddings import Embeddings, Labelled
from cloob.evaluation.probe import ProbeOptions, probe_numbers, probe_ranks
from cloob.evaluation.protocols import Candidates, candidate_numbers, embed_listed
from cloob.evaluation.report.tables import METRICS, Row, set_names
from cloob.files import write_whole
from cloob.functional.bootstrap import grouped_bootstrap
from cloob.models.aligned.model import embed_pairs

if TYPE_CHECKING:  # it brings pyarrow
    from cloob.data.vectors import VectorPairs

Hits = dict[tuple[str, str], dict[str, Tensor]]
"""(metric, set) -> model -> (n,) whether every sample is right: its mean over seeds of
a probe, texts by picture.
"""

_SEED_METRICS = {
    "zeroshot": ("acc1",),
    "probe": ("acc1",),
    "retrieval": tuple(METRICS),
    "vectors": tuple(METRICS),
}


def evaluate(
    models: Mapping[str, Encoder | str | Path] | Embeddings,
    zeroshot: Sequence[Labelled] = (),
    retrieval: Sequence[Reader] = (),
    *,
    vectors: Sequence[VectorPairs] = (),
    candidates: Mapping[str, Candidates] | None = None,
    training: Mapping[str, Labelled] | None = None,
    probe: ProbeOptions | None = None,
    train_seconds: Mapping[str, float] | None = None,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    geometry_limit: int = measures.DEFAULT_LIMIT,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Any]:
    """Evaluates models on labelled sets (zero-shot and linear probe) and on pairs
    (retrieval and geometry).

    Args:
        models: Models by name, or an ``Embeddings`` over them, which has the device,
            workers, progress and cache.
        zeroshot: Labelled sets.
        retrieval: Sources of pairs; pairs of equal caption count as correct for each
            other.
        vectors: Pairs of vectors, for models of vectors.
        candidates: Name of pairs of vectors -> the rows of b that every row of a is
            also ranked among.
        training: Name of a labelled set -> its training images; these sets get a linear
            probe as well.
        probe: How probes are fitted; None takes the defaults.
        train_seconds: Seconds of the training by model.
        settings: Settings by model, added to those of its objective.
        geometry_limit: Pairs that the geometry is measured on, at most.
        level: Level of all intervals.
        seed: Seed of the bootstrap.

    Returns:
        ``{"rows": [...], "differences": [...], "level": level}`` as in results.json. A
        row has ``model``, ``objective`` (None if unknown), ``settings``,
        ``fingerprint``, ``train_seconds`` and, by set, ``zeroshot``, ``retrieval``,
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
    embeddings = (
        models
        if isinstance(models, Embeddings)
        else Embeddings(models, tower=bool(training))
    )
    uses = [
        use
        for sets in (zeroshot, retrieval, vectors)
        for use in Counter(data.name for data in sets).items()
    ]
    twice = "; ".join(f"{n} sets are called {name!r}" for name, n in uses if n > 1)
    refuse({"nothing to evaluate: no labelled set and no pairs were given": not uses})
    refuse({f"{twice}, and results are kept by name; rename a folder": twice})
    measuring = _Measuring(
        embeddings,
        probe or ProbeOptions(),
        geometry_limit,
        {"level": level, "seed": seed},
        candidates or {},
    )
    tasks: list[tuple[Any, Callable[[Any, dict[str, Any]], None]]] = [
        *((data, measuring.classify) for data in zeroshot),
        *(
            (data, partial(measuring.probe, training[data.name]))
            for data in zeroshot
            if data.name in training
        ),
        *((source, measuring.retrieve) for source in retrieval),
        *((pairs, measuring.match) for pairs in vectors),
    ]
    kinds = {
        "zeroshot": True,
        "retrieval": True,
        "geometry": True,
        "probe": training,
        "vectors": vectors,
    }
    rows, failures = list[dict[str, Any]](), list[dict[str, Any]]()
    for model in embeddings.models:
        try:
            facts = embeddings.facts(model)
        except (InputError, OSError) as error:
            failures.append({"model": model, "set": None, "error": message(error)})
            continue
        row: dict[str, Any] = {"model": model, "objective": facts.objective}
        row |= {
            "settings": {**facts.settings, **(settings or {}).get(model, {})},
            "fingerprint": facts.fingerprint,
        }
        row |= {kind: {} for kind, requested in kinds.items() if requested}
        for data, measure in tasks:
            try:
                measure(data, row)
            except (
                ValueError
            ) as error:  # an InputError, or too few pairs for a geometry
                text = (
                    str(error)
                    if str(error).startswith(data.name)
                    else f"{data.name}: {error}"
                )
                failures.append({"model": model, "set": data.name, "error": text})
        rows.append(row | {"train_seconds": (train_seconds or {}).get(model)})
    refuse_if_all_failed(
        [row for row in rows if any(row.get(kind) for kind in kinds)], failures
    )
    compared = differences(measuring.hits, level=level, seed=seed)
    results = {"rows": rows, "differences": compared, "level": level}
    return {**results, "failures": failures} if failures else results


@dataclass
class _Measuring:
    """Writes the numbers of a model on a set into the model's row, and keeps which
    samples are right.
    """

    embeddings: Embeddings
    how: ProbeOptions
    geometry_limit: int
    bootstrap: dict[str, Any]
    candidates: Mapping[str, Candidates]
    hits: Hits = field(default_factory=lambda: defaultdict(dict))

    def classify(self, data: Labelled, row: dict[str, Any]) -> None:
        images, labels, classes = self.embeddings.labelled(row["model"], data)
        ranks = measures.zeroshot_ranks(images.features, labels, classes)
        numbers = measures.zeroshot_numbers(
            ranks, labels, data.classnames, **self.bootstrap
        )
        row["zeroshot"][data.name] = numbers | _unreadable(images.bad)
        self.hits["acc1", data.name][row["model"]] = ranks < 1

    def probe(self, train: Labelled, data: Labelled, row: dict[str, Any]) -> None:
        for label, (tested, trained) in enumerate(
            itertools.zip_longest(data.classnames, train.classnames)
        ):
            # No number would show it.
            refuse(
                {
                    f"label {label} is {tested!r} to test, but {trained!r} to train": (
                        tested != trained
                    )
                }
            )
        features, labels = self.embeddings.tower(row["model"], data)
        n_classes = len(data.classnames)
        fits = []
        for seed in self.how.seeds:
            fit = self.embeddings.probe(row["model"], train, n_classes, self.how, seed)
            fits.append((probe_ranks(fit.weight, features, labels), fit))
        row["probe"][data.name] = probe_numbers(
            fits, labels, n_classes, self.how, **self.bootstrap
        )
        right = torch.stack([(ranks < 1).double() for ranks, _ in fits]).mean(0)
        self.hits["probe_acc1", data.name][row["model"]] = right

    def retrieve(self, source: Reader, row: dict[str, Any]) -> None:
        name, model = source.name, row["model"]
        pairs = self.embeddings.pairs(model, source)
        images = pairs.images.features
        ranks = measures.retrieval_ranks(
            images, pairs.texts, pairs.image_of_text, pairs.captions
        )
        numbers = measures.retrieval_numbers(
            ranks, pairs.image_of_text, **self.bootstrap
        )
        row["retrieval"][name] = numbers | (
            {"unreadable": pairs.unreadable} if pairs.unreadable else {}
        )
        self.hits["image_to_text@1", name][model] = ranks.image_to_text < 1
        self.hits["text_to_image@1", name][model] = measures.by_picture(
            ranks.text_to_image < 1, pairs.image_of_text
        )
        facts, texts = self.embeddings.facts(model), pairs.texts[pairs.first_texts]
        row["geometry"][name] = measures.geometry(
            images, texts, facts.inv_tau, facts.beta, self.geometry_limit
        )

    def match(self, pairs: VectorPairs, row: dict[str, Any]) -> None:
        encoder, facts = (
            self.embeddings.encoder(row["model"]),
            self.embeddings.facts(row["model"]),
        )
        a, b = embed_pairs(encoder, pairs)
        ids = torch.from_numpy(pairs.ids)
        numbers, hits = measures.vector_numbers(a, b, ids, **self.bootstrap)
        listed = self.candidates.get(pairs.name)
        if listed is not None:
            rows = embed_listed(encoder, pairs, listed)
            numbers |= candidate_numbers(a, rows, listed, ids, **self.bootstrap)
        first = np.unique(pairs.ids, return_index=True)[1]
        row["vectors"][pairs.name] = numbers | _unreadable(pairs.skipped)
        measured = measures.geometry(
            a[first], b[first], facts.inv_tau, facts.beta, self.geometry_limit
        )
        row["geometry"][pairs.name] = of_sides(measured)
        for metric, right in hits.items():
            self.hits[metric, pairs.name][row["model"]] = right


def _unreadable(skipped: Sequence[Skip]) -> dict[str, Any]:
    counts = dict(sorted(Counter(skip.reason for skip in skipped).items()))
    return {"unreadable": counts} if counts else {}


def of_sides(measured: Mapping[str, Any]) -> dict[str, Any]:
    """What was measured of pictures and texts, by the names of a and b."""
    return {
        key.replace("image", "a").replace("text", "b"): value
        for key, value in measured.items()
    }


def refuse_if_all_failed(
    done: Sequence[Any], failures: Sequence[Mapping[str, Any]]
) -> None:
    """InputError, one line, where nothing could be measured."""
    lines = dict[str, None]()
    for failure in failures:
        named = failure["error"].startswith(failure["model"])
        lines[
            failure["error"] if named else f"{failure['model']}: {failure['error']}"
        ] = None
    refuse(
        {
            f"{'nothing could be measured; ' if len(lines) > 1 else ''}{'; '.join(lines)}": (
                not done
            )
        }
    )


def differences(
    hits: Hits, *, level: float = 0.95, seed: int = 0
) -> list[dict[str, Any]]:
    """Compares every two models (``model`` minus the earlier ``baseline``) by paired
    bootstrap, on every set.

    The means over the sets that all models with a metric share follow, with ``set``
    None.
    """
    entries = []
    for metric in dict.fromkeys(metric for metric, _ in hits):
        of_sets = {
            name: [by_model] for (m, name), by_model in hits.items() if m == metric
        }
        everyone = {model for groups in of_sets.values() for model in groups[0]}
        shared = [
            groups[0] for groups in of_sets.values() if groups[0].keys() == everyone
        ]
        for name, groups in [
            *of_sets.items(),
            *([(None, shared)] if len(shared) > 1 else []),
        ]:
            for baseline, model in itertools.combinations(groups[0], 2):
                values = [
                    by_model[model].double() - by_model[baseline].double()
                    for by_model in groups
                ]
                gap, low, high = grouped_bootstrap(values, level=level, seed=seed)
                pair = {
                    "metric": metric,
                    "set": name,
                    "model": model,
                    "baseline": baseline,
                }
                entries.append({**pair, "difference": gap, "low": low, "high": high})
    return entries


def write_results(path: str | Path, results: Mapping[str, Any]) -> None:
    """Writes results.json, completely or not at all; equal results give equal bytes.

    NaN and infinity become null.
    """
    plain = json.loads(json.dumps(results), parse_constant=lambda _: None)
    text = json.dumps(plain, indent=1, ensure_ascii=False) + "\n"
    write_whole(Path(path), text, f"{path}: results cannot be written here")


def write_per_class(
    folder: Path,
    results: Mapping[str, Any],
    embeddings: Embeddings,
    zeroshot: Sequence[Labelled],
) -> list[Path]:
    """Writes a CSV a labelled set; returns the files.

    A line is a class: ``label``, ``class``, ``images``, and for every model its recall
    and worst confusion.
    """
    files: dict[str, Path] = {}  # by name, whatever its case
    for data in zeroshot:
        matrices = {}
        for model in (
            row["model"] for row in results["rows"] if data.name in row["zeroshot"]
        ):
            images, labels, classes = embeddings.labelled(model, data)
            matrices[model] = measures.confusion_matrix(
                images.features, labels, classes
            )
        if not matrices:
            continue
        text = io.StringIO(newline="")
        writer = csv.writer(text, lineterminator="\n")
        columns = [
            f"{model}: {number}"
            for model in matrices
            for number in ("recall", "mostly taken for")
        ]
        writer.writerow(["label", "class", "images", *columns])
        for label, name in enumerate(data.classnames):
            cells: list[str] = []
            for matrix in matrices.values():
                row, n = matrix[label].clone(), int(matrix[label].sum())
                cells.append(f"{int(row[label]) / n:.6g}" if n else "")
                row[label] = 0
                worst = int(row.argmax())
                cells.append(
                    [*data.classnames, "(unreadable)"][worst] if int(row[worst]) else ""
                )
            writer.writerow([label, name, n, *cells])
        stem = re.sub(r"[^\w.+-]+", "-", data.name).strip("-.") or "set"
        names = itertools.chain(
            [stem], (f"{stem}-{number}" for number in itertools.count(2))
        )
        free = next(name for name in names if name.casefold() not in files)
        files[free.casefold()] = folder / f"{free}.csv"
        write_whole(files[free.casefold()], text.getvalue())
    return list(files.values())


def per_class_files(results: Path) -> list[str]:
    """The names of the tables of classes that a results.json lists, none without one.

    Its folder may be anybody's, so a name that leads elsewhere is no name.
    """
    try:
        content = json.loads(results.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    names = content.get("per_class") if isinstance(content, dict) else None
    if not isinstance(names, list):
        return []
    texts = [name for name in names if isinstance(name, str)]
    return [name for name in texts if re.fullmatch(r"[\w+-][\w.+-]*\.csv", name)]


def remove_per_class(folder: Path, names: Iterable[str]) -> None:
    """Removes tables of an earlier evaluation; other files stay."""
    for name in names:
        (folder / name).unlink(missing_ok=True)


def over_seeds(
    rows: Sequence[Row], groups: Mapping[str, Mapping[int, str]]
) -> list[dict[str, Any]]:
    """Means over seeds of the accuracies and recalls of every group of models, by set,
    and paired differences.

    ``groups`` are models by seed. An entry has ``group``, ``metric``, ``set`` (None:
    the mean of the sets), ``mean``, ``sd`` (over seeds, n − 1 in the denominator; None
    for one) and ``n``. With ``minus``, another group, the numbers are of the
    differences between the two models of a seed, for the seeds that both groups have.
    """
    entries = list[dict[str, Any]]()
    for metric, name, numbers in _by_set(rows):
        values = {
            group: {
                seed: numbers[model]
                for seed, model in models.items()
                if model in numbers
            }
            for group, models in groups.items()
        }
        samples = [
            ({"group": group}, list(result.values()))
            for group, result in values.items()
        ]
        for one, other in itertools.combinations(values, 2):
            gaps = [
                values[other][seed] - values[one][seed]
                for seed in values[one].keys() & values[other].keys()
            ]
            samples.append(({"group": other, "minus": one}, gaps))
        for who, some in samples:
            if some:
                spread = {
                    "mean": mean(some),
                    "sd": stdev(some) if len(some) > 1 else None,
                    "n": len(some),
                }
                entries.append({**who, "metric": metric, "set": name, **spread})
    return entries


def _by_set(rows: Sequence[Row]) -> Iterator[tuple[str, str | None, dict[str, float]]]:
    """Every metric and set with its numbers by model, then the metric's mean over the
    sets that all models have.
    """
    for kind, keys in _SEED_METRICS.items():
        for key in keys:
            metric = f"probe_{key}" if kind == "probe" else key
            shared = []
            for name in set_names(rows, kind):
                numbers = {
                    row["model"]: row[kind][name][key]
                    for row in rows
                    if key in row.get(kind, {}).get(name, {})
                }
                shared += [numbers] if len(numbers) == len(rows) else []
                if numbers:
                    yield metric, name, numbers
            if len(shared) > 1:
                yield (
                    metric,
                    None,
                    {
                        model: mean(numbers[model] for numbers in shared)
                        for model in shared[0]
                    },
                )


def seed_lines(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line per entry, in percent and percentage points."""
    lines = []
    for entry in entries:
        what = f"{METRICS[entry['metric']]}, {entry['set'] or 'mean of the sets'}"
        sign = "+" if "minus" in entry else ""
        value = f"{100 * entry['mean']:{sign}.2f}" + (
            f" ± {100 * entry['sd']:.2f}" if entry["sd"] is not None else ""
        )
        who = (
            f"{entry['group']} − {entry['minus']}"
            if "minus" in entry
            else entry["group"]
        )
        lines.append(f"{who}: {what} {value} (n = {entry['n']})")
    return lines
