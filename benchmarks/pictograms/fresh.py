"""What retrieval sees in towers that were never trained: ``python -m benchmarks.pictograms.fresh [--data DIR]``.

One training batch, batch norms in training mode, CLOOB's published β; a table of the uniformity (Wang and Isola, 2020;
0: all rows equal, −4: spread out) of the embeddings and of what they retrieve from the image memory. No timing.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from benchmarks.pictograms import cache
from benchmarks.pictograms.cells import DEFAULTS, SEARCH_EPOCHS, SEARCH_SEED, TOWERS, Cell, Setting
from benchmarks.pictograms.running import Run
from benchmarks.pictograms.study import ROOT, WORK

from cloob.functional.geometry import uniformity
from cloob.functional.hopfield import hopfield_retrieval
from cloob.models.towers import create_model

HEAD = ("start", "images", "texts", "image memory, image queries", "image memory, text queries")


@torch.no_grad()
def measured(data: cache.Data, setting: Setting) -> list[float]:
    """The uniformity of one batch's images, texts and of both retrieved from the images."""
    assert setting.beta is not None
    run = Run(Cell("search", "cloob", TOWERS[0], SEARCH_SEED, SEARCH_EPOCHS, setting), data, Path("never-written"))
    images, tokens, _ = run.batches.batch(0, np.arange(setting.batch_size))
    x, y = run.encoder.train()(images, tokens)
    retrieved = [hopfield_retrieval(queries, x, setting.beta) for queries in (x, y)]
    return [float(uniformity(rows)) for rows in (x, y, *retrieved)]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="the study's pictures")
    folder = parser.parse_args().data
    data = cache.load(folder, WORK / "cache", create_model(TOWERS[0], seed=0), tests=False)
    print(f"| {' | '.join(HEAD)} |\n|{'---|' * len(HEAD)}")
    for name, start in (("as initialised", ""), ("image embeddings' mean moved into the origin", "centred")):
        values = measured(data, Setting(beta=DEFAULTS["cloob"].beta, start=start))
        print(f"| {name} | {' | '.join(f'{value:.2f}' for value in values)} |")


if __name__ == "__main__":
    main()
