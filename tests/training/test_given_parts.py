"""Parts of a caller's own in ``train``: pairs in memory, towers, a loss, an optimiser;
alone, together, over ranks.
"""

import copy
import os
import random
import runpy
import signal
import sys
from functools import partial

import pytest
import torch
from own_items import EXAMPLE, Collated, DictTowers, Learned, Named, own
from torch import nn
from torch.utils.data import Dataset, Subset, random_split
from train_helpers import (
    Recorder,
    assert_close_runs,
    assert_same_run,
    exact,
    learned,
    on_two_ranks,
    result_of,
    told_to_end,
)

import cloob
from cloob import TrainConfig
from cloob.errors import InputError
from cloob.models.runs import latest_checkpoint
from support import fork, raises, read_json, read_lines


class BlindTowers(DictTowers):
    """Towers that see nothing in held-out pairs."""

    def forward(self, a, b):
        x, y = super().forward(a, b)
        return x if self.training else x * torch.nan, y


class Counting(torch.optim.Adafactor):
    """Keeps a count beside its options, as schedule-free optimisers do, and statistics
    of other shapes than weights.
    """

    def step(self, closure=None):
        for group in self.param_groups:
            group["k"] = group.get("k", 0) + 1
            group["lr"] /= group["k"] ** 0.1
        return super().step(closure)


@pytest.fixture
def config(tmp_path):
    start = TrainConfig(epochs=3, batch_size=16, device="cpu", workers=0, ema=0.9)
    start = start.override(max_bad_fraction=0.2, save_every=2, warmup=2, lr=1e-2)
    return start.override(out=tmp_path / "run", resume="auto")


def train(config, **changes):
    """With fresh towers and a fresh loss; a given optimiser has a rate of its own."""
    parts = {
        "pairs": Named(),
        "held_out": Named(20),
        "towers": DictTowers(),
        "objective": Learned(),
    }
    if "optimizer" in changes:
        config = config.override(lr=TrainConfig().lr)
    return cloob.train(config, **parts | changes)


def test_the_example_killed_at_any_step_ends_with_the_same_bits(tmp_path):
    def script(out):
        def action():
            sys.argv = [str(EXAMPLE), str(out)]
            runpy.run_path(str(EXAMPLE), run_name="__main__")

        return fork(tmp_path / f"{out.name}-output", 1, action)

    whole = tmp_path / "whole"
    run = tmp_path / "run"
    assert script(whole).wait() == [0]
    log = run / "metrics.jsonl"
    step = random.Random("own parts").randrange(10, 80)
    ranks = script(run)
    ranks.until(lambda: log.is_file() and log.read_text().count("\n") >= step)
    os.kill(ranks.pids[0], signal.SIGKILL)
    assert ranks.wait() == [-signal.SIGKILL]
    assert len(read_lines(log)) < 90
    assert script(run).wait() == [0]
    assert_same_run(run, whole, load=partial(cloob.load_model, towers=own.Towers()))
    given = read_json(run / "config.json")
    names = ["Views", "Views", "Towers", "Margin", "Muon", None, None, None]
    assert [given[name] for name in given if name.startswith("given_")] == names
    assert read_lines(log)[9]["lr"] == pytest.approx(0.02)
    assert read_lines(run / "epochs.jsonl")[-1]["val_recall"] > 0.9


def test_held_out_rows_that_are_not_finite_have_no_loss(config, caplog):
    config = config.override(epochs=1, ema=None)
    run = train(config, towers=BlindTowers(), objective=None).run
    (epoch,) = read_lines(run / "epochs.jsonl")
    assert epoch["val_loss"] is None
    assert epoch["val_recall"] == 0
    assert "held-out pairs have no loss" in caplog.text


def test_items_are_collated_named_and_drawn_alike_by_workers_and_in_micro_batches(
    config, tmp_path
):
    """Torch's collation, the Dataset's own, two workers, and gradient caching: one and
    the same run.
    """
    recorder = Recorder()
    run = train(config, callbacks=[recorder]).run
    log = read_lines(run / "skipped.jsonl")
    of_first_epoch = [line for line in log if line["epoch"] == 1]
    bad = [line["key"] for line in of_first_epoch if not line.get("held_out")]
    expected = sorted(map(str, range(7, 80, 10)))
    assert sorted(bad) == expected
    held_out = [line["key"] for line in log if line.get("held_out")]
    assert sorted(held_out) == ["17", "7"]  # once, not in each epoch
    assert log[0]["reason"] == "item raised an error"
    assert log[0]["detail"].startswith("KeyError: 'no graph ")
    first, *_, last = read_lines(run / "epochs.jsonl")
    assert first["skipped"] == {"item raised an error": 8}
    assert first["val_skipped"] == {"item raised an error": 2}
    assert last["val_recall"] > 0.5
    assert last["loss"] < first["loss"]
    info = recorder.of("start")[0]
    assert type(info.encoder) is DictTowers
    assert type(info.objective) is Learned

    collated = config.override(out=tmp_path / "collated", workers=2)
    assert exact(train(collated, pairs=Collated()).run) == exact(run)
    cached = train(config.override(out=tmp_path / "cached", micro_batch_size=5))
    assert_close_runs(cached.run, run, 1e-4)


def test_two_ranks_are_one_process(config, tmp_path):
    """Also where a bad item leaves them unequal parts, and for the loss's own
    parameter.
    """
    two = config.override(out=tmp_path / "two")
    on_two_ranks(tmp_path / "ranks", lambda: train(two))
    run = train(config).run
    assert_close_runs(two.out, run, 1e-3)
    scales = [learned(each, "loss.log_scale") for each in (two.out, run)]
    assert scales[0] == pytest.approx(scales[1], rel=1e-4)
    assert scales[0] != 2.0


def test_towers_in_float64_are_trained_in_float64(config):
    seen = set()

    class Doubled(DictTowers):
        def forward(self, a, b):
            return super().forward({"x": a["x"].double()}, b.double())

    class Seen(nn.Module):
        def forward(self, x, y):
            seen.update({x.dtype, y.dtype})
            length = x.norm(dim=1)
            assert torch.allclose(length, torch.ones_like(length), rtol=0, atol=1e-12)
            return -(x * y).sum(1).mean()

    config = config.override(epochs=1, ema=None)
    train(config, towers=Doubled().double(), objective=Seen())
    assert seen == {torch.float64}


MATRICES_AND_REST = [
    (lambda name, p: p.ndim == 2 and name != "b.weight", torch.optim.Muon),
    (lambda name, p: True, partial(torch.optim.AdamW, lr=0.05, fused=True)),
]


@pytest.mark.parametrize("make", [partial(Counting, lr=0.05), MATRICES_AND_REST])
def test_what_an_optimiser_keeps_is_resumed(config, tmp_path, make):
    """Counters beside its options, statistics that have not the shape of their weights,
    and several optimisers, each for the parameters that its predicate takes.
    """
    whole = train(config.override(out=tmp_path / "whole"), optimizer=make).run
    stopped = result_of(train, config, optimizer=make, callbacks=[told_to_end(6)])
    assert stopped.stopped == "SIGTERM"
    run = train(config, optimizer=make).run
    state = torch.load(latest_checkpoint(run) / "trainer.pt", weights_only=True)
    if make is MATRICES_AND_REST:
        kept = [{*each} for each in state["optimizer"]["state"].values()]
        adam = {"step", "exp_avg", "exp_avg_sq"}
        assert kept == [{"momentum_buffer"}, adam, adam]

    def load(folder):
        return copy.deepcopy(cloob.load_model(folder, towers=DictTowers()))

    assert_same_run(run, whole, load=load)


def test_other_parts_than_before_are_one_line(config):
    run = train(config.override(epochs=1)).run

    class Wide(nn.Linear):
        """Another class."""

    wide = DictTowers()
    wide.b = Wide(20, 8, bias=False)
    other_pairs = "the training pairs are not those of .*"
    for name, part, error in (
        ("towers", own.Towers(), "given_towers = 'DictTowers', not 'Towers'; resume"),
        ("towers", wide, "was trained with other parameters, or is damaged"),
        ("objective", own.Margin(), "given_objective = 'Learned', not 'Margin'"),
        ("optimizer", torch.optim.SGD, "given_optimizer = None, not 'SGD'"),
        ("pairs", own.Views(80, 3), "given_pairs = 'Named', not 'Views'"),
        ("pairs", Named(96), other_pairs + "80 pairs before, 96 now"),
    ):
        raises(InputError, error, train, config, **{name: part})
    again = TrainConfig().merge_file(run / "config.json")
    again = again.override(resume="auto", epochs=2)
    error = r"has pairs of the class 'Named', .*give them to cloob.train\("
    raises(InputError, error, cloob.train, again)
    assert train(again).epochs == 2
    for source, towers, error in (
        (run, None, r"DictTowers, to which its weights belong, .*towers=module"),
        (run, wide, "does not fit DictTowers"),
        ("RN50", wide, "RN50: holds no weights of a module"),
    ):
        parts = {} if towers is None else {"towers": towers}
        raises(InputError, error, cloob.load_model, source, **parts)


class Pictures(nn.Module):
    """Towers for images and captions as cloob reads them: uint8 pixels, tokens."""

    def __init__(self):
        super().__init__()
        self.image = nn.Linear(3 * 32 * 32, 8)
        self.text = nn.EmbeddingBag(49408, 8)

    def forward(self, images, tokens):
        return self.image(images.flatten(1) / 255), self.text(tokens)


class OneSide(nn.Linear):
    """Gives rows of one side alone."""

    def forward(self, images, tokens):
        return images.flatten(1).float()


class Encoded(Dataset):
    """Pixels and tokens, as a model of cloob's takes them."""

    def __len__(self):
        return 24

    def __getitem__(self, index):
        pixels = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)
        return pixels, torch.randint(1, 400, (8,))


@pytest.fixture
def small(base, pairs_folder, tmp_path):
    start = base.override(epochs=1, save_every=0, model="nano-vit", image_size=32)
    return start.override(lr=1e-3, val_data=[str(pairs_folder)], out=tmp_path / "run")


def test_each_part_alone(small, pairs_folder, tmp_path):
    given = {
        "towers": Pictures(),
        "pairs": Encoded(),
        "held_out": cloob.open_source(pairs_folder),
        "objective": Learned(),
        "optimizer": torch.optim.SGD,
    }
    for name, part in given.items():
        result = cloob.train(small.override(out=tmp_path / name), **{name: part})
        assert result.steps == (3 if name == "pairs" else 5)
        assert read_lines(result.run / "epochs.jsonl")[0]["val_recall"] is not None
    unknown = cloob.load_model(tmp_path / "objective")  # a loss that no member computes
    raises(InputError, "does not say what it was trained with", unknown.make_objective)
    clip = cloob.train(small, objective=cloob.make_objective("clip")).run
    assert cloob.load_model(clip).make_objective().name == "clip"


ONE_SIDE = r"OneSide: returned \[.*\]; two tensors \(n, D\) of the same n and D are ex"


PARTS_THAT_DO_NOT_FIT = [
    ({"freeze": "image"}, {"towers": Pictures()}, "freeze is 'image'; .*towers="),
    ({"val_split": 0.1}, {"pairs": Encoded()}, "is a Dataset; split it yourself"),
    ({}, {"pairs": iter([])}, "has no length"),
    ({}, {"optimizer": lambda groups: None}, "optimizer: returned NoneType"),
    ({}, {"towers": OneSide(1, 1)}, ONE_SIDE),
]


@pytest.mark.parametrize(
    ("settings", "parts", "error"),
    PARTS_THAT_DO_NOT_FIT,
)
def test_a_part_that_does_not_fit_is_one_line(small, settings, parts, error):
    raises(InputError, error, cloob.train, small.override(**settings), **parts)


class Parted(Named):
    """Named items with an id of another kind, or with more parts."""

    def __init__(self, *part):
        super().__init__()
        self.part = part

    def __getitem__(self, index):
        a, b, _ = super().__getitem__(index)
        return a, b, *self.part


def half(groups):
    """An optimiser that holds a part of the parameters."""
    return torch.optim.SGD(groups[:1], lr=0.1)


FOUR_PARTS = r"an item has 4 parts; \(a, b\) or \(a, b, id\) is expected"
FROZEN = {"towers": DictTowers().requires_grad_(False), "objective": own.Margin()}


WHAT_THE_LOOP_CANNOT_USE = [
    ({"pairs": Parted(0.5)}, "Parted: ids are torch.float64; integers or texts"),
    ({"pairs": Parted(1, 1.0)}, FOUR_PARTS),
    ({"optimizer": torch.optim.LBFGS}, "LBFGS doesn't support per-parameter opt"),
    ({"optimizer": half}, "does not hold 1 of the 3 parameters that learn"),
    ({"optimizer": torch.optim.Muon}, "optimizer: Muon only supports 2D"),
    (FROZEN, "nothing learns: no parameter of the towers or the loss"),
]


@pytest.mark.parametrize(
    ("parts", "error"),
    WHAT_THE_LOOP_CANNOT_USE,
)
def test_what_the_loop_cannot_use_is_one_line(config, parts, error):
    raises(InputError, error, train, config, **parts)


def test_a_given_member_masks_duplicates_where_the_named_one_does(config, tmp_path):
    """Four items have one id."""
    runs = {}
    for masks in (False, True):
        here = config.override(mask_duplicates=masks, steps=3)
        for kind in ("given", "named"):
            objective = cloob.ContrastiveObjective.cloob() if kind == "given" else None
            out = tmp_path / f"{kind}-{masks}"
            runs[kind, masks] = train(here.override(out=out), objective=objective).run
    assert exact(runs["given", False]) == exact(runs["named", False])
    assert exact(runs["given", True]) == exact(runs["named", True])
    assert exact(runs["given", True]) != exact(runs["given", False])


def test_a_part_of_a_dataset_is_collated_as_the_dataset(config, tmp_path):
    part, _ = random_split(Collated(), [64, 16])
    subset = Subset(Subset(Named(), part.indices), range(64))
    first = train(config.override(out=tmp_path / "0", steps=2), pairs=part).run
    second = train(config.override(out=tmp_path / "1", steps=2), pairs=subset).run
    assert exact(first) == exact(second)
