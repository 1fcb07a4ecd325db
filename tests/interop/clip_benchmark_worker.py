"""Run where clip_benchmark is installed: one set through its evaluator by our model type and by its own, as JSON."""

import json
import sys
from pathlib import Path

import torch
from clip_benchmark.models import MODEL_TYPES, load_clip

import cloob.interop.clip_benchmark as adapter


def run(kind: str, model: str, data: Path, out: Path) -> dict:
    words = ["eval", "--model_type", kind, "--model", model, "--dataset", f"wds/{data.name}", "--no_amp", "--quiet"]
    words += ["--dataset_root", str(data), "--num_workers", "0", "--batch_size", "16", "--output", str(out)]
    adapter.main(words)
    return json.loads(out.read_text())


def main(model: str, data: str, folder: str) -> None:
    torch.set_num_threads(1)
    place = Path(data)
    encoder, _, tokenizer = load_clip("cloob", model, "label", None, "cpu")
    found = {
        "types": list(MODEL_TYPES),
        "training": encoder.training,
        "tokens": list(tokenizer(["a cat"]).shape),
        "cloob": run("cloob", model, place, Path(folder) / "a.json"),
        "open_clip": run("open_clip", f"local-dir:{model}", place, Path(folder) / "b.json"),
    }
    Path(folder, "found.json").write_text(json.dumps(found))


main(*sys.argv[1:])
