"""Does retrieval help a search? Recall of captions' pictures, ranked by what the caption retrieves.

    python -m benchmarks.rerank --model RUN --choose PICTOGRAMS/val --test tuxpaint-captions/test/0.tar

A caption q is searched among the pictures X of its set. Instead of q the ranking goes by

- ``retrieved``: norm(Xᵀ softmax(β X q)), what q retrieves from the pictures (Eq. 4 of arXiv:2110.11316);
- ``mixed``: norm(q + λ · retrieved);
- ``texts``: norm(q + λ · Tᵀ softmax(β T q)), what it retrieves from the other set's captions T.

β and λ are chosen by recall@5 on ``--choose`` and then measured on ``--test``; all β of ``retrieved`` are in the
record. Differences from plain ranking are paired over captions, with 95 % bootstrap intervals.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from cloob.cache import Cache
from cloob.data.open import open_source
from cloob.evaluate.embed import EmbedOptions, PairEmbeddings
from cloob.evaluate.embeddings import Embeddings
from cloob.evaluate.measures.retrieval import retrieval_ranks
from cloob.functional import hopfield_retrieval
from cloob.functional.bootstrap import paired_bootstrap

BETAS = (8.0, 14.0, 30.0, 50.0, 100.0, 200.0)
MIXES = (0.1, 0.25, 0.5, 1.0)
KS = (1, 5, 10)


def ranks(pairs: PairEmbeddings, queries: Tensor) -> Tensor:
    """(T,) where each caption's best picture lands."""
    return retrieval_ranks(pairs.images.features, queries, pairs.image_of_text, pairs.captions).text_to_image


def queries(pairs: PairEmbeddings, memory: Tensor, way: str, beta: float, mix: float) -> Tensor:
    stored = memory if way == "texts" else pairs.images.features
    found = hopfield_retrieval(pairs.texts, stored, beta)
    return found if way == "retrieved" else F.normalize(pairs.texts + mix * found, dim=1)


def recalls(found: Tensor) -> dict[str, float]:
    return {f"@{k}": round(float((found < k).double().mean()), 4) for k in KS}


def compare(found: Tensor, plain: Tensor) -> dict[str, Any]:
    rows: dict[str, Any] = {"recall": recalls(found)}
    for k in KS:
        mean, low, high = paired_bootstrap((found < k).double(), (plain < k).double())
        rows[f"difference@{k}"] = [round(value, 4) for value in (mean, low, high)]
    return rows


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    embeddings = Embeddings({"model": arguments.model}, EmbedOptions(cache=Cache()))
    choose, test = (embeddings.pairs("model", open_source(p)) for p in (arguments.choose, arguments.test))
    plain = {"choose": ranks(choose, choose.texts), "test": ranks(test, test.texts)}
    result: dict[str, Any] = {"plain": {name: recalls(found) for name, found in plain.items()}, "ways": {}}
    result["pairs"] = {"choose": len(choose.texts), "test": len(test.texts)}
    memories = {"choose": test.texts, "test": choose.texts}  # captions of the other set: none of its own
    for way in ("retrieved", "mixed", "texts"):
        settings = [(beta, mix) for beta in BETAS for mix in (MIXES if way != "retrieved" else (1.0,))]
        scored = []
        for beta, mix in settings:
            found = ranks(choose, queries(choose, memories["choose"], way, beta, mix))
            scored.append((float((found < 5).double().mean()), -beta, -mix))
        _, beta, mix = max(scored)
        rows = compare(ranks(test, queries(test, memories["test"], way, -beta, -mix)), plain["test"])
        own = compare(ranks(choose, queries(choose, memories["choose"], way, -beta, -mix)), plain["choose"])
        result["ways"][way] = {"beta": -beta, "mix": -mix, "test": rows, "choose": own}
    result["retrieved by β"] = {
        f"{beta:g}": {
            "choose": recalls(ranks(choose, queries(choose, choose.texts, "retrieved", beta, 1.0))),
            "test": recalls(ranks(test, queries(test, test.texts, "retrieved", beta, 1.0))),
        }
        for beta in BETAS
    }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--choose", required=True, help="pairs that β and λ are chosen by")
    parser.add_argument("--test", required=True, help="pairs that nothing is chosen by")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "rerank")
    arguments = parser.parse_args()
    found = run(arguments)
    print(json.dumps(found, indent=1))
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "results.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
