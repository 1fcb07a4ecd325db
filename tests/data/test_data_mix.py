from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from cloob.data.loader import PairLoader
from cloob.data.mix import MixedSource, mix, parts_of
from cloob.data.open import open_source
from cloob.data.source import Source
from cloob.errors import InputError


@pytest.fixture
def two(shards: Path) -> tuple[Source, Source]:
    """Sources of 5 + 4 + 3 and of 3 pairs."""
    return open_source(shards), open_source(shards / "00002.tar")


def draw(image: Image.Image, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 256, (3, 2, 2), generator=generator).to(torch.uint8)


def test_sources_are_read_one_after_the_other(two: tuple[Source, Source]) -> None:
    both = mix(two)
    assert len(both) == 15 and both.shard_sizes == (5, 4, 3, 3) and not both.streamed
    expected = [two[0].read(i) for i in range(12)] + [two[1].read(i) for i in range(3)]
    assert [both.read(i) for i in range(15)] == expected
    assert both.read(15 + 13) == expected[13]  # a further copy
    assert both.name == f"{two[0].name} + {two[1].name}"
    assert pickle.loads(pickle.dumps(both)).read(14) == expected[14]


def test_a_source_alone_is_itself(two: tuple[Source, Source]) -> None:
    assert mix(two[:1]) is two[0] and mix(two[:1], [1.0]) is two[0]
    assert [part.weight for part in parts_of(mix(two[:1], [0.5]))] == [0.5]


def test_the_loader_visits_each_source_as_its_weight_says(
    two: tuple[Source, Source], tokenizer: Callable[[list[str]], Tensor]
) -> None:
    pairs = PairLoader(mix(two, [0.5, 2]), draw, tokenizer, 5, drop_last=False)
    assert pairs.pairs_per_epoch == 12 and pairs.steps_per_epoch == 3
    first, second = (list(pairs.epoch(e)) for e in (0, 1))
    # Pairs 9 to 11 are in both sources: twice from the second, and once in two epochs from the first.
    found = [sorted(key[-3:] for batch in epoch for key in batch.keys) for epoch in (first, second)]
    assert [len(keys) for keys in found] == [12, 12]
    together = np.unique(found[0] + found[1], return_counts=True)
    assert dict(zip(*together, strict=True)) == {f"{i:03d}": 1 if i < 9 else 5 for i in range(12)}
    # The same pair in an epoch is augmented anew.
    images = torch.cat([batch.images for batch in first]).flatten(1)
    assert len(torch.unique(images, dim=0)) == 12


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ([1], "1 given for 2"),
        ([1, 0], "0 for"),
        ([1, float("nan")], "nan"),
        ([0.04, 1], r"0.04 for .* takes none of its 12 pairs; give 0.083 or more"),
    ],
)
def test_wrong_weights(two: tuple[Source, Source], weights: list[float], said: str) -> None:
    with pytest.raises(InputError, match=said):
        MixedSource(two, tuple(weights))
