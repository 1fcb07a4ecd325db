"""Undocumented names of torch: that each is there, and what breaks without it.

A new torch is tried with this file.
"""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import cloob.functional.private as private

BATCH = torch.ones(2, 2)


NAMES = {
    "_disable_dynamo": (
        lambda: torch,
        "the import of cloob takes a second longer; nothing else",
    ),
    "get_interpreter_stack": (
        lambda: torch._C._functorch,
        "torch.func is not noticed: streamed paths fail inside it",
    ),
    "TransformType": (
        lambda: torch._C._functorch,
        "inside vmap the objective looks at values that are not there",
    ),
    "_NormBase": (
        lambda: nn.modules.batchnorm,
        "batch norms of several dimensions decay",
    ),
    "get_backend_config": (
        lambda: torch.distributed,
        "small numbers between hosts go by the device",
    ),
    "_step_supports_amp_scaling": (
        lambda: torch.optim.AdamW([nn.Parameter(BATCH)], fused=True),
        "each step waits for the device",
    ),
    "_iterator": (lambda: DataLoader([0]), "worker processes outlive the loader"),
    "_new_shared": (
        lambda: torch.UntypedStorage,
        "batches are copied once more on their way from a worker",
    ),
    "_pytree": (
        lambda: torch.utils,
        "batches of a Dataset that are lists or mappings do not reach the device",
    ),
    "_buffers": (
        lambda: nn.Linear(1, 1),
        "a bad step moves running statistics; fixed scales lose their float64",
    ),
}


@pytest.mark.parametrize("name", NAMES)
def test_the_name_is_there(name):
    owner, breaks = NAMES[name]
    assert hasattr(owner(), name), f"without {name}: {breaks}"


def test_workers_are_found_and_end():
    """Without ``_workers`` a worker that dies leaves the run waiting, without
    ``_shutdown_workers`` they stay.
    """
    loader = DataLoader(
        [0, 1], num_workers=1, persistent_workers=True, multiprocessing_context="fork"
    )
    (worker,) = private.worker_processes(iter(loader))
    assert worker.is_alive()
    private.shut_down(loader)
    assert not worker.is_alive()
