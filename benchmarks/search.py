"""Search, figure by figure, side by side with what people use otherwise.

``python -m benchmarks.search index [--model ViT-B-32] [--threads 2] [--repeats 3]
[--quick]``: pictures a second of ``cloob index`` and of the customary open_clip loop on
the same files, and the model's forward pass alone, which is the floor. The model has
random weights: times do not depend on them. Two kinds of files: ``web`` (640×480) and
``camera`` (4000×3000), JPEG, made here; ``--pictures DIR`` takes others. Rows:

- ``cloob``: what ``cloob index`` does once the model is loaded and its fingerprint
  known (the cache keeps it), into a new index: hashes, metadata, transactions;
- ``loop``: ``model.encode_image(torch.stack([preprocess(Image.open(path)) for path in
  batch]))``;
- ``loader``: the same with a DataLoader that has as many worker processes as ours has
  threads;
- ``forward``: ``encode_image`` of pixels that are ready.

Medians of interleaved repeats.

``python -m benchmarks.search scale [--rows 100000 1000000] [--postgres ADDRESS]
[--stores cloob …]``: clustered unit vectors of width 256 in a Parquet file of float16
(a hundred rows to a cluster, cosine to its centre about 0.8), stored and searched by

- ``cloob``: ``cloob index FILE --vectors COLUMN`` into a folder, exact search;
- ``PostgreSQL``: the same into a database, whose search walks pgvector's HNSW;
- ``LanceDB``: a table with its default IVF_PQ, which has four codes of a byte for 64
  numbers here;
- ``numpy``: a product with all rows in memory, the floor of exact search and the oracle
  of recall.

CPU seconds of all threads and of the server, not of the clock: other work on the
    machine hardly counts. Bytes are on
disk after the build. Queries are new members of clusters; recall@10 is against the
oracle.

``query`` (milliseconds of a query and recall@10 at 10,000 to a million vectors, beside
numpy, faiss, LanceDB and PostgreSQL) was measured by this script at commit fc415074;
its record stays.

Writes results.json to --out, in which other parts stay.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from benchmarks.machine import machine as this_machine
from PIL import Image
from pyarrow import parquet
from torch.utils.data import DataLoader

WORKERS = 2
BATCH = 64
KINDS = {"web": ((640, 480), 192), "camera": ((4000, 3000), 32)}
"""Name -> width and height, and how many."""
WIDTH = 256  # of the vectors of `scale`, that of the tiny models
CLUSTER = 100  # rows
BLOCK = 50_000  # rows made or written at once
QUERIES = 50
TOP = 10


def make_pictures(folder: Path, size: tuple[int, int], count: int) -> list[Path]:
    """JPEG files with the spectrum of photographs (amplitudes fall as 1/f), quality
    90.
    """
    folder.mkdir(parents=True)
    width, height = size
    frequencies = np.hypot(
        np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    )
    paths = []
    for i in range(count):
        generator = np.random.default_rng(i)
        shape = (3, height, width // 2 + 1)
        spectrum = generator.standard_normal(
            shape, np.float32
        ) + 1j * generator.standard_normal(shape, np.float32)
        planes = np.fft.irfft2(
            spectrum / np.maximum(frequencies, 1 / width), (height, width)
        )
        planes = 128 + 50 * (planes - planes.mean()) / planes.std()
        paths.append(folder / f"{i:04}.jpg")
        Image.fromarray(planes.clip(0, 255).astype(np.uint8).transpose(1, 2, 0)).save(
            paths[-1], quality=90
        )
    return paths


class Files(torch.utils.data.Dataset[torch.Tensor]):
    """Pictures through open_clip's transform."""

    def __init__(
        self, paths: list[Path], preprocess: Callable[[Any], torch.Tensor]
    ) -> None:
        self.paths, self.preprocess = paths, preprocess

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.preprocess(Image.open(self.paths[index]))


def measure_index(args: argparse.Namespace) -> dict[str, Any]:
    import open_clip

    import cloob
    from cloob.search.index import Index
    from cloob.search.update import UpdateOptions

    encoder = cloob.create_model(args.model, seed=0).eval()
    theirs, _, preprocess = open_clip.create_model_and_transforms(args.model)
    theirs.eval()
    found: dict[str, Any] = {"model": args.model, "batch": BATCH, "workers": WORKERS}
    with tempfile.TemporaryDirectory() as work:
        given = sorted(args.pictures.iterdir()) if args.pictures else None
        kinds = {"given": given} if given else None
        if kinds is None:
            kinds = {
                kind: make_pictures(
                    Path(work) / kind, size, count // (4 if args.quick else 1)
                )
                for kind, (size, count) in KINDS.items()
            }
        for kind, paths in kinds.items():
            batches = [paths[i : i + BATCH] for i in range(0, len(paths), BATCH)]
            ready = torch.zeros(
                min(BATCH, len(paths)),
                3,
                encoder.image_size,
                encoder.image_size,
                dtype=torch.uint8,
            )

            def ours(kind: str = kind, paths: list[Path] = paths) -> float:
                with Index.create(
                    Path(tempfile.mkdtemp(dir=work)) / f"{kind}.idx"
                ) as index:
                    options = UpdateOptions(
                        model=encoder, batch_size=BATCH, workers=WORKERS
                    )
                    done = index.update([paths[0].parent], options)
                    assert done.added == len(paths)
                    return done.seconds

            def loop(batches: list[list[Path]] = batches) -> None:
                with torch.no_grad():
                    for batch in batches:
                        theirs.encode_image(
                            torch.stack(
                                [preprocess(Image.open(path)) for path in batch]
                            )
                        )

            def loader(paths: list[Path] = paths) -> None:
                with torch.no_grad():
                    for batch in DataLoader(
                        Files(paths, preprocess), BATCH, num_workers=WORKERS
                    ):
                        theirs.encode_image(batch)

            def forward(ready: torch.Tensor = ready, paths: list[Path] = paths) -> None:
                for start in range(0, len(paths), BATCH):
                    encoder.encode_image(ready[: len(paths) - start])

            rows: dict[str, Callable[[], float | None]] = {
                "cloob": ours,
                "loop": loop,
                "loader": loader,
                "forward": forward,
            }
            found[kind] = {
                "pictures": len(paths),
                **interleaved(rows, len(paths), args.repeats),
            }
            found[kind]["cloob over loop"] = (
                found[kind]["cloob"]["median"] / found[kind]["loop"]["median"]
            )
            found[kind]["cloob over loader"] = (
                found[kind]["cloob"]["median"] / found[kind]["loader"]["median"]
            )
    return found


def clustered(n: int, block: int, centres: np.ndarray) -> np.ndarray:
    """(n, WIDTH) float32 unit rows around centres drawn at random; the same for the
    same block.
    """
    generator = np.random.default_rng([1, block])
    rows = centres[generator.integers(len(centres), size=n)]
    rows = rows + generator.standard_normal((n, WIDTH), np.float32) * np.float32(
        0.75 / np.sqrt(WIDTH)
    )
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def write_vectors(path: Path, n: int, centres: np.ndarray) -> None:
    schema = pa.schema(
        [("path", pa.string()), ("vector", pa.list_(pa.float16(), WIDTH))]
    )
    with parquet.ParquetWriter(path, schema, compression="none") as writer:
        for block, start in enumerate(range(0, n, BLOCK)):
            rows = clustered(min(BLOCK, n - start), block, centres).astype(np.float16)
            cells = pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), WIDTH)
            names = pa.array([f"row {start + i}" for i in range(len(rows))])
            writer.write_table(pa.table([names, cells], schema=schema))


def read_blocks(path: Path) -> Any:
    """The rows of the file as float32, block by block."""
    for batch in parquet.ParquetFile(path).iter_batches(BLOCK, columns=["vector"]):
        yield (
            batch.column(0)
            .flatten()
            .to_numpy(zero_copy_only=False)
            .astype(np.float32)
            .reshape(-1, WIDTH)
        )


def cpu_seconds(server: int | None = None) -> float:
    """Of this process, of children that have ended, and of a server with its own."""
    used = sum(
        resource.getrusage(who)[i]
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        for i in (0, 1)
    )
    for process in Path("/proc").glob("[0-9]*/stat") if server else ():
        try:
            fields = process.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        own, ended = sum(map(int, fields[11:13])), sum(map(int, fields[13:15]))
        if int(process.parent.name) == server:
            used += (own + ended) / os.sysconf("SC_CLK_TCK")
        elif int(fields[1]) == server:
            used += own / os.sysconf("SC_CLK_TCK")
    return used


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


Found = list[list[int]]  # rows of the file, for each query
Measured = tuple[dict[str, Any], Found]
Clock = Callable[[], float]


def numpy_store(file: Path, queries: np.ndarray, clock: Clock) -> Measured:
    start = clock()
    rows, first = (
        np.empty((parquet.ParquetFile(file).metadata.num_rows, WIDTH), np.float32),
        0,
    )
    for block in read_blocks(file):
        rows[first : first + len(block)] = block
        first += len(block)
    ready = clock()
    found = []
    for query in queries:
        scores = rows @ query
        best = np.argpartition(-scores, TOP)[:TOP]
        found.append(best[np.argsort(-scores[best])].tolist())
    return {
        "bytes": rows.nbytes,
        "write": ready - start,
        "build": 0.0,
        "search": clock() - ready,
    }, found


def cloob_store(
    address: str, file: Path, queries: np.ndarray, clock: Clock
) -> Measured:
    from cloob import Index, create_model
    from cloob.search.scan.open import ScanOptions
    from cloob.search.update import UpdateOptions

    encoder = create_model("tiny-vit", seed=0).eval()
    start = clock()
    with Index.create(address) as index:
        optimise, index.store.table.optimise = index.store.table.optimise, lambda: None  # type: ignore[method-assign]
        index.update(
            [file],
            UpdateOptions(
                model=encoder, device="cpu", scan=ScanOptions(vectors="vector")
            ),
        )
        written = clock()
        optimise()
        model = index.store.model()
        index.store.nearest(
            model, queries[0], TOP
        )  # which lays out the matrix of a folder
        built = clock()
        found = [index.store.nearest(model, query, TOP).ids for query in queries]
        searched = clock()
        rows = [
            [int(item.path.split()[-1]) for item in index.store.items(ids)]
            for ids in found
        ]
    return {
        "write": written - start,
        "build": built - written,
        "search": searched - built,
    }, rows


def lance_store(file: Path, work: Path, queries: np.ndarray, clock: Clock) -> Measured:
    import lancedb

    start = clock()
    database, table, first = lancedb.connect(work / "lance"), None, 0
    for rows in read_blocks(file):
        cells = pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), WIDTH)
        part = pa.table(
            {
                "id": pa.array(range(first, first + len(rows)), pa.int64()),
                "vector": cells,
            }
        )
        table, first = (
            table or database.create_table("rows", part.slice(0, 0)),
            first + len(rows),
        )
        table.add(part)
    written = clock()
    table.create_index(metric="dot", vector_column_name="vector")
    built = clock()
    found = [
        table.search(query).metric("dot").refine_factor(10).limit(TOP).to_arrow()
        for query in queries
    ]
    values = {
        "bytes": folder_bytes(work / "lance"),
        "write": written - start,
        "build": built - written,
    }
    return values | {"search": clock() - built, "version": lancedb.__version__}, [
        each["id"].to_pylist() for each in found
    ]


def postgres_store(database: str, n: int, file: Path, queries: np.ndarray) -> Measured:
    import psycopg

    def ask(statement: str) -> Any:
        with psycopg.connect(database, autocommit=True) as connection:
            row = connection.execute(statement.encode()).fetchone()
            return row and row[0]

    server = int(
        (Path(ask("SHOW data_directory")) / "postmaster.pid")
        .read_text()
        .splitlines()[0]
    )
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute(f"CREATE SCHEMA scale{n}".encode())
    size = "SELECT pg_database_size(current_database())"
    before = ask(size)
    address = f"{database}?options=-csearch_path%3Dscale{n},public"
    values, found = cloob_store(address, file, queries, lambda: cpu_seconds(server))
    return values | {"bytes": ask(size) - before}, found


def measure_scale(args: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for n in args.rows:
        with tempfile.TemporaryDirectory(dir=args.work) as folder:
            work, file = Path(folder), Path(folder) / "vectors.parquet"
            centres = np.random.default_rng(0).standard_normal(
                (max(1, n // CLUSTER), WIDTH), np.float32
            )
            centres /= np.linalg.norm(centres, axis=1, keepdims=True)
            write_vectors(file, n, centres)
            queries = clustered(QUERIES, n, centres)
            found[str(n)] = rows = {"file bytes": file.stat().st_size}
            oracle: Found = []
            for name in ["numpy", *args.stores]:
                if name == "numpy":
                    found_by = numpy_store(file, queries, cpu_seconds)
                    oracle = found_by[1]
                elif name == "LanceDB":
                    found_by = lance_store(file, work, queries, cpu_seconds)
                elif name == "cloob":
                    found_by = cloob_store(
                        str(work / "index"), file, queries, cpu_seconds
                    )
                else:
                    found_by = postgres_store(args.postgres, n, file, queries)
                values, best = found_by
                if name == "cloob":
                    values["bytes"] = folder_bytes(work / "index")
                values["search"] = 1000 * values["search"] / QUERIES
                hits = [
                    len({*mine} & {*theirs})
                    for mine, theirs in zip(best, oracle, strict=True)
                ]
                rows[name] = values | {"recall_at_10": sum(hits) / (TOP * QUERIES)}
                print(
                    f"{n:,} rows, {name}: {json.dumps(rows[name])}",
                    file=sys.stderr,
                    flush=True,
                )
                for left in ("index", "lance"):
                    shutil.rmtree(work / left, ignore_errors=True)
    return {
        "width": WIDTH,
        "queries": QUERIES,
        "units": "CPU seconds; search: CPU milliseconds a query",
        "rows": found,
    }


def interleaved(
    rows: dict[str, Callable[[], float | None]], count: int, repeats: int
) -> dict[str, Any]:
    rates: dict[str, list[float]] = {}
    for _ in range(repeats):
        for name, run in rows.items():
            start = time.perf_counter()
            own = run()  # seconds, where the row counts its own
            rates.setdefault(name, []).append(
                count / (own or time.perf_counter() - start)
            )
            print(
                f"{name}: {rates[name][-1]:.1f} a second", file=sys.stderr, flush=True
            )
    return {
        name: {"median": statistics.median(all_), "all": all_}
        for name, all_ in rates.items()
    }


def machine(threads: int) -> dict[str, Any]:
    return {**this_machine(), "threads": threads, "python": platform.python_version()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("part", choices=["index", "scale"])
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument(
        "--pictures",
        type=Path,
        help="a folder of pictures, in place of those made here",
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--quick", action="store_true", help="a quarter of the pictures"
    )
    parser.add_argument(
        "--rows", type=int, nargs="+", default=[100_000, 1_000_000], help="of scale"
    )
    parser.add_argument(
        "--stores",
        nargs="+",
        default=["cloob", "LanceDB"],
        help="cloob, LanceDB, PostgreSQL",
    )
    parser.add_argument(
        "--postgres",
        help="the address of an empty database with pgvector, on this machine",
    )
    parser.add_argument(
        "--work",
        type=Path,
        help="a folder for the files of scale; the temporary one by default",
    )
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "search"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    path = args.out / "results.json"
    results = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    measure = {"index": measure_index, "scale": measure_scale}[args.part]
    results[args.part] = measure(args) | {"machine": machine(args.threads)}
    args.out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(results[args.part], indent=2))


if __name__ == "__main__":
    main()
