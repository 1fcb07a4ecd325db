"""One process of a SentenceTransformerTrainer run under torchrun: folder, kind; rank 0
saves what came out.
"""

import gc
import sys
from pathlib import Path

import torch

import tiny_bert
from cloob.distributed import rank
from cloob.interop.sentence_transformers import CachedCLOOBLoss, CLOOBLoss

folder = Path(sys.argv[1])
kind = sys.argv[2]
torch.set_num_threads(1)
model = tiny_bert.load(folder)
columns = tiny_bert.pictures() if "pictures" in kind else tiny_bert.PAIRS
arguments = {"per_device_train_batch_size": 4, "ddp_backend": "gloo"}
if "cached" in kind:
    loss = CachedCLOOBLoss(model, mini_batch_size=3, gather_across_devices=True)
else:
    loss = CLOOBLoss(model, gather_across_devices=True)
    if "pictures" in kind:  # docs/interop.md
        arguments["ddp_find_unused_parameters"] = False
        model[0].auto_model.logit_scale.requires_grad_(False)
losses = tiny_bert.fit(model, loss, columns, folder / "out", **arguments)
if rank() == 0:
    torch.save({"losses": losses, "state": model.state_dict()}, folder / f"{kind}.pt")
# the trainer's DDP goes before the group that it holds, which could abort the process
# at its end
gc.collect()
torch.distributed.destroy_process_group()
