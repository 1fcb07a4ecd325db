"""``python clip_benchmark_worker.py MODEL SET`` prints what CLIP_benchmark's evaluator
finds on a WebDataset folder.
"""

import json
import sys

import torch
from clip_benchmark.datasets.builder import build_dataset
from clip_benchmark.metrics import zeroshot_classification
from clip_benchmark.models import load_clip

model, folder = sys.argv[1:]
name = f"local-dir:{model}"
towers, transform, tokenizer = load_clip(
    "open_clip", model_name=name, pretrained=None, cache_dir=None, device="cpu"
)
data = build_dataset(
    "wds/set", root=folder, transform=transform, split="test", download=False
)
batched = data.batched(64)
batched.classes = data.classes  # which the evaluator reads
loader = torch.utils.data.DataLoader(
    batched, batch_size=None, shuffle=False, num_workers=1
)
found = zeroshot_classification.evaluate(
    towers.eval(),
    loader,
    tokenizer,
    data.classes,
    data.templates,
    device="cpu",
    amp=False,
)
print(json.dumps(found))
