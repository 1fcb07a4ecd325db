"""Whether a search can say that nothing fits: false accepts and false rejects at each cutoff.

    python -m benchmarks.cutoff --model RUN --data DATA/zeroshot

For each labelled set half of its classes are in the collection, drawn anew a few times. Queries are the plain names of
classes that are there (to be accepted), of the other half (*near*: the same kind of thing, to be rejected), and of
other sets' classes (*far*; the two emoji sets have a bit of everything and are left out). Beside the names, pictures
are queries as well: of classes that are there (itself taken out), and of the others. A query is accepted when one of
its best hits (``LOOKED_AT``) has a margin (cloob.search.background) of at least the cutoff. ``areas`` compares the
margin with the score alone and with how far it stands out of the query's own scores, by the area under the curve within
a collection; ``labels`` is the same question for ten labels and a picture. Rates are means over the sets, each weighing
the same.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from cloob.cache import Cache
from cloob.evaluation.embed import EmbedOptions, embed_texts
from cloob.evaluation.embeddings import Embeddings
from cloob.evaluation.sets.labelled import open_labelled
from cloob.search.background import CUTOFF, DRAWN, background_texts, margins, unrelated
from cloob.search.find import LOOKED_AT
from cloob.search.query import Query, Term

LABEL_CUTOFFS = (1.0, 1.25, 1.5, 1.75, 2.0)
CUTOFFS = (2.0, 2.25, 2.5, 2.75, 3.0, 3.25, 3.5, 4.0)
MOST_QUERIES = 300
KIN = {  # sets whose classes the pictures of a set may show all the same
    "flags": (),
    "tuxpaint-photos": ("animal-silhouettes",),
    "road-signs": ("twemoji-activities", "digits"),
    "twemoji-activities": ("road-signs",),
    "animal-silhouettes": ("tuxpaint-photos",),
    "digits": ("road-signs",),
}


def best_margins(queries: np.ndarray, pictures: np.ndarray, others: np.ndarray, own: np.ndarray | None) -> np.ndarray:
    """The largest margin among each query's best hits; ``own`` are pictures that are the query itself."""
    scores = queries @ pictures.T
    if own is not None:
        scores[np.arange(len(queries)), own] = -np.inf
    top = np.argsort(-scores, axis=1)[:, :LOOKED_AT]
    found = [margins(row[hits], pictures[hits], others).max() for row, hits in zip(scores, top, strict=True)]
    return np.array(found)


def plain_statistics(queries: np.ndarray, pictures: np.ndarray, others: np.ndarray) -> dict[str, np.ndarray]:
    """The best score by itself, and how far it stands out of the query's own scores."""
    scores = queries @ pictures.T
    return {"score": scores.max(1), "own scores": (scores.max(1) - scores.mean(1)) / scores.std(1)}


def area(accepted: np.ndarray, rejected: np.ndarray) -> float:
    return float((accepted[:, None] > rejected[None]).mean() + (accepted[:, None] == rejected[None]).mean() / 2)


def draw(sets: dict[str, Any], name: str, texts: np.ndarray, generator: np.random.Generator) -> dict[str, Any]:
    pictures, truth, classes = sets[name]
    present = generator.permutation(len(classes))[: len(classes) // 2]
    inside = np.isin(truth, present)
    collection, have = pictures[inside], np.unique(truth[inside])
    absent = np.setdiff1d(np.arange(len(classes)), present)
    others = [n for n in sets if n != name and n not in KIN[name]]
    far = np.concatenate([sets[n][2] for n in others])
    strangers = np.concatenate([sets[n][0] for n in others])
    drawn = collection[generator.permutation(len(collection))[:DRAWN]]
    words = unrelated(Query.of("x"), texts, drawn)
    shown = unrelated(Query((Term(1, "item"),)), texts, drawn)
    some = {
        "present": classes[_some(have, generator)],
        "near": classes[_some(absent, generator)],
        "far": far[_some(np.arange(len(far)), generator)],
    }
    result: dict[str, Any] = {k: best_margins(q, collection, words, None) for k, q in some.items()}
    plain = {k: plain_statistics(q, collection, words) for k, q in some.items()}
    result["labels"] = labels(pictures, truth, classes, far, texts, generator)
    result["area"] = {"margin": {k: area(result["present"], result[k]) for k in ("near", "far")}}
    for statistic in ("score", "own scores"):
        values = {k: v[statistic] for k, v in plain.items()}
        result["area"][statistic] = {k: area(values["present"], values[k]) for k in ("near", "far")}
    seen = [row for row in np.flatnonzero(inside) if (truth == truth[row]).sum() > 1]
    own = np.searchsorted(np.flatnonzero(inside), seen)
    if len(own) and shown is not None:
        own = _some(own, generator)
        result["present pictures"] = best_margins(collection[own], collection, shown, own)
        result["near pictures"] = best_margins(
            pictures[_some(np.flatnonzero(~inside), generator)], collection, shown, None
        )
        result["far pictures"] = best_margins(
            strangers[_some(np.arange(len(strangers)), generator)], collection, shown, None
        )
    return result


def labels(
    pictures: np.ndarray,
    truth: np.ndarray,
    classes: np.ndarray,
    far: np.ndarray,
    texts: np.ndarray,
    generator: np.random.Generator,
) -> dict[str, np.ndarray]:
    """The best margin of ten labels for pictures of one of them, and of ten other sets' labels."""
    ten = generator.permutation(len(classes))[:10]
    own = pictures[np.isin(truth, ten)]
    strange = far[generator.permutation(len(far))[:10]]
    return {kind: margins(own @ rows.T, own, texts).max(1) for kind, rows in (("own", classes[ten]), ("far", strange))}


def _some(values: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    return generator.permutation(values)[:MOST_QUERIES]


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    embeddings = Embeddings({"model": arguments.model}, EmbedOptions(cache=Cache()))
    encoder = embeddings.encoder("model")
    texts = embed_texts(encoder, background_texts()).numpy()
    sets = {}
    for name in KIN:
        data = open_labelled(arguments.data / name)
        pictures = embeddings.labelled("model", data).images.features.numpy()
        kept = np.isfinite(pictures).all(1)
        names = embed_texts(encoder, list(data.classnames)).numpy()
        sets[name] = pictures[kept], np.asarray(data.labels)[kept], names
    generator = np.random.default_rng(0)
    drawn = {name: [draw(sets, name, texts, generator) for _ in range(arguments.repeats)] for name in sets}
    kinds = ["present", "near", "far", "present pictures", "near pictures", "far pictures"]
    rows = []
    for cutoff in CUTOFFS:
        rates = {
            k: _mean([[(r[k] >= cutoff).mean() for r in runs if k in r] for runs in drawn.values()]) for k in kinds
        }
        rows.append({"cutoff": cutoff, "accepted": rates})
    own = {
        name: {k: _mean([[(r[k] >= CUTOFF).mean() for r in runs if k in r]]) for k in kinds if k in runs[0]}
        for name, runs in drawn.items()
    }
    areas = {
        statistic: {
            k: _mean([[r["area"][statistic][k] for r in runs] for runs in drawn.values()]) for k in ("near", "far")
        }
        for statistic in ("margin", "score", "own scores")
    }
    marked = {
        f"{cutoff:g}": {
            kind: _mean([[(r["labels"][kind] >= cutoff).mean() for r in runs] for runs in drawn.values()])
            for kind in ("own", "far")
        }
        for cutoff in LABEL_CUTOFFS
    }
    return {
        "labels": marked,
        "default": CUTOFF,
        "texts": len(texts),
        "rates": rows,
        "sets at the default": own,
        "areas": areas,
    }


def _mean(of_sets: list[list[float]]) -> float:
    return round(float(np.mean([np.mean(values) for values in of_sets if values])), 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True, help="folder of the labelled sets")
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "cutoff")
    arguments = parser.parse_args()
    found = run(arguments)
    for row in found["rates"]:
        print(f"{row['cutoff']:.2f}  " + "  ".join(f"{kind} {rate:.2f}" for kind, rate in row["accepted"].items()))
    print(json.dumps(found["areas"]))
    print(json.dumps(found["labels"]))
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "results.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
