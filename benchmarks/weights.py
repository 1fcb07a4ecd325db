"""Seconds and peak memory to load other programs' weights at their real size.

Files with random weights in the real shapes are written into a temporary folder. Each load is a process of its own that
has imported its libraries before the clock starts; loaders take turns, and the first turn, which warms the page cache,
is left out. Peak memory is what the process had at most (``ru_maxrss``) beyond what it had before the load, over the
bytes of the weights in float32. The other loader is open_clip's where it has one; ml-jku's weights go by ``torch.load``
into open_clip's towers; ``torch.load`` and ``pickle.load`` alone, which build no towers, are all that the two others
have today.

    python benchmarks/weights.py [--rounds 5] [--only rn50 …] [--out benchmarks/results/weights/results.json]
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pickle
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.machine import machine as this_machine

TEXT_MODEL, IMAGE_MODEL = "text_model", "vision_model"
FAMILIES = {
    "rn50": ("ml-jku RN50", "torch.load, open_clip's towers"),
    "rn50x4": ("ml-jku RN50x4", "torch.load, open_clip's towers"),
    "crowsonkb": ("crowsonkb ViT-B/16", "pickle.load alone"),
    "rinna": ("rinna ViT-B/16, BERT base", "torch.load alone"),
    "open_clip": ("open_clip ViT-B-32", "open_clip"),
}
RINNA = {
    "model_type": "cloob",
    "projection_dim": 768,
    "init_inv_tau": 30.0,
    "scale_hopfield": 15.0,
    "text_config": {"model_type": "roberta", "vocab_size": 32000, "max_position_embeddings": 514, "pad_token_id": 3},
    "vision_config": {"model_type": "vit"},
}


def main() -> None:
    """Writes the files, measures the loaders in turn, writes the record and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/weights/results.json")
    parser.add_argument("--worker", nargs=3, metavar=("STEP", "FAMILY", "PATH"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        step, family, path = arguments.worker
        print(json.dumps(WRITERS[family](Path(path)) if step == "write" else measure(step, family, Path(path))))
        return
    record: dict[str, Any] = {"machine": machine(), "rounds": arguments.rounds, "families": {}}
    for family in arguments.only:
        record["families"][family] = compare(family, arguments.rounds)
        print(line(family, record["families"][family]), flush=True)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(record, indent=2) + "\n")


def compare(family: str, rounds: int) -> dict[str, Any]:
    """Both loaders on one file, in turn."""
    with tempfile.TemporaryDirectory() as folder:
        written = worker("write", family, folder)
        runs: dict[str, list[dict[str, float]]] = {"cloob": [], "other": []}
        for number in range(rounds + 1):
            for loader, results in runs.items():
                result = worker(loader, family, written["path"])
                if number:
                    results.append(result)
    weights = written["weights"]
    summary = {
        loader: {
            "seconds": statistics.median(run["seconds"] for run in results),
            "seconds_all": [round(run["seconds"], 3) for run in results],
            "peak": statistics.median(run["peak"] for run in results),
            "peak_over_weights": statistics.median(run["peak"] for run in results) / weights,
        }
        for loader, results in runs.items()
    }
    return {"other_is": FAMILIES[family][1], "weights": weights, **summary}


def line(family: str, result: dict[str, Any]) -> str:
    """A row of the table in docs/weights.md."""
    cells = [f"{result[who]['seconds']:.2f} s, {result[who]['peak_over_weights']:.2f} ×" for who in ("cloob", "other")]
    return (
        f"| {FAMILIES[family][0]} | {result['weights'] / 1e6:.0f} MB | {cells[0]} | {cells[1]} ({result['other_is']}) |"
    )


def worker(step: str, family: str, path: str) -> dict[str, Any]:
    """Runs one step in a fresh process, without a network."""
    words = [sys.executable, __file__, "--worker", step, family, path]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(words, check=True, capture_output=True, text=True, env=environment)
    result: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return result


def measure(loader: str, family: str, path: Path) -> dict[str, float]:
    """Seconds and bytes of one load in this process."""
    load = LOADERS[family] if loader == "other" else load_by_cloob
    import_all()
    before = resident()
    start = time.perf_counter()
    loaded = load(path)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    del loaded
    return {"seconds": seconds, "peak": peak}


def import_all() -> None:
    """What both loaders need, so that no import is measured; open_clip imports itself on the first use of a name."""
    for module in ("safetensors.torch", "torchvision.transforms", "open_clip.tokenizer", "cloob.models.load"):
        importlib.import_module(module)
    assert importlib.import_module("open_clip").create_model


def resident() -> int:
    """Bytes of memory that the process has now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def load_by_cloob(path: Path) -> Any:
    import cloob

    return cloob.load_model(path, device="cpu")


def load_mljku(path: Path) -> Any:
    """As people load these files today: torch.load, keys renamed, into open_clip's module; with a tokenizer."""
    import open_clip
    import torch

    content = torch.load(path, map_location="cpu", weights_only=True)
    state = {key.removeprefix("transformer."): value for key, value in content["state_dict"].items()}
    state["logit_scale"] = state.pop("logit_inv_tau")
    state.pop("logit_scale_hopfield")
    name = path.stem
    model = open_clip.create_model(name, force_quick_gelu=True)
    model.load_state_dict(state)
    return model, open_clip.get_tokenizer(name)


def load_pickle(path: Path) -> Any:
    with path.open("rb") as file:
        return pickle.load(file)


def load_torch(path: Path) -> Any:
    import torch

    return torch.load(path / "pytorch_model.bin", map_location="cpu", weights_only=True)


def load_open_clip(path: Path) -> Any:
    import open_clip

    return open_clip.create_model(f"local-dir:{path}"), open_clip.get_tokenizer(f"local-dir:{path}")


def write_mljku(name: str) -> Callable[[Path], dict[str, Any]]:
    """A file as published, of open_clip's random towers."""

    def write(folder: Path) -> dict[str, Any]:
        import open_clip
        import torch

        state = {}
        for key, value in open_clip.create_model(name).state_dict().items():
            own = key if key.startswith("visual.") else f"transformer.{key}"
            state["logit_inv_tau" if key == "logit_scale" else own] = value
        state["logit_scale_hopfield"] = torch.tensor(8.0).log()
        torch.save({"state_dict": state, "model_config_file": f"{name}.json"}, folder / f"{name}.pt")
        return {"path": str(folder / f"{name}.pt"), "weights": total(state.values())}

    return write


def write_crowsonkb(folder: Path) -> dict[str, Any]:
    """The pickle of haiku's parameters."""
    import numpy as np

    from cloob.models.registry import MODELS

    towers: tuple[dict[str, Any], dict[str, Any]] = {}, {}
    source, weights = np.random.default_rng(0), 0
    for number, key, shape in crowsonkb_shapes():
        value = source.standard_normal(shape, np.float32) * np.float32(0.02)
        module, _, name = key.rpartition("/")
        towers[number].setdefault(module, {})[name] = value
        weights += value.nbytes
    config = MODELS["crowsonkb/vit-b-16-laion400m-32"].config
    (folder / "config.json").write_text(json.dumps(config))
    with (folder / "towers.pkl").open("wb") as file:
        pickle.dump({"params": towers, "epoch": 32}, file)
    return {"path": str(folder / "towers.pkl"), "weights": weights}


def crowsonkb_shapes() -> Iterator[tuple[int, str, tuple[int, ...]]]:
    """Tower, name and shape of each parameter of ViT-B/16."""
    yield 0, "vi_t_image_encoder/embed/w", (16, 16, 3, 768)
    yield 0, "vi_t_image_encoder/class_embed", (768,)
    yield 0, "vi_t_image_encoder/pos_embed/w", (197, 768)
    yield 1, "text_encoder/embed/embeddings", (49408, 512)
    yield 1, "text_encoder/pos_embed/w", (77, 512)
    for number, tower, width in ((0, "vi_t_image_encoder", 768), (1, "text_encoder", 512)):
        linears = {"proj": (width, 512)}
        norms = []
        for i in range(12):
            layer = f"{tower}/layer_{i}"
            for name in ("query", "key", "value", "linear"):
                linears[f"layer_{i}/self_attention/multi_head_attention/{name}"] = (width, width)
            linears[f"layer_{i}/feed_forward/linear_0"] = (width, 4 * width)
            linears[f"layer_{i}/feed_forward/linear_1"] = (4 * width, width)
            norms += [f"{layer}/self_attention/layer_norm", f"{layer}/feed_forward/layer_norm"]
        for name, shape in linears.items():
            yield number, f"{tower}/{name}/w", shape
            yield number, f"{tower}/{name}/b", shape[1:]
        for name in norms:
            yield number, f"{name}/scale", (width,)
            yield number, f"{name}/offset", (width,)


def write_rinna(folder: Path) -> dict[str, Any]:
    """A folder with ``pytorch_model.bin``."""
    import torch

    state = {key: torch.randn(shape) * 0.02 for key, shape in rinna_shapes().items()}
    (folder / "config.json").write_text(json.dumps(RINNA))
    torch.save(state, folder / "pytorch_model.bin")
    return {"path": str(folder), "weights": total(state.values())}


def rinna_shapes() -> dict[str, tuple[int, ...]]:
    """Name and shape of each weight."""
    text, image = f"{TEXT_MODEL}.embeddings", f"{IMAGE_MODEL}.embeddings"
    shapes: dict[str, tuple[int, ...]] = {
        f"{text}.word_embeddings.weight": (32000, 768),
        f"{text}.position_embeddings.weight": (514, 768),
        f"{text}.token_type_embeddings.weight": (2, 768),
        f"{image}.cls_token": (1, 1, 768),
        f"{image}.position_embeddings": (1, 197, 768),
        f"{image}.patch_embeddings.projection.weight": (768, 3, 16, 16),
        f"{image}.patch_embeddings.projection.bias": (768,),
        "text_projection.weight": (768, 768),
        "visual_projection.weight": (768, 768),
    }
    norms = [f"{text}.LayerNorm", f"{IMAGE_MODEL}.layernorm"]
    linears: dict[str, tuple[int, int]] = {}
    sides = (
        (TEXT_MODEL, "self", ("attention.output.LayerNorm", "output.LayerNorm")),
        (IMAGE_MODEL, "attention", ("layernorm_before", "layernorm_after")),
    )
    for tower, inner, names in sides:
        for i in range(12):
            layer = f"{tower}.encoder.layer.{i}"
            linears |= {f"{layer}.attention.{inner}.{name}": (768, 768) for name in ("query", "key", "value")}
            linears[f"{layer}.attention.output.dense"] = (768, 768)
            linears |= {f"{layer}.intermediate.dense": (3072, 768), f"{layer}.output.dense": (768, 3072)}
            norms += [f"{layer}.{name}" for name in names]
    for name, shape in linears.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    for name in norms:
        shapes |= {f"{name}.weight": (768,), f"{name}.bias": (768,)}
    return shapes


def write_open_clip(folder: Path) -> dict[str, Any]:
    """A ``local-dir:`` folder."""
    import open_clip
    from safetensors.torch import save_file

    state = open_clip.create_model("ViT-B-32").state_dict()
    config = {"model_cfg": open_clip.get_model_config("ViT-B-32"), "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    save_file(state, folder / "open_clip_model.safetensors")
    return {"path": str(folder), "weights": total(state.values())}


def total(tensors: Any) -> int:
    return sum(4 * tensor.numel() for tensor in tensors)


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    return {**this_machine("open_clip_torch"), "python": platform.python_version()}


LOADERS = {
    "rn50": load_mljku,
    "rn50x4": load_mljku,
    "crowsonkb": load_pickle,
    "rinna": load_torch,
    "open_clip": load_open_clip,
}
WRITERS = {
    "rn50": write_mljku("RN50"),
    "rn50x4": write_mljku("RN50x4"),
    "crowsonkb": write_crowsonkb,
    "rinna": write_rinna,
    "open_clip": write_open_clip,
}


if __name__ == "__main__":
    main()
