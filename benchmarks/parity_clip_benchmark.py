"""The same model on the same set through CLIP_benchmark's evaluator and through ours: same accuracy to the last image?

    python benchmarks/parity_clip_benchmark.py MODEL SET

CLIP_benchmark 1.6.2 needs `requests`, which it does not declare, and numpy < 2.4: benchmarks/overlay.py makes it an
environment of its own with the same torch and open_clip, unless --python names one that has it.

MODEL is a run, checkpoint or model folder of ours; SET a WebDataset folder in CLIP_benchmark's layout. Prints both
results as JSON and exits with 1 where they differ by an image or more.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.overlay import CLIP_BENCHMARK, overlay

THEIRS = """
import json, sys, time
start = time.perf_counter()
import torch
from clip_benchmark.datasets.builder import build_dataset
from clip_benchmark.metrics import zeroshot_classification
from clip_benchmark.models import load_clip
model, folder, out = sys.argv[1:]
model, transform, tokenizer = load_clip(model_type="open_clip", model_name="local-dir:" + model, pretrained=None,
                                        cache_dir=None, device="cpu")
model.eval()
data = build_dataset("wds/set", root=folder, transform=transform, split="test", download=False)
loader = torch.utils.data.DataLoader(data.batched(64), batch_size=None, shuffle=False, num_workers=1)
found = zeroshot_classification.evaluate(model, WithClasses(loader), tokenizer, data.classes, data.templates,
                                         device="cpu", amp=False)
json.dump({**found, "seconds": time.perf_counter() - start}, open(out, "w"))
"""
# Its evaluator asks the loader's dataset for the classes, which `batched` does not hand on.
WRAPPER = """
class WithClasses:
    def __init__(self, loader):
        self.loader, self.dataset = loader, data
    def __iter__(self):
        return iter(self.loader)
"""


def theirs(python: str, model: Path, folder: Path) -> dict[str, Any]:
    """What CLIP_benchmark's evaluator finds, in an environment of its own."""
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "found.json"
        script = Path(place) / "theirs.py"
        script.write_text(THEIRS.replace("loader = torch", WRAPPER + "\nloader = torch"), encoding="utf-8")
        subprocess.run([python, str(script), str(model), str(folder), str(out)], check=True, stderr=subprocess.PIPE)
        found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
        return found


def ours(model: Path, folder: Path) -> dict[str, Any]:
    """What our evaluation finds."""
    start = time.perf_counter()
    from cloob.evaluation.embed import EmbedOptions
    from cloob.evaluation.embeddings import Embeddings
    from cloob.evaluation.sets.labelled import open_labelled
    from cloob.evaluation.suite import evaluate

    results = evaluate(Embeddings({"model": model}, EmbedOptions(batch_size=64, workers=1)), [open_labelled(folder)])
    if "failures" in results:
        raise SystemExit(results["failures"][0]["error"])
    found: dict[str, Any] = results["rows"][0]["zeroshot"][folder.name]
    return {**found, "seconds": time.perf_counter() - start}


def main() -> int:
    """Compares and reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("set", type=Path)
    parser.add_argument("--python", help="the interpreter of an environment with clip-benchmark; made when left out")
    arguments = parser.parse_args()
    python = arguments.python or overlay(CLIP_BENCHMARK)
    from cloob.models.load import find_model_folder

    folder = arguments.set.resolve()
    model = find_model_folder(arguments.model)
    if model is None:
        raise SystemExit(f"{arguments.model}: a run, checkpoint or model folder is wanted")
    metrics = ("acc1", "acc5", "mean_per_class_recall")
    try:
        found = {"clip_benchmark": theirs(python, model.resolve(), folder), "cloob": ours(model, folder)}
    except subprocess.CalledProcessError as error:
        sys.stderr.write(error.stderr.decode(errors="replace")[-2000:])
        return 2
    n = found["cloob"]["n"]
    report = {name: {key: part[key] for key in (*metrics, "seconds")} for name, part in found.items()}
    images = {key: round(abs(report["clip_benchmark"][key] - report["cloob"][key]) * n, 6) for key in metrics[:2]}
    print(json.dumps({"set": folder.name, "n": n, **report, "images_apart": images}, indent=1))
    recall = abs(report["clip_benchmark"]["mean_per_class_recall"] - report["cloob"]["mean_per_class_recall"])
    return int(max(images.values()) >= 0.5 or recall > 1e-6)


if __name__ == "__main__":
    sys.exit(main())
