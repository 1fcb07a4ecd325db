"""What ``cloob train`` says of a small set of pairs: what it will do with it, and what would do better."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from cloob.commands.steps import columns, shell
from cloob.recipes import get_recipe
from cloob.train.config import TrainConfig
from cloob.train.config.checks import aligns

SMALL = 5_000
"""Up to so many pairs a run gets advice; beyond, whoever has them is taken to know what they want."""
_MOST_BATCH = 256


@dataclass(frozen=True)
class Advice:
    """What would be done otherwise.

    Attributes:
        reasons: A sentence for each change.
        words: The words after ``cloob`` of the run that is advised.
    """

    reasons: tuple[str, ...]
    words: tuple[str, ...]


def advise(config: TrainConfig, pairs: int, steps: int, warmup: int) -> Advice | None:
    """Advice for a run that is about to begin; None where there is nothing to say.

    Args:
        config: The run's.
        pairs: Training pairs of an epoch.
        steps: Steps of the whole run; 0 where the pairs do not make one.
        warmup: Steps of its warm-up.
    """
    if pairs > SMALL:
        return None
    reasons, options = [], []
    scratch = not aligns(config) and config.towers.init is None
    if scratch:
        reasons.append(
            f"{pairs:,} pairs are few for towers that start from random weights; heads on two frozen encoders learn "
            "more from them, in minutes on a CPU"
        )
    size, good = config.run.batch_size, good_batch(pairs)
    if size > pairs:
        reasons.append(f"a batch of {size:,} is more than there are")
    elif size > 2 * good:
        reasons.append(f"a batch of {size:,} makes {pairs // size} steps of an epoch; a smaller one makes more")
    if warmup > steps // 4:
        reasons.append(f"{warmup:,} steps of warm-up leave little of {steps:,} steps")
    if not config.pairs.holds_out:
        reasons.append("without held-out pairs nobody sees when the training goes too far")
    elif not config.pairs.val_split and _only_demo(config.pairs.val_data) and not _only_demo(config.pairs.data):
        reasons.append(f"the held-out pairs are {', '.join(config.pairs.val_data)}, which are not like yours")
    if not reasons:
        return None
    advised = get_recipe("align") if scratch else config
    batch = good if advised.run.batch_size > 2 * good else advised.run.batch_size
    options += ["--batch-size", str(batch)] if batch != advised.run.batch_size else []
    if _only_demo(config.pairs.val_data):
        options += ["--val-split", f"{config.pairs.val_split or 0.1:g}"]
    else:
        options += ["--val-data", *config.pairs.val_data]
    length = advised.run.total_steps(max(1, pairs * 9 // 10 // batch))
    if (advised.optim.warmup or 0) > length // 4:
        options += ["--warmup", str(max(1, length // 10))]
    return Advice(
        tuple(reasons),
        (*_start(config, scratch or aligns(config)), *options, "--out", f"{os.fspath(config.save.out)}-advised"),
    )


def good_batch(pairs: int) -> int:
    """The power of two that makes 16 to 32 steps of an epoch, from 8 to 256."""
    return min(_MOST_BATCH, max(8, 1 << max(pairs // 16, 1).bit_length() - 1))


def lines(config: TrainConfig, pairs: int, steps: int, warmup: int) -> list[str]:
    """What is said before a run of a small set: what will be done, and what would do better, as a command."""
    advice = advise(config, pairs, steps, warmup)
    if advice is None:
        return []
    what = "heads on frozen encoders" if aligns(config) else config.towers.model or config.towers.init
    done = f"{pairs:,} pairs: {what}, {config.loss.objective}, batches of {config.run.batch_size:,}"
    done += f", {steps:,} steps, {warmup:,} of them warm-up" if steps else ""
    return [done, *(f"  - {reason}" for reason in advice.reasons), f"  better: {shell(advice.words)}"]


def _start(config: TrainConfig, align: bool) -> Sequence[str]:
    """The command without its options."""
    pairs = config.pairs
    where = ["align"] if align else ["--init", config.towers.init or ""]
    named = map(str, columns(pairs.image_column, pairs.caption_column))
    return ["train", *where, "--data", *pairs.data, *named, "--objective", config.loss.objective]


def _only_demo(specs: Sequence[str]) -> bool:
    return all(spec.partition(":")[0] == "demo" for spec in specs)
