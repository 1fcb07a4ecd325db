"""``cloob train vectors`` and ``cloob train align``: heads on vectors, or on two frozen
encoders.
"""

from __future__ import annotations

import logging
import typing
from functools import partial
from pathlib import Path

from cloob.commands.console import (
    print_length,
    say,
    say_next,
    say_next_of_pictures,
)
from cloob.commands.protocols import print_numbers
from cloob.heads.config import HeadsConfig, check_config
from cloob.models.source import check_packages

if typing.TYPE_CHECKING:
    from cloob.heads.fitted import EpochLine
    from cloob.heads.run import HeadsResult


def run(config: HeadsConfig) -> int:
    """Trains heads; 0 when the run reached its end."""
    check_config(config)
    if not config.has_vectors:
        check_packages([str(config.image_encoder), str(config.text_encoder)])
    say("opening data …")  # the imports alone take seconds
    from cloob.heads.run import train_heads

    for name in ("cloob.heads", "cloob.data.open", "cloob.data.vectors"):
        logging.getLogger(name).setLevel(logging.INFO)
    result = train_heads(config, on_epoch=partial(print_epoch, config.objective))
    print_result(config, result)
    return 0


def print_epoch(objective: str, line: EpochLine) -> None:
    """Prints an epoch's line of the record."""
    message = f"{objective}: solved"
    if line["loss"] is not None:
        message = f"{objective}: epoch {line['epoch']} done"
        message += f", mean loss {line['loss']:.4f}"
    if line["val_recall"] is not None:
        message += f", mean recall {100 * line['val_recall']:.1f} %"
    say(message)


def print_result(config: HeadsConfig, result: HeadsResult) -> None:
    """Says what a run came to, and what may come next."""
    out = result.run
    print_length(result, config.patience)
    if result.already_finished:
        return
    if result.skipped:
        counts = ", ".join(f"{n:,} {reason}" for reason, n in result.skipped.items())
        print(f"skipped (named in skipped.jsonl): {counts}")
    if result.recall is not None:
        place = result.checkpoint.name
        print(
            f"{out}:best: val_recall {result.recall:.4g} ({place}), of the pairs that"
            " chose it: lower on others"
        )
        print_numbers(result.numbers)
    say_what_follows(config, out)


def say_what_follows(config: HeadsConfig, out: Path) -> None:
    """Says the commands that take the run."""
    if config.has_vectors:
        judge = ["--held-out"] if config.holds_out else ["--a", "A.npy", "--b", "B.npy"]
        embed: list[str | Path] = ["embed", out, "--a", str(config.a)]
        say_next(["eval", out, *judge], [*embed, "--out", "rows.npy"])
        return
    say_next_of_pictures(out, config.sources[0], config.holds_out)
