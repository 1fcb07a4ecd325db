"""The contract of pairs: of pictures, of a caller's items, of two matrices."""

import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from cloob.data.items import Items
from cloob.data.loader import Loader, PicturePairs
from cloob.data.source import Subset
from cloob.data.transforms import TrainTransform
from cloob.heads.matrix import pairs_of
from make import Listed, code_points, noise

N = 20


class Rows(Dataset):
    def __len__(self):
        return N

    def __getitem__(self, row):
        return torch.full((3,), row) + torch.rand(3), torch.full((2,), row), row // 2


def pictures():
    samples = [(noise(row), f"caption {row // 2}") for row in range(N)]
    return PicturePairs(Listed(samples, "listed"), TrainTransform(8), code_points, 1)


def matrices():
    a = np.random.default_rng(0).normal(size=(N, 5)).astype(np.float32)
    return pairs_of(a, a[:, :3] * 2, np.arange(N) // 2)


@pytest.fixture(params=[pictures, lambda: Items(Rows(), 1), matrices])
def make(request):
    return request.param


def test_pairs_of_each_kind_keep_one_contract(make):
    pairs = make()
    again = pickle.loads(pickle.dumps(make()))
    assert len(pairs) == N == sum(sum(part.shard_sizes) for part in pairs.parts)
    assert pairs.fingerprint() == again.fingerprint()
    groups = pairs.groups()
    assert groups.shape == (N,)
    assert groups.dtype == np.int64
    expected = N if isinstance(pairs, Items) else N // 2
    assert len(np.unique(groups)) == expected

    rows = np.array([7, 3, 6])
    batch = pairs.batch(rows, 2)
    assert len(batch) == 3 == len(batch.ids)
    assert not batch.skipped
    assert batch.ids[0] == batch.ids[2] != batch.ids[1]
    torch.testing.assert_close(again.batch(rows, 2).parts[:2], batch.parts[:2])
    turned = pairs.batch(rows[::-1].copy(), 2)
    for side, other in zip(batch.parts[:2], turned.parts[:2], strict=True):
        assert torch.equal(side, other.flip(0))


def test_one_loader_takes_pairs_of_each_kind(make):
    batches = list(Loader(make(), 6, seed=3, drop_last=False).epoch(1))
    assert [len(batch) for batch in batches] == [6, 6, 6, 2]
    ids = torch.cat([batch.ids for batch in batches])
    expected = sorted(make().batch(np.arange(N)).ids.tolist())
    assert sorted(ids.tolist()) == expected


def test_groups_of_a_part_are_those_of_the_whole():
    samples = [(noise(row), f"caption {row % 3}") for row in range(6)]
    source = Listed(samples, "listed")
    groups = source.groups()
    assert groups[0] == groups[3]
    assert groups[2] == groups[5]
    assert len(np.unique(groups)) == 3
    part = Subset(source, np.array([0, 3, 5]), "training")
    assert len(np.unique(part.groups())) == 2
