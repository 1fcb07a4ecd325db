"""Parts of a caller's own in ``train``: pairs in memory, towers, a loss, an optimiser;
alone, together, over ranks.
"""

import copy
import importlib.util
import json
import os
import random
import runpy
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset
from train_helpers import At, Recorder, assert_same_run, exact, lines, result_of

import cloob
from cloob import TrainConfig
from cloob.errors import InputError
from cloob.models.runs import latest_checkpoint
from support import fork, raises

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
        return (
            {"x": torch.stack([one["x"] for one in a])},
            torch.stack(b),
            cloob.ids(ids),
        )


class DictTowers(own.Towers):
    def forward(self, a, b):
        return super().forward(a["x"], b)


class BlindTowers(DictTowers):
    """Towers that see nothing in held-out pairs."""

    def forward(self, a, b):
        x, y = super().forward(a, b)
        return x if self.training else x * torch.nan, y


class Learned(nn.Module):
    """A loss with a parameter, which masks by ids."""

    def __init__(self):
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x, y, ids=None):
        assert ids is not None and len(x) == len(y) == len(ids)
        assert (
            torch.allclose(x.norm(dim=1), torch.ones(len(x)))
            and x.dtype == torch.float32
        )
        logits = (x @ y.T * self.log_scale.exp()).masked_fill(
            (ids[:, None] == ids) & ~torch.eye(len(x)).bool(), -1e9
        )
        return (
            nn.functional.cross_entropy(logits, torch.arange(len(x)))
            + 0.01 * self.log_scale
        )


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
    start = TrainConfig().override(
        epochs=3, batch_size=16, device="cpu", workers=0, max_bad_fraction=0.2, ema=0.9
    )
    return start.override(
        out=tmp_path / "run",
        tensorboard=False,
        save_every=2,
        warmup=2,
        lr=1e-2,
        resume="auto",
    )


PARTS = {
    "pairs": Named(),
    "held_out": Named(20),
    "towers": DictTowers,
    "objective": Learned,
}


def train(config, **changes):
    """With fresh towers and a fresh loss; a given optimiser has a rate of its own."""
    parts = PARTS | changes
    for name in ("towers", "objective"):
        if isinstance(parts[name], type):
            parts[name] = parts[name]()
    if "optimizer" in changes:
        config = config.override(lr=TrainConfig().lr)
    return cloob.train(config, **parts)


def test_the_example_killed_at_any_step_ends_with_the_same_bits(tmp_path):
    def script(out):
        def action():
            sys.argv = [str(EXAMPLE), str(out)]
            runpy.run_path(str(EXAMPLE), run_name="__main__")

        return fork(tmp_path / f"{out.name}-output", 1, action)

    whole, run = tmp_path / "whole", tmp_path / "run"
    assert script(whole).wait() == [0]
    ranks, log, step = (
        script(run),
        run / "metrics.jsonl",
        random.Random("own parts").randrange(10, 80),
    )
    ranks.until(lambda: log.is_file() and log.read_text().count("\n") >= step)
    os.kill(ranks.pids[0], signal.SIGKILL)
    assert ranks.wait() == [-signal.SIGKILL]
    assert len(lines(log)) < 90
    assert script(run).wait() == [0]
    assert_same_run(
        run, whole, load=lambda folder: cloob.load_model(folder, towers=own.Towers())
    )
    given = json.loads((run / "config.json").read_text())
    names = ["Views", "Views", "Towers", "Margin", "Muon", None, None, None]
    parts = [value for name, value in given.items() if name.startswith("given_")]
    assert parts == names
    assert (
        lines(log)[9]["lr"] == pytest.approx(0.02)
        and lines(run / "epochs.jsonl")[-1]["val_recall"] > 0.9
    )


def test_held_out_rows_that_are_not_finite_have_no_loss(config, caplog):
    config = config.override(epochs=1, ema=None)
    run = train(config, towers=BlindTowers, objective=None).run
    (epoch,) = lines(run / "epochs.jsonl")
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
    log = lines(run / "skipped.jsonl")
    bad = [
        line["key"] for line in log if line["epoch"] == 1 and not line.get("held_out")
    ]
    assert sorted(bad) == sorted(map(str, range(7, 80, 10)))
    assert log[0]["reason"] == "item raised an error" and log[0]["detail"].startswith(
        "KeyError: 'no graph "
    )
    epochs = lines(run / "epochs.jsonl")
    assert epochs[0]["skipped"] == {"item raised an error": 8}
    assert epochs[0]["val_skipped"] == {"item raised an error": 2}
    assert epochs[-1]["val_recall"] > 0.5 and epochs[-1]["loss"] < epochs[0]["loss"]
    info = recorder.of("start")[0]
    assert type(info.encoder) is DictTowers and type(info.objective) is Learned

    others = {
        "collated": train(
            config.override(out=tmp_path / "collated", workers=2), pairs=Collated()
        ),
        "cached": train(config.override(out=tmp_path / "cached", micro_batch_size=5)),
    }
    assert exact(others["collated"].run) == exact(run)
    for here, there in zip(exact(others["cached"].run), exact(run), strict=True):
        assert (here["loss"], here["grad_norm"]) == pytest.approx(
            (there["loss"], there["grad_norm"]), rel=1e-4
        )


def test_two_ranks_are_one_process(config, tmp_path):
    """Also where a bad item leaves them unequal parts, and for the loss's own
    parameter.
    """
    ranks = fork(
        tmp_path / "ranks",
        2,
        lambda: train(config.override(out=tmp_path / "two")) and None,
    )
    assert ranks.wait() == [0, 0], ranks.told()
    run = train(config).run
    for here, there in zip(exact(tmp_path / "two"), exact(run), strict=True):
        assert (here["loss"], here["grad_norm"]) == pytest.approx(
            (there["loss"], there["grad_norm"]), rel=1e-3
        )
        assert here["samples_seen"] == there["samples_seen"]
    files = [
        latest_checkpoint(tmp_path / name) / "trainer.pt" for name in ("two", "run")
    ]
    states = [torch.load(file, weights_only=True) for file in files]
    scales = [state["objective"]["loss.log_scale"].item() for state in states]
    assert scales[0] == pytest.approx(scales[1], rel=1e-4) and scales[0] != 2.0


def test_towers_in_float64_are_trained_in_float64(config):
    class Doubled(DictTowers):
        def forward(self, a, b):
            return super().forward({"x": a["x"].double()}, b.double())

    class Seen(nn.Module):
        dtypes: set[torch.dtype] = set()  # noqa: RUF012

        def forward(self, x, y):
            self.dtypes |= {x.dtype, y.dtype}
            assert torch.allclose(
                x.norm(dim=1), torch.ones(len(x), dtype=x.dtype), rtol=0, atol=1e-12
            )
            return -(x * y).sum(1).mean()

    train(
        config.override(epochs=1, ema=None), towers=Doubled().double(), objective=Seen
    )
    assert Seen.dtypes == {torch.float64}


MATRICES_AND_REST = [
    (lambda name, p: p.ndim == 2 and name != "b.weight", partial(torch.optim.Muon)),
    (lambda name, p: True, partial(torch.optim.AdamW, lr=0.05, fused=True)),
]


@pytest.mark.parametrize("make", [partial(Counting, lr=0.05), MATRICES_AND_REST])
def test_what_an_optimiser_keeps_is_resumed(config, tmp_path, make):
    """Counters beside its options, statistics that have not the shape of their weights,
    and several optimisers, each for the parameters that its predicate takes.
    """
    train(config.override(out=tmp_path / "whole"), optimizer=make)
    stop = At(6, lambda: signal.raise_signal(signal.SIGTERM))
    assert (
        result_of(train, config, optimizer=make, callbacks=[stop]).stopped == "SIGTERM"
    )
    train(config, optimizer=make)
    state = torch.load(latest_checkpoint(config.out) / "trainer.pt", weights_only=True)
    if make is MATRICES_AND_REST:
        kept = [{*each} for each in state["optimizer"]["state"].values()]
        adam = {"step", "exp_avg", "exp_avg_sq"}
        assert kept == [{"momentum_buffer"}, adam, adam]
    load = partial(cloob.load_model, towers=DictTowers())
    assert_same_run(
        tmp_path / "run",
        tmp_path / "whole",
        load=lambda folder: copy.deepcopy(load(folder)),
    )


def test_other_parts_than_before_are_one_line(config, tmp_path):
    run = train(config.override(epochs=1)).run

    class Wide(nn.Linear):
        """Another class."""

    wide = DictTowers()
    wide.b = Wide(20, 8, bias=False)
    for changes, error in (
        (
            {"towers": own.Towers()},
            (
                r"was trained with given_towers = 'DictTowers', not 'Towers';"
                r" resume with"
            ),
        ),
        ({"towers": wide}, "was trained with other parameters, or is damaged"),
        (
            {"objective": own.Margin()},
            r"given_objective = 'Learned', not 'Margin'",
        ),
        (
            {"optimizer": partial(torch.optim.SGD, lr=1.0)},
            r"given_optimizer = None, not 'SGD'",
        ),
        ({"pairs": own.Views(80, 3)}, r"given_pairs = 'Named', not 'Views'"),
        (
            {"pairs": Named(96)},
            r"the training pairs are not those of .*80 pairs before, 96 now",
        ),
        (
            {"pairs": Named(80, 19)},
            r"the training pairs are not those of .*other kinds of items",
        ),
    ):
        raises(InputError, error, train, config, **changes)
    again = (
        TrainConfig().merge_file(run / "config.json").override(resume="auto", epochs=2)
    )
    raises(
        InputError,
        r"has pairs of the class 'Named', .*give them to cloob.train\(",
        cloob.train,
        again,
    )
    assert train(again).epochs == 2
    for load, error in (
        (
            lambda: cloob.load_model(run),
            r"DictTowers, to which its weights belong, is Python code.*towers=module",
        ),
        (lambda: cloob.load_model(run, towers=wide), "does not fit DictTowers"),
        (
            lambda: cloob.load_model("RN50", towers=wide),
            "RN50: holds no weights of a module",
        ),
    ):
        raises(InputError, error, load)


class Pictures(nn.Module):
    """Towers for images and captions as cloob reads them: uint8 pixels, tokens."""

    def __init__(self):
        super().__init__()
        self.image, self.text = nn.Linear(3 * 32 * 32, 8), nn.EmbeddingBag(49408, 8)

    def forward(self, images, tokens):
        return self.image(images.flatten(1) / 255), self.text(tokens)


class OneSide(nn.Linear):
    """Gives rows of one side alone."""

    def forward(self, images, tokens):
        return images.flatten(1).float()


class Encoded(Dataset[Any]):
    """Pixels and tokens, as a model of cloob's takes them."""

    def __len__(self):
        return 24

    def __getitem__(self, index):
        return torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8), torch.randint(
            1, 400, (8,)
        )


def test_each_part_alone(base, pairs_folder, tmp_path):
    small = base.override(
        epochs=1, save_every=0, model="nano-vit", val_data=[str(pairs_folder)]
    )
    given = {
        "towers": {"towers": Pictures()},
        "pairs": {"pairs": Encoded()},
        "held_out": {"held_out": cloob.open_source(pairs_folder)},
        "objective": {"objective": Learned()},
        "member": {"objective": cloob.make_objective("clip")},
        "optimizer": {"optimizer": torch.optim.SGD},
    }
    small = small.override(image_size=32, lr=1e-3)
    runs = {
        name: cloob.train(small.override(out=tmp_path / name), **parts)
        for name, parts in given.items()
    }
    assert {name: result.steps for name, result in runs.items()} == dict.fromkeys(
        given, 5
    ) | {"pairs": 3}
    assert all(
        lines(result.run / "epochs.jsonl")[0]["val_recall"] is not None
        for result in runs.values()
    )
    with pytest.raises(
        InputError, match="does not say what it was trained with"
    ):  # a loss that no member computes
        cloob.load_model(runs["objective"].run).make_objective()
    assert cloob.load_model(runs["member"].run).make_objective().name == "clip"
    for changes, error in (
        (
            {"towers": Pictures(), "freeze": "image"},
            "freeze is 'image'; it must be left out with towers=",
        ),
        (
            {"pairs": Encoded(), "val_split": 0.1},
            "pairs= is a Dataset; split it yourself",
        ),
        ({"pairs": iter([])}, "has no length"),
        ({"optimizer": lambda groups: None}, "optimizer: returned NoneType"),
        (
            {"towers": OneSide(1, 1)},
            (
                r"OneSide: returned \[.*\]; two tensors \(n, D\) of the same n and D"
                r" are expected"
            ),
        ),
    ):
        parts = {
            name: changes.pop(name)
            for name in ("pairs", "towers", "optimizer")
            if name in changes
        }
        raises(
            InputError,
            error,
            cloob.train,
            small.override(out=tmp_path / "no", **changes),
            **parts,
        )


class Parted(Named):
    """Named items with an id of another kind, or with more parts."""

    def __init__(self, part):
        super().__init__()
        self.part = part

    def __getitem__(self, index):
        a, b, _ = super().__getitem__(index)
        return a, b, *self.part(index)


@pytest.mark.parametrize(
    ("part", "error"),
    [
        (lambda i: (i / 100,), "Parted: ids are torch.float64; integers or texts"),
        (
            lambda i: (i, 1.0),
            r"Parted: an item has 4 parts; \(a, b\) or \(a, b, id\) is expected",
        ),
    ],
)
def test_no_part_of_an_item_is_dropped_or_rounded(config, part, error):
    raises(InputError, error, train, config, pairs=Parted(part))


def test_a_given_member_masks_duplicates_where_the_named_one_does(config, tmp_path):
    """Four items have one id."""
    losses = {}
    for masks in (False, True):
        for given in (cloob.ContrastiveObjective.cloob(), None):
            here = config.override(
                out=tmp_path / f"{masks}{given is None}", mask_duplicates=masks, steps=3
            )
            losses[masks, given is None] = exact(train(here, objective=given).run)
    assert losses[False, False] == losses[False, True]
    assert losses[True, False] == losses[True, True] != losses[False, True]


def test_a_part_of_a_dataset_is_collated_as_the_dataset(config, tmp_path):
    part, _ = torch.utils.data.random_split(Collated(), [64, 16])
    subset = torch.utils.data.Subset(Named(), part.indices)
    runs = [
        train(config.override(out=tmp_path / str(i), steps=2), pairs=pairs).run
        for i, pairs in enumerate((part, torch.utils.data.Subset(subset, range(64))))
    ]
    assert exact(runs[0]) == exact(runs[1])


def half(groups):
    """An optimiser that holds a part of the parameters."""
    return torch.optim.SGD(groups[:1], lr=0.1)


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (torch.optim.LBFGS, "optimizer: LBFGS doesn't support per-parameter options"),
        (half, "optimizer: does not hold 1 of the 3 parameters that learn"),
        (
            partial(torch.optim.Muon, lr=0.02),
            "optimizer: Muon only supports 2D",
        ),
    ],
)
def test_an_optimiser_that_the_loop_cannot_use_is_one_line(config, make, error):
    raises(InputError, error, train, config, optimizer=make)


def test_nothing_to_learn_is_one_line(config):
    frozen = DictTowers().requires_grad_(False)
    raises(
        InputError,
        "nothing learns: no parameter of the towers or the loss",
        *(train, config),
        towers=frozen,
        objective=own.Margin(),
    )


def test_a_private_function_is_the_same_at_resume(config):
    def run():
        return train(config, optimizer=lambda groups: torch.optim.SGD(groups, lr=0.1))

    def again():
        return train(
            config.override(epochs=4),
            optimizer=lambda groups: torch.optim.SGD(groups, lr=0.1),
        )

    assert (run().epochs, again().epochs) == (3, 4)
