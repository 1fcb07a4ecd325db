from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from cloob.data.batch import RawSample
from cloob.data.builder import BatchBuilder, Request
from cloob.data.order import sample_generator
from cloob.data.transforms import TrainTransform
from cloob.pictures import Encoded, decode


class Pictures:
    """Pair i is a picture of its own size: JPEG for even i, else PNG; pair 3 is cut."""

    name = "pictures"
    shard_sizes = (8,)

    def __len__(self) -> int:
        return 8

    def read(self, index: int) -> RawSample:
        pixels = np.random.default_rng(index).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        file = io.BytesIO()
        large = Image.fromarray(pixels).resize((90 + 17 * index, 70 + 11 * index), Image.Resampling.BICUBIC)
        large.save(file, "PNG" if index % 2 else "JPEG")
        data = file.getvalue()
        return RawSample(f"k{index}", data[: len(data) // 2] if index == 3 else data, f"caption {index}")


@pytest.mark.parametrize("reduce", [True, False])
def test_a_batch_is_the_plain_loop(tokenizer: Callable[[list[str]], Tensor], reduce: bool) -> None:
    source, transform = Pictures(), TrainTransform(32, scale=(0.5, 0.9), flip=True, reduce=reduce)
    batch = BatchBuilder(source, transform, tokenizer, seed=4).__getitems__(Request(2, np.array([5, 3, 0, 6])))
    assert batch.keys == ("k5", "k0", "k6") and [(s.key, s.reason) for s in batch.skipped] == [("k3", "corrupt image")]
    assert torch.equal(batch.tokens, tokenizer(["caption 5", "caption 0", "caption 6"]))
    reductions = []
    for pixels, index in zip(batch.images, (5, 0, 6), strict=True):
        encoded = Encoded(source.read(index).image)
        crop = transform.draw(*encoded.size, sample_generator(4, 2, index))
        assert torch.equal(pixels, transform.take(encoded.rgb(crop.reduction), crop))
        reductions.append(crop.reduction)
        # ... which is close to the transform of the whole picture with the sample's own generator, and equal for PNG.
        whole = transform(decode(source.read(index).image), sample_generator(4, 2, index))
        assert torch.equal(pixels, whole) if index % 2 or not reduce else (pixels.int() - whole).abs().max() < 12
    assert (max(reductions) > 1) == reduce
