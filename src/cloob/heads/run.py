"""A run of heads: read or embed the pairs, clean them, fit, write the run folder.

The folder is as other runs have it (``cloob.models.runs``), so that ``eval``,
``embed``, ``index``, ``match``, ``export`` and ``load_model`` read it; ``state/`` holds
where the fits stand, from which a killed run goes on bit for bit.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import logging
import shutil
import signal
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cloob.data.bad import by_reason, check_fraction
from cloob.data.batch import Skip
from cloob.data.open import open_source
from cloob.data.source import (
    Fingerprint,
    Source,
    choose_held_out,
    digest,
    mix,
    split,
)
from cloob.data.vectors import VectorPairs, open_pairs
from cloob.errors import InputError, Stopped, counted
from cloob.files import flush, whole_folder, write_whole
from cloob.heads import arrays
from cloob.heads.choose import choose
from cloob.heads.cleaning import LeftOut, cleaned, without
from cloob.heads.config import HeadsConfig, check_config, read_config
from cloob.heads.features import embedded, first_captions, open_encoders
from cloob.heads.fitted import FittedHeads
from cloob.heads.head import Heads
from cloob.heads.ledger import Ledger, open_ledger
from cloob.heads.settings import USUAL_SCALES
from cloob.lock import lock_run_folder
from cloob.models import runs
from cloob.models.aligned.model import AlignedEncoder, VectorEncoder, with_heads
from cloob.models.folder import save_model

logger = logging.getLogger(__name__)

FROZEN_SCALES: dict[str, dict[str, Any]] = {
    "infoloob": {"inv_tau": 15.0},
    "clip": {"inv_tau": 15.0, "learnable_inv_tau": False},
    "cloob": {"inv_tau": 15.0},
}
"""Where ``auto`` starts on the features of frozen encoders."""
N_FEW = 20  # held-out ids: one of them is 5 points of recall
MAX_NAMED = 1000  # bad pairs in skipped.jsonl


@dataclass(frozen=True)
class HeadsResult:
    """What a run of heads came to."""

    run: Path  # its folder
    epochs: int
    steps: int
    samples_seen: int
    seconds: float
    checkpoint: Path | None  # the best; None where a signal came before the first epoch
    recall: float | None = None  # of the held-out pairs that chose
    skipped: Mapping[str, int] = field(default_factory=dict)  # pairs by reason
    stopped: str | None = None  # None when the run reached its end, else "SIGTERM"
    already_finished: bool = False
    out_of_patience: bool = False


class Stop:
    """Turns SIGTERM into a flag, in the main thread."""

    def __init__(self) -> None:
        self.requested = False
        self._before: Any = None

    def __call__(self) -> bool:
        return self.requested

    def __enter__(self) -> Stop:
        def request(*_: object) -> None:
            self.requested = True

        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, request)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)


def train_heads(
    config: HeadsConfig, *, on_epoch: Callable[[dict[str, Any]], object] | None = None
) -> HeadsResult:
    """Fits heads to two files of vectors, or to the features of two frozen encoders,
    and writes a run folder.

    SIGTERM ends the run after the current step: its state is kept, and ``Stopped`` is
    raised, so that a script that trains in a loop ends too.

    Args:
        config: What to fit to what.
        on_epoch: Called with the line of every epoch.

    Returns:
        What the run came to.

    Raises:
        InputError: A setting or a file is not right, or another process writes to the
            run folder.
        TrainingFailed: The loss is not finite.
        Stopped: SIGTERM ended the run; it is a ``KeyboardInterrupt``.

    Example:
        >>> import numpy as np
        >>> import cloob
        >>> cause = np.random.default_rng(0).normal(size=(300, 4))
        >>> np.save("a.npy", cause @ np.ones((4, 9)))
        >>> np.save("b.npy", cause**3)
        >>> config = cloob.get_recipe("vectors", objective="cca")
        >>> result = cloob.train_heads(config.override(a="a.npy", b="b.npy"))
        >>> cloob.load_model(result.run).encode_a(np.load("a.npy")).shape
        torch.Size([300, 4])
    """
    result = run_heads(config, on_epoch)
    if result.stopped:
        raise Stopped(result)
    return result


def run_heads(
    config: HeadsConfig, on_epoch: Callable[[dict[str, Any]], object] | None = None
) -> HeadsResult:
    """As ``train_heads``, but a result says that a signal ended the run."""
    check_config(config)
    with lock_run_folder(config.out), Stop() as stop:
        start_folder(config)
        is_new = not (config.out / runs.DECISIONS_FILE).exists()
        try:
            data = open_data(config)
        except InputError:
            if is_new:  # nothing has begun
                (config.out / runs.DECISIONS_FILE).unlink(missing_ok=True)
            raise
        return fit_and_write(config, data, stop, on_epoch)


@dataclass
class Data:
    """The pairs of a run, and the model that their heads belong to."""

    pairs: VectorPairs
    held_out: VectorPairs | None
    ledger: Ledger
    encoder: AlignedEncoder | None = None  # None for vectors
    left_out: list[LeftOut] = field(default_factory=list)
    held_out_fingerprint: Fingerprint | None = None

    def model(self, heads: Heads, objective: dict[str, Any]) -> AlignedEncoder:
        """The model with these heads."""
        if self.encoder is None:
            return VectorEncoder(*heads, objective)
        model = with_heads(self.encoder, *heads)
        model.objective_config = objective
        return model


# --- the run folder before the first step ---


def start_folder(config: HeadsConfig) -> None:
    """Refuses a folder that holds another run; removes it where it is to be
    replaced.
    """
    out = config.out
    if not runs.find_run(out):
        return
    if config.overwrite:
        runs.remove_run(out)
        return
    if config.resume == "none":
        raise InputError(
            f"{out}: already holds a run; go on with --resume auto, or give --overwrite"
            " or another --out"
        )
    file = out / runs.RUN_CONFIG_FILE
    if file.is_file() and read_config(file) is None:
        raise InputError(f"{out}: holds a run of towers; give another --out")


def open_data(config: HeadsConfig) -> Data:
    """Reads or embeds the pairs; what is decided of them is in the ledger."""
    data = open_vectors(config) if config.has_vectors else open_pictures(config)
    if data.held_out is not None:
        n_ids = len(np.unique(data.held_out.ids))
        if n_ids < N_FEW:
            held_out = counted(n_ids, "ids")
            logger.warning("%s held out: their recall means little", held_out)
    if config.clean is not None:
        known = data.ledger.get("suspects")
        if known is None:
            data.pairs, data.left_out = cleaned(data.pairs, config.clean)
            data.ledger.decide("suspects", [list(one) for one in data.left_out])
        else:
            data.left_out = [LeftOut(*one) for one in known]
            data.pairs = without(data.pairs, data.left_out, config.clean)
    if data.encoder is not None and not config.mask_duplicates:
        numbers = np.arange(len(data.pairs))
        data.pairs = dataclasses.replace(data.pairs, ids=numbers)
    return data


def open_vectors(config: HeadsConfig) -> Data:
    """The pairs of two files of vectors."""
    pairs, held_out = vector_pairs(config)
    data = {"training pairs": pairs.fingerprint()}
    if held_out is not None:
        data["held-out pairs"] = held_out.fingerprint()
    ledger = open_ledger(config.out, data, config.kept())
    if ledger.get("held_out") is None:
        rows = [] if held_out is None else held_out.rows[:, 0].tolist()
        ledger.decide("held_out", rows if config.held_out_share else [])
    fingerprint = data.get("held-out pairs")
    return Data(pairs, held_out, ledger, held_out_fingerprint=fingerprint)


def vector_pairs(config: HeadsConfig) -> tuple[VectorPairs, VectorPairs | None]:
    """The training pairs of two files, and the held-out ones."""
    assert config.a is not None and config.b is not None
    pairs = open_pairs(
        config.a,
        config.b,
        config.ids,
        config.a_ids,
        config.b_ids,
        groups=config.groups,
        weights=config.weights,
        drop=config.drop,
    )
    check_usable(config, pairs)
    if config.val_a is not None and config.val_b is not None:
        held_out = open_pairs(
            config.val_a, config.val_b, config.val_ids, drop=config.drop
        )
        check_usable(config, held_out)
        for side in ("a", "b"):
            width, of_val = getattr(pairs, side).shape[1], getattr(held_out, side)
            if of_val.shape[1] != width:
                raise InputError(
                    f"val_{side} has {of_val.shape[1]:,} columns, {side} has {width:,}"
                )
        return pairs, held_out
    if not config.held_out_share:
        return pairs, None
    return arrays.split(pairs, config.held_out_share)


def check_usable(config: HeadsConfig, pairs: VectorPairs) -> None:
    """Refuses pairs too many of which cannot be used."""
    total = len(pairs) + len(pairs.skipped)
    limit = config.max_bad_fraction
    check_fraction(pairs.name, "pairs", pairs.skipped, total, limit)


def picture_sources(config: HeadsConfig) -> tuple[Source, Source | None, Ledger]:
    """The training pairs of pictures and captions, the held-out ones, and the ledger,
    which knows these if a share is held out.
    """
    columns: dict[str, Any] = {
        "image_column": config.image_column,
        "caption_column": config.caption_column,
    }
    sources = [open_source(spec, **columns) for spec in config.sources]
    others = [open_source(spec, **columns) for spec in config.held_out_sources]
    data: dict[str, Fingerprint] = {"training pairs": mix(sources).fingerprint()}
    if others:
        data["held-out pairs"] = mix(others).fingerprint()
    ledger = open_ledger(config.out, data, config.kept())
    rows = ledger.get("held_out")
    if not config.held_out_share:
        if rows is None:
            ledger.decide("held_out", [])
        return mix(sources), mix(others) if others else None, ledger
    if rows is None:
        logger.info("reading all pairs once, to hold some out (--val-split) …")
        chosen = choose_held_out(sources, config.held_out_share)
        rows = [part.tolist() for part in chosen]
        ledger.decide("held_out", rows)
    parts = [np.array(part, np.int64) for part in rows]
    return *split(sources, parts), ledger


def open_pictures(config: HeadsConfig) -> Data:
    """The features of pictures and captions by the two frozen encoders."""
    training, held_out, ledger = picture_sources(config)
    assert config.image_encoder is not None and config.text_encoder is not None
    encoder = open_encoders(
        config.image_encoder, config.text_encoder, config.image_size
    )
    how: dict[str, Any] = {
        "workers": config.workers,
        "max_bad_fraction": config.max_bad_fraction,
    }
    pairs = embedded(training, encoder, **how)
    if held_out is None:
        return Data(pairs, None, ledger, encoder)
    judges = first_captions(embedded(held_out, encoder, kind="held-out pairs", **how))
    # a picture's right answer is its caption
    judges = dataclasses.replace(judges, ids=np.arange(len(judges)))
    fingerprint = held_out.fingerprint()
    return Data(pairs, judges, ledger, encoder, held_out_fingerprint=fingerprint)


# --- the fit, and what is written ---


def fit_and_write(
    config: HeadsConfig,
    data: Data,
    stop: Stop,
    on_epoch: Callable[[dict[str, Any]], object] | None,
) -> HeadsResult:
    """Fits the heads and writes the run; one that is whole is left as it is."""
    out, ledger = config.out, data.ledger
    finished = ledger.get("finished")
    if finished is not None and finished["epochs_asked"] == length_of(config):
        found = runs.find_best(out)
        checkpoint = runs.latest_checkpoint(out) if found is None else found[0]
        lines = runs.read_lines(out / runs.EPOCHS_FILE)
        return result_of(config, lines, checkpoint, {}, already_finished=True)
    write_whole(out / runs.RUN_CONFIG_FILE, config.to_json())
    skipped = write_skipped(out, data)
    write_suspects(out, data.left_out, config)
    log = EpochLog(out, data, on_epoch)
    began = time.perf_counter()
    fitted = choose(
        data.pairs,
        data.held_out,
        config,
        scales=FROZEN_SCALES if data.encoder is not None else USUAL_SCALES,
        folder=out / runs.STATE_FOLDER,
        on_epoch=log,
        stop=stop,
        decided=ledger.get("objective"),
        decide=lambda choice: decide_objective(ledger, choice),
    )
    log.write(fitted.history)
    if fitted.stopped and not fitted.history:
        return HeadsResult(out, 0, 0, 0, 0.0, None, stopped="SIGTERM")
    best = write_checkpoints(config, data, fitted)
    if not fitted.stopped:
        for name in ("ridge", "power", "by_column", "joined", "refit"):
            if name in fitted.decisions:
                ledger.decide(name, fitted.decisions[name])
        ledger.decide("finished", {"epochs_asked": length_of(config)})
        forget_states(out / runs.STATE_FOLDER)
    result = result_of(config, fitted.history, best, skipped)
    return dataclasses.replace(
        result,
        seconds=time.perf_counter() - began,
        stopped="SIGTERM" if fitted.stopped else None,
    )


def length_of(config: HeadsConfig) -> list[Any]:
    """What a finished run is whole by: with another one it goes on."""
    return [config.epochs, config.patience, config.refit]


def decide_objective(ledger: Ledger, choice: dict[str, Any]) -> None:
    """Notes the objective that held-out pairs chose."""
    ledger.decide("objective", choice)
    content = json.dumps(choice, indent=2)
    write_whole(ledger.file.with_name(runs.OBJECTIVES_FILE), content)


def result_of(
    config: HeadsConfig,
    history: list[dict[str, Any]],
    checkpoint: Path,
    skipped: Mapping[str, int],
    *,
    already_finished: bool = False,
) -> HeadsResult:
    """What a run came to, from the lines of its epochs."""
    last = history[-1]
    n_epochs = 1 if config.objective == "cca" else config.epochs
    facts = runs.read_validation(checkpoint) or {}
    return HeadsResult(
        config.out,
        last["epoch"],
        last["step"],
        last["samples_seen"],
        last.get("seconds", 0.0),
        checkpoint,
        facts.get("val_recall"),
        skipped,
        already_finished=already_finished,
        out_of_patience=last["epoch"] < n_epochs,
    )


def forget_states(folder: Path) -> None:
    """Removes the states of all fits but the first, which may go on for longer."""
    for file in folder.glob("*.pt"):
        if file.name != "fit.pt":
            file.unlink()


class EpochLog:
    """Writes ``epochs.jsonl`` and ``metrics.jsonl``, a line an epoch."""

    def __init__(
        self,
        out: Path,
        data: Data,
        on_epoch: Callable[[dict[str, Any]], object] | None,
    ) -> None:
        self._out, self._on_epoch = out, on_epoch
        self._skipped = by_reason(data.pairs.skipped)
        of_val = () if data.held_out is None else data.held_out.skipped
        self._val_skipped = by_reason(of_val)
        self._history: list[dict[str, Any]] = []

    def __call__(self, line: dict[str, Any]) -> None:
        if line["epoch"] == 1:
            self._history = []
        elif not self._history:  # taken up again
            lines = runs.read_lines(self._out / runs.EPOCHS_FILE)
            self._history = [x for x in lines if x["epoch"] < line["epoch"]]
        self._history.append(line)
        self.write(self._history)
        if self._on_epoch is not None:
            self._on_epoch(self._shown(line))

    def write(self, history: list[dict[str, Any]]) -> None:
        """Writes the lines of all epochs."""
        lines = [self._shown(line) for line in history]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        write_whole(self._out / runs.EPOCHS_FILE, text)
        kept = ("epoch", "step", "samples_seen", "loss")
        curve = [{key: line[key] for key in kept} for line in lines]
        text = "".join(json.dumps(line) + "\n" for line in curve)
        write_whole(self._out / runs.METRICS_FILE, text)

    def _shown(self, line: dict[str, Any]) -> dict[str, Any]:
        line = {**line, "skipped": self._skipped if line["epoch"] == 1 else {}}
        if self._val_skipped:
            line["val_skipped"] = self._val_skipped
        return line


def write_skipped(out: Path, data: Data) -> dict[str, int]:
    """Names the pairs that cannot be used; returns their numbers by reason."""
    place = {"step": 1, "epoch": 1}
    lines = [skip_line(place, skip) for skip in data.pairs.skipped[:MAX_NAMED]]
    if data.held_out is not None:
        place = {**place, "held_out": True}
        lines += [skip_line(place, skip) for skip in data.held_out.skipped[:MAX_NAMED]]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    write_whole(out / runs.SKIPPED_FILE, text)
    return by_reason(data.pairs.skipped)


def skip_line(place: dict[str, Any], skip: Skip) -> dict[str, Any]:
    """The line of ``skipped.jsonl`` of a pair."""
    return {**place, "rank": 0, **vars(skip)}


def write_suspects(out: Path, left_out: list[LeftOut], config: HeadsConfig) -> None:
    """Lists the pairs that are left out."""
    if config.clean is None:
        return
    text = io.StringIO(newline="")
    csv.writer(text).writerows([LeftOut._fields, *left_out])
    write_whole(out / runs.SUSPECTS_FILE, text.getvalue())


def write_checkpoints(config: HeadsConfig, data: Data, fitted: FittedHeads) -> Path:
    """Writes the heads of the best epoch and of the last, and what was joined; returns
    the best.
    """
    folder = config.out / runs.CHECKPOINTS_FOLDER
    for earlier in folder.glob("step-*"):
        shutil.rmtree(earlier)
    lines = {line["epoch"]: line for line in fitted.history}
    last, best = lines[max(lines)], lines[fitted.best_epoch]
    objective, facts = fitted.objective, measured(config, data)
    alone = fitted.heads if fitted.alone is None else fitted.alone
    is_refit = "refit" in fitted.decisions
    paths = []
    if not is_refit:
        paths.append(write_checkpoint(folder, data, alone, objective, best, facts))
        if last is not best and fitted.last is not None:
            write_checkpoint(folder, data, fitted.last, objective, last, facts)
    joined = fitted.decisions.get("joined", {})
    if is_refit or fitted.alone is not None:
        recall = joined["recall"] if fitted.alone is not None else best["val_recall"]
        line = {"step": last["step"] + 1, "val_loss": None, "val_recall": recall}
        path = write_checkpoint(folder, data, fitted.heads, objective, line, facts)
        if fitted.alone is not None:
            content = json.dumps(joined, indent=2)
            (path / runs.JOINED_FILE).write_text(content, encoding="utf-8")
        paths.append(path)
    return paths[-1]


def measured(config: HeadsConfig, data: Data) -> dict[str, Any]:
    """What validations are comparable by."""
    held_out = None
    if data.held_out_fingerprint is not None:
        held_out = digest([json.dumps(data.held_out_fingerprint, sort_keys=True)])
    return {"batch_size": config.batch_size, "held_out": held_out}


def write_checkpoint(
    folder: Path,
    data: Data,
    heads: Heads,
    objective: dict[str, Any],
    line: Mapping[str, Any],
    facts: Mapping[str, Any],
) -> Path:
    """Writes one checkpoint, whole or not at all."""
    path = folder / runs.CHECKPOINT.format(line["step"])
    with whole_folder(path) as place:
        model = data.model(heads, objective)
        save_model(place / runs.MODEL_FOLDER, model, objective)
        if line.get("val_recall") is not None:
            names = ("step", "val_loss", "val_recall")
            validation = {name: line[name] for name in names}
            validation |= {"metric": "val_recall", **facts}
            content = json.dumps(validation, indent=2) + "\n"
            (place / runs.VALIDATION_FILE).write_text(content, encoding="utf-8")
            flush(place / runs.VALIDATION_FILE)
    return path


# --- what other commands ask of a run ---


def held_out_pairs(config: HeadsConfig) -> VectorPairs | Source | None:
    """The held-out pairs of a run; InputError where its pairs have changed."""
    if config.has_vectors:
        return vector_pairs(config)[1]
    if not (config.out / runs.DECISIONS_FILE).is_file():
        raise InputError(f"{config.out}: has no {runs.DECISIONS_FILE}")
    return picture_sources(config)[1]
