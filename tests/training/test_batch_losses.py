"""A loss that sees the batch, samplers and metrics of a caller's, in ``train``."""

import math
import random
import signal
from functools import partial

import pytest
import torch
from test_given_parts import Named
from torch import nn
from torch.nn import functional as F
from torch.utils.data import BatchSampler, Dataset, Sampler, WeightedRandomSampler
from train_helpers import At, assert_same_run, exact, lines, result_of

import cloob
from cloob import TrainConfig
from cloob.errors import InputError
from cloob.models.runs import latest_checkpoint
from support import fork, raises


class ByName(Dataset):
    """80 mappings: two sides, further captions of b, a weight, a flag and a text; items
    7, 17, … cannot be read.
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


class Sides(nn.Module):
    """Rows by name, with (n, 3, D) rows of further captions and (n, 2) integers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(20, 16), nn.Linear(20, 16)
        self.dropout = nn.Dropout(0.1)
        self.norm = nn.BatchNorm1d(16)

    def forward(self, batch):
        return {
            "a": self.a(batch["a"]),
            "b": self.norm(self.b(self.dropout(batch["b"]))),
            "more": self.b(batch["more"]),
            "halves": (batch["a"][:, :2] > 0).long(),
        }


class Plain(Sides):
    """The same without what depends on the micro-batch."""

    def __init__(self):
        super().__init__()
        self.dropout, self.norm = nn.Identity(), nn.Identity()


class Weighted(nn.Module):
    """Uses every part: weights, flags, texts, further captions; has a parameter."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, features, batch):
        x, y = F.normalize(features["a"], dim=1), F.normalize(features["b"], dim=1)
        more = F.normalize(features["more"].mean(1), dim=1)
        rows = len(x)
        assert features["more"].shape == (rows, 3, 16)
        assert features["halves"].shape == (rows, 2) and len(batch["weight"]) == rows
        even = [kind == "even" for kind in batch["kind"]]
        assert batch["flag"].tolist() == even and set(batch) >= {"a", "id"}
        logits = self.scale.exp() * (x @ y.T + 0.5 * x @ more.T)
        losses = F.cross_entropy(logits, torch.arange(rows), reduction="none")
        weights = batch["weight"].float() * torch.where(batch["flag"], 1.0, 0.5)
        return (weights * losses).sum() / weights.sum()


@pytest.fixture
def config(tmp_path):
    start = TrainConfig().override(
        epochs=3, batch_size=16, device="cpu", workers=0, max_bad_fraction=0.2
    )
    return start.override(
        out=tmp_path / "run", tensorboard=False, save_every=2, warmup=2, lr=1e-2
    )


def train(config, **changes):
    parts = {
        "pairs": ByName(),
        "held_out": ByName(20),
        "towers": Sides(),
        "objective": Weighted(),
    } | changes
    return cloob.train(config, **parts)


def close(run, other, tolerance):
    for here, there in zip(exact(run), exact(other), strict=True):
        assert (here["loss"], here["grad_norm"]) == pytest.approx(
            (there["loss"], there["grad_norm"]), rel=tolerance
        )
        assert here["samples_seen"] == there["samples_seen"]


def test_a_loss_sees_the_batch_in_micro_batches_and_on_two_ranks(config, tmp_path):
    whole = train(config, towers=Plain()).run
    steps = lines(whole / "epochs.jsonl")
    assert steps[-1]["loss"] < steps[0]["loss"] and steps[-1]["val_recall"] > 0.3
    parts = config.override(out=tmp_path / "parts", micro_batch_size=5)
    close(train(parts, towers=Plain()).run, whole, 1e-4)
    for name, size in (("two", 0), ("two-parts", 3)):
        here = config.override(out=tmp_path / name, micro_batch_size=size)
        ranks = fork(
            tmp_path / f"{name}-ranks",
            2,
            lambda: train(here, towers=Plain()) and None,  # noqa: B023
        )
        assert ranks.wait() == [0, 0], ranks.told()
        close(here.out, whole, 1e-3)
    scales = [
        torch.load(latest_checkpoint(run) / "trainer.pt", weights_only=True)
        for run in (whole, tmp_path / "two")
    ]
    first, second = (state["objective"]["loss.scale"].item() for state in scales)
    assert first == pytest.approx(second, rel=1e-4) and first != 2.0


@pytest.mark.parametrize("micro", [0, 5])
def test_a_loss_that_sees_the_batch_resumes_bit_for_bit(config, tmp_path, micro):
    config = config.override(micro_batch_size=micro, resume="auto", ema=0.9)
    train(config.override(out=tmp_path / "whole", workers=2))
    stop = At(6, lambda: signal.raise_signal(signal.SIGTERM))
    assert result_of(train, config, callbacks=[stop]).stopped == "SIGTERM"
    train(config)
    assert_same_run(
        tmp_path / "run",
        tmp_path / "whole",
        load=lambda folder: cloob.load_model(folder, towers=Sides()),
    )
    last = lines(config.out / "epochs.jsonl")[-1]  # the average is judged, too
    assert last["ema_val_loss"] != last["val_loss"]


class Longer(ByName):
    """The same as a tuple of five."""

    def __getitem__(self, index):
        item = super().__getitem__(index)
        return item["a"], item["b"], item["id"], item["weight"], item["more"]


class TwoSides(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(20, 16), nn.Linear(20, 16)

    def forward(self, a, b):
        return self.a(a), self.b(b)


class ByWeight(nn.Module):
    """Of two unit matrices and the weights of pairs."""

    def forward(self, features, batch):
        assert list(features) == ["x", "y"] and len(batch) == 5
        logits = 10 * features["x"] @ features["y"].T
        losses = F.cross_entropy(logits, torch.arange(len(logits)), reduction="none")
        return (batch[3] * losses).mean()


class Unweighted(nn.Module):
    def forward(self, x, y):
        return F.cross_entropy(10 * x @ y.T, torch.arange(len(x)))


def test_tuples_of_any_length_reach_the_loss(config, tmp_path):
    """With equal weights it is the loss of two matrices, without weights zero."""

    class Even(Longer):
        def __init__(self, weight):
            super().__init__()
            self.weight = weight

        def __getitem__(self, index):
            a, b, name, _, more = super().__getitem__(index)
            return a, b, name, self.weight, more

    parts = {"held_out": None, "towers": TwoSides()}
    two_matrices = train(
        config.override(out=tmp_path / "plain"),
        **{**parts, "pairs": Pair(), "objective": Unweighted(), "towers": TwoSides()},
    )
    for weight in (1.0, 0.0):
        run = train(
            config.override(out=tmp_path / str(weight)),
            **{
                **parts,
                "pairs": Even(weight),
                "objective": ByWeight(),
                "towers": TwoSides(),
            },
        ).run
        losses = [line["loss"] for line in exact(run)]
        if weight:
            expected = [line["loss"] for line in exact(two_matrices.run)]
            assert losses == pytest.approx(expected, rel=1e-6)
        else:
            assert set(losses) == {0.0}


class Pair(Longer):
    def __getitem__(self, index):
        return super().__getitem__(index)[:3]


class Third(TwoSides):
    def forward(self, a, b):
        return {"a": self.a(a), "b": self.b(b), "c": b}


class Ragged(TwoSides):
    def forward(self, a, b):
        return {"a": self.a(a), "b": self.b(b), "c": b[:3]}


@pytest.mark.parametrize(
    ("parts", "error"),
    [
        (
            {"towers": TwoSides()},
            r"items have the names a, b, .*, but the towers take \(a, b\)",
        ),
        (
            {"towers": TwoSides(), "objective": Unweighted()},
            "ByName: an item has the names a, b, more, weight, flag, kind, id",
        ),
        (
            {"towers": Third(), "objective": Unweighted(), "pairs": Pair()},
            r"the towers returned a, b, c; a loss of \(x, y\) takes two",
        ),
        (
            {"towers": Ragged(), "objective": ByWeight(), "pairs": Longer()},
            "Ragged: returned {.*}; tensors of n rows are expected",
        ),
    ],
)
def test_what_a_loss_would_not_see_is_refused(config, parts, error):
    raises(InputError, error, train, config, **{"held_out": None, **parts})


# Samplers


class Curriculum(Sampler):
    """Rows whose number depends on how often it was asked, as a curriculum's do."""

    def __init__(self):
        self.asked = 0

    def __len__(self):
        return 40

    def __iter__(self):
        self.asked += 1
        order = torch.randperm(10 * (self.asked + 1)).tolist()
        return iter((order * 4)[:40])

    def state_dict(self):
        return {"asked": self.asked}

    def load_state_dict(self, state):
        self.asked = state["asked"]


class Uneven(Curriculum):
    """Batches of 9 to 16 rows."""

    def __len__(self):
        return 6

    def __iter__(self):
        self.asked += 1
        for size in (16, 10, 12, 9, 16, 11):
            yield random.sample(range(80), size)


@pytest.mark.parametrize("kind", [Curriculum, Uneven])
def test_a_sampler_with_a_state_resumes_bit_for_bit_and_divides_over_ranks(
    config, tmp_path, kind
):
    name = "batch_sampler" if kind is Uneven else "sampler"
    config = config.override(resume="auto", keep=1)
    whole = train(config.override(out=tmp_path / "whole"), **{name: kind()}).run
    seen = [line["samples_seen"] for line in exact(whole)]
    assert len(seen) == (18 if kind is Uneven else 6)
    for stop_at in (3, 5):
        stop = At(stop_at, lambda: signal.raise_signal(signal.SIGTERM))
        result_of(train, config, callbacks=[stop], **{name: kind()})
    train(config, **{name: kind()})
    assert_same_run(
        tmp_path / "run",
        whole,
        load=lambda folder: cloob.load_model(folder, towers=Sides()),
    )

    def plain(out):
        return train(config.override(out=out), towers=Plain(), **{name: kind()}).run

    alone = plain(tmp_path / "alone")
    ranks = fork(tmp_path / "ranks", 2, lambda: plain(tmp_path / "two") and None)
    assert ranks.wait() == [0, 0], ranks.told()
    close(tmp_path / "two", alone, 1e-3)


def test_torchs_samplers_choose_the_rows(config, tmp_path):
    """Rows of weight 0 are never read, and a batch is of one half."""

    class Reads(ByName):
        rows: set[int] = set()  # noqa: RUF012

        def __getitem__(self, index):
            self.rows.add(index)
            return super().__getitem__(index)

    weights = [float(i < 30 and i % 10 != 7) for i in range(80)]
    sampler = WeightedRandomSampler(weights, 48)
    result = train(config, pairs=Reads(), sampler=sampler)
    assert result.steps == 9 and max(Reads.rows) < 30
    again = train(config.override(out=tmp_path / "again"), sampler=sampler)
    assert exact(again.run) == exact(result.run)  # draws depend on the seed alone
    halves = BatchSampler(range(32), 16, drop_last=False)
    other = train(config.override(out=tmp_path / "halves"), batch_sampler=halves)
    assert [line["samples_seen"] for line in exact(other.run)][:2] == [15, 29]


class TooFew(Curriculum):
    def __len__(self):
        return 41


class Outside(Curriculum):
    def __iter__(self):
        return iter(range(50, 90))


@pytest.mark.parametrize(
    ("parts", "error"),
    [
        ({"sampler": TooFew()}, "TooFew: gave 40 in an epoch, its length is 41"),
        ({"sampler": Outside()}, "Outside: gave row 80 of 80 pairs"),
        ({"sampler": iter([])}, "has no length; a sampler needs __len__"),
        (
            {"sampler": Curriculum(), "batch_sampler": Uneven()},
            "sampler= and batch_sampler= exclude each other",
        ),
        ({"batch_sampler": Uneven(), "batch_size": 8}, "gave a batch of 16 pairs"),
        ({"batch_sampler": Uneven(), "batch_size": 0}, "needs batch_size, the size"),
        (
            {"pairs": cloob.open_source("demo"), "sampler": Curriculum()},
            "a sampler orders the rows of a Dataset",
        ),
    ],
)
def test_a_sampler_that_cannot_be_used_is_one_line(config, parts, error):
    size = parts.pop("batch_size", 16)
    raises(InputError, error, train, config.override(batch_size=size), **parts)


# Metrics


def of_step(held_out):
    """Best at the second validation of four."""
    assert not held_out.towers.training and not torch.is_grad_enabled()
    assert held_out.x.shape == held_out.y.shape == (18, 16)
    assert len(held_out.ids.unique()) == 5
    of_step.asked += 1
    torch.rand(1), random.random()
    return {"up": -abs(of_step.asked - 2), "nan": math.nan}


def test_best_and_patience_go_by_a_metric_of_the_callers(config, tmp_path):
    of_step.asked = 0
    config = config.override(epochs=9, best="up", patience=2, save_every=0)
    config = config.override(schedule="constant")
    result = train(config, metrics=of_step)
    assert result.out_of_patience and result.epochs == 4
    found = [line["up"] for line in lines(result.run / "epochs.jsonl")]
    assert found == [-1, 0, -1, -2]
    assert lines(result.run / "epochs.jsonl")[0]["nan"] is None
    best = cloob.load_model(f"{result.run}:best", towers=Sides()).state_dict()
    second = result.run / "checkpoints" / "step-00000010"
    expected = cloob.load_model(second, towers=Sides()).state_dict()
    assert all(torch.equal(best[name], value) for name, value in expected.items())
    usual = train(config.override(out=tmp_path / "usual", best="val_loss", patience=0))
    count = len(exact(result.run))
    assert exact(usual.run)[:count] == exact(result.run)  # its draws move nothing


@pytest.mark.parametrize(
    ("best", "metrics", "error"),
    [
        ("mrr", None, "best is 'mrr'; it must be one of val_loss, val_recall, or a"),
        ("mrr", lambda _: {"up": 1.0}, "best is 'mrr', but metrics= gives up"),
        ("up", lambda _: {"up": 1.0, "loss": 2}, "'loss' is a name of cloob's own"),
    ],
)
def test_a_metric_that_is_not_there_is_one_line(config, best, metrics, error):
    here = config.override(best=best)
    raises(InputError, error, partial(train, here, metrics=metrics))
