"""A device that is pretended: it computes on the CPU, and counts what a real one would
be asked to do.

torch's python backend names it ``pretended``. ``Held`` is one of its tensors, and holds
one of the CPU. Counted are kernels (operations that are no views), waits (numbers and
sizes that the host reads), copies between host and device, and operations on tensors of
both. Run as a program it prints the counts of every case as JSON: a backend is for the
life of a process.
"""

import collections
import json
import sys
import warnings
from unittest.mock import Mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)

NAME = "pretended"
VIEWS = {
    "view",
    "detach",
    "alias",
    "t",
    "transpose",
    "permute",
    "slice",
    "select",
    "expand",
    "unsqueeze",
    "squeeze",
    "as_strided",
    "split",
    "diagonal",
    "_unsafe_view",
    "split_with_sizes",
    "reshape",
    "_reshape_alias",
    "unbind",
    "lift_fresh",
    "chunk",
}
READS = {
    "_local_scalar_dense",
    "nonzero",
    "equal",
    "_unique2",
    "unique_dim",
    "is_nonzero",
    "masked_select",
    "bincount",
    "repeat_interleave",
}
AUTOCAST = "AutocastPrivateUse1"
IN_LOW_PRECISION = ("linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "conv2d")
IN_FLOAT32 = ("layer_norm", "softmax", "norm")
INDEXES = {"index", "index_put", "index_put_"}
counts: dict[str, collections.Counter] = {
    kind: collections.Counter() for kind in ("kernels", "waits", "copies", "mixed")
}


class Backend(_DummyBackendModule):
    def get_amp_supported_dtype(self):
        return [torch.bfloat16, torch.float16, torch.float32]


class Held(torch.Tensor):
    """A tensor of the device."""

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device(NAME, 0),
        )

    def __init__(self, held):
        self.held = held

    def __deepcopy__(self, memo):
        copied = Held(self.held.clone())
        if isinstance(self, torch.nn.Parameter):
            copied = torch.nn.Parameter(copied, self.requires_grad)
        return memo.setdefault(id(self), copied)

    def tolist(self):
        counts["waits"]["tolist"] += 1
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return run(function, args, kwargs or {})


class OnDevice(TorchDispatchMode):
    """Inside, what makes a tensor on the device makes a pretended one."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return run(function, args, kwargs or {})


def is_device(device):
    return device is not None and torch.device(device).type == NAME


def run(function, args, kwargs):
    name = function.overloadpacket.__name__
    tensors = [
        a for a in tree_flatten((args, kwargs))[0] if isinstance(a, torch.Tensor)
    ]
    held = [a for a in tensors if isinstance(a, Held)]
    target = kwargs.get("device")
    on_device = bool(held) if target is None else is_device(target)
    count(name, args, kwargs, tensors, held, on_device)
    if is_device(target):
        kwargs = {**kwargs, "device": torch.device("cpu")}
    result = function(*tree_map(inner, args), **tree_map(inner, kwargs))
    if not on_device:
        return result
    outer = {id(tensor.held): tensor for tensor in held}  # what is written in place

    def outside(made):
        if not isinstance(made, torch.Tensor):
            return made
        return outer[id(made)] if id(made) in outer else Held(made)

    return tree_map(outside, result)


def inner(value):
    return value.held if isinstance(value, Held) else value


def count(name, args, kwargs, tensors, held, on_device):
    if name == "_to_copy" and bool(held) != on_device:
        counts["copies"]["to device" if on_device else "to host"] += 1
    elif name == "copy_" and isinstance(args[0], Held) != isinstance(args[1], Held):
        counts["copies"][name] += 1
    elif held and any(t.ndim > 0 and not isinstance(t, Held) for t in tensors):
        counts["mixed"][name] += 1
    indices = args[1] if name in INDEXES else []
    by_mask = any(getattr(i, "dtype", None) == torch.bool for i in indices)
    knows_size = kwargs.get("output_size") is not None  # of repeat_interleave
    if held and (name in READS or by_mask) and not knows_size:
        counts["waits"][name] += 1
    if (held or on_device) and name not in VIEWS:
        counts["kernels"][name] += 1


def move(module):
    """The module with its parameters and buffers on the device."""
    moved = {}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                if id(parameter) not in moved:
                    held = Held(parameter.data)
                    moved[id(parameter)] = torch.nn.Parameter(
                        held, requires_grad=parameter.requires_grad
                    )
                part._parameters[name] = moved[id(parameter)]
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = Held(buffer)
    return module


def counted(action):
    """What ``action`` asks of the device at its second call."""
    with OnDevice():
        action()
        for counter in counts.values():
            counter.clear()
        action()
    return {kind: sum(counter.values()) for kind, counter in counts.items()} | {
        "which": {kind: dict(counts[kind]) for kind in ("waits", "copies", "mixed")}
    }


def objective_cases():
    from cloob.distributed import Layout
    from cloob.objective import make_objective

    n = 64
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(n, 16, generator=generator) for _ in range(2)]
    x, y = (
        Held(torch.nn.functional.normalize(r, dim=1)).requires_grad_() for r in rows
    )
    cases = {name: {} for name in ("cloob", "clip", "infoloob", "siglip")}
    cases["cloob, learned beta"] = {"learnable_beta": True, "scale": "unit"}
    cases["cloob, bf16"] = {"matmul": "bfloat16"}
    for name, options in cases.items():
        objective = make_objective(
            name.partition(",")[0], backend="streamed", **options
        )
        move(objective)
        for kind, trusted in (("own call", None), ("in the loop", Layout((n,)))):
            yield (
                f"{name}, {kind}",
                lambda o=objective, t=trusted: o(x, y, trusted=t).backward(),
            )


def step_cases():
    import cloob
    from cloob.distributed import Layout
    from cloob.objective import make_objective
    from cloob.training.optim import Optimizers, parameter_groups
    from cloob.training.step import StepBatch, Stepper, TowersWithLoss

    n = 8
    cases = {
        "tiny-vit, cloob": {},
        "tiny-vit, clip, clipped": {"clip_grad_norm": 1.0},
        "tiny-vit, cloob, two optimisers": {},
        "tiny-vit, cloob, bf16": {},
        "tiny-resnet, cloob": {},
        "tiny-resnet, cloob, ema": {"ema": 0.99},
        "tiny-resnet, cloob, micro": {"micro_batch_size": n // 4},
    }
    for name, options in cases.items():
        model, kind, *how = name.split(", ")
        encoder = cloob.create_model(model, seed=0)
        encoder._layout = torch.contiguous_format
        size = encoder.image_size
        tokens = Held(encoder.tokenizer(["a dog", "two cats"] * (n // 2)))
        images = Held(torch.randint(0, 255, (n, 3, size, size), dtype=torch.uint8))
        objective = move(make_objective(kind))
        groups = parameter_groups(move(encoder), objective, 0.1)
        for group in groups:
            group["lr"] = 1e-3
        optimizer = torch.optim.AdamW(groups, fused=True)
        if "two optimisers" in how:
            optimizer = Optimizers(
                [torch.optim.AdamW([group], fused=True) for group in groups]
            )
        precision = "bf16" if "bf16" in how else "fp32"
        towers = TowersWithLoss(encoder, objective, precision).train()
        stepper = Stepper(towers, optimizer, **options)
        yield (
            name,
            lambda s=stepper, i=images, t=tokens: s.launch(
                StepBatch((i, t), Layout((n,)), hopfield=True), 1e-3
            ),
        )


def heads_cases():
    """Epochs of 4 and of 8 steps from rows that lie on the device, and validations of
    as many rows.
    """
    from cloob import HeadSettings
    from cloob.heads import fit, parts

    device = torch.device(NAME, 0)
    settings = HeadSettings(objective="cloob", batch_size=16)
    parts.resident = lambda pairs, device: (held(pairs.a), held(pairs.b))
    for steps in (4, 8):
        pairs = vector_pairs(16 * steps)
        heads = fit.first_heads(pairs, None, settings, None)
        model = move(parts.Model(*heads, parts.objective_of(settings)))
        optimizer = parts.adamw(model, settings, torch.device("cpu"))  # a fused one
        with OnDevice():
            batches = parts.Batches(pairs, settings, device)
            judge = parts.Judge(pairs, device)

        def train(m=model, o=optimizer, b=batches):
            fit.fit_epoch(m, o, b, settings, fit.Progress())

        yield f"heads, {steps} steps", train
        yield f"heads, {steps} held-out", lambda j=judge, m=model: j(m)


def held(rows):
    return Held(torch.from_numpy(rows))


def vector_pairs(n):
    """Pairs of random rows, with weights."""
    import numpy as np

    from cloob.data.vectors import VectorPairs

    draws = np.random.default_rng(0)
    a, b = (draws.normal(size=(n, 12)).astype("float32") for _ in "ab")
    numbers = np.arange(n)
    rows = np.stack([numbers, numbers], axis=1)
    return VectorPairs("pairs", a, b, rows, numbers, weights=draws.random(n))


def validation_cases():
    """What a pass over 2 and over 4 batches of held-out pairs asks for."""
    import cloob
    from cloob.data.batch import Batch
    from cloob.objective import make_objective
    from cloob.training.faults import StopSignal, fetch
    from cloob.training.step import StepBatch, TowersWithLoss
    from cloob.training.validation import pass_over_held_out

    encoder = cloob.create_model("tiny-vit", seed=0)
    tokens = Held(encoder.tokenizer(["a dog", "two cats"] * 4))
    size = encoder.image_size
    images = Held(torch.randint(0, 255, (8, 3, size, size), dtype=torch.uint8))
    encoder._layout = torch.contiguous_format
    towers = TowersWithLoss(move(encoder), move(make_objective("cloob"))).eval()
    batch = Batch((images, tokens), Held(torch.arange(8)), ("",) * 8)
    run = Mock(objective=towers.objective)
    run.step_batch = lambda batch, layout, hopfield: StepBatch(
        batch.parts, layout, batch.ids, hopfield
    )
    run.stepper.device = torch.device(NAME, 0)
    run.stepper.micro_batch_size = 0
    run.fetch = lambda batches: fetch(batches, StopSignal(), run.stepper.device, None)
    for n in (2, 4):
        loader = Mock(pairs_per_epoch=8 * n, batch_size=8, steps_per_epoch=n)
        loader.epoch = lambda epoch, n=n: iter([batch] * n)

        @torch.no_grad()
        def judge(loader=loader):
            run.val_loader = loader
            pass_over_held_out(run, towers, hopfield=True).mean_loss()

        yield f"validation of {n} batches", judge


def ranking_cases():
    from cloob.functional.ranking import mutual_ranks

    x, y = (Held(torch.randn(256, 16)) for _ in range(2))
    pairs = Held(torch.arange(256).repeat(2, 1).T.contiguous())
    for chunk in (256, 64):
        yield f"ranks, blocks of {chunk}", lambda c=chunk: mutual_ranks(x, y, pairs, c)


def pretend_autocast():
    """Gives the device the autocast of a GPU: products in low precision, norms in
    float32.
    """
    every_operation = torch.library.Library("_", "IMPL")
    every_operation.fallback(torch.library.fallthrough_kernel, AUTOCAST)
    library = torch.library.Library("aten", "IMPL")
    for names, dtype in ((IN_LOW_PRECISION, None), (IN_FLOAT32, torch.float32)):
        for name in names:
            library.impl(name, cast_to(dtype, getattr(torch.ops.aten, name)), AUTOCAST)
    return every_operation, library  # which hold until they are freed


def cast_to(dtype, operation):
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def run_cast(*args, **kwargs):
        target = dtype or torch.get_autocast_dtype(NAME)

        def cast(value):
            is_number = isinstance(value, torch.Tensor) and value.is_floating_point()
            return value.to(target) if is_number else value

        with torch._C._ExcludeDispatchKeyGuard(keys):
            return operation(*tree_map(cast, args), **tree_map(cast, kwargs))

    return run_cast


def main():
    warnings.simplefilter("ignore")
    _setup_privateuseone_for_python_backend(NAME, backend_module=Backend())
    libraries = pretend_autocast()
    found = {}
    for cases in (
        objective_cases,
        ranking_cases,
        step_cases,
        heads_cases,
        validation_cases,
    ):
        for name, action in cases():
            try:
                found[name] = counted(action)
            except Exception as error:
                found[name] = {"raised": f"{type(error).__name__}: {error}"[:300]}
    json.dump(found, sys.stdout)
    del libraries


if __name__ == "__main__":
    main()
