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

``query`` (milliseconds of a query and recall@10 at 10,000 to a million vectors, beside
numpy, faiss, LanceDB and PostgreSQL) was measured by this script at commit fc415074,
``scale`` (cost and recall of stores) at b91f4757; their records stay.

Writes results.json to --out, in which other parts stay.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.machine import machine as this_machine
from PIL import Image
from torch.utils.data import DataLoader

WORKERS = 2
BATCH = 64
KINDS = {"web": ((640, 480), 192), "camera": ((4000, 3000), 32)}
"""Name -> width and height, and how many."""


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
    parser.add_argument("part", choices=["index"])
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
        "--out", type=Path, default=Path(__file__).parent / "results" / "search"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    path = args.out / "results.json"
    results = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    results[args.part] = measure_index(args) | {"machine": machine(args.threads)}
    args.out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(results[args.part], indent=2))


if __name__ == "__main__":
    main()
