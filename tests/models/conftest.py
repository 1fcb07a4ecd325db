"""Towers whose output depends on their input, and two folders with encoders."""

import pytest
import torch

import tiny_bert
from cloob.models.towers import create_model
from make import tiny_model


def _lively(name, **arguments):
    encoder = create_model(name, seed=0, **arguments)
    norms = [
        module
        for module in encoder.modules()
        if isinstance(module, torch.nn.BatchNorm2d)
    ]
    size = encoder.image_size
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(
            0
        )  # the same in each worker: an export is made by one of them
        for norm in norms:
            torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
            norm.momentum = None  # a plain average over the passes
            norm.reset_running_stats()
        encoder.encode_image(
            torch.randint(0, 256, (32, 3, size, size), dtype=torch.uint8)
        )
        for norm in norms:
            norm.momentum = 0.1
    return encoder.eval()


@pytest.fixture(scope="session")
def lively():
    """Makes a tiny encoder in eval mode whose batch norms have seen images.

    A fresh ModifiedResNet in eval mode gives nearly the same row for every picture (its
    blocks start at zero and its statistics are not those of its activations), and any
    comparison of such rows would pass.
    """
    return _lively


@pytest.fixture(scope="session")
def bert(tmp_path_factory):
    """The tiny sentence-transformers folder of the interop tests; nobody writes into
    it.
    """
    folder = tmp_path_factory.mktemp("bert")
    tiny_bert.build(folder)
    return folder / "model"


@pytest.fixture(scope="session")
def tower(tmp_path_factory):
    """A model folder with fresh tiny towers; nobody writes into it."""
    return tiny_model(tmp_path_factory.mktemp("tower") / "model", seed=3)
