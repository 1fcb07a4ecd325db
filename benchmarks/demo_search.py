"""The search that found the settings of the demo (src/cloob/recipes/demo.py), each method with the same effort.

    python benchmarks/demo_search.py run      # trains what is missing, 24 runs, and writes a line for each
    python benchmarks/demo_search.py choose   # the settings that the records lead to

Heads on the demo's two frozen encoders, trained on nine tenths of the demo's training pairs and judged by the mean of
recall at 1, 5 and 10, both directions, on the tenth that ``val_split`` holds out. Neither ``demo:val`` nor the Noto
emoji are looked at. Each method takes the same stages of the same size, each from the best found so far: temperatures
(four settings), learning rate (one more), dropout (one more), temperatures again, closer (two more). All train for 15
epochs. One seed, so differences of a point are no finding: this finds settings, the demo's intervals judge. A test
recomputes the choice from the records.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

RECORDS = Path(__file__).parent / "results" / "demo_search" / "runs.jsonl"
METHODS = ("clip", "infoloob", "cloob")
SEEDS = (100,)
START: dict[str, Any] = {"lr": 1e-3, "head_dropout": 0.3}
TEMPERATURES: dict[str, list[dict[str, Any]]] = {
    "clip": [
        *({"inv_tau": inv_tau, "learnable_inv_tau": False} for inv_tau in (8.0, 14.0, 24.0)),
        {"inv_tau": 14.3, "learnable_inv_tau": True},
    ],
    "infoloob": [{"inv_tau": inv_tau} for inv_tau in (5.0, 8.0, 14.0, 24.0)],
    "cloob": [
        {"inv_tau": inv_tau, "beta": beta} for inv_tau, beta in ((10.0, 8.0), (15.0, 8.0), (24.0, 8.0), (15.0, 16.0))
    ],
}
Settings = Mapping[str, Any]
Record = Mapping[str, Any]


def stages(method: str, best: Settings) -> list[list[dict[str, Any]]]:
    """Every stage's further settings, as changes of the best before it; the first stage's are whole."""
    closer = [("inv_tau", 0.75), ("beta" if method == "cloob" else "inv_tau", 1.33)]
    return [
        [{**START, **scales} for scales in TEMPERATURES[method]],
        [{"lr": 5e-4}],
        [{"head_dropout": 0.5}],
        [{name: float(f"{best.get(name, 1.0) * factor:.3g}")} for name, factor in closer],
    ]


def mean_recall(records: Sequence[Record], method: str, settings: Settings) -> float | None:
    """The mean over the seeds; None where a seed's run is missing."""
    found = [
        [r["val_recall"] for r in records if (r["method"], r["settings"], r["seed"]) == (method, dict(settings), seed)]
        for seed in SEEDS
    ]
    return statistics.mean(runs[0] for runs in found) if all(found) else None


def walk(records: Sequence[Record], method: str) -> tuple[dict[str, Any], list[dict[str, Any]], list[dict[str, Any]]]:
    """Follows the stages through the records.

    Returns:
        The best settings so far, all that were tried, and those of the current stage that are missing (none: finished).
    """
    best: dict[str, Any] = {}
    score, tried = -math.inf, []
    for place in range(len(stages(method, START))):
        candidates = [{**best, **change} for change in stages(method, best)[place]]
        missing = [settings for settings in candidates if mean_recall(records, method, settings) is None]
        if missing:
            return best, tried, missing
        for settings in candidates:
            tried.append(settings)
            recall = mean_recall(records, method, settings)
            if recall is not None and recall > score:
                best, score = settings, recall
    return best, tried, []


def read(path: Path = RECORDS) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def run(method: str, settings: Settings, seed: int, folder: Path) -> dict[str, Any]:
    """One training; the recall of its last epoch."""
    from cloob.recipes import get_recipe
    from cloob.training.loop import train

    config = get_recipe("demo", objective=method).override(
        **settings,
        seed=seed,
        val_split=0.1,
        val_every=1000,
        out=folder / "run",
        overwrite=True,
        device="cpu",
        tensorboard=False,
        save_every=10**9,
        log_every=10**9,
    )
    began = time.process_time()
    result = train(config)
    lines = [json.loads(line) for line in (result.run / "epochs.jsonl").read_text().splitlines()]
    return {
        "method": method,
        "settings": dict(settings),
        "seed": seed,
        "val_recall": round(lines[-1]["val_recall"], 5),
        "cpu_seconds": round(time.process_time() - began, 1),
    }


def make_once() -> None:
    """Encoders, the split and the features' key are the same in all runs: one making of each serves them."""
    from cloob.training import align, build

    def once(make: Any, same: Any) -> Any:
        made: dict[Any, Any] = {}

        def cached(*arguments: Any) -> Any:
            key = same(*arguments)
            if key not in made:
                made[key] = make(*arguments)
            return made[key]

        return cached

    align.open_image_encoder = once(align.open_image_encoder, lambda name, load, size: (name, size))
    align.open_text = once(align.open_text, lambda name, load: name)
    align._key = once(align._key, lambda source, encoder: source.name)
    build.open_both = once(build.open_both, lambda config: (config.pairs.data, config.pairs.val_split))


def search(path: Path, methods: Sequence[str]) -> None:
    import torch

    torch.set_num_threads(1)
    make_once()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        while todo := [(m, s) for m in methods for s in walk(read(path), m)[2]]:
            for method, settings in todo:
                for seed in SEEDS:
                    held = [(r["method"], r["settings"], r["seed"]) for r in read(path)]
                    if (method, dict(settings), seed) not in held:
                        record = run(method, settings, seed, Path(folder))
                        with path.open("a") as file:
                            file.write(json.dumps(record) + "\n")
                        print(record, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("run", "choose"))
    parser.add_argument("--records", type=Path, default=RECORDS)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help="one a process, to share them")
    arguments = parser.parse_args()
    if arguments.part == "run":
        search(arguments.records, arguments.methods)
    for method in METHODS:
        best, tried, missing = walk(read(arguments.records), method)
        recall = mean_recall(read(arguments.records), method, best) if best else None
        shown = "none yet" if recall is None else f"{100 * recall:.1f} %"
        print(f"{method:9} {shown} of {len(tried)} settings, {len(missing)} missing: {best}")


if __name__ == "__main__":
    main()
