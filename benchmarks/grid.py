"""Frames of the search page's grid while it is scrolled, with many pictures and with few.

Indices of 1,000 and of 100,000 pictures are made (hard links to 256 JPEG files of 320×240, random vectors), served, and
opened in headless Chromium at 1280×860, without a GPU. A script on the page notes the time of each frame: standing
still, while the wheel turns slowly (20 pixels a frame) and fast (400), and after jumps of a screen to anywhere. A frame
that takes longer than two of the still page's is late. The two sizes take turns.

    python -m benchmarks.grid [--sizes 1000 100000] [--rounds 3] [--seconds 4] [--out FILE.json]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.machine import machine as this_machine
from benchmarks.pictures import chromium, served
from PIL import Image

from cloob.search.open import open_store
from cloob.search.records import IndexedModel, Item

FILES, BATCH, DIM = 256, 5000, 8
MOVES = {"still": "0", "slow": "20", "fast": "400", "jumps": "jump"}
"""Name -> pixels a frame, or a jump to anywhere every tenth frame."""
FRAMES = """
const [move, seconds, done] = arguments;
const times = [], most = { tiles: 0 };
let last = 0, end = 0, frame = 0, way = 1, shown = 0, seen = 0;
scrollTo(0, document.documentElement.scrollHeight / 3);
function tick(now) {
  times.push(now - last);
  last = now;
  const tiles = document.querySelectorAll(".grid .tile");
  most.tiles = Math.max(most.tiles, tiles.length);
  seen += tiles.length;
  for (const tile of tiles) shown += tile.classList.contains("ready");
  if (move === "jump") { if (++frame % 10 === 0) scrollTo(0, Math.random() * document.documentElement.scrollHeight); }
  else {
    if (scrollY <= 0 || scrollY + innerHeight >= document.documentElement.scrollHeight - 1) way = -way;
    scrollBy(0, way * Number(move));
  }
  if (now < end) requestAnimationFrame(tick);
  else done({ times: times.slice(2), tiles: most.tiles, shown: shown / seen });
}
setTimeout(() => {
  last = performance.now();
  end = last + 1000 * seconds;
  requestAnimationFrame(tick);
}, 1000);
"""


def main() -> None:
    """Makes the indices, looks at them in turn, writes the record and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", type=int, default=[1000, 100_000])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/grid/results.json")
    options = parser.parse_args()
    times: dict[int, dict[str, list[float]]] = {size: {move: [] for move in MOVES} for size in options.sizes}
    facts: dict[int, dict[str, Any]] = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        addresses = {size: stack.enter_context(served(make_index(folder, size))) for size in options.sizes}
        driver = chromium(str(folder / "profile"))
        stack.callback(driver.quit)
        driver.set_window_size(1280, 860)
        driver.set_script_timeout(120)
        for _ in range(options.rounds):
            for size, address in addresses.items():
                start = time.perf_counter()
                driver.get(address)
                while not driver.execute_script("return document.querySelector('.grid .tile.ready')"):
                    time.sleep(0.02)
                first = time.perf_counter() - start
                for move, how in MOVES.items():
                    result = driver.execute_async_script(FRAMES, how, options.seconds)
                    times[size][move] += result.pop("times")
                    facts.setdefault(size, {})[move] = result
                heap = driver.execute_script("return performance.memory.usedJSHeapSize") / 1e6
                facts[size] |= {"first_picture_s": first, "heap_mb": heap}
    record = {"machine": machine(), "rounds": options.rounds, "seconds": options.seconds, "sizes": {}}
    for size in options.sizes:
        record["sizes"][str(size)] = facts[size] | {
            move: facts[size][move] | summary(values, times[size]["still"]) for move, values in times[size].items()
        }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record, indent=2) + "\n")
    print(table(record))


def summary(values: list[float], still: list[float]) -> dict[str, float]:
    """Frame times, and the share of frames that are late."""
    late = 2 * float(np.median(still))
    return {
        "frames": len(values),
        "p50_ms": float(np.percentile(values, 50)),
        "p95_ms": float(np.percentile(values, 95)),
        "max_ms": max(values),
        "late": float(np.mean(np.array(values) > late)),
    }


def table(record: dict[str, Any]) -> str:
    """The rows of docs/serve.md."""
    lines = [
        "| pictures | | frame p50, ms | p95, ms | late frames | tiles, at most | loaded |",
        "|---|---|---|---|---|---|---|",
    ]
    for size, facts in record["sizes"].items():
        for move in MOVES:
            cells = facts[move]
            lines.append(
                f"| {int(size):,} | {move} | {cells['p50_ms']:.1f} | {cells['p95_ms']:.1f} | {cells['late']:.1%} "
                f"| {cells['tiles']} | {cells['shown']:.0%} |"
            )
    return "\n".join(lines)


def make_index(folder: Path, n: int) -> Path:
    """An index of n files of a few contents, with random rows of a model that cannot be loaded: none is needed."""
    pictures, address = folder / f"pictures-{n}", folder / f"{n}.idx"
    pictures.mkdir()
    draw = np.random.default_rng(0)
    contents = []
    for number in range(FILES):
        path = folder / f"{number}.jpg"
        coarse = Image.fromarray(draw.integers(0, 256, (6, 8, 3), np.uint8))
        coarse.resize((320, 240), Image.Resampling.BICUBIC).save(path, quality=85)
        contents.append((path, hashlib.sha256(path.read_bytes()).hexdigest()))
    store = open_store(address, create=True)
    store.add_model(IndexedModel("random", "none", "0" * 64, DIM))
    for start in range(0, n, BATCH):
        items = []
        for number in range(start, min(n, start + BATCH)):
            path, content = contents[number % FILES]
            place = pictures / f"{number:06d}.jpg"
            os.link(path, place)
            facts = place.stat()
            items.append(Item(0, str(pictures), str(place), content, facts.st_size, facts.st_mtime_ns, 320, 240))
        rows = draw.standard_normal((len(items), DIM), np.float32)
        store.write(items, "random", rows / np.linalg.norm(rows, axis=1, keepdims=True))
    store.close()
    return address


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    return this_machine()


if __name__ == "__main__":
    main()
