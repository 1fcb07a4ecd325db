"""``auto`` and ``members``: held-out pairs choose among objectives, and join several heads into one model."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from cloob.data.source import spread
from cloob.data.vectors import VectorPairs
from cloob.distributed import resolve_device
from cloob.files import whole_folder
from cloob.functional.bootstrap import bootstrap_interval, grouped_bootstrap
from cloob.models import runs
from cloob.models.aligned.heads import AnyHead, Head, Members, fit_members
from cloob.models.aligned.model import AlignedEncoder, with_heads
from cloob.models.folder import save_model
from cloob.models.load import load_model
from cloob.training.align import FeatureLoader, cleaned
from cloob.training.callbacks import Ended, RunResult
from cloob.training.config import TrainConfig
from cloob.training.config.parts import HEAD_SCALES, LENGTHS
from cloob.training.given import Given, make_encoder, make_loader, open_pairs
from cloob.training.record import GALLERY, RECALLS, recalls_of_ids

_TRIED = ("infoloob", "clip", "siglip", "cloob")  # the first is taken unless another is clearly better
_FEW_EPOCHS = 2  # of a trial
_SMALL = 8192  # pairs up to which a second head takes seconds
_JUDGES, _BANK = 2000, 1024  # pairs
_WEIGHTS, _STRENGTHS = (0.7, 1.0, 1.4), (0.0, 0.25, 0.5)  # of the closed form, and of the bias against hubs
_AT_TEN = [RECALLS.index(10), len(RECALLS) + RECALLS.index(10)]  # rows of ``recalls_of_ids``
Heads = tuple[AnyHead, AnyHead]
Train = Callable[..., RunResult]  # ``loop.train``
TEMPORARY = {"resume": "none", "tensorboard": False, "wandb": None, "keep": 1, "save_every": 2**31, "log_every": 2**31}
"""Settings of a run whose folder goes: it writes no more than its result needs."""
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Trial:
    objective: str
    settings: dict[str, Any]
    heads: Heads
    found: Tensor  # as of ``_found``

    def line(self) -> dict[str, Any]:
        """Its entry in ``objectives.json``, which is printed too."""
        shown = {"inv_tau": "τ⁻¹ {:g}", "beta": "β {:g}", "standardise": "{}"}
        settings = [form.format(value) for key, form in shown.items() if (value := self.settings.get(key)) is not None]
        low, high = bootstrap_interval(self.found)
        recall, what = float(self.found.mean()), " ".join([self.objective, *settings])
        logger.info("%-26s recall %.1f %% (%.1f to %.1f)", what, 100 * recall, 100 * low, 100 * high)
        return {"objective": self.objective, **self.settings, "recall": recall, "interval": (low, high)}


def _recall(trial: _Trial) -> float:
    return float(trial.found.mean())


def read_choice(run: Path) -> dict[str, Any] | None:
    """The content of ``objectives.json`` of a run, if it has one."""
    file = run / runs.OBJECTIVES_FILE
    choice: dict[str, Any] | None = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    return choice


class Selection:
    """What held-out pairs choose before a run and after it; both train heads on the same features."""

    def __init__(self, config: TrainConfig, given: Given, train: Train) -> None:
        self.config, self.given, self._train = config, given, train
        self._closed: Heads | None = None  # solved in a trial
        self._pairs: tuple[VectorPairs, VectorPairs] | None = None

    def choose(self, config: TrainConfig) -> dict[str, Any]:
        """What held-out pairs choose: ``chosen``, an objective, its ``settings``, ``beside`` it, and what was tried.

        The closed form, InfoLOOB with both ways to standardise, and the others with the better way train for two epochs
        at most. Another objective is taken in the place of InfoLOOB where it is better on ids that did not choose it,
        with the interval. A resumed run keeps its choice. Ended where a signal ended a trial.
        """
        if config.save.resume != "none" and (kept := read_choice(config.save.out)) is not None:
            return kept
        pairs, held_out = self._opened(resumed=False)
        judge = _rows(held_out, _JUDGES)
        logger.info("trying cca, %s on %s held-out ids …", ", ".join(_TRIED), f"{len(np.unique(judge[2])):,}")
        requested = config.align.standardise
        ways = ("one", "column") if requested in (None, "auto") else (requested,)
        closed = self._try("cca", {"standardise": requested}, judge)
        self._closed = closed.heads
        first = [self._try(_TRIED[0], self._settings(_TRIED[0], way), judge) for way in ways]
        usual = max(first, key=_recall)
        way = usual.settings["standardise"]
        others = [self._try(name, self._settings(name, way), judge) for name in _TRIED[1:]]
        trials = [trial.line() for trial in (closed, *first, *others)]
        gain = crossed([usual.found, *(trial.found for trial in others)])
        best = max([usual, *others], key=_recall)
        clear = gain[1] > 0 and best is not usual
        taken = best if clear else usual
        second = max((trial for trial in (usual, *others) if trial is not taken), key=_recall)
        verdict = f"{best.objective} is clearly better" if clear else "none is clearly better than another"
        says = f"{verdict} ({_points(gain)}): {taken.objective} is taken"
        logger.info("%s", says)
        members = config.align.members or (2 if len(pairs) <= _SMALL else 1)
        turns = [(taken, second)[i % 2] for i in range(1, members)]
        beside = [{"objective": t.objective, **t.settings, "seed": config.run.seed + i} for i, t in enumerate(turns, 1)]
        beside.append({"objective": "cca", **closed.settings})
        outcome = {"says": says, "clear": clear, "best": best.objective, "difference": gain}
        chosen = {"chosen": taken.objective, "settings": taken.settings, "beside": beside}
        return {**chosen, **outcome, "trials": trials}

    def join(self, result: RunResult) -> RunResult:
        """Adds a checkpoint of the run's best heads with others and the closed form next to them, if they find more.

        Held-out pairs choose which, the weight of the closed form and the strength of the bias against hubs. Rows are
        cut to the configured ``embed_dim``. The others train in ``OUT/members``, which goes when they are joined.
        """
        run, requested, choice = result.run, self.config.align, read_choice(result.run)
        single = self.config.loss.objective != "auto" and (requested.members or 1) == 1
        if single or result.stopped or result.checkpoint is None:
            return result
        if (runs.latest_checkpoint(run) / runs.JOINED_FILE).is_file():
            return result
        config = TrainConfig.from_json(run / runs.RUN_CONFIG_FILE)
        recalls = [line["val_recall"] or 0.0 for line in runs.read_lines(run / runs.EPOCHS_FILE)]
        if config.run.epochs is not None:  # those that the first took to its best
            config = config.override(epochs=max(2, (int(np.argmax(recalls)) + 1) * config.pairs.val_every), patience=0)
        seeds = [{"seed": config.run.seed + i} for i in range(1, requested.members or 1)]
        beside: list[dict[str, Any]] = choice["beside"] if choice else [*seeds, {"objective": "cca"}]
        pairs, held_out = self._opened()
        best = runs.chosen_checkpoint(run)
        encoder = load_model(best, "cpu").eval()
        assert isinstance(encoder, AlignedEncoder)
        heads: list[Heads] = [encoder.heads]
        for number, leaves in enumerate(beside, 1):
            is_closed = leaves.get("objective") == "cca"
            if is_closed and self._closed is not None:
                heads.append(self._closed)
                continue
            width = {"embed_dim": requested.embed_dim} if is_closed else {}
            leaves = {"out": run / runs.MEMBERS_FOLDER / str(number), "resume": "auto", **width, **leaves}
            trained = self._quietly(config.override(**{**TEMPORARY, **leaves, "members": None}))
            if trained.stopped:
                return replace(result, stopped=trained.stopped)
            heads.append(_heads(trained.run))
        names = ["first head", *(f"{leaves.get('objective', 'head')} {i}" for i, leaves in enumerate(beside, 2))]
        judge, bank = _rows(held_out, _JUDGES), _rows(pairs, _BANK)
        tried = list(_combinations(heads, names, judge, bank, requested.embed_dim or 0))
        what, sides, _ = max(tried, key=lambda one: float(one[2].mean()))
        gain = crossed([found for *_, found in tried])
        judge = _rows(held_out, len(held_out) // -(-len(held_out) // GALLERY))
        recall, alone = (float(_found(*some, judge).mean()) for some in (sides, heads[0]))
        message = "joined: %s; recall %.1f %% (against the first alone: %s)"
        logger.info(message, what, 100 * recall, _points(gain))
        if recall > alone:
            joined = with_heads(encoder, *sides)
            step = runs.checkpoint_step(runs.latest_checkpoint(run)) + 1
            facts = {"joined": what, "recall": recall, "difference": gain}
            validation = {**(runs.read_validation(best) or {}), "step": step, "val_loss": None, "val_recall": recall}
            checkpoint = run / runs.CHECKPOINTS_FOLDER / runs.checkpoint_name(step)
            with whole_folder(checkpoint) as folder:
                save_model(folder / runs.MODEL_FOLDER, joined, encoder.objective_config)
                for name, content in ((runs.VALIDATION_FILE, validation), (runs.JOINED_FILE, facts)):
                    (folder / name).write_text(json.dumps(content, indent=2), encoding="utf-8")
            result = replace(result, checkpoint=checkpoint)
        shutil.rmtree(run / runs.MEMBERS_FOLDER, ignore_errors=True)
        return result

    def _opened(self, *, resumed: bool = True) -> tuple[VectorPairs, VectorPairs]:
        """The training pairs, cleaned if asked, and the held-out pairs as heads see them; opened once for all."""
        if self._pairs is None:
            config = self.config
            pairs, held_out = open_pairs(config, self.given.pairs, self.given.held_out)
            if not isinstance(pairs, VectorPairs):
                encoder, device = make_encoder(config), resolve_device(config.run.device)
                loaders = [
                    make_loader(part, encoder, config, device, train=False) for part in (pairs, held_out) if part
                ]
                pairs, held_out = (cast(FeatureLoader, loader).pairs for loader in loaders)
            if config.align.clean is not None:
                pairs, _ = cleaned(pairs, config, resumed=resumed)
            self._pairs = pairs, cast(VectorPairs, held_out)
        return self._pairs

    def _settings(self, objective: str, way: str | None) -> dict[str, Any]:
        """Scales and standardisation with which an objective is tried."""
        of_encoders = {"inv_tau": 15.0} if self.config.align.encoders() and objective != "siglip" else {}
        return {**HEAD_SCALES.get(objective, {}), **of_encoders, "standardise": way}

    def _try(self, objective: str, settings: dict[str, Any], judge: _Rows) -> _Trial:
        """Trains for a part of the run, in a folder that goes, and judges its best epoch."""
        config, lengths = self.config, {name: getattr(self.config.run, name) for name in LENGTHS}
        length, of_run = next((name, value) for name, value in lengths.items() if value is not None)
        part = min(-(-of_run // 8), _FEW_EPOCHS if length == "epochs" else of_run)
        with tempfile.TemporaryDirectory(prefix="cloob-") as folder:
            leaves = {"objective": objective, "out": f"{folder}/run", **settings, length: part}
            result = self._quietly(config.override(**leaves, **TEMPORARY))
            if result.stopped:
                raise Ended(replace(result, run=config.save.out, steps=0, epochs=0, samples_seen=0, checkpoint=None))
            heads = _heads(result.run)
        return _Trial(objective, settings, heads, _found(*heads, judge))

    def _quietly(self, config: TrainConfig) -> RunResult:
        """Trains on the pairs, without messages: what there is to report of them is reported by the run itself."""
        pairs, held_out = self._opened()
        none = dict.fromkeys(["image_encoder", "text_encoder", "image_size", *vars(config.vectors)])
        disabled = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            return self._train(
                config.override(**none, data=(), val_split=0.0, clean=None), pairs=pairs, held_out=held_out
            )
        finally:
            logging.disable(disabled)


_Rows = tuple[Tensor, Tensor, Tensor]  # features of some pairs, and the ids by which they are judged


def _rows(pairs: VectorPairs, most: int) -> _Rows:
    return pairs.take(np.array(spread(len(pairs), most)))[:3]


def _heads(run: Path) -> Heads:
    heads: Heads = load_model(run, "cpu").eval().heads
    assert heads is not None
    return heads


@torch.no_grad()
def _found(a: torch.nn.Module, b: torch.nn.Module, judge: _Rows) -> Tensor:
    """(ids,) the mean of recall at 1, 5 and 10 in both directions, with the heads of both sides."""
    return recalls_of_ids(F.normalize(a(judge[0]), dim=1), F.normalize(b(judge[1]), dim=1), judge[2]).mean(0)


def crossed(found: Sequence[Tensor]) -> tuple[float, float, float]:
    """What choosing gains over the first, with its interval: each half of the ids is judged by the other's choice."""
    table = torch.stack(list(found))
    gains = torch.zeros_like(table[0])
    for half in (0, 1):
        chosen = int(table[:, 1 - half :: 2].mean(1).argmax())
        gains[half::2] = table[chosen, half::2] - table[0, half::2]
    return grouped_bootstrap([gains.double()])


def _points(gain: tuple[float, float, float]) -> str:
    difference, low, high = (100 * value for value in gain)
    return f"{difference:+.1f} points, {low:+.1f} to {high:+.1f}, on ids that did not choose"


@torch.no_grad()
def _combinations(
    heads: Sequence[Heads], names: Sequence[str], judge: _Rows, bank: _Rows, width: int
) -> Iterator[tuple[str, Heads, Tensor]]:
    """What may be joined, cut to ``width`` columns (0: no cut), in words, as heads, and what it finds.

    The first head alone comes first. Features go through every head once. A bias may not lower recall@10.
    """
    closed = names[-1].startswith("cca")
    n, trained = len(heads), len(heads) - closed
    of_heads = [[1.0] * k + [0.0] * (n - k) for k in {1: 1, trained: trained}]
    weights = [*of_heads, *([*row[:-1], w] for row in of_heads for w in _WEIGHTS if closed)]
    weights += [[0.0] * trained + [1.0]] if closed else []
    parts = [
        [[F.normalize(pair[side](rows[side]), dim=1) for pair in heads] for side in (0, 1)] for rows in (judge, bank)
    ]
    for row in weights:
        places = [place for place, weight in enumerate(row) if weight]
        words = " + ".join(f"{row[i]:g} × {names[i]}" for i in places)
        of_judge, of_bank = ([[part[i] for i in places] for part in sides] for sides in parts)
        total, at_ten = sum(part.shape[1] for part in of_judge[0]), 0.0
        for strength in _STRENGTHS if not 0 < width < 16 else (0.0,):
            more = 4 * bool(strength)
            options: dict[str, Any] = {"rows": len(bank[2]) * bool(strength), "strength": strength}
            options["cut"] = width - more if width and total + more > width else 0
            a, b = (
                Members([cast(Head, heads[i][side]) for i in places], [row[i] for i in places], side=side, **options)
                for side in (0, 1)
            )
            fit_members(a.eval(), b.eval(), *of_bank)
            recalls = recalls_of_ids(a.joined(of_judge[0]), b.joined(of_judge[1]), judge[2])
            if strength and float(recalls[_AT_TEN].mean()) < at_ten:
                continue
            at_ten = at_ten if strength else float(recalls[_AT_TEN].mean())
            alone = places == [0] and not strength
            yield words + (f", hubs {strength:g}" if strength else ""), heads[0] if alone else (a, b), recalls.mean(0)
