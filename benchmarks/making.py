"""What faster ways of making vectors cost: bfloat16 products, and large JPEG files decoded smaller.

    python -m benchmarks.making --model RUN --pairs PICTOGRAMS/val --photographs FOLDER

Rows of the same pictures in float32 and in bfloat16 (``cloob index --precision bf16``), of a trained model: their
cosines, and recall@1, 5, 10 of the captions, whose rows are float32 in both, with paired 95 % intervals. With
``--photographs`` the same cosines between whole and smaller decoding (``--draft``), of all JPEG files there that are
large enough for the model. ``--seconds`` times both precisions' forward pass in turn.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import cloob
from cloob.data.open import open_source
from cloob.evaluate.measures.retrieval import retrieval_ranks
from cloob.functional.bootstrap import paired_bootstrap
from cloob.models.encoder import DualEncoder
from cloob.pictures import Encoded
from cloob.search.build.forward import Forward, draft_reduction
from cloob.search.identity import Making

BATCH = 64
KS = (1, 5, 10)


def rows(encoder: DualEncoder, pictures: list[bytes], making: Making) -> Tensor:
    """(n, D) as ``cloob index`` makes them."""
    forward = Forward(lambda: encoder, making)
    parts = []
    for start in range(0, len(pictures), BATCH):
        some = [forward.pixels(Encoded(data)) for data in pictures[start : start + BATCH]]
        parts.append(forward.rows(some))
    return torch.cat(parts)


def cosines(one: Tensor, other: Tensor) -> dict[str, float]:
    """Between two rows of each picture."""
    found = (one.double() * other.double()).sum(1)
    return {"mean": float(found.mean()), "1 %": float(found.quantile(0.01)), "least": float(found.min())}


def precision(encoder: DualEncoder, source: str) -> dict[str, Any]:
    """bfloat16 beside float32."""
    pairs = open_source(source)
    samples = [pairs.read(i) for i in range(len(pairs))]
    pictures, captions = [sample.image for sample in samples], [sample.caption for sample in samples]
    texts = encoder.encode_text(captions).float().cpu()
    own = torch.arange(len(texts))
    whole, half = (rows(encoder, pictures, Making(name)) for name in ("fp32", "bf16"))  # type: ignore[arg-type]
    found: dict[str, Any] = {"pairs": len(pictures), "cosines": cosines(whole, half)}
    before, after = (retrieval_ranks(images, texts, own, captions).text_to_image for images in (whole, half))
    nearest = [(images @ texts.T).topk(10, 0).indices for images in (whole, half)]
    kept = [len(set(a) & set(b)) / 10 for a, b in zip(*(some.T.tolist() for some in nearest), strict=True)]
    found["of the 10 nearest kept"] = statistics.mean(kept)
    for k in KS:
        mean, low, high = paired_bootstrap((after < k).double(), (before < k).double())
        found[f"recall@{k}"] = {
            "fp32": float((before < k).double().mean()),
            "bf16": float((after < k).double().mean()),
            "difference": [round(value, 4) for value in (mean, low, high)],
        }
    return found


def drafts(encoder: DualEncoder, folder: Path) -> dict[str, Any]:
    """Smaller decoding beside whole decoding, and float32 of one beside bfloat16 of the other."""
    pictures = [path.read_bytes() for path in sorted(folder.rglob("*.jp*g"))]
    large = [data for data in pictures if draft_reduction(Encoded(data).stored, encoder.image_size) > 1]
    whole, draft = (rows(encoder, large, Making(draft=draft)) for draft in (False, True))
    among = (whole @ whole.T).fill_diagonal_(-1)
    return {
        "pictures": len(large),
        "cosines": cosines(whole, draft),
        "nearest other picture": float(among.amax(1).mean()),
    }


def seconds(encoder: DualEncoder, repeats: int) -> dict[str, Any]:
    """A forward pass of a batch, in turn."""
    pixels = list(torch.randint(0, 256, (BATCH, 3, encoder.image_size, encoder.image_size), dtype=torch.uint8))
    times: dict[str, list[float]] = {"fp32": [], "bf16": []}
    for repeat in range(repeats + 1):
        for name, all_ in times.items():
            forward = Forward(lambda: encoder, Making(name))  # type: ignore[arg-type]
            start = time.perf_counter()
            forward.rows(pixels)
            if repeat:
                all_.append(time.perf_counter() - start)
    medians = {name: statistics.median(all_) for name, all_ in times.items()}
    return medians | {"fp32 over bf16": medians["fp32"] / medians["bf16"], "all": times}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a trained model, or with --seconds alone towers by name")
    parser.add_argument("--pairs", help="what `cloob train --data` reads")
    parser.add_argument("--photographs", type=Path)
    parser.add_argument("--seconds", type=int, default=0, metavar="REPEATS")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "making")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    trained = args.pairs or args.photographs
    encoder = cloob.load_model(args.model) if trained else cloob.create_model(args.model, seed=0).eval()
    found: dict[str, Any] = {"torch": torch.__version__, "threads": args.threads}
    found |= {"precision": precision(encoder, args.pairs)} if args.pairs else {}
    found |= {"draft": drafts(encoder, args.photographs)} if args.photographs else {}
    found |= {"seconds": seconds(encoder, args.seconds)} if args.seconds else {}
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "results.json"
    results = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    name = encoder.name
    results[name] = results.get(name, {}) | found
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({name: found}, indent=1))


if __name__ == "__main__":
    main()
