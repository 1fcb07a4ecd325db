"""Which objective suits some vectors: short runs of three, by successive halving, of which held-out ids choose."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cloob.data.vectors import VectorPairs
from cloob.functional.bootstrap import bootstrap_interval, paired_bootstrap
from cloob.models.aligned.vectors import embed_pairs
from cloob.models.load import load_model
from cloob.models.runs import OBJECTIVES_FILE
from cloob.training.callbacks import Ended, RunResult
from cloob.training.config import TrainConfig
from cloob.training.config.parts import LENGTHS
from cloob.training.validate import recalls_of_ids
from cloob.training.vectors import open_vectors

_TRIED: dict[str, list[dict[str, Any]]] = {
    "clip": [{"inv_tau": inv_tau, "learnable_inv_tau": False} for inv_tau in (7.5, 10.0, 15.0, 30.0)],
    "infoloob": [{"inv_tau": inv_tau} for inv_tau in (7.5, 10.0, 15.0, 30.0)],
    "cloob": [
        {"inv_tau": inv_tau, "beta": beta} for inv_tau, beta in ((7.5, 8.0), (15.0, 8.0), (7.5, 14.0), (15.0, 14.0))
    ],
}
_FALLBACK = "infoloob"
Train = Callable[[TrainConfig], RunResult]  # as ``loop.train``
TEMPORARY = {"resume": "none", "tensorboard": False, "wandb": None, "keep": 1, "save_every": 2**31, "log_every": 2**31}
"""Settings of a run whose folder goes: it writes no more than its result needs."""
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Tried:
    """A setting of an objective, and the share of each held-out id that it found."""

    objective: str
    settings: dict[str, Any]
    found: Tensor

    @property
    def recall(self) -> float:
        return float(self.found.mean())

    def __str__(self) -> str:
        shown = {"inv_tau": "τ⁻¹", "beta": "β"}
        settings = [f"{shown[key]} {self.settings[key]:g}" for key in shown if key in self.settings]
        return " ".join([self.objective, *settings])


def choose(config: TrainConfig, train: Train) -> dict[str, Any]:
    """What held-out pairs choose: ``chosen``, an objective, with its ``settings``, and all that was tried.

    Four settings of CLIP, InfoLOOB and CLOOB each train for a quarter of the run, the better two for half of it, the
    best for all of it. An objective is taken in place of InfoLOOB where the interval of their difference is above 0.
    A resumed run keeps its choice. Ended where a signal ended a trial.
    """
    if config.save.resume != "none" and (kept := read_choice(config.save.out)) is not None:
        return kept
    held_out = open_vectors(config)[1]
    assert held_out is not None
    logger.info("trying %s, four settings each, on %s held-out pairs …", ", ".join(_TRIED), f"{len(held_out):,}")
    runs: list[dict[str, Any]] = []
    finals = []
    for objective, settings in _TRIED.items():
        for share in (4, 2, 1):
            tried = [_try(config, objective, setting, share, train, held_out) for setting in settings]
            runs += ({"objective": objective, **x.settings, "share": 1 / share, "recall": x.recall} for x in tried)
            tried.sort(key=lambda one: -one.recall)
            settings = [one.settings for one in tried[: max(1, len(tried) // 2)]]
        finals.append(tried[0])
        low, high = bootstrap_interval(tried[0].found)
        logger.info("%-24s recall %.1f %% (%.1f to %.1f)", tried[0], 100 * tried[0].recall, 100 * low, 100 * high)
    choice = _chosen(finals)
    logger.info("%s", choice["says"])
    return {**choice, "runs": runs}


def read_choice(run: Path) -> dict[str, Any] | None:
    """What ``objectives.json`` of a run says, if it has one."""
    file = run / OBJECTIVES_FILE
    choice: dict[str, Any] | None = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    return choice


def _try(
    config: TrainConfig, objective: str, settings: dict[str, Any], share: int, train: Train, held_out: VectorPairs
) -> _Tried:
    """Trains for a part of the run, in a folder that goes, and judges its best epoch."""
    length = next(name for name in LENGTHS if getattr(config.run, name) is not None)
    part = {length: max(1, getattr(config.run, length) // share)}
    with tempfile.TemporaryDirectory(prefix="cloob-") as folder:
        tried = config.override(objective=objective, out=f"{folder}/run", **settings, **part, **TEMPORARY)
        disabled = logging.root.manager.disable
        logging.disable(logging.INFO)  # what there is to say of these pairs is said when all of the run begins
        try:
            result = train(tried)
        finally:
            logging.disable(disabled)
        if result.stopped:
            raise Ended(replace(result, run=config.save.out, steps=0, epochs=0, samples_seen=0, checkpoint=None))
        encoder = load_model(result.run, config.run.device).eval()
    a, b = embed_pairs(encoder, held_out)
    return _Tried(objective, settings, recalls_of_ids(a, b, torch.from_numpy(held_out.ids)).mean(0))


def _chosen(finals: list[_Tried]) -> dict[str, Any]:
    """The best of the finals, unless it is not clearly better than InfoLOOB, as a line and as numbers."""
    best = max(finals, key=lambda one: one.recall)
    usual = next(one for one in finals if one.objective == _FALLBACK)
    other = usual if best is not usual else max((one for one in finals if one is not best), key=lambda one: one.recall)
    difference, low, high = paired_bootstrap(best.found, other.found)
    clear = low > 0
    chosen = best if clear else usual
    verdict = f"{chosen.objective} is taken" if clear else f"no clear difference: {chosen.objective} is taken"
    numbers = f"{100 * difference:+.1f} points, {100 * low:+.1f} to {100 * high:+.1f}"
    says = f"{verdict} ({best.objective} against {other.objective}: {numbers})"
    what = {"says": says, "chosen": chosen.objective, "settings": chosen.settings, "clear": clear}
    return {**what, "best": best.objective, "against": other.objective, "difference": [difference, low, high]}
