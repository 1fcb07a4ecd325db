"""What a step takes of the memory, and the one line when that is too much; with batch sizes that fit."""

from __future__ import annotations

import gc
import os
import resource
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cloob.data.batch import Batch
from cloob.distributed import world_size
from cloob.errors import InputError
from cloob.train.config import TrainConfig
from cloob.train.ranks import gather_objects
from cloob.train.state.rng import preserved_rng
from cloob.train.step import Stepper

_PAIRS = 2  # are measured: batch norms need two
# Beside what autograd keeps, the backward pass holds the gradients of a layer and the workspace of its kernels.
_BESIDE = 1.15
_ROOM = 0.95  # of what is free is planned with


@dataclass(frozen=True)
class Need:
    """What steps take beyond what is taken already, in bytes.

    Attributes:
        fixed: Gradients, and the optimiser's moments where there are none yet.
        pair: Activations of one pair.
    """

    fixed: int
    pair: float

    def of(self, pairs: int) -> float:
        """A step with so many pairs at a time."""
        return self.fixed + pairs * self.pair

    def fitting(self, room: float) -> int:
        """The largest power of two of pairs that fits; 0 when two do not."""
        pairs = int((room - self.fixed) / self.pair)
        return 1 << (pairs.bit_length() - 1) if pairs >= 2 else 0


def check(config: TrainConfig, stepper: Stepper, batch: Batch) -> None:
    """Refuses a run whose steps do not fit, on all ranks at once; measured on two pairs of its first batch.

    Shards of towers (FSDP) are not measured: that would need all ranks.

    Raises:
        InputError: They do not fit.
    """
    said = ""
    if not config.run.fsdp and config.align.image_encoder is None and batch.images.ndim == 4:
        need, room = measure(stepper, batch), available(batch.images.device)
        if need.of(_at_a_time(config)) > room:
            said = _told(config, need, room)
    for line in gather_objects(said):
        if line:
            raise InputError(line)


def too_large(config: TrainConfig, stepper: Stepper, batch: Batch) -> InputError:
    """The error of a step for which there was not enough memory; to be called when all of it is free again."""
    gc.collect()
    device = batch.images.device
    if device.type == "cuda":
        torch.cuda.empty_cache()
    if config.run.fsdp or config.run.sync_bn:  # both talk to the other ranks in a forward pass
        return InputError(f"batch size {config.run.batch_size} does not fit in memory; give a smaller --batch-size")
    return InputError(_told(config, measure(stepper, batch), available(device)))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch or Python says that there is not enough memory."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return "DefaultCPUAllocator" in str(error) or "could not create a memory object" in str(error)


def measure(stepper: Stepper, batch: Batch) -> Need:
    """What autograd keeps of a forward pass with two pairs, and what all parameters need; changes nothing."""
    module, kept = stepper.module, dict[int, int]()
    parameters = list(module.parameters())
    own = {p.untyped_storage().data_ptr() for p in parameters}
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    some = torch.arange(_PAIRS, device=batch.images.device) % len(batch)
    images, tokens = batch.images[some], batch.tokens[some]

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with (
        preserved_rng(images.device),
        torch.compiler.set_stance("force_eager"),
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
    ):
        features = module(images, tokens, loss=False)
    del features
    with torch.no_grad():
        for buffer, before in buffers:
            buffer.copy_(before)
    trained = sum(p.numel() * p.element_size() for p in parameters if p.requires_grad)
    moments = 0 if stepper.optimizer.state else 2 * trained
    return Need(trained + moments, _BESIDE * sum(kept.values()) / len(images))


def available(device: torch.device) -> float:
    """Bytes that this rank may still take, with a little left over."""
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return _ROOM * (torch.cuda.mem_get_info(device)[0] + held)
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return _ROOM * min([*_free_of_host(), *_free_of_groups(Path("/sys/fs/cgroup"))], default=2**62) / ranks


def _free_of_host() -> list[int]:
    """What the machine has, and what a limit on this process's address space leaves."""
    free = []
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        free.append(limit - int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize())
    if Path("/proc/meminfo").is_file():
        lines = Path("/proc/meminfo").read_text().splitlines()
        free += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return free


def _free_of_groups(root: Path, membership: Path = Path("/proc/self/cgroup")) -> list[int]:
    """What each control group that this process is in leaves; pages of files that can go count as free."""
    free = []
    for line in membership.read_text().splitlines() if membership.is_file() else ():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        top = root if controllers == "" else root / "memory"
        names = ("memory.max", "memory.current") if controllers == "" else (
            "memory.limit_in_bytes", "memory.usage_in_bytes")  # fmt: skip
        group = top / path.lstrip("/")
        for folder in (group, *group.parents):
            if not folder.is_relative_to(top):
                break
            limit, used = (folder / name for name in names)
            if limit.is_file() and used.is_file() and (most := limit.read_text().strip()).isdigit():
                stat = (folder / "memory.stat").read_text().splitlines()
                files = sum(int(line.split()[1]) for line in stat if line.split()[0] == "inactive_file")
                free.append(int(most) - int(used.read_text()) + files)
    return free


def _at_a_time(config: TrainConfig) -> int:
    """Pairs whose activations a rank holds together."""
    local = -(-config.run.batch_size // world_size())
    return min(local, config.run.micro_batch_size or local)


def _told(config: TrainConfig, need: Need, room: float) -> str:
    pairs = _at_a_time(config)
    who = config.towers.model or config.towers.init
    fits = min(need.fitting(room), pairs // 2)
    said = f"{who} with {pairs} pairs at a time takes about {_gb(need.of(pairs))} more memory, {_gb(room)} are free"
    if fits < 2:
        return f"{said}: not even 2 pairs fit; give a smaller --model or --image-size"
    smaller = f"--batch-size {fits * world_size()}"
    if config.run.sync_bn or config.run.fsdp:
        return f"{said}: give {smaller}"
    return f"{said}: give --micro-batch-size {fits} (the loss stays that of the whole batch), or {smaller}"


def _gb(size: float) -> str:
    return f"{max(size, 0) / 1e9:.1f} GB"
