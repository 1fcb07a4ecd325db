"""One process of the launcher under torchrun, on a machine without an accelerator.

open_clip_train 3.3 hands DDP ``device_ids=[cpu]``, which DDP refuses, so several
processes need an accelerator. Nothing else is changed here.
"""

import runpy

import torch


class CpuDdp(torch.nn.parallel.DistributedDataParallel):
    def __init__(self, module, device_ids=None, **more):
        assert device_ids == [torch.device("cpu")]
        super().__init__(module, **more)


torch.nn.parallel.DistributedDataParallel = CpuDdp
runpy.run_module("cloob.interop.open_clip", run_name="__main__")
