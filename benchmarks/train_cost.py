"""What a recipe asks for, counted and not timed: steps, pairs and floating-point operations.

``python benchmarks/train_cost.py`` counts the operations of one pair's forward pass through the towers with
``torch.utils.flop_counter`` (matrix products and convolutions, two operations a multiplication and addition) and
takes three times that for training (backward: twice the forward pass). CLOOB's objective adds 52 N D operations a
pair (``docs/architecture.md``), about a thousandth; it is given apart, not in the total. Writes
``benchmarks/results/train_cost/results.json``.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from cloob.models.towers import create_model
from cloob.recipes import get_recipe

OUT = Path(__file__).parent / "results" / "train_cost" / "results.json"
PAIRS = {"cc3m": 2_890_000, "yfcc": 15_000_000}
"""Training pairs: CC3M as the authors read it; YFCC's subset is "about 15 million"."""
RUNS = (("cc3m", None), *(("yfcc", model) for model in (None, "RN101", "RN50x4", "ViT-B-32", "ViT-B-16")))


def forward_flops(model: str, image_size: int | None) -> dict[str, int]:
    """Operations of one image and one caption, forward."""
    encoder = create_model(model, image_size=image_size, seed=0).eval()
    side, found = encoder.image_size, {}
    with torch.no_grad():
        for tower, call in (
            ("image", lambda: encoder.encode_image(torch.zeros(1, 3, side, side, dtype=torch.uint8))),
            ("text", lambda: encoder.encode_text(["a"])),
        ):
            with FlopCounterMode(display=False) as counter:
                call()
            found[tower] = counter.get_total_flops()
    return found | {"embed_dim": encoder.embed_dim, "image_size": side}


def cost(pairs: int, epochs: int, batch_size: int, forward: dict[str, int]) -> dict[str, float]:
    """Of a whole run; the loader leaves the last, smaller batch of an epoch out."""
    steps = pairs // batch_size * epochs
    seen = steps * batch_size
    towers = 3 * (forward["image"] + forward["text"])
    objective = 52 * batch_size * forward["embed_dim"]
    return {
        "steps": steps,
        "pairs_seen": seen,
        "tower_flops_a_pair": towers,
        "objective_flops_a_pair": objective,
        "total_flops": float(seen * towers),
    }


def main() -> None:
    rows = {}
    for recipe, model in RUNS:
        config = get_recipe(recipe, model=model)
        assert config.towers.model is not None and config.run.epochs is not None
        name = f"{recipe} --model {model}" if model else recipe
        forward = forward_flops(config.towers.model, config.towers.image_size)
        rows[name] = {"model": config.towers.model, **forward} | cost(
            PAIRS[recipe], config.run.epochs, config.run.batch_size, forward
        )
        print(f"{name:24} {rows[name]['steps']:>9,} steps {rows[name]['total_flops']:.2e} operations", flush=True)
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps({"torch": torch.__version__, "pairs": PAIRS, "recipes": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
