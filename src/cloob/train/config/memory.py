"""What a step takes of the memory, and the one line when that is too much; with batch sizes that fit."""

from __future__ import annotations

import gc
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cloob.data.batch import Batch
from cloob.distributed import world_size
from cloob.errors import InputError
from cloob.models.aligned import AlignedEncoder
from cloob.models.encoder import DualEncoder
from cloob.train.config import TrainConfig
from cloob.train.ranks import gather_objects
from cloob.train.state.rng import preserved_rng
from cloob.train.step import Stepper

if sys.platform != "win32":
    import resource

_PAIRS = 2  # are measured: batch norms need two
# Beside what autograd keeps, the backward pass holds the gradients of a layer and the workspace of its kernels.
_BESIDE = 1.15
_ROOM = 0.95  # of what is free is planned with
_SMALLER_MODEL = "a smaller --model or --image-size"


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


def check(config: TrainConfig, stepper: Stepper, encoder: DualEncoder, device: torch.device) -> None:
    """Refuses a run whose steps do not fit, on all ranks at once; measured on two empty pairs.

    On the CPU alone, where the kernel kills instead of refusing. Heads on frozen encoders take next to nothing, and
    shards of towers (FSDP) would need all ranks.

    Raises:
        InputError: They do not fit.
    """
    if device.type != "cpu" or config.run.fsdp or isinstance(encoder, AlignedEncoder):
        return
    images = torch.zeros(_PAIRS, 3, encoder.image_size, encoder.image_size, dtype=torch.uint8)
    said = _refusal(config, stepper, images, torch.ones(_PAIRS, encoder.context_length, dtype=torch.int64))
    for line in gather_objects(said):
        if line:
            raise InputError(line)


def too_large(config: TrainConfig, stepper: Stepper, batch: Batch) -> InputError:
    """The error of a step for which there was not enough memory; to be called when all of it is free again."""
    gc.collect()
    device = batch.images.device
    if device.type == "cuda":
        torch.cuda.empty_cache()
    if config.run.fsdp or config.run.sync_bn or batch.images.ndim != 4:  # the first two talk to other ranks
        return InputError(f"batch size {config.run.batch_size} does not fit in memory; give a smaller --batch-size")
    some = torch.arange(_PAIRS, device=device) % len(batch)
    return InputError(_refusal(config, stepper, batch.images[some], batch.tokens[some], failed=True))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch or Python says that there is not enough memory."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return "DefaultCPUAllocator" in str(error) or "could not create a memory object" in str(error)


def measure(stepper: Stepper, images: Tensor, tokens: Tensor) -> Need:
    """What autograd keeps of a forward pass with two pairs, and what all parameters need; changes nothing."""
    module, kept = stepper.module, dict[int, int]()
    parameters = list(module.parameters())
    parameter_storages = {p.untyped_storage().data_ptr() for p in parameters}
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameter_storages:
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
    """What the machine has, and what a limit on this process's address space leaves; nothing without /proc."""
    free = []
    statm = Path("/proc/self/statm")
    if sys.platform != "win32" and statm.is_file():
        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        if limit != resource.RLIM_INFINITY:
            free.append(limit - int(statm.read_text().split()[0]) * resource.getpagesize())
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


def _refusal(config: TrainConfig, stepper: Stepper, images: Tensor, tokens: Tensor, *, failed: bool = False) -> str:
    """The line on steps that do not fit, empty if they do; ``failed``: one has been tried, so they do not."""
    try:
        need = measure(stepper, images, tokens)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return f"{_name(config)} does not fit in memory with {_PAIRS} pairs; give {_SMALLER_MODEL}"
    pairs, room = _at_a_time(config), available(images.device)
    if need.of(pairs) <= room and not failed:
        return ""
    fits = min(need.fitting(room), pairs // 2)
    sizes = f"takes about {_gb(need.of(pairs))} more memory, {_gb(room)} are free"
    said = f"{_name(config)} with {pairs} pairs at a time {sizes}"
    if fits < 2:
        return f"{said}: not even {_PAIRS} pairs fit; give {_SMALLER_MODEL}"
    smaller = f"--batch-size {fits * world_size()}"
    if config.run.sync_bn or config.run.fsdp:
        return f"{said}: give {smaller}"
    return f"{said}: give --micro-batch-size {fits} (the loss stays that of the whole batch), or {smaller}"


def _name(config: TrainConfig) -> str:
    return config.towers.model or config.towers.init or config.towers.init_image or "the model"


def _gb(size: float) -> str:
    return f"{max(size, 0) / 1e9:.1f} GB"
