"""Fifty clients at once for a minute against `cloob serve`: errors, latency, memory.

    python benchmarks/serve.py IDX [--clients 50] [--seconds 60]

Each client sends one query after the other, without a pause: three of five are words
(half of them are four words drawn anew, so that the model runs), one is more like this,
one a thumbnail. Where the files are gone, there are no
thumbnails, and one of four is more like this. The server is another process of this
machine; the clients are one process (aiohttp), which takes part of a core."""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import aiohttp
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.machine import processor

WORDS = tuple(
    "red blue old small bird house car tree face hand arrow music heart sun cloud fish".split()  # noqa: SIM905
)


def resident(process: int) -> float:
    status = Path(f"/proc/{process}/status").read_text(encoding="ascii")
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1000  # type: ignore[index]


def processor_seconds(process: int) -> float:
    fields = (
        Path(f"/proc/{process}/stat")
        .read_text(encoding="ascii")
        .rpartition(")")[2]
        .split()
    )
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def machine() -> str:
    return f"{len(os.sched_getaffinity(0))} cores of {processor()}"


async def client(
    web: aiohttp.ClientSession,
    seed: int,
    ids: list[int],
    kinds: list[str],
    until: float,
    rows: list[tuple[str, float, int]],
) -> None:
    draw = random.Random(seed)
    while time.perf_counter() < until:
        kind = draw.choice(kinds)
        id_ = draw.choice(ids)
        start = time.perf_counter()
        if kind == "words":
            words = " ".join(draw.sample(WORDS, draw.choice([1, 4])))
            asked = web.post(
                "/api/search", json={"parts": [{"words": words}], "top": 50}
            )
        else:
            asked = web.get(f"/api/items/{id_}/{kind}")
        try:
            async with asked as answer:
                status, content = answer.status, await answer.read()
            if status != 200:
                print(f"{kind}: {status} {content[:200]!r}", file=sys.stderr)
        except (aiohttp.ClientError, TimeoutError) as error:
            status = 0
            print(f"{kind}: {error!r}", file=sys.stderr)
        rows.append((kind, time.perf_counter() - start, status))


async def load(
    address: str, headers: dict[str, str], clients: int, seconds: float
) -> list[tuple[str, float, int]]:
    rows: list[tuple[str, float, int]] = []
    connections = aiohttp.TCPConnector(limit=clients)
    async with aiohttp.ClientSession(
        address,
        headers=headers,
        connector=connections,
        timeout=aiohttp.ClientTimeout(60),
    ) as web:
        async with web.get("/api/ids") as answer:
            ids = (await answer.json())["ids"]
        async with web.post(
            "/api/search", json={"parts": [{"words": "the first one loads the model"}]}
        ) as answer:
            await answer.read()
        kinds = ["words", "words", "words", "similar"]
        async with web.get(f"/api/items/{ids[0]}/thumbnail") as answer:
            kinds += ["thumbnail"] if answer.status == 200 else []
        until = time.perf_counter() + seconds
        await asyncio.gather(
            *(client(web, seed, ids, kinds, until, rows) for seed in range(clients))
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("index")
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=60)
    options = parser.parse_args()
    command = [sys.executable, "-m", "cloob", "serve", options.index, "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        address = next(
            found[0]
            for line in process.stderr
            if (found := re.search(r"http://\S+", line))
        )
        address, _, token = address.partition("?token=")
        headers = {"authorization": f"Bearer {token}"} if token else {}
        asyncio.run(
            load(address, headers, options.clients, min(5.0, options.seconds))
        )  # caches fill
        before, computed = resident(process.pid), processor_seconds(process.pid)
        rows = asyncio.run(load(address, headers, options.clients, options.seconds))
        after, computed = (
            resident(process.pid),
            processor_seconds(process.pid) - computed,
        )
    finally:
        process.terminate()
        process.wait()
    errors = sum(status != 200 for _, _, status in rows)
    print(
        f"{options.clients} clients, {options.seconds:g} s, {machine()}, load"
        f" {os.getloadavg()[0]:.0f}\n"
    )
    print(
        "| | answers | errors | p50, ms | p95, ms | p99, ms"
        " |\n|---|---|---|---|---|---|"
    )
    for kind in sorted({name for name, _, _ in rows}):
        times = np.array([taken for name, taken, _ in rows if name == kind]) * 1000
        wrong = sum(status != 200 for name, _, status in rows if name == kind)
        print(
            f"| {kind} | {len(times):,} | {wrong} | "
            + " | ".join(f"{np.percentile(times, q):.0f}" for q in (50, 95, 99))
            + " |"
        )
    rate, cost = len(rows) / options.seconds, 1000 * computed / len(rows)
    print(
        f"\n{rate:.0f} answers a second, {errors} errors; {cost:.0f} ms of a core each;"
        f" {before:.0f} → {after:.0f} MB"
    )


if __name__ == "__main__":
    main()
