"""open_clip is imported, and plain towers are built, without torch's compiler; nothing else changes."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from cloob.models.towers import open_clip
from cloob.models.weights.clip_towers import build

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


@pytest.mark.parametrize("name", ["tiny-resnet", "tiny-vit"])
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
