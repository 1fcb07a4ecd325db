"""``auto`` and ``members``: held-out pairs choose among objectives, and join several heads into one model."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from cloob.data.source import spread
from cloob.data.vectors import VectorPairs
from cloob.distributed import resolve_device
from cloob.files import whole_folder
from cloob.functional.bootstrap import bootstrap_interval, grouped_bootstrap
from cloob.models import runs
from cloob.models.aligned.heads import Head, Members, fit_members
from cloob.models.aligned.model import AlignedEncoder
from cloob.models.folder import save_model
from cloob.models.load import load_model
from cloob.training.align import FeatureLoader, as_vectors
from cloob.training.build import make_encoder
from cloob.training.callbacks import Ended, RunResult
from cloob.training.config import TrainConfig
from cloob.training.config.parts import HEAD_SCALES, LENGTHS
from cloob.training.given import Given
from cloob.training.pairs import make_loader, open_pairs
from cloob.training.validate import GALLERY, recalls_of_ids

_TRIED = ("infoloob", "clip", "siglip", "cloob")  # the first is taken unless another is clearly better
_FEW_EPOCHS = 5  # of a trial
_SMALL = 8192  # pairs up to which a second head takes seconds
_JUDGES, _BANK = 2000, 1024  # pairs
_WEIGHTS, _STRENGTHS = (0.7, 1.0, 1.4), (0.0, 0.25, 0.5)  # of the closed form, and of the bias against hubs
Train = Callable[..., RunResult]  # ``loop.train``
TEMPORARY = {"resume": "none", "tensorboard": False, "wandb": None, "keep": 1, "save_every": 2**31, "log_every": 2**31}
"""Settings of a run whose folder goes: it writes no more than its result needs."""
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Rows:
    """Features of some pairs, and the ids by which they are judged."""

    a: Tensor
    b: Tensor
    ids: Tensor

    @classmethod
    def of(cls, pairs: VectorPairs, most: int) -> _Rows:
        return cls(*pairs.take(np.array(spread(len(pairs), most)))[:3])

    @torch.no_grad()
    def found(self, a: torch.nn.Module, b: torch.nn.Module) -> Tensor:
        """(ids,) the mean of recall at 1, 5 and 10 in both directions, with the heads of both sides."""
        rows = torch.nn.functional.normalize(a(self.a), dim=1), torch.nn.functional.normalize(b(self.b), dim=1)
        return recalls_of_ids(*rows, self.ids).mean(0)


@dataclass(frozen=True)
class _Trial:
    objective: str
    settings: dict[str, Any]
    found: Tensor

    def line(self) -> dict[str, Any]:
        """What ``objectives.json`` has of it."""
        interval = bootstrap_interval(self.found)
        return {"objective": self.objective, **self.settings, "recall": float(self.found.mean()), "interval": interval}


def read_choice(run: Path) -> dict[str, Any] | None:
    """What ``objectives.json`` of a run has, if it has one."""
    file = run / runs.OBJECTIVES_FILE
    choice: dict[str, Any] | None = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    return choice


def choose(config: TrainConfig, *, given: Given, train: Train) -> dict[str, Any]:
    """What held-out pairs choose: ``chosen``, an objective, with its ``settings``, ``beside`` it, and what was tried.

    The closed form, InfoLOOB with both ways to standardise, and the others with the better way train for some epochs.
    Another takes the place of InfoLOOB where it is better on ids that did not choose it, with its interval. A resumed
    run keeps its choice. Ended where a signal ended a trial.
    """
    if config.save.resume != "none" and (kept := read_choice(config.save.out)) is not None:
        return kept
    pairs, held_out = _opened(config, given)
    judge, train = _Rows.of(held_out, _JUDGES), partial(_quietly, train, pairs, held_out)
    logger.info("trying cca, %s on %s held-out ids …", ", ".join(_TRIED), f"{len(np.unique(judge.ids)):,}")
    asked = config.align.standardise
    ways = ("one", "column") if asked in (None, "auto") else (asked,)
    closed = _try(config, "cca", {"standardise": asked}, train, judge)
    first = [_try(config, _TRIED[0], _settings(config, _TRIED[0], way), train, judge) for way in ways]
    usual = max(first, key=lambda trial: float(trial.found.mean()))
    way = usual.settings["standardise"]
    others = [_try(config, name, _settings(config, name, way), train, judge) for name in _TRIED[1:]]
    for trial in (trials := [closed, *first, *others]):
        _print(trial)
    difference, low, high = crossed([usual.found, *(trial.found for trial in others)])
    best, *rest = sorted([usual, *others], key=lambda trial: -float(trial.found.mean()))
    clear = low > 0 and best is not usual
    order = [best, *rest] if clear else [usual, *(trial for trial in (best, *rest) if trial is not usual)]
    numbers = f"{100 * difference:+.1f} points, {100 * low:+.1f} to {100 * high:+.1f}, on ids that did not choose"
    verdict = f"{best.objective} is clearly better" if clear else "none is clearly better than another"
    says = f"{verdict} ({numbers}): {order[0].objective} is taken"
    logger.info("%s", says)
    members = config.align.members or (2 if len(pairs) <= _SMALL else 1)
    beside = [
        {"objective": order[i % 2].objective, **order[i % 2].settings, "seed": config.run.seed + i}
        for i in range(1, members)
    ]
    beside.append({"objective": "cca", **closed.settings})
    taken = {"chosen": order[0].objective, "settings": order[0].settings, "beside": beside}
    outcome = {"says": says, "clear": clear, "best": best.objective, "difference": [difference, low, high]}
    return {**taken, **outcome, "trials": [trial.line() for trial in trials]}


def join(asked: TrainConfig, result: RunResult, *, given: Given, train: Train) -> RunResult:
    """Adds a checkpoint of the run's best heads with others and the closed form beside them, if they find more.

    Held-out pairs choose which, the weight of the closed form and the strength of the bias against hubs. Rows are cut
    to the ``embed_dim`` that ``asked`` has. The others train in ``OUT/members``, which goes when they are joined.
    """
    run, choice = result.run, read_choice(result.run)
    single = asked.loss.objective != "auto" and (asked.align.members or 1) == 1
    if single or result.stopped or result.checkpoint is None:
        return result
    if (runs.latest_checkpoint(run) / runs.JOINED_FILE).is_file():
        return result
    config = TrainConfig.from_json(run / runs.RUN_CONFIG_FILE)
    seeds = [{"seed": config.run.seed + i} for i in range(1, asked.align.members or 1)]
    beside: list[dict[str, Any]] = choice["beside"] if choice else [*seeds, {"objective": "cca"}]
    pairs, held_out = _opened(asked, given)
    members = []
    for number, leaves in enumerate(beside, 1):
        closed = {"embed_dim": asked.align.embed_dim} if leaves.get("objective") == "cca" else {}
        out = run / runs.MEMBERS_FOLDER / str(number)
        own = config.override(**{**TEMPORARY, "out": out, "resume": "auto", **closed, **leaves, "members": None})
        trained = _quietly(train, pairs, held_out, own)
        if trained.stopped:
            return replace(result, stopped=trained.stopped)
        members.append(load_model(out, "cpu").eval())
    best = runs.chosen_checkpoint(run)
    encoder = load_model(best, "cpu").eval()
    assert isinstance(encoder, AlignedEncoder)
    width = asked.align.embed_dim or 0
    judge, bank = _Rows.of(held_out, _JUDGES), _Rows.of(pairs, _BANK)
    heads = [(each.model.image_head, each.model.text_head) for each in (encoder, *members)]
    tried = [(what, *sides, judge.found(*sides)) for what, sides in _combinations(heads, beside, bank, width)]
    what, a, b, _ = max(tried, key=lambda one: float(one[3].mean()))
    difference, low, high = crossed([one[3] for one in tried])
    judge = _Rows.of(held_out, len(held_out) // -(-len(held_out) // GALLERY))
    recall, alone = (float(judge.found(*sides).mean()) for sides in ((a, b), heads[0]))
    numbers = f"{100 * difference:+.1f} points, {100 * low:+.1f} to {100 * high:+.1f}, on ids that did not choose"
    logger.info("joined: %s; recall %.1f %% (against the first alone: %s)", what, 100 * recall, numbers)
    if recall > alone:
        joined = encoder.with_heads(a, b)
        step = runs.checkpoint_step(runs.latest_checkpoint(run)) + 1
        facts = {"joined": what, "recall": recall, "difference": [difference, low, high]}
        validation = {**(runs.read_validation(best) or {}), "step": step, "val_loss": None, "val_recall": recall}
        with whole_folder(run / runs.CHECKPOINTS_FOLDER / runs.checkpoint_name(step)) as folder:
            save_model(folder / runs.MODEL_FOLDER, joined, encoder.objective_config)
            for name, content in ((runs.VALIDATION_FILE, validation), (runs.JOINED_FILE, facts)):
                (folder / name).write_text(json.dumps(content, indent=2), encoding="utf-8")
        result = replace(result, checkpoint=run / runs.CHECKPOINTS_FOLDER / runs.checkpoint_name(step))
    shutil.rmtree(run / runs.MEMBERS_FOLDER)
    return result


def crossed(found: Sequence[Tensor]) -> tuple[float, float, float]:
    """What choosing gains over the first, with its interval: each half of the ids is judged by the other's choice."""
    table = torch.stack(list(found))
    gains = torch.zeros_like(table[0])
    for half in (0, 1):
        chosen = int(table[:, 1 - half :: 2].mean(1).argmax())
        gains[half::2] = table[chosen, half::2] - table[0, half::2]
    return grouped_bootstrap([gains.double()])


def _combinations(
    heads: Sequence[tuple[Any, Any]], beside: Sequence[dict[str, Any]], bank: _Rows, width: int
) -> Iterator[tuple[str, tuple[Head | Members, Head | Members]]]:
    """What may be joined, in words and as heads cut to ``width`` columns (0: no cut); the first head alone first."""
    names = ["first head", *(f"{each.get('objective', 'head')} {i}" for i, each in enumerate(beside, 2))]
    n = len(heads)
    closed = beside[-1].get("objective") == "cca"
    trained = n - closed
    all_heads = [[1.0] * k + [0.0] * (n - k) for k in {1: 1, trained: trained}]
    weights = [*all_heads, *([*row[:-1], w] for row in all_heads for w in _WEIGHTS if closed)]
    weights += [[0.0] * trained + [1.0]] if closed else []
    for row in weights:
        places = [place for place, weight in enumerate(row) if weight]
        words = " + ".join(f"{row[i]:g} × {names[i]}" for i in places)
        for strength in _STRENGTHS:
            if not strength and places == [0]:
                yield names[0], heads[0]
                continue
            if strength and 0 < width < 16:
                continue
            total = sum(heads[i][0].options["embed_dim"] for i in places)
            cut = width - 4 * bool(strength) if width and total + 4 * bool(strength) > width else 0
            options: dict[str, Any] = {"cut": cut, "rows": len(bank.ids) * bool(strength), "strength": strength}
            a, b = (
                Members([heads[i][side] for i in places], [row[i] for i in places], side=side, **options).eval()
                for side in (0, 1)
            )
            fit_members(a, b, bank.a, bank.b)
            yield words + (f", hubs {strength:g}" if strength else ""), (a, b)


def _settings(config: TrainConfig, objective: str, way: str | None) -> dict[str, Any]:
    """Scales and standardisation with which an objective is tried."""
    of_encoders = {"inv_tau": 15.0} if config.align.encoders() and objective != "siglip" else {}
    return {**HEAD_SCALES.get(objective, {}), **of_encoders, "standardise": way}


def _opened(config: TrainConfig, given: Given) -> tuple[VectorPairs, VectorPairs]:
    """The training pairs and the held-out pairs as heads see them, opened once for all that train on them."""
    pairs, held_out = open_pairs(config, given.pairs, given.held_out)
    if isinstance(pairs, VectorPairs) and isinstance(held_out, VectorPairs):
        return pairs, held_out
    encoder, device = make_encoder(config), resolve_device(config.run.device)
    loaders = [make_loader(part, encoder, config, device, train=False) for part in (pairs, held_out) if part]
    first, second = (as_vectors(cast(FeatureLoader, loader).features, loader.name) for loader in loaders)
    return first, second


def _try(config: TrainConfig, objective: str, settings: dict[str, Any], train: Train, judge: _Rows) -> _Trial:
    """Trains for a part of the run, in a folder that goes, and judges its best epoch."""
    length = next(name for name in LENGTHS if getattr(config.run, name) is not None)
    part = -(-getattr(config.run, length) // 4)
    part = min(part, _FEW_EPOCHS) if length == "epochs" else part
    with tempfile.TemporaryDirectory(prefix="cloob-") as folder:
        tried = config.override(objective=objective, out=f"{folder}/run", **settings, **{length: part}, **TEMPORARY)
        result = train(tried)
        if result.stopped:
            raise Ended(replace(result, run=config.save.out, steps=0, epochs=0, samples_seen=0, checkpoint=None))
        model = load_model(result.run, "cpu").eval().model
        return _Trial(objective, settings, judge.found(model.image_head, model.text_head))


def _quietly(train: Train, pairs: VectorPairs, held_out: VectorPairs, config: TrainConfig) -> RunResult:
    """Trains on vectors, without messages: what there is to report of these pairs is reported by the run itself."""
    none = dict.fromkeys(["image_encoder", "text_encoder", "image_size", *vars(config.vectors)])
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        return train(config.override(**none, data=(), val_split=0.0), pairs=pairs, held_out=held_out)
    finally:
        logging.disable(disabled)


def _print(trial: _Trial) -> None:
    shown = {"inv_tau": "τ⁻¹ {:g}", "beta": "β {:g}", "standardise": "{}"}
    settings = [form.format(value) for key, form in shown.items() if (value := trial.settings.get(key)) is not None]
    low, high = bootstrap_interval(trial.found)
    recall = 100 * float(trial.found.mean()), 100 * low, 100 * high
    logger.info("%-26s recall %.1f %% (%.1f to %.1f)", " ".join([trial.objective, *settings]), *recall)
