"""ONNX against torch: milliseconds a picture and a text, and seconds to a first text embedding in a fresh process.

Towers of open_clip with random weights are saved as a model folder and exported as by ``cloob export --to onnx``, in
float32 and with dynamic quantisation. All of them embed the same batches in turn, on as many threads as cores; the
first round is left out. Texts are captions of about ten words; both leave out the padding that a batch shares.

A first text embedding is a process of its own, from its start to the row: the package's own torch towers, the ONNX
folder by ``cloob.load_model``, the same by onnxruntime and tokenizers alone (docs/weights.md), and open_clip.

    python benchmarks/export.py [--models ViT-B-32 RN50] [--rounds 10] [--out benchmarks/results/export/results.json]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.machine import machine as this_machine

PICTURES, TEXTS = 16, 64
WORDS = (
    "a",
    "red",
    "old",
    "small",
    "dog",
    "house",
    "tree",
    "river",
    "man",
    "with",
    "on",
    "near",
    "under",
    "boat",
    "of",
)
FIRST = {
    "torch, open_clip": """
import sys, torch, open_clip
model = open_clip.create_model("local-dir:" + sys.argv[1]).eval()
tokenizer = open_clip.get_tokenizer("local-dir:" + sys.argv[1])
with torch.no_grad():
    rows = model.encode_text(tokenizer(["a photo of a dog"]), normalize=True)
""",
    "torch, cloob.load_model": """
import sys, cloob
rows = cloob.load_model(sys.argv[1], device="cpu").encode_text(["a photo of a dog"])
""",
    "ONNX, cloob.load_model": """
import sys, cloob
rows = cloob.load_model(sys.argv[2], device="cpu").encode_text(["a photo of a dog"])
""",
    "ONNX, onnxruntime and tokenizers alone": """
import sys, numpy as np
from onnxruntime import InferenceSession
from tokenizers import Tokenizer
tokens = Tokenizer.from_file(sys.argv[2] + "/tokenizer.json").encode("a photo of a dog").ids
rows = InferenceSession(sys.argv[2] + "/text.onnx").run(None, {"input_ids": np.array([tokens])})[0]
""",
}


def main() -> None:
    """Exports, measures in turn, writes the record and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["ViT-B-32", "RN50"])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--processes", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/export/results.json")
    arguments = parser.parse_args()
    record: dict[str, Any] = {"machine": machine(), "rounds": arguments.rounds}
    record |= {"processes": arguments.processes, "models": {}}
    for name in arguments.models:
        with tempfile.TemporaryDirectory() as folder:
            record["models"][name] = compare(name, Path(folder), arguments.rounds, arguments.processes)
        print(f"\n{name}\n{table(record['models'][name])}", flush=True)
        record["load_after"] = os.getloadavg()[0]
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(record, indent=2) + "\n")


def compare(name: str, folder: Path, rounds: int, processes: int) -> dict[str, Any]:
    """One model: sizes, milliseconds of its forms, seconds to a first embedding."""
    import torch

    from cloob.export.programs.int8 import quantise
    from cloob.export.programs.onnx import export_onnx
    from cloob.models.folder import save_model
    from cloob.models.load import load_model
    from cloob.models.towers import create_model

    torch.set_num_threads(os.cpu_count() or 1)
    plain, graphs, small = (folder / kind for kind in ("torch", "onnx", "int8"))
    encoder = create_model(name, seed=0).eval()
    save_model(plain, encoder, {})
    graphs.mkdir()
    export_onnx(encoder, graphs)
    small.mkdir()
    for path in graphs.iterdir():
        (small / path.name).write_bytes(b"" if path.suffix == ".onnx" else path.read_bytes())
    for graph in ("image.onnx", "text.onnx"):
        quantise(graphs / graph, small / graph)
    forms = {"torch": encoder, "ONNX": load_model(graphs, "cpu"), "ONNX int8": load_model(small, "cpu")}
    pixels = torch.randint(0, 256, (PICTURES, 3, encoder.image_size, encoder.image_size), dtype=torch.uint8)
    texts = [" ".join(WORDS[(i * 7 + k * k) % len(WORDS)] for k in range(10)) for i in range(TEXTS)]
    images = in_turn({form: lambda m=model: m.encode_image(pixels) for form, model in forms.items()}, rounds)
    captions = in_turn({form: lambda m=model: m.encode_text(texts) for form, model in forms.items()}, rounds)
    result = {
        form: {
            "image_ms": 1000 * images[form] / PICTURES,
            "text_ms": 1000 * captions[form] / TEXTS,
            "megabytes": sum(p.stat().st_size for p in place.rglob("*") if p.suffix in (".onnx", ".safetensors")) / 1e6,
        }
        for form, place in zip(forms, (plain, graphs, small), strict=True)
    }
    del forms, encoder
    return {"forms": result, "first_text_s": first_texts(plain, graphs, processes)}


def in_turn(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each call; all of them once a round, the first round left out."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def first_texts(plain: Path, graphs: Path, processes: int) -> dict[str, float]:
    """Median seconds of each script in a process of its own."""

    def run(script: str) -> Callable[[], Any]:
        words = [sys.executable, "-W", "ignore", "-c", script, str(plain), str(graphs)]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        return lambda: subprocess.run(words, check=True, capture_output=True, env=environment)

    return in_turn({name: run(script) for name, script in FIRST.items()}, processes)


def table(result: dict[str, Any]) -> str:
    """The rows of docs/weights.md."""
    lines = ["| | a picture | a text | files |", "|---|---|---|---|"]
    for form, cells in result["forms"].items():
        lines.append(
            f"| {form} | {cells['image_ms']:.1f} ms | {cells['text_ms']:.2f} ms | {cells['megabytes']:.0f} MB |"
        )
    lines += ["", "| first text | seconds |", "|---|---|"]
    lines += [f"| {name} | {seconds:.2f} s |" for name, seconds in result["first_text_s"].items()]
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    return {**this_machine("onnxruntime"), "python": platform.python_version()}


if __name__ == "__main__":
    main()
