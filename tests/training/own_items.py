"""Pairs, towers and losses of a caller's, for the tests that hand them to ``train``."""

import importlib.util
import random
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset

import cloob

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_parts.py"
spec = importlib.util.spec_from_file_location("own_parts", EXAMPLE)
own = importlib.util.module_from_spec(spec)
spec.loader.exec_module(own)


class Named(Dataset[Any]):
    """80 items as dictionaries, four of an id; items 7, 17, … cannot be read.

    Draws from all three generators.
    """

    def __init__(self, n=80, width=20):
        self.views = own.Views(n, 3)
        self.width = width

    def __len__(self):
        return len(self.views)

    def __getitem__(self, index):
        if index % 10 == 7:
            raise KeyError(f"no graph {index}")
        a, b = self.views[index]
        return {"x": a[: self.width] + random.random() / 9}, b, f"id {index // 4}"


class Collated(Named):
    def collate_fn(self, items):
        a, b, ids = zip(*items, strict=True)
        rows = torch.stack([one["x"] for one in a])
        return {"x": rows}, torch.stack(b), cloob.ids(ids)


class DictTowers(own.Towers):
    def forward(self, a, b):
        return super().forward(a["x"], b)


class Learned(nn.Module):
    """A loss with a parameter, which masks by ids."""

    def __init__(self):
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x, y, ids=None):
        assert len(x) == len(y) == len(ids)
        assert x.dtype == torch.float32
        assert torch.allclose(x.norm(dim=1), torch.ones(len(x)))
        same = (ids[:, None] == ids) & ~torch.eye(len(x)).bool()
        logits = (x @ y.T * self.log_scale.exp()).masked_fill(same, -1e9)
        return F.cross_entropy(logits, torch.arange(len(x))) + 0.01 * self.log_scale


class ByName(Dataset):
    """The items of Named as mappings: two sides, further captions of b, a weight, a
    flag and a text.
    """

    def __init__(self, n=80):
        self.inner = Named(n)

    def __len__(self):
        return len(self.inner)

    def __getitem__(self, index):
        a, b, name = self.inner[index]
        return {
            "a": a["x"],
            "b": b,
            "more": torch.stack([b + 0.1 * k for k in range(3)]),
            "weight": 1.0 + index % 3,
            "flag": torch.tensor(index % 2 == 0),
            "kind": "even" if index % 2 == 0 else "odd",
            "id": name,
        }


class InTuples(ByName):
    """The same as a tuple of so many."""

    def __init__(self, parts, weight=None):
        super().__init__()
        self.parts = parts
        self.weight = weight

    def __getitem__(self, index):
        item = super().__getitem__(index)
        weight = item["weight"] if self.weight is None else self.weight
        return (item["a"], item["b"], item["id"], weight, item["more"])[: self.parts]


class TwoSides(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Linear(20, 16)
        self.b = nn.Linear(20, 16)

    def forward(self, a, b):
        return self.a(a), self.b(b)


class Plain(TwoSides):
    """Rows by name, with (n, 3, D) rows of further captions and (n, 2) integers."""

    def forward(self, batch):
        return {
            "a": self.a(batch["a"]),
            "b": self.b(batch["b"]),
            "more": self.b(batch["more"]),
            "halves": (batch["a"][:, :2] > 0).long(),
        }


class Sides(Plain):
    """The same with dropout and a norm, which depend on the micro-batch."""

    def __init__(self):
        super().__init__()
        self.b = nn.Sequential(nn.Dropout(0.1), self.b)
        self.norm = nn.BatchNorm1d(16)

    def forward(self, batch):
        features = super().forward(batch)
        return features | {"b": self.norm(features["b"])}


class Weighted(nn.Module):
    """Uses every part: weights, flags, texts, further captions; has a parameter."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, features, batch):
        x = F.normalize(features["a"], dim=1)
        y = F.normalize(features["b"], dim=1)
        more = F.normalize(features["more"].mean(1), dim=1)
        rows = len(x)
        assert features["more"].shape == (rows, 3, 16)
        assert features["halves"].shape == (rows, 2)
        assert len(batch["weight"]) == rows
        even = [kind == "even" for kind in batch["kind"]]
        assert batch["flag"].tolist() == even
        assert set(batch) >= {"a", "id"}
        logits = self.scale.exp() * (x @ y.T + 0.5 * x @ more.T)
        losses = F.cross_entropy(logits, torch.arange(rows), reduction="none")
        weights = batch["weight"].float() * torch.where(batch["flag"], 1.0, 0.5)
        return (weights * losses).sum() / weights.sum()


class ByWeight(nn.Module):
    """Of two unit matrices and the weights of pairs."""

    def forward(self, features, batch):
        assert list(features) == ["x", "y"]
        assert len(batch) == 5
        logits = 10 * features["x"] @ features["y"].T
        losses = F.cross_entropy(logits, torch.arange(len(logits)), reduction="none")
        return (batch[3] * losses).mean()


class Unweighted(nn.Module):
    def forward(self, x, y):
        return F.cross_entropy(10 * x @ y.T, torch.arange(len(x)))
