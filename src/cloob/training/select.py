"""Heads that held-out pairs choose: the closed form, ``auto`` among objectives,
``members`` side by side in one model.

For ``objective="cca"`` every rank adds up the moments of its pairs; their sum gives the
directions for every ridge.
"""

from __future__ import annotations

import functools
import json
import logging
import operator
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from cloob.data.loader import Loader
from cloob.data.source import spread
from cloob.data.vectors import VectorPairs
from cloob.distributed import gather_objects, rank, resolve_device
from cloob.errors import InputError
from cloob.files import whole_folder
from cloob.functional.bootstrap import bootstrap_interval, grouped_bootstrap
from cloob.functional.cca import CanonicalDirections, PairMoments, canonical_directions
from cloob.heads.head import AnyHead, Head, Members, fit_members
from cloob.models import runs
from cloob.models.aligned.model import AlignedEncoder, with_heads
from cloob.models.folder import save_model
from cloob.models.load import load_model
from cloob.training.align import ClosedForm, cleaned
from cloob.training.build import Run
from cloob.training.callbacks import Ended, RunResult
from cloob.training.config import TrainConfig
from cloob.training.config.parts import HEAD_SCALES, LENGTHS
from cloob.training.faults import StopSignal, agree_on_batch, fetch
from cloob.training.given import Given, make_encoder, make_loader, open_pairs
from cloob.training.record import GALLERY, RECALLS, mean_recall, recalls_of_ids

_TRIED = (
    "infoloob",
    "clip",
    "siglip",
    "cloob",
)  # the first is taken unless another is clearly better
_FEW_EPOCHS = 2  # of a trial
_SMALL = 8192  # pairs up to which a second head takes seconds
_JUDGES, _BANK = (
    2000,
    1024,
)  # held-out pairs that choose, and training pairs of the bias against hubs
_RIDGES, _POWERS = (0.1, 0.01, 0.03, 0.3, 1.0, 3.0), (1.0, 0.5, 2.0)
"""What is tried, the usual first: it is taken without held-out pairs, and where they
see no difference.
"""
_WEIGHTS, _STRENGTHS = (
    (0.7, 1.0, 1.4),
    (0.0, 0.25, 0.5),
)  # of the closed form, and of the bias against hubs
_AT_TEN = [
    RECALLS.index(10),
    len(RECALLS) + RECALLS.index(10),
]  # rows of ``recalls_of_ids``
Heads = tuple[AnyHead, AnyHead]
_Rows = tuple[
    Tensor, Tensor, Tensor
]  # features of some pairs, and the ids by which they are judged
Train = Callable[..., RunResult]  # ``loop.train``
TEMPORARY = {
    "resume": "none",
    "tensorboard": False,
    "wandb": None,
    "keep": 1,
    "save_every": 2**31,
    "log_every": 2**31,
}
"""Settings of a run whose folder goes: it writes no more than its result needs."""
logger = logging.getLogger(__name__)


class _Trial(NamedTuple):
    objective: str
    settings: dict[str, Any]
    heads: Heads
    recalls: Tensor  # of the ids
    recall: float
    line: dict[str, Any]  # its entry in ``objectives.json``


_RECALL = operator.attrgetter("recall")


def read_choice(run: Path) -> dict[str, Any] | None:
    file = run / runs.OBJECTIVES_FILE
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


class Selection:
    """What held-out pairs choose before a run and after it; both train heads on the
    same features.
    """

    def __init__(self, config: TrainConfig, given: Given, train: Train) -> None:
        self.config, self.given, self._train = config, given, train
        self._closed: Heads | None = None  # solved in a trial
        self._pairs: tuple[VectorPairs, VectorPairs] | None = None

    def choose(self, config: TrainConfig) -> dict[str, Any]:
        """The objective that held-out pairs choose, with its ``settings``, the heads
        next to it, and what was tried.

        Another takes the place of InfoLOOB if it is better on ids that did not choose
        it, with the interval.
        """
        if (
            config.save.resume != "none"
            and (kept := read_choice(config.save.out)) is not None
        ):
            return kept
        pairs, held_out = self._opened()
        judge = _rows(held_out, _JUDGES)
        logger.info(
            "trying cca, %s on %s held-out ids …",
            ", ".join(_TRIED),
            f"{len(np.unique(judge[2])):,}",
        )
        requested = config.align.standardise
        ways = ("one", "column") if requested in (None, "auto") else (requested,)
        closed = self._try("cca", requested, judge)
        self._closed = closed.heads
        first = [self._try(_TRIED[0], way, judge) for way in ways]
        usual = max(first, key=_RECALL)
        trials = [
            usual,
            *(
                self._try(name, usual.settings["standardise"], judge)
                for name in _TRIED[1:]
            ),
        ]
        gain = crossed([trial.recalls for trial in trials])
        best = max(trials, key=_RECALL)
        clear = gain[1] > 0 and best is not usual
        taken = best if clear else usual
        second = max((trial for trial in trials if trial is not taken), key=_RECALL)
        verdict = (
            f"{best.objective} is clearly better"
            if clear
            else "none is clearly better than another"
        )
        message = f"{verdict} ({_points(gain)}): {taken.objective} is taken"
        logger.info("%s", message)
        members = config.align.members or (2 if len(pairs) <= _SMALL else 1)
        turns = [(taken, second)[i % 2] for i in range(1, members)]
        others = [
            {"objective": t.objective, **t.settings, "seed": config.run.seed + i}
            for i, t in enumerate(turns, 1)
        ]
        return {
            "chosen": taken.objective,
            "settings": taken.settings,
            "beside": [*others, {"objective": "cca", **closed.settings}],
            "says": message,
            "clear": clear,
            "best": best.objective,
            "difference": gain,
            "trials": [trial.line for trial in (closed, *first, *trials[1:])],
        }

    def join(self, result: RunResult) -> RunResult:
        """Adds a checkpoint of the best heads joined with others and the closed form,
        if the recall is higher.
        """
        run, requested, choice = result.run, self.config.align, read_choice(result.run)
        single = self.config.loss.objective != "auto" and (requested.members or 1) == 1
        if single or result.stopped or result.checkpoint is None:
            return result
        if (runs.latest_checkpoint(run) / runs.JOINED_FILE).is_file():
            return result
        config = TrainConfig.from_json(run / runs.RUN_CONFIG_FILE)
        recalls = [
            line["val_recall"] or 0.0
            for line in runs.read_lines(run / runs.EPOCHS_FILE)
        ]
        if config.run.epochs is not None:  # those that the first took to its best
            config = config.override(
                epochs=max(2, (int(np.argmax(recalls)) + 1) * config.pairs.val_every),
                patience=0,
            )
        seeds = [
            {"seed": config.run.seed + i} for i in range(1, requested.members or 1)
        ]
        others: list[dict[str, Any]] = (
            choice["beside"] if choice else [*seeds, {"objective": "cca"}]
        )
        pairs, held_out = self._opened()
        best = runs.chosen_checkpoint(run)
        encoder = load_model(best, "cpu").eval()
        assert isinstance(encoder, AlignedEncoder)
        heads: list[Heads] = [encoder.heads]
        names = ["first head"]
        for number, leaves in enumerate(others, 1):
            names.append(f"{leaves.get('objective', 'head')} {number + 1}")
            is_closed = leaves.get("objective") == "cca"
            if is_closed and self._closed is not None:
                heads.append(self._closed)
                continue
            width = {"embed_dim": requested.embed_dim} if is_closed else {}
            leaves = {
                "out": run / runs.MEMBERS_FOLDER / str(number),
                "resume": "auto",
                **width,
                **leaves,
            }
            trained = self._quietly(
                config.override(**{**TEMPORARY, **leaves, "members": None})
            )
            if trained.stopped:
                return replace(result, stopped=trained.stopped)
            heads.append(cast(Heads, load_model(trained.run, "cpu").eval().heads))
        judge, bank = _rows(held_out, _JUDGES), _rows(pairs, _BANK)
        tried = list(_combinations(heads, names, judge, bank, requested.embed_dim or 0))
        what, sides, _ = max(tried, key=lambda one: float(one[2].mean()))
        gain = crossed([recalls for *_, recalls in tried])
        judge = _rows(held_out, len(held_out) // -(-len(held_out) // GALLERY))
        recall, alone = (
            float(_recalls(*some, judge).mean()) for some in (sides, heads[0])
        )
        message = "joined: %s; recall %.1f %% (against the first alone: %s)"
        logger.info(message, what, 100 * recall, _points(gain))
        if recall > alone:
            joined = with_heads(encoder, *sides)
            step = runs.checkpoint_step(runs.latest_checkpoint(run)) + 1
            facts = {"joined": what, "recall": recall, "difference": gain}
            validation = {
                **(runs.read_validation(best) or {}),
                "step": step,
                "val_loss": None,
                "val_recall": recall,
            }
            checkpoint = run / runs.CHECKPOINTS_FOLDER / runs.CHECKPOINT.format(step)
            with whole_folder(checkpoint) as folder:
                save_model(folder / runs.MODEL_FOLDER, joined, encoder.objective_config)
                for name, content in (
                    (runs.VALIDATION_FILE, validation),
                    (runs.JOINED_FILE, facts),
                ):
                    (folder / name).write_text(
                        json.dumps(content, indent=2), encoding="utf-8"
                    )
            result = replace(result, checkpoint=checkpoint)
        shutil.rmtree(run / runs.MEMBERS_FOLDER, ignore_errors=True)
        return result

    def _opened(self) -> tuple[VectorPairs, VectorPairs]:
        """The training pairs, perhaps cleaned, and the held-out pairs as heads see
        them; opened once for all.
        """
        if self._pairs is None:
            config = self.config
            pairs, held_out = open_pairs(config, self.given.pairs, self.given.held_out)
            if not isinstance(pairs, VectorPairs):
                encoder, device = (
                    make_encoder(config),
                    resolve_device(config.run.device),
                )
                both: Any = (pairs, held_out)
                parts: Any = (
                    make_loader(part, encoder, config, device, train=False)
                    for part in both
                )
                pairs, held_out = (loader.pairs for loader in parts)
            if config.align.clean is not None:
                pairs, _ = cleaned(pairs, config)
            self._pairs = pairs, cast(VectorPairs, held_out)
        return self._pairs

    def _try(self, objective: str, way: str | None, judge: _Rows) -> _Trial:
        """Trains for a part of the run, in a folder that goes, judges the best epoch
        and logs its recall.
        """
        config, lengths = (
            self.config,
            {name: getattr(self.config.run, name) for name in LENGTHS},
        )
        length, of_run = next(
            (name, value) for name, value in lengths.items() if value is not None
        )
        part = min(-(-of_run // 8), _FEW_EPOCHS if length == "epochs" else of_run)
        settings: dict[str, Any] = {
            **HEAD_SCALES.get(objective, {}),
            "standardise": way,
        }
        if config.align.encoders() and objective not in ("cca", "siglip"):
            settings["inv_tau"] = 15.0
        with tempfile.TemporaryDirectory(prefix="cloob-") as folder:
            leaves = {
                "objective": objective,
                "out": f"{folder}/run",
                **settings,
                length: part,
            }
            result = self._quietly(config.override(**leaves, **TEMPORARY))
            if result.stopped:
                raise Ended(
                    replace(
                        result,
                        run=config.save.out,
                        steps=0,
                        epochs=0,
                        samples_seen=0,
                        checkpoint=None,
                    )
                )
            heads = cast(Heads, load_model(result.run, "cpu").eval().heads)
        recalls = _recalls(*heads, judge)
        recall, (low, high) = float(recalls.mean()), bootstrap_interval(recalls)
        shown = {"inv_tau": "τ⁻¹ {:g}", "beta": "β {:g}", "standardise": "{}"}
        words = [
            form.format(value)
            for key, form in shown.items()
            if (value := settings.get(key)) is not None
        ]
        what = " ".join([objective, *words])
        logger.info(
            "%-26s recall %.1f %% (%.1f to %.1f)",
            what,
            100 * recall,
            100 * low,
            100 * high,
        )
        line = {
            "objective": objective,
            **settings,
            "recall": recall,
            "interval": (low, high),
        }
        return _Trial(objective, settings, heads, recalls, recall, line)

    def _quietly(self, config: TrainConfig) -> RunResult:
        """Trains on the pairs, without messages: what there is to report of them is
        reported by the run itself.
        """
        pairs, held_out = self._opened()
        none = dict.fromkeys(
            ["image_encoder", "text_encoder", "image_size", *vars(config.vectors)]
        )
        disabled = logging.root.manager.disable
        logging.disable(logging.WARNING)
        config = config.override(**none, data=(), val_split=0.0, clean=None)
        try:
            return self._train(config, pairs=pairs, held_out=held_out)
        finally:
            logging.disable(disabled)


def _rows(pairs: VectorPairs, most: int) -> _Rows:
    return pairs.take(np.array(spread(len(pairs), most)))[:3]


@torch.no_grad()
def _recalls(a: torch.nn.Module, b: torch.nn.Module, judge: _Rows) -> Tensor:
    """(ids,) the mean of recall at 1, 5 and 10 in both directions, with the heads of
    both sides.
    """
    return recalls_of_ids(
        F.normalize(a(judge[0]), dim=1), F.normalize(b(judge[1]), dim=1), judge[2]
    ).mean(0)


def crossed(recalls: Sequence[Tensor]) -> tuple[float, float, float]:
    """What choosing gains over the first, with its interval: one half of the ids is
    judged by the other's choice.
    """
    table = torch.stack(list(recalls))
    gains = torch.zeros_like(table[0])
    for half in (0, 1):
        chosen = int(table[:, 1 - half :: 2].mean(1).argmax())
        gains[half::2] = table[chosen, half::2] - table[0, half::2]
    return grouped_bootstrap([gains.double()])


def _points(gain: tuple[float, float, float]) -> str:
    difference, low, high = (100 * value for value in gain)
    return (
        f"{difference:+.1f} points, {low:+.1f} to {high:+.1f}, on ids that did not"
        " choose"
    )


@torch.no_grad()
def _combinations(
    heads: Sequence[Heads], names: Sequence[str], judge: _Rows, bank: _Rows, width: int
) -> Iterator[tuple[str, Heads, Tensor]]:
    """What may be joined, the first head alone first: in words, as heads of ``width``
    columns (0: all), and recall.
    """
    closed = names[-1].startswith("cca")
    n, trained = len(heads), len(heads) - closed
    of_heads = [[1.0] * k + [0.0] * (n - k) for k in {1: 1, trained: trained}]
    weights = [
        *of_heads,
        *([*row[:-1], w] for row in of_heads for w in _WEIGHTS if closed),
    ]
    weights += [[0.0] * trained + [1.0]] if closed else []
    parts = [
        [
            [F.normalize(pair[side](rows[side]), dim=1) for pair in heads]
            for side in (0, 1)
        ]
        for rows in (judge, bank)
    ]
    for row in weights:
        places = [place for place, weight in enumerate(row) if weight]
        words = " + ".join(f"{row[i]:g} × {names[i]}" for i in places)
        of_judge, of_bank = (
            [[part[i] for i in places] for part in sides] for sides in parts
        )
        total, at_ten = sum(part.shape[1] for part in of_judge[0]), 0.0
        for strength in _STRENGTHS if not 0 < width < 16 else (0.0,):
            more = 4 * bool(strength)
            options: dict[str, Any] = {
                "rows": len(bank[2]) * bool(strength),
                "strength": strength,
            }
            options["cut"] = width - more if width and total + more > width else 0
            a, b = (
                Members(
                    [cast(Head, heads[i][side]) for i in places],
                    [row[i] for i in places],
                    side=side,
                    **options,
                )
                for side in (0, 1)
            )
            fit_members(a.eval(), b.eval(), *of_bank)
            recalls = recalls_of_ids(
                a.joined(of_judge[0]), b.joined(of_judge[1]), judge[2]
            )
            if (
                strength and float(recalls[_AT_TEN].mean()) < at_ten
            ):  # which the bias may not lower
                continue
            at_ten = at_ten if strength else float(recalls[_AT_TEN].mean())
            alone = places == [0] and not strength
            yield (
                words + (f", hubs {strength:g}" if strength else ""),
                heads[0] if alone else (a, b),
                recalls.mean(0),
            )


def solve(run: Run, stop: StopSignal) -> None:
    """Solves for the heads of a run; every rank calls this.

    StopRequested where a signal ends it: nothing is kept.
    """
    progress, size = run.progress, run.config.run.batch_size
    moments = None
    for a, b, _ in _blocks(run, run.loader, stop, counts=True):
        block = PairMoments.of(a, b)
        moments = block if moments is None else moments + block
    total = [part for part in gather_objects(moments) if part is not None]
    if not total:
        raise InputError(f"{run.loader.name}: no usable pairs")
    moments = functools.reduce(operator.add, total)
    judges = (
        []
        if run.val_loader is None
        else list(_blocks(run, run.val_loader, stop, counts=False))
    )
    chosen, directions = _ridge(run, moments, judges)
    assert run.encoder.heads is not None and isinstance(run.objective, ClosedForm)
    means, matrices = (
        (moments.mean_a, moments.mean_b),
        directions.weighted(chosen["power"]),
    )
    for head, mean, matrix in zip(run.encoder.heads, means, matrices, strict=True):
        head.solve(mean, matrix)
    run.objective.chosen = chosen
    progress.step, progress.samples_seen = 1, int(moments.count)
    progress.position = progress.passed = run.loader.steps_per_epoch * size


def _blocks(
    run: Run, loader: Loader, stop: StopSignal, *, counts: bool
) -> Iterator[_Rows]:
    """This rank's rows on the CPU: all of training pairs, which are counted, or some of
    held-out ones.
    """
    batches, every = (
        loader.epoch(0),
        1 if counts else -(-loader.pairs_per_epoch // _JUDGES),
    )
    while not isinstance((fetched := fetch(batches, stop))[1], StopIteration):
        batch, layout, bad = agree_on_batch(
            *fetched, stop, run.stepper.device, run.saver.last
        )
        if counts:
            run.bad.count(batch, layout.total, bad)
        if len(batch):
            yield batch.images[::every], batch.tokens[::every], batch.ids[::every]


def _ridge(
    run: Run, moments: PairMoments, judges: list[_Rows]
) -> tuple[dict[str, Any], CanonicalDirections]:
    """The best by the held-out pairs, or the first without; every rank comes to the
    same.
    """
    assert run.encoder.heads is not None
    width, usual = (
        run.encoder.embed_dim,
        any(head.standardise == "column" for head in run.encoder.heads),
    )
    tries_both = judges and run.config.align.standardise in (None, "auto")
    tried: list[tuple[float, dict[str, Any], CanonicalDirections]] = []
    for by_column in (usual, not usual) if tries_both else (usual,):
        for ridge, result in zip(
            _RIDGES,
            canonical_directions(moments, _RIDGES, by_column=by_column),
            strict=True,
        ):
            directions = CanonicalDirections(*(part[..., :width] for part in result))
            settings = {"ridge": ridge, "power": _POWERS[0], "by_column": by_column}
            if not judges:
                return settings, directions
            a, b, ids = (torch.cat(side) for side in zip(*judges, strict=True))
            a = (a - moments.mean_a).float() @ directions.a.float()
            b = (b - moments.mean_b).float() @ directions.b.float()
            for power in _POWERS:
                weights = (directions.correlations**power).float()
                rows = (
                    F.normalize(a * weights, dim=1),
                    F.normalize(b * weights, dim=1),
                    ids,
                )
                recall = mean_recall(rows, torch.device("cpu"), run.loader.by_id) or 0.0
                tried.append((recall, settings | {"power": power}, directions))
    _, settings, directions = max(tried, key=operator.itemgetter(0))
    if rank() == 0:
        columns = ", columns standardised" if settings["by_column"] else ""
        message = "cca: ridge %g, power %g%s (the best of %d on held-out pairs)"
        logger.info(message, settings["ridge"], settings["power"], columns, len(tried))
    return settings, directions
