"""The engines side by side: all are ready before the first is asked, and they take turns."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.vectors.collection import DIM, best, make_texts, make_world, statistics_of, write_pictures
from benchmarks.vectors.engines import ENGINES, TOP

QUERIES = 200
ROUNDS = 5
PATIENCE_SECONDS = 5.0
"""An engine's turn ends after so long, with fewer queries answered than a turn has."""
SWEEP = (4, 8, 16, 32, 64, 128, 256)
"""Lists of faiss's index that are visited, to see what recall costs."""


class Worker:
    """An engine's process."""

    def __init__(self, name: str, files: Sequence[Path], threads: int, cache: Path) -> None:
        root = Path(__file__).parents[2]
        names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
        environment = os.environ | dict.fromkeys(names, str(threads)) | {"CLOOB_CACHE": str(cache)}
        environment |= {"CLOOB_CACHE_BYTES": str(10**12), "PYTHONPATH": f"{root / 'src'}:{root}"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.vectors.engines", name, *map(str, files)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root, env=environment,
        )  # fmt: skip

    def ask(self, *words: Any) -> dict[str, Any]:
        """Sends a line, waits for the answer."""
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps(words), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.process.args}: ended with {self.process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """Ends the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def measure(n: int, threads: int) -> dict[str, Any]:
    """All figures for so many vectors."""
    world = make_world()
    texts, _ = make_texts(world, QUERIES)
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        files = [folder / "vectors.npy", folder / "queries.npy", folder]
        write_pictures(files[0], world, n)
        np.save(files[1], texts)
        rows = np.load(files[0], mmap_mode="r")
        truth = best(rows, texts, TOP)
        result: dict[str, Any] = {"vectors": n, "dim": DIM, "cosines": statistics_of(rows, texts, truth)}
        del rows
        workers: dict[str, Worker] = {}
        try:
            for name in ENGINES:
                workers[name] = Worker(name, files, threads, folder / "cache")
                result[name] = workers[name].ask("prepare")
                if "ingest_seconds" in result[name]:
                    result[name]["ingest_rows_a_second"] = n / result[name]["ingest_seconds"]
                print(f"{n:,} {name}: {result[name]}", file=sys.stderr, flush=True)
            for name, figures in take_turns(workers, truth).items():
                result[name] |= figures
            result["probes"] = sweep(workers["cloob approximate"], truth)
        finally:
            for worker in workers.values():
                worker.close()
    return result


def take_turns(workers: dict[str, Worker], truth: np.ndarray[Any, Any]) -> dict[str, dict[str, Any]]:
    """Milliseconds of a query and recall, over turns that change."""
    seconds: dict[str, list[float]] = {name: [] for name in workers}
    hits: dict[str, list[float]] = {name: [] for name in workers}
    last: dict[str, dict[str, Any]] = {}
    first = {name: 1e3 * worker.ask("ask", 0, 1, 60)["seconds"][0] for name, worker in workers.items()}
    for worker in workers.values():
        worker.ask("ask", 1, 4, PATIENCE_SECONDS)
    each = QUERIES // ROUNDS
    for start in range(0, QUERIES, each):
        for name, worker in workers.items():
            last[name] = worker.ask("ask", start, start + each, PATIENCE_SECONDS)
            seconds[name] += last[name]["seconds"]
            hits[name] += recalls(last[name]["found"], truth[start:])
    return {
        name: {
            "first_ms": first[name],
            "p50_ms": 1e3 * statistics.median(seconds[name]),
            "p95_ms": 1e3 * float(np.quantile(seconds[name], 0.95)),
            "queries": len(seconds[name]),
            "recall_at_10": statistics.mean(hits[name]),
            "own_bytes": last[name]["own_bytes"],
            "file_bytes": last[name]["file_bytes"],
        }
        for name in workers
    }


def sweep(worker: Worker, truth: np.ndarray[Any, Any]) -> dict[str, dict[str, float]]:
    """Recall and time by the number of lists that are visited."""
    found = {}
    for probes in SWEEP:
        worker.ask("probes", probes)
        answer = worker.ask("ask", 0, QUERIES, 30)
        found[str(probes)] = {
            "recall_at_10": statistics.mean(recalls(answer["found"], truth)),
            "p50_ms": 1e3 * statistics.median(answer["seconds"]),
            "p95_ms": 1e3 * float(np.quantile(answer["seconds"], 0.95)),
        }
    return found


def recalls(found: list[list[int]], truth: np.ndarray[Any, Any]) -> list[float]:
    """The share of the ten nearest that was found, of each query."""
    return [len(set(ids) & set(right.tolist())) / TOP for ids, right in zip(found, truth, strict=False)]


def table(results: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        "| vectors | | p50 ms | p95 ms | recall@10 | memory MB | rows in, a second | build s | disk MB |",
    ]
    lines.append("|---|---|---|---|---|---|---|---|---|")
    for result in results.values():
        for name in (name for name in ENGINES if name in result):
            row = result[name]
            disk = row.get("disk_bytes_built", row.get("disk_bytes"))
            cells = [
                f"{result['vectors']:,}", name, f"{row['p50_ms']:.1f}", f"{row['p95_ms']:.1f}",
                f"{row['recall_at_10']:.3f}", f"{row['own_bytes'] / 1e6:,.0f}",
                f"{row['ingest_rows_a_second']:,.0f}" if "ingest_rows_a_second" in row else "",
                f"{row['build_seconds']:.1f}" if "build_seconds" in row else "",
                "" if disk is None else f"{disk / 1e6:,.0f}",
            ]  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
