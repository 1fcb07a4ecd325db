"""A run of heads: read or embed the pairs, clean them, fit, write the run folder.

The folder is as other runs have it (``cloob.models.runs``), so that ``eval``,
``embed``, ``index``, ``match``, ``export`` and ``load_model`` read it; ``state/`` holds
where the fits stand, from which a killed run goes on bit for bit.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from cloob.data.bad import by_reason, check_fraction
from cloob.data.open import open_source
from cloob.data.source import (
    Fingerprint,
    Source,
    choose_held_out,
    digest,
    mix,
    split,
)
from cloob.data.vectors import VectorPairs, hold_out, open_vector_pairs
from cloob.errors import InputError
from cloob.files import whole_folder, write_csv, write_whole
from cloob.functional.protocols import pair_numbers
from cloob.functional.ranking import mutual_ranks_of_ids
from cloob.heads.choose import choose
from cloob.heads.cleaning import LeftOut, suspicious_pairs, without
from cloob.heads.config import HeadsConfig, check_config, read_config
from cloob.heads.features import embedded, first_captions, open_encoders
from cloob.heads.fitted import (
    GALLERY,
    EpochLine,
    FittedHeads,
    OnEpoch,
    Rows,
    unit_sides,
)
from cloob.heads.head import Heads
from cloob.heads.ledger import Decisions, open_decisions, write_decisions
from cloob.heads.settings import USUAL_SCALES
from cloob.lock import lock_run_folder
from cloob.models import runs
from cloob.models.aligned.model import AlignedEncoder
from cloob.models.encoder import Model
from cloob.models.folder import save_model
from cloob.models.vectors import VectorEncoder

logger = logging.getLogger(__name__)

FROZEN_SCALES: dict[str, dict[str, float | bool]] = {
    "infoloob": {"inv_tau": 15.0},
    "clip": {"inv_tau": 15.0, "learnable_inv_tau": False},
    "cloob": {"inv_tau": 15.0},
}
"""Where ``auto`` starts on the features of frozen encoders."""
N_FEW = 20  # held-out ids or groups: one of them is 5 points of recall
TRAINING, HELD_OUT = "training pairs", "held-out pairs"


@dataclass(frozen=True)
class HeadsResult:
    """What a run of heads came to."""

    run: Path  # its folder
    epochs: int
    steps: int
    samples_seen: int
    seconds: float
    checkpoint: Path
    recall: float | None  # of the held-out pairs that chose
    # all their numbers, as of ``cloob.functional.protocols.pair_numbers``
    numbers: Mapping[str, object]
    skipped: Mapping[str, int]  # pairs by reason
    already_finished: bool
    out_of_patience: bool


def train_heads(config: HeadsConfig, *, on_epoch: OnEpoch | None = None) -> HeadsResult:
    """Fits heads to two files of vectors, or to the features of two frozen encoders,
    and writes a run folder.

    Whatever ends the process, the same call with ``resume="auto"`` goes on at the last
    epoch, bit for bit.

    Args:
        config: What to fit to what.
        on_epoch: Called with the line of every epoch.

    Returns:
        What the run came to.

    Raises:
        InputError: A setting or a file is not right, or another process writes to the
            run folder.
        TrainingFailed: The loss is not finite.

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
    check_config(config)
    with lock_run_folder(config.out):
        check_place(config)
        data = open_vectors(config) if config.has_vectors else open_pictures(config)
        warn_of_few(data)
        leave_out_suspects(config, data)
        began = time.perf_counter()
        is_finished = data.decisions.get("finished") == length_of(config)
        if not is_finished:
            start_run(config, data)
            fitted = fit_run(config, data, on_epoch)
            finish_run(config, data, fitted)
        seconds = time.perf_counter() - began
        return result_of(config, data, seconds, already_finished=is_finished)


@dataclass
class Data:
    """The pairs of a run, and the model that their heads belong to."""

    pairs: VectorPairs
    held_out: VectorPairs | None
    decisions: Decisions
    held_out_fingerprint: Fingerprint | None
    encoder: AlignedEncoder | None = None  # None for vectors

    def model(self, heads: Heads, objective: dict[str, object]) -> Model:
        """The model with these heads."""
        if self.encoder is None:
            return VectorEncoder(*heads, objective, self.pairs.encodings)
        return self.encoder.with_heads(heads, objective)


# --- the run folder and the pairs, before anything is written ---


def check_place(config: HeadsConfig) -> None:
    """Refuses a folder that holds other things, or a run; removes a run that is to be
    replaced.
    """
    out = config.out
    if not runs.run_files(out):
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


def open_vectors(config: HeadsConfig) -> Data:
    """The pairs of two files of vectors; the decisions list those of a share that is
    held out.
    """
    pairs, held_out = vector_pairs(config)
    decisions = decisions_about(config, pairs, held_out)
    decisions["held_out"] = []
    if held_out is not None and config.held_out_share:
        decisions["held_out"] = held_out.rows[:, 0].tolist()
    fingerprint = decisions["of"]["pairs"].get(HELD_OUT)
    return Data(pairs, held_out, decisions, fingerprint)


def decisions_about(
    config: HeadsConfig,
    training: VectorPairs | Source,
    held_out: VectorPairs | Source | None,
) -> Decisions:
    """What the run has decided; InputError where it was of other pairs or settings."""
    fingerprints = {TRAINING: training.fingerprint()}
    if held_out is not None:
        fingerprints[HELD_OUT] = held_out.fingerprint()
    return open_decisions(config.out, fingerprints, config.resumable_settings())


def vector_pairs(config: HeadsConfig) -> tuple[VectorPairs, VectorPairs | None]:
    """The training pairs of two files, and the held-out ones."""
    assert config.a is not None and config.b is not None
    pairs = open_vector_pairs(
        config.a,
        config.b,
        config.ids,
        config.a_ids,
        config.b_ids,
        groups=config.groups,
        weights=config.weights,
        drop=config.drop,
    )
    check_skipped(config, "pairs", pairs)
    held_out: VectorPairs | float = config.held_out_share
    if config.val_a is not None and config.val_b is not None:
        held_out = open_vector_pairs(
            config.val_a,
            config.val_b,
            config.val_ids,
            groups=config.val_groups,
            drop=config.drop,
        )
        check_skipped(config, "pairs", held_out)
    return hold_out(pairs, held_out)


def check_skipped(config: HeadsConfig, kind: str, pairs: VectorPairs) -> None:
    """Refuses pairs too many of which cannot be used."""
    total = len(pairs) + len(pairs.skipped)
    limit = config.max_bad_fraction
    check_fraction(pairs.name, kind, pairs.skipped, total, limit)


def open_pictures(config: HeadsConfig) -> Data:
    """The features of pictures and captions by the two frozen encoders."""
    training, held_out, decisions = picture_sources(config)
    assert config.image_encoder is not None and config.text_encoder is not None
    encoder = open_encoders(
        config.image_encoder, config.text_encoder, config.image_size
    )
    pairs = embedded(training, encoder, config.workers).pairs
    check_skipped(config, "samples", pairs)
    data = Data(pairs, None, decisions, None, encoder)
    if held_out is not None:
        data.held_out_fingerprint = held_out.fingerprint()
        judges = embedded(held_out, encoder, config.workers).pairs
        check_skipped(config, HELD_OUT, judges)
        # a picture's right answer is its caption
        data.held_out = numbered(first_captions(judges))
    return data


def picture_sources(config: HeadsConfig) -> tuple[Source, Source | None, Decisions]:
    """The training pairs of pictures and captions, the held-out ones, and the run's
    decisions, in which a share that is held out is noted.
    """
    training = open_sources(config, config.sources)
    held_out: Source | None = None
    if config.held_out_sources:
        held_out = open_sources(config, config.held_out_sources)
    decisions = decisions_about(config, training, held_out)
    if not config.held_out_share:
        decisions["held_out"] = []
        return training, held_out, decisions
    if "held_out" not in decisions:
        logger.info("reading all pairs once, to hold some out (--val-split) …")
        chosen = choose_held_out(training, config.held_out_share)
        decisions["held_out"] = chosen.tolist()
    rows = np.array(decisions["held_out"], np.int64)
    return *split(training, rows), decisions


def open_sources(config: HeadsConfig, specs: Iterable[str]) -> Source:
    """Pictures and captions, of several sources one after the other."""
    image, caption = config.image_column, config.caption_column
    sources = [
        open_source(spec, image_column=image, caption_column=caption) for spec in specs
    ]
    return mix(sources)


def numbered(pairs: VectorPairs) -> VectorPairs:
    """The pairs, each with an id of its own."""
    return replace(pairs, ids=np.arange(len(pairs)))


def warn_of_few(data: Data) -> None:
    """Warns of held-out pairs that are too few to judge by."""
    if data.held_out is not None and len(np.unique(data.held_out.groups())) < N_FEW:
        held_out = data.held_out.counted_units()
        logger.warning("%s held out: their recall means little", held_out)


def leave_out_suspects(config: HeadsConfig, data: Data) -> None:
    """Takes the suspects out of the training pairs, as was decided before or is now;
    then equal captions are negatives unless they are to be masked.
    """
    if config.clean is not None:
        if "suspects" not in data.decisions:
            data.decisions["suspects"] = suspicious_pairs(data.pairs)
        left_out = [LeftOut(*line) for line in data.decisions["suspects"]]
        data.pairs = without(data.pairs, left_out)
    if data.encoder is not None and not config.mask_duplicates:
        data.pairs = numbered(data.pairs)


# --- the fit, and what is written ---


def start_run(config: HeadsConfig, data: Data) -> None:
    """Writes what the run was asked and what it decided, before the first step."""
    out = config.out
    write_decisions(out, data.decisions)
    write_whole(out / runs.RUN_CONFIG_FILE, config.to_json())
    skipped: list[dict[str, object]] = [vars(skip) for skip in data.pairs.skipped]
    if data.held_out is not None:
        skipped += [{"held_out": True, **vars(skip)} for skip in data.held_out.skipped]
    write_lines(out / runs.SKIPPED_FILE, skipped)
    if config.clean is not None:
        rows = data.decisions["suspects"]
        write_csv(out / runs.SUSPECTS_FILE, [LeftOut._fields, *rows])


def fit_run(config: HeadsConfig, data: Data, on_epoch: OnEpoch | None) -> FittedHeads:
    """Fits heads to the pairs, an epoch's line at a time."""
    file = config.out / runs.EPOCHS_FILE

    def write_epoch(line: EpochLine) -> None:
        # what stands there of this epoch is of an earlier trial, or a killed run's
        lines = runs.read_lines(file)
        earlier = [other for other in lines if other["epoch"] < line["epoch"]]
        write_lines(file, [*earlier, line])
        if on_epoch is not None:
            on_epoch(line)

    return choose(
        data.pairs,
        data.held_out,
        config,
        scales=USUAL_SCALES if data.encoder is None else FROZEN_SCALES,
        folder=config.out / runs.STATE_FOLDER,
        on_epoch=write_epoch,
    )


def finish_run(config: HeadsConfig, data: Data, fitted: FittedHeads) -> None:
    """Writes the heads and what was decided; states are kept of fits that may go on for
    longer.
    """
    write_lines(config.out / runs.EPOCHS_FILE, fitted.history)
    write_checkpoint(config, data, fitted)
    data.decisions |= {**fitted.decisions, "finished": length_of(config)}
    write_decisions(config.out, data.decisions)
    for file in (config.out / runs.STATE_FOLDER).glob("refit*.pt"):
        file.unlink()


def length_of(config: HeadsConfig) -> list[int]:
    """What a finished run is whole by: with another one it goes on."""
    return [config.epochs, config.patience, config.refit]


def write_lines(file: Path, lines: Sequence[Mapping[str, object]]) -> None:
    """Writes a file of JSON lines."""
    write_whole(file, "".join(json.dumps(line) + "\n" for line in lines))


def write_checkpoint(config: HeadsConfig, data: Data, fitted: FittedHeads) -> None:
    """Writes the heads of the best epoch, with what was joined with them, and removes
    earlier ones.
    """
    best_step = fitted.history[fitted.best_epoch - 1]["step"]
    folder = config.out / runs.CHECKPOINTS_FOLDER
    checkpoint = folder / runs.CHECKPOINT.format(best_step)
    with whole_folder(checkpoint) as place:
        model = data.model(fitted.heads, fitted.objective)
        save_model(place / runs.MODEL_FOLDER, model, fitted.objective)
        if data.held_out is not None:
            fingerprint = json.dumps(data.held_out_fingerprint, sort_keys=True)
            validation = {
                "metric": "val_recall",
                "val_recall": fitted.recall,
                "held_out": digest([fingerprint]),
                "numbers": held_out_numbers(fitted.heads, data.held_out),
            }
            content = json.dumps(validation, indent=2) + "\n"
            (place / runs.VALIDATION_FILE).write_text(content, encoding="utf-8")
    for earlier in folder.glob("step-*"):
        if earlier != checkpoint:
            shutil.rmtree(earlier)


def held_out_numbers(heads: Heads, held_out: VectorPairs) -> dict[str, object]:
    """What other people's tables show of those held-out pairs that ``val_recall`` is
    of; intervals are over groups where there are any.
    """
    judged = held_out.at_most(GALLERY)
    rows = Rows.of(judged)
    ranks = mutual_ranks_of_ids(*unit_sides(heads, rows), rows.ids)
    return pair_numbers(ranks, rows.ids, units=judged.units_of_ids())


def result_of(
    config: HeadsConfig, data: Data, seconds: float, *, already_finished: bool
) -> HeadsResult:
    """What a finished run came to."""
    last = runs.read_lines(config.out / runs.EPOCHS_FILE)[-1]
    checkpoint = runs.latest_checkpoint(config.out)
    validation = runs.read_validation(checkpoint) or {}
    n_epochs = 1 if config.is_closed_form else config.epochs
    return HeadsResult(
        run=config.out,
        epochs=last["epoch"],
        steps=last["step"],
        samples_seen=last["samples_seen"],
        seconds=seconds,
        checkpoint=checkpoint,
        recall=validation.get("val_recall"),
        numbers=validation.get("numbers", {}),
        skipped=by_reason(data.pairs.skipped),
        already_finished=already_finished,
        out_of_patience=last["epoch"] < n_epochs,
    )


# --- what other commands ask of a run ---


def open_held_out(config: HeadsConfig) -> VectorPairs | Source | None:
    """The pairs of vectors that a run held out, or its source of pictures; InputError
    where its pairs have changed.
    """
    if config.has_vectors:
        return vector_pairs(config)[1]
    if not (config.out / runs.DECISIONS_FILE).is_file():
        raise InputError(f"{config.out}: has no {runs.DECISIONS_FILE}")
    return picture_sources(config)[1]
