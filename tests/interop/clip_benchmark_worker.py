"""``python clip_benchmark_worker.py MODEL SET`` prints what CLIP_benchmark's evaluator finds on a WebDataset folder."""

import json
import sys

import torch
from clip_benchmark.datasets.builder import build_dataset
from clip_benchmark.metrics import zeroshot_classification
from clip_benchmark.models import load_clip


class WithClasses:
    """A loader whose dataset knows its classes, for which the evaluator asks; ``batched`` does not hand them on."""

    def __init__(self, loader, dataset):
        self.loader, self.dataset = loader, dataset

    def __iter__(self):
        return iter(self.loader)


model, folder = sys.argv[1:]
name = f"local-dir:{model}"
towers, transform, tokenizer = load_clip("open_clip", model_name=name, pretrained=None, cache_dir=None, device="cpu")
data = build_dataset("wds/set", root=folder, transform=transform, split="test", download=False)
batches = torch.utils.data.DataLoader(data.batched(64), batch_size=None, shuffle=False, num_workers=1)
loader = WithClasses(batches, data)
found = zeroshot_classification.evaluate(
    towers.eval(), loader, tokenizer, data.classes, data.templates, device="cpu", amp=False
)
print(json.dumps(found))
