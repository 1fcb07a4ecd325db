"""Losses of published trainings that need more than two matrices, in ``cloob.train``:
the batch gives them the rest. Each is written from its paper's formula, and trained on
small made-up data with and without what only the batch can give it.
"""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset, Sampler

import cloob
from cloob import TrainConfig
from support import read_lines

pytestmark = pytest.mark.nightly


class Views(Dataset):
    """Noisy linear views of hidden causes; every item has the named ones."""

    def __init__(self, n, seed, noise):
        draw = torch.Generator().manual_seed(seed)
        causes = torch.randn(n, 8, generator=draw)
        fixed = torch.Generator().manual_seed(0)
        self.views = {}
        for name, share in noise.items():
            side = name.removesuffix("2")
            mix = torch.randn(8, 32, generator=fixed.manual_seed(len(side)))
            rows = torch.tanh(causes @ mix / 3)
            self.views[name] = rows + share * torch.randn(n, 32, generator=draw)

    def __len__(self):
        return len(next(iter(self.views.values())))

    def __getitem__(self, index):
        return {name: rows[index] for name, rows in self.views.items()}


class Towers(nn.Module):
    """A tower a side; a second view of a side goes through its tower."""

    def __init__(self, *sides):
        super().__init__()
        torch.manual_seed(0)
        self.sides = nn.ModuleDict({side: nn.Linear(32, 16) for side in sides})

    def forward(self, batch):
        return {
            name: F.normalize(self.sides[name.removesuffix("2")](rows), dim=-1)
            for name, rows in batch.items()
            if name.removesuffix("2") in self.sides
        }


def run(out, *, pairs, held_out, towers, objective, epochs=12, batch_size=64, **parts):
    """The last line of ``epochs.jsonl``."""
    config = TrainConfig(epochs=epochs, batch_size=batch_size, lr=5e-3, workers=0)
    config = config.override(out=out, device="cpu", best=parts.pop("best", "val_loss"))
    named = {"pairs": pairs, "held_out": held_out, "towers": towers}
    result = cloob.train(config, **named, objective=objective, **parts)
    last = read_lines(result.run / "epochs.jsonl")[-1]
    print(f"{out}: val_loss {last['val_loss']:.4f}, recall {last['val_recall']:.3f}")
    return last


class Sail(nn.Module):
    """SAIL (arXiv:2412.04616): the sigmoid loss of the picture with its caption and,
    where there is one, with a second caption: the mean of both.

    −1/N Σ_i Σ_j log σ(z_ij (t⟨x_i, y_j⟩ + b)), z = 1 on the diagonal, else −1.
    """

    def __init__(self, second):
        super().__init__()
        self.second = second
        self.log_t = nn.Parameter(torch.tensor(math.log(10.0)))
        self.bias = nn.Parameter(torch.tensor(-4.0))

    def one(self, x, y):
        logits = self.log_t.exp() * x @ y.T + self.bias
        signs = 2 * torch.eye(len(x)) - 1
        return -F.logsigmoid(signs * logits).sum() / len(x)

    def forward(self, features, batch):
        first = self.one(features["image"], features["text"])
        if not self.second:
            return first
        return (first + self.one(features["image"], features["text2"])) / 2


def test_sail_with_its_third_matrix_of_captions(tmp_path):
    """A second caption, with less noise, finds more pictures by their first."""
    noise = {"image": 0.2, "text": 1.0, "text2": 0.3}
    recalls = []
    for second in (False, True):
        last = run(
            tmp_path / f"second-{second}",
            pairs=Views(256, 1, noise),
            held_out=Views(200, 2, noise),
            towers=Towers("image", "text"),
            objective=Sail(second),
            epochs=6,
            batch_size=32,
        )
        recalls.append(last["val_recall"])
    assert recalls[1] > recalls[0] + 0.01


class CyClip(nn.Module):
    """A fork of CyCLIP (arXiv:2205.14459) on InfoLOOB: between the modalities, within
    each between two views, and the two consistency terms.

    ℓ(x, y) + ℓ(y, x) with ℓ(x, y) = −1/N Σ_i (t⟨x_i, y_i⟩ − log Σ_{j≠i} exp t⟨x_i,
    y_j⟩), cyclic 1/N Σ_ij (⟨x_i, y_j⟩ − ⟨x_j, y_i⟩)², in-modal 1/N Σ_ij (⟨x_i, x_j⟩ −
    ⟨y_i, y_j⟩)², each times λ.
    """

    t = 10.0

    def __init__(self, weight):
        super().__init__()
        self.weight = weight
        self.contrast = cloob.make_objective("infoloob", inv_tau=self.t, scale="unit")

    def forward(self, features, batch):
        x, y = features["image"], features["text"]
        total = self.contrast(x, y)
        total = total + self.contrast(x, features["image2"])
        total = total + self.contrast(y, features["text2"])
        cyclic = (x @ y.T - y @ x.T).square().sum() / len(x)
        in_modal = (x @ x.T - y @ y.T).square().sum() / len(x)
        return total + self.weight * (cyclic + in_modal)


def gap(held_out):
    """Minus the mean difference of both modalities' geometry."""
    x, y = held_out.x, held_out.y
    return {"consistency": -float((x @ x.T - y @ y.T).square().mean())}


def test_cyclips_terms_within_the_modalities(tmp_path):
    """The geometry of both modalities agrees better with the terms than without."""
    noise = dict.fromkeys(("image", "text", "image2", "text2"), 0.4)
    found = []
    for weight in (0.0, 0.25):
        last = run(
            tmp_path / f"lambda-{weight}",
            pairs=Views(256, 1, noise),
            held_out=Views(200, 2, noise),
            towers=Towers("image", "text"),
            objective=CyClip(weight),
            epochs=4,
            batch_size=32,
            metrics=gap,
        )
        found.append(last["consistency"])
    print(found)
    assert found[1] > found[0]


class Relations(Dataset):
    """Word pairs of 12 relations; a row has another pair of its relation, and pairs of
    other relations as its negatives.
    """

    def __init__(self, n, seed, negatives=16):
        draw = torch.Generator().manual_seed(seed)
        kinds = torch.randn(12, 32, generator=torch.Generator().manual_seed(9))
        self.kind = torch.arange(n) % 12

        def words(kind):
            return kinds[kind] + 1.5 * torch.randn(*kind.shape, 32, generator=draw)

        self.a, self.b = words(self.kind), words(self.kind)
        others = 1 + torch.randint(11, (n, negatives), generator=draw)
        self.negatives = words((self.kind[:, None] + others) % 12)

    def __len__(self):
        return len(self.a)

    def __getitem__(self, index):
        return {
            "a": self.a[index],
            "b": self.b[index],
            "negatives": self.negatives[index],
            "id": int(self.kind[index]),
        }


class OneRelation(Sampler):
    """Batches of ten rows of one relation."""

    def __init__(self, kind):
        self.kind = kind

    def __len__(self):
        return 12 * (len(self.kind) // 120)

    def __iter__(self):
        batches = []
        for kind in range(12):
            rows = (self.kind == kind).nonzero()[:, 0]
            rows = rows[torch.randperm(len(rows))][: len(self) // 12 * 10]
            batches += rows.view(-1, 10).tolist()
        return iter([batches[i] for i in torch.randperm(len(batches)).tolist()])


class Embedding(nn.Module):
    """One tower for all pairs of words."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.tower = nn.Linear(32, 16)

    def forward(self, batch):
        names = ("a", "b", "negatives")
        return {name: F.normalize(self.tower(batch[name]), dim=-1) for name in names}


class RelBert(nn.Module):
    """RelBERT's loss (arXiv:2110.15705, ``iloob``): every two rows of the relation are
    a positive pair, against the negatives that are listed.

    1/N² Σ_i Σ_j −(⟨a_i, b_j⟩/τ − log Σ_k exp ⟨a_i, n_ik⟩/τ).
    """

    inv_tau = 5.0

    def forward(self, features, batch):
        positives = self.inv_tau * features["a"] @ features["b"].T
        negatives = self.inv_tau * torch.einsum(
            "nd,nkd->nk", features["a"], features["negatives"]
        )
        return (negatives.logsumexp(1)[:, None] - positives).mean()


def of_relation(held_out):
    """The share of nearest neighbours that have the row's relation."""
    nearest = (held_out.x @ held_out.y.T).argmax(1)
    return {"right": float((held_out.ids[nearest] == held_out.ids).double().mean())}


def test_relberts_listed_negatives_and_groups_of_positives(tmp_path):
    pairs, held_out = Relations(480, 1), Relations(240, 2)
    untrained = Embedding()(held_out.__dict__)
    ids = held_out.kind
    before = (ids[(untrained["a"] @ untrained["b"].T).argmax(1)] == ids).double().mean()
    last = run(
        tmp_path / "relbert",
        pairs=pairs,
        held_out=held_out,
        towers=Embedding(),
        objective=RelBert(),
        batch_sampler=OneRelation(pairs.kind),
        metrics=of_relation,
        epochs=6,
        batch_size=10,
        best="right",
    )
    print(f"before {before:.3f}, after {last['right']:.3f}")
    assert last["right"] > before + 0.1
