"""open_clip is imported, and plain towers are built, without torch's compiler; nothing else changes."""

from __future__ import annotations

import gc
import importlib
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from cloob.models import importing
from cloob.models.towers import open_clip
from cloob.models.weights.clip_towers import Unfilled, build

WITHOUT = """
import sys, torch
from cloob.models.importing import import_open_clip
disable = torch.compiler.disable
library = import_open_clip()
assert torch.compiler.disable is disable and "torch._dynamo.utils" not in sys.modules
from cloob.models.weights.clip_towers import build
build(library.get_model_config("ViT-B-32"), {}, "")
build(library.get_model_config("RN50"), {}, "")
assert not {"torch._dynamo", "sympy"} & sys.modules.keys()
import torchvision
pixels, boxes = torch.rand(1, 1, 8, 8), [torch.tensor([[0.0, 0.0, 8.0, 8.0]])]
assert torchvision.ops.roi_align(pixels, boxes, 2).shape == (1, 1, 2, 2)
assert torchvision.ops.roi_align.__globals__["is_compile_supported"]("cpu") is not None
assert torch.equal(torch.compile(lambda x: x + 1, backend="eager")(pixels), pixels + 1)
"""


@pytest.mark.nightly
def test_the_compiler_stays_away_until_it_is_asked_for() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


THREADS = """
import sys, threading, time, torch
from cloob.models.towers import create_model
mistakes = []
def work(wait):
    time.sleep(wait)
    try:
        create_model("tiny-vit", seed=0)
        torch.compiler.disable(lambda: 1, reason="the patched one knows no reason")
    except Exception as error:
        mistakes.append(error)
threads = [threading.Thread(target=work, args=(0.1 * i,)) for i in range(3)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
assert not mistakes, mistakes
"""


@pytest.mark.nightly
def test_threads_that_import_at_the_same_time_see_nothing_of_it() -> None:
    done = subprocess.run([sys.executable, "-c", THREADS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_what_stands_for_the_module_gives_its_function_and_brings_it_for_more(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module("torch._dynamo.utils")
    later = importing._Later()
    assert later.is_compile_supported("cpu") == real.is_compile_supported("cpu")
    monkeypatch.setitem(sys.modules, "torch._dynamo.utils", real)
    assert later.counters is real.counters
    with pytest.raises(AttributeError):
        _ = later.__path__


def test_the_collector_is_as_it_was() -> None:
    for enabled in (True, False):
        (gc.enable if enabled else gc.disable)()
        try:
            with importing._no_collection():
                assert not gc.isenabled()
            assert gc.isenabled() is enabled
        finally:
            gc.enable()


@pytest.mark.parametrize("name", ["tiny-resnet", "tiny-vit", "RN50", "ViT-B-32"])
def test_towers_without_values_have_the_shapes_of_those_with(name: str) -> None:
    library = open_clip()
    config = library.get_model_config(name)
    with torch.device("meta"):
        kind = library.CustomTextCLIP if config.pop("custom_text", False) else library.CLIP
        plain: nn.Module = kind(**config)
    bare: nn.Module = build(library.get_model_config(name), {}, name)

    def facts(model: nn.Module) -> dict[str, object]:
        tensors = [*model.named_parameters(), *model.named_buffers()]
        return {key: (tuple(value.shape), value.dtype, value.requires_grad, value.device) for key, value in tensors}

    assert facts(bare) == facts(plain)


def test_values_are_left_out_without_memory_alone() -> None:
    with Unfilled():
        real = torch.ones(3) * 2
        meta = torch.ones(3, device="meta") * 2
        nn.init.zeros_(real)
        drawn = torch.randn(64)
    assert drawn.std() > 0.5
    assert meta.is_meta and isinstance(meta, Tensor) and real.tolist() == [0, 0, 0]
