"""What ``cloob train`` says of a small set of pairs: what it will do with it, and what would do better."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass

from cloob.commands.steps import columns, shell
from cloob.commands.typed import words_without
from cloob.data.shards.spec import is_remote
from cloob.data.split import most_held_out
from cloob.errors import counted
from cloob.recipes import get_recipe
from cloob.train.config import TrainConfig
from cloob.train.config.checks import aligns
from cloob.train.config.pairs import VAL_SPLIT
from cloob.train.towers.build import DEFAULT_MODEL

SMALL = 5_000
"""Up to so many pairs a run gets advice; beyond, whoever has them is taken to know what they want."""
FEW = 50_000
"""Up to so many heads on frozen encoders are what to begin with (docs/choose.md; they were studied with 43,276)."""
_MOST_BATCH = 256


@dataclass(frozen=True)
class Advice:
    """What would be done otherwise.

    Attributes:
        reasons: A sentence for each change.
        words: The words after ``cloob`` of the run that is advised; none where held-out pairs are missing and
            none can be split off.
    """

    reasons: tuple[str, ...]
    words: tuple[str, ...]


def advise(config: TrainConfig, pairs: int, steps: int, warmup: int, typed: Sequence[str]) -> Advice | None:
    """Advice for a run that is about to begin; None where there is nothing to say.

    Args:
        config: The run's.
        pairs: Training pairs of an epoch.
        steps: Steps of the whole run; 0 where the pairs do not make one.
        warmup: Steps of its warm-up.
        typed: The words after ``cloob train`` that the configuration was read from.
    """
    if pairs > SMALL:
        return None
    reasons = []
    scratch = not aligns(config) and config.towers.init is None and config.towers.init_image is None
    if scratch:
        are = "is" if pairs == 1 else "are"
        reasons.append(
            f"{counted(pairs, 'pairs')} {are} few for towers that start from random weights; heads on two frozen "
            "encoders learn more from them, in minutes on a CPU"
        )
    size = config.run.batch_size
    if size > pairs:
        reasons.append(f"a batch of {size:,} is more than there are")
    elif size > 2 * good_batch(pairs):
        reasons.append(f"a batch of {size:,} makes {pairs // size} steps of an epoch; a smaller one makes more")
    if warmup > steps // 4:
        reasons.append(f"{warmup:,} steps of warm-up leave little of {steps:,} steps")
    if not config.pairs.holds_out:
        reasons.append("without held-out pairs nobody sees when the training goes too far")
    elif config.pairs.judged_by_demo:
        reasons.append(f"the held-out pairs are {', '.join(config.pairs.val_data)}, which are not like yours")
    if not reasons:
        return None
    return Advice(tuple(reasons), _words(config, pairs, typed, scratch=scratch))


def good_batch(pairs: int) -> int:
    """The power of two that makes 16 to 32 steps of an epoch, from 8 to 256; all pairs where these are fewer."""
    return min(pairs, _MOST_BATCH, max(8, 1 << max(pairs // 16, 1).bit_length() - 1))


def shorter_warmup(config: TrainConfig, pairs: int) -> dict[str, str]:
    """``--warmup`` of a tenth of the run, where the configuration's takes more than a quarter; else nothing."""
    steps = config.run.total_steps(pairs // config.run.batch_size)
    return {"--warmup": str(max(1, steps // 10))} if (config.optim.warmup or 0) > steps // 4 else {}


def lines(config: TrainConfig, pairs: int, steps: int, warmup: int, typed: Sequence[str]) -> list[str]:
    """What is said before a run of a small set: what will be done, and what would do better, as a command."""
    advice = advise(config, pairs, steps, warmup, typed)
    if advice is None:
        return []
    what = "heads on frozen encoders" if aligns(config) else _towers(config)
    done = f"{counted(pairs, 'pairs')}: {what}, {config.loss.objective}, batches of {config.run.batch_size:,}"
    done += f", {steps:,} steps, {warmup:,} of them warm-up" if steps else ""
    better = [f"  better: {shell(advice.words)}"] if advice.words else []
    return [done, *(f"  - {reason}" for reason in advice.reasons), *better]


def _words(config: TrainConfig, pairs: int, typed: Sequence[str], *, scratch: bool) -> tuple[str, ...]:
    """The advised run: by another recipe from scratch, else what was typed but for what is advised against."""
    split = not config.pairs.holds_out or config.pairs.judged_by_demo
    left = pairs - most_held_out(pairs, VAL_SPLIT) if split else pairs
    if left < 2 or (split and any(map(is_remote, config.pairs.data))):  # of streamed pairs none are split off
        return ()
    start = get_recipe("align") if scratch else config
    batch = start.run.batch_size
    batch = good_batch(left) if batch > min(2 * good_batch(left), left) else batch
    changes: dict[str, str] = {}
    if batch != start.run.batch_size:
        changes["--batch-size"] = str(batch)
    changes |= shorter_warmup(start.override(batch_size=batch), left)
    if split:
        changes["--val-split"] = f"{VAL_SPLIT:g}"
    if split and start.loss.retrieval_from and start.save.best == "val_loss":
        changes["--best"] = "val_recall"  # the loss is another from there on
    changes["--out"] = f"{os.fspath(config.save.out)}-advised"
    if scratch:
        kept = _by_align(config, split=split)
    else:
        kept = words_without(typed, {*changes, "--val-data"} if split else changes)
    return ("train", *kept, *itertools.chain.from_iterable(changes.items()))


def _by_align(config: TrainConfig, *, split: bool) -> list[str]:
    """Heads on frozen encoders: the run's pairs and objective, and its held-out pairs unless they are split off."""
    pairs = config.pairs
    held_out: list[str] = []
    if not split:
        held_out = ["--val-split", f"{pairs.val_split:g}"] if pairs.val_split else ["--val-data", *pairs.val_data]
    named = map(str, columns(pairs.image_column, pairs.caption_column))
    return ["align", "--data", *pairs.data, *named, "--objective", config.loss.objective, *held_out]


def _towers(config: TrainConfig) -> str:
    towers = config.towers
    if towers.init_image is not None:
        return f"a new text tower for the images of {towers.init_image}"
    return towers.model or towers.init or DEFAULT_MODEL
