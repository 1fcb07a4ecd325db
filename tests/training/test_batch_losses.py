"""A loss that sees the batch, samplers and metrics of a caller's, in ``train``."""

import math
import random

import pytest
import torch
from own_items import (
    ByName,
    ByWeight,
    InTuples,
    Plain,
    Sides,
    TwoSides,
    Unweighted,
    Weighted,
)
from torch.utils.data import BatchSampler, Sampler, WeightedRandomSampler
from train_helpers import (
    assert_close_runs,
    assert_same_run,
    equal,
    exact,
    learned,
    on_two_ranks,
    result_of,
    told_to_end,
)

import cloob
from cloob import TrainConfig
from cloob.errors import InputError
from support import raises, read_lines


@pytest.fixture
def config(tmp_path):
    start = TrainConfig(epochs=3, batch_size=16, device="cpu", workers=0, lr=1e-2)
    start = start.override(max_bad_fraction=0.2, save_every=2, warmup=2)
    return start.override(out=tmp_path / "run")


def train(config, **changes):
    parts = {
        "pairs": ByName(),
        "held_out": ByName(20),
        "towers": Sides(),
        "objective": Weighted(),
    }
    return cloob.train(config, **parts | changes)


def load(folder):
    return cloob.load_model(folder, towers=Sides())


def test_a_loss_sees_the_batch_in_micro_batches_and_on_two_ranks(config, tmp_path):
    whole = train(config, towers=Plain()).run
    first, *_, last = read_lines(whole / "epochs.jsonl")
    assert last["loss"] < first["loss"]
    assert last["val_recall"] > 0.3
    parts = config.override(out=tmp_path / "parts", micro_batch_size=5)
    assert_close_runs(train(parts, towers=Plain()).run, whole, 1e-4)
    two = config.override(out=tmp_path / "two")
    two_parts = config.override(out=tmp_path / "two-parts", micro_batch_size=3)

    def both():
        train(two, towers=Plain())
        train(two_parts, towers=Plain())

    on_two_ranks(tmp_path / "ranks", both)
    for here in (two, two_parts):
        assert_close_runs(here.out, whole, 1e-3)
    scale = learned(whole, "loss.scale")
    assert learned(two.out, "loss.scale") == pytest.approx(scale, rel=1e-4) != 2.0


@pytest.mark.parametrize("micro", [0, 5])
def test_a_loss_that_sees_the_batch_resumes_bit_for_bit(config, tmp_path, micro):
    config = config.override(micro_batch_size=micro, resume="auto", ema=0.9)
    whole = train(config.override(out=tmp_path / "whole", workers=2)).run
    result = result_of(train, config, callbacks=[told_to_end(6)])
    assert result.stopped == "SIGTERM"
    assert_same_run(train(config).run, whole, load=load)
    last = read_lines(config.out / "epochs.jsonl")[-1]  # the average is judged, too
    assert last["ema_val_loss"] != last["val_loss"]


def test_tuples_of_any_length_reach_the_loss(config, tmp_path):
    """With equal weights it is the loss of two matrices, without weights zero."""

    def losses(name, pairs, objective):
        here = config.override(out=tmp_path / name)
        parts = {"pairs": pairs, "objective": objective, "towers": TwoSides()}
        return [line["loss"] for line in exact(train(here, held_out=None, **parts).run)]

    expected = losses("plain", InTuples(3), Unweighted())
    found = losses("even", InTuples(5, 1.0), ByWeight())
    assert found == pytest.approx(expected, rel=1e-6)
    assert set(losses("none", InTuples(5, 0.0), ByWeight())) == {0.0}


class Third(TwoSides):
    """Gives a third matrix of so many rows."""

    def __init__(self, rows=None):
        super().__init__()
        self.rows = rows

    def forward(self, a, b):
        return {"a": self.a(a), "b": self.b(b), "c": b[: self.rows]}


PARTS_THAT_DO_NOT_FIT = [
    (ByName(), TwoSides(), Weighted(), r"the names a, b, .*, but the towers take"),
    (
        ByName(),
        TwoSides(),
        Unweighted(),
        r"the names a, b, .*, but the towers take",
    ),
    (InTuples(3), Third(), Unweighted(), r"returned a, b, c; a loss of \(x, y\)"),
    (InTuples(5), Third(3), ByWeight(), "Third: returned {.*}; tensors of n rows"),
]


@pytest.mark.parametrize(
    ("pairs", "towers", "objective", "error"),
    PARTS_THAT_DO_NOT_FIT,
)
def test_what_a_loss_would_not_see_is_refused(config, pairs, towers, objective, error):
    parts = {"pairs": pairs, "towers": towers, "objective": objective}
    raises(InputError, error, train, config, held_out=None, **parts)


# Samplers


class Curriculum(Sampler):
    """Rows whose number depends on how often it was asked, as a curriculum's do."""

    def __init__(self, length=40, first=0):
        self.asked = 0
        self.length = length
        self.first = first

    def __len__(self):
        return self.length

    def __iter__(self):
        self.asked += 1
        order = self.first + torch.randperm(10 * (self.asked + 1))
        return iter((order.tolist() * 4)[:40])

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


@pytest.mark.parametrize(
    ("name", "kind", "steps"),
    [("sampler", Curriculum, 6), ("batch_sampler", Uneven, 18)],
)
def test_a_sampler_with_a_state_resumes_bit_for_bit_and_divides_over_ranks(
    config, tmp_path, name, kind, steps
):
    config = config.override(resume="auto", keep=1)

    def run(out, towers=Sides, **more):
        return train(
            config.override(out=tmp_path / out),
            towers=towers(),
            **{name: kind()},
            **more,
        )

    whole = run("whole")
    assert whole.steps == steps
    for stop_at in (3, 5):
        result_of(run, "run", callbacks=[told_to_end(stop_at)])
    assert_same_run(run("run").run, whole.run, load=load)

    on_two_ranks(tmp_path / "ranks", lambda: run("two", Plain))
    assert_close_runs(tmp_path / "two", run("alone", Plain).run, 1e-3)


def test_torchs_samplers_choose_the_rows(config, tmp_path):
    """Rows of weight 0 are never read, and a batch is of one half."""
    rows = set()

    class Reads(ByName):
        def __getitem__(self, index):
            rows.add(index)
            return super().__getitem__(index)

    weights = [float(i < 30 and i % 10 != 7) for i in range(80)]
    sampler = WeightedRandomSampler(weights, 48)
    result = train(config, pairs=Reads(), sampler=sampler)
    assert result.steps == 9
    assert max(rows) < 30
    again = train(config.override(out=tmp_path / "again"), sampler=sampler)
    assert exact(again.run) == exact(result.run)  # draws depend on the seed alone
    halves = BatchSampler(range(32), 16, drop_last=False)
    other = train(config.override(out=tmp_path / "halves"), batch_sampler=halves)
    assert [line["samples_seen"] for line in exact(other.run)][:2] == [15, 29]


DEMO = {"pairs": cloob.open_source("demo"), "sampler": Curriculum()}
BOTH = {"sampler": Curriculum(), "batch_sampler": Uneven()}
UNEVEN = {"batch_sampler": Uneven()}


WRONG_SAMPLERS = [
    ({"sampler": Curriculum(41)}, 16, "gave 40 in an epoch, its length is 41"),
    ({"sampler": Curriculum(first=80)}, 16, "Curriculum: gave row 8. of 80 pairs"),
    ({"sampler": iter([])}, 16, "has no length; a sampler needs __len__"),
    (BOTH, 16, "sampler= and batch_sampler= exclude each other"),
    (UNEVEN, 8, "gave a batch of 16 pairs"),
    (UNEVEN, 0, "needs batch_size, the size"),
    (DEMO, 16, "a sampler orders the rows of a Dataset"),
]


@pytest.mark.parametrize(
    ("parts", "size", "error"),
    WRONG_SAMPLERS,
)
def test_a_sampler_that_cannot_be_used_is_one_line(config, parts, size, error):
    raises(InputError, error, train, config.override(batch_size=size), **parts)


# Metrics


def test_best_and_patience_go_by_a_metric_of_the_callers(config, tmp_path):
    asked = []

    def best_at_the_second(held_out):
        assert not held_out.towers.training
        assert not torch.is_grad_enabled()
        assert held_out.x.shape == held_out.y.shape == (18, 16)
        assert len(held_out.ids.unique()) == 5
        asked.append((torch.rand(1), random.random()))
        return {"up": -abs(len(asked) - 2), "nan": math.nan}

    config = config.override(epochs=9, best="up", patience=2, save_every=0)
    config = config.override(schedule="constant")
    result = train(config, metrics=best_at_the_second)
    assert result.out_of_patience
    assert result.epochs == 4
    epochs = read_lines(result.run / "epochs.jsonl")
    expected = [-1, 0, -1, -2]
    assert [line["up"] for line in epochs] == expected
    assert epochs[0]["nan"] is None
    best = load(f"{result.run}:best").state_dict()
    assert equal(best, load(result.run / "checkpoints" / "step-00000010").state_dict())
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
    raises(InputError, error, train, config.override(best=best), metrics=metrics)
