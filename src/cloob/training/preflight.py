"""What can be refused before torch is imported: what does not go together, and models
that are not there.
"""

from __future__ import annotations

import os

from cloob.data.shards.spec import is_remote
from cloob.errors import InputError
from cloob.family import FAMILY
from cloob.models.source import check_name
from cloob.training.config import TrainConfig


def preflight(config: TrainConfig) -> None:
    """Refuses a run that cannot begin, as far as the configuration shows; files are
    checked where they are opened.
    """
    check_combination(config)
    if _processes() > 1:  # one that ended alone would leave the others waiting for it
        return
    if config.model is not None:
        check_name(config.model)


def check_combination(config: TrainConfig) -> None:
    """Refuses values that exclude others, or need others that are missing; InputError
    names the first.
    """
    config.check_member()
    if not FAMILY[config.objective].hopfield:
        other = f"{config.objective}, which has no retrieval"
        config.refuse(["retrieval_from"], other)
    if config.retrieval_from:
        config.refuse(["learnable_beta"], "--retrieval-from: it would have no part")
    _check_ranks(config)
    _check_start(config)
    _check_length(config)
    _check_held_out(config)
    if not (config.data or config.given_pairs):
        raise InputError(
            "data is missing; give --data with your pairs (a table such as pairs.csv,"
            " shards, or a folder of images with .txt files next to them), or --data"
            " demo for the bundled set; `cloob train vectors` takes --a and"
            " --b"
        )


def _check_ranks(config: TrainConfig) -> None:
    """Refuses what ranks cannot do together."""
    # A rank whose batch lost samples has fewer micro-batches, and shards are gathered
    # in every forward pass: the other ranks would wait for it.
    if config.micro_batch_size:
        config.refuse(["fsdp"], "--micro-batch-size")
    if config.compile:
        config.refuse(["fsdp"], "--compile")
    if config.fsdp:
        config.refuse(["ema"], "--fsdp")
    if config.fsdp and _processes() == 1:
        raise InputError(
            "fsdp is True, but there is one process; start several with torchrun, or"
            " leave it out"
        )


def _check_start(config: TrainConfig) -> None:
    """Refuses what the first weights cannot serve."""
    if config.given_towers is not None:
        config.refuse(("init", "freeze"), "towers=, which gives both towers")
        config.refuse(["fsdp"], "towers=: it knows the layers of cloob's towers alone")
    if config.init is not None:
        config.refuse(("model", "image_size"), "--init, which has its own")
    if config.resume != "none":
        config.refuse(["overwrite"], "--resume auto")


def _check_length(config: TrainConfig) -> None:
    """Refuses two lengths of the run, and a schedule without restarts that has some."""
    if config.epochs is not None and config.steps is not None:
        raise InputError(
            f"epochs is {config.epochs} and steps is {config.steps}; give one of them:"
            " both are the length of the run"
        )
    if config.schedule != "cosine-restarts":
        other = f"schedule {config.schedule}; --schedule cosine-restarts has them"
        config.refuse(["restarts"], other)


def _check_held_out(config: TrainConfig) -> None:
    """Refuses settings of the validation that its pairs cannot serve."""
    if config.best not in ("val_loss", "val_recall") and config.given_metrics is None:
        raise InputError(
            f"best is {config.best!r}; it must be one of val_loss, val_recall, or a"
            " metric of cloob.train(…, metrics=…)"
        )
    if config.val_data:
        config.refuse(["val_split"], "--val-data")
    if config.val_split and any(map(is_remote, config.data)):
        raise InputError(
            f"val_split is {config.val_split}, but streamed pairs would all be fetched"
            " to hold some out; give --val-data in its place"
        )
    if not config.holds_out:
        advice = "a run without held-out pairs; give --val-data or --val-split"
        config.refuse(["patience"], advice)
    elif config.retrieval_from and config.best == "val_loss":
        raise InputError(
            "--retrieval-from changes the loss, by which epochs cannot be compared"
            " then; use --best val_recall"
        )


def _processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))
