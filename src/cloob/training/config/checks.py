"""What can be refused before torch is imported: what does not go together, and models
that are not there.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from cloob.data.shards.spec import is_remote
from cloob.errors import InputError, refuse
from cloob.family import CONTRASTS, FAMILY
from cloob.models.source import check_name, check_packages
from cloob.training.config import TrainConfig
from cloob.training.config.parts import HEADS, LENGTHS, AlignConfig, OptimConfig

_NEEDS = (
    *(
        "a needs b",
        "b needs a",
        "ids needs a",
        "a_ids needs b_ids",
        "b_ids needs a_ids",
        "a_ids needs a",
    ),
    *("val_a needs val_b", "val_b needs val_a", "val_ids needs val_a", "val_a needs a"),
)


def preflight(config: TrainConfig) -> None:
    """Refuses a run that cannot begin, as far as the configuration shows; files are
    checked where they are opened.
    """
    check_combination(config)
    if _processes() > 1:  # one that ended alone would leave the others waiting for it
        return
    check_packages(config.align.encoders())
    if config.towers.model is not None and config.towers.init is None:
        check_name(config.towers.model)


def check_combination(config: TrainConfig) -> None:
    """Refuses values that exclude others, or need others that are missing; InputError
    names the first.
    """
    values = {
        leaf: value
        for part in vars(config).values()
        for leaf, value in vars(part).items()
    }
    for key, other, excluded in _exclusions(config):
        if excluded:
            raise InputError(
                f"{key} is {values[key]!r}; it must be left out with {other}"
            )
    _check_run(config)
    if config.given.given_towers is not None:
        check_without_heads(config.align)
        return
    if config.has_vectors:
        for one, other in (pair.split(" needs ") for pair in _NEEDS):
            if values[one] and values[other] is None:
                raise InputError(
                    f"{other} is missing: --{one.replace('_', '-')} needs"
                    f" --{other.replace('_', '-')}"
                )
        for key in (
            "data",
            "val_data",
            "model",
            "init",
            "image_size",
            "image_encoder",
            "text_encoder",
        ):
            if values[key]:
                raise InputError(
                    f"{key} is {values[key]!r}, but --a and --b give vectors; leave"
                    " it out"
                )
        check_with_heads(config)
    elif config.align.encoders():
        for key in ("image_encoder", "text_encoder"):
            if values[key] is None:
                raise InputError(
                    f"{key} is missing: heads need both --image-encoder and"
                    " --text-encoder"
                )
        for key in ("model", "init"):
            if values[key]:
                raise InputError(
                    f"{key} is {values[key]!r}, but the encoders are given by"
                    " --image-encoder and --text-encoder"
                )
        check_with_heads(config)
    elif config.towers.init is None:  # which may hold heads
        check_without_heads(config.align)


def _exclusions(config: TrainConfig) -> Iterator[tuple[str, str, object]]:
    """A leaf, what excludes it, and whether it does so here."""
    run, save, optim, pairs, files = (
        config.run,
        config.save,
        config.optim,
        config.pairs,
        config.vectors,
    )
    loss, name = config.loss, config.loss.objective
    member, paper = FAMILY.get(name), loss.scale == "paper"
    sigmoid = member is not None and not CONTRASTS[member.contrast].softmax
    retrieves = member is not None and member.hopfield
    yield (
        "overwrite",
        f"--resume {save.resume}",
        save.overwrite and save.resume != "none",
    )
    # A rank whose batch lost samples has fewer micro-batches, and both of these
    # communicate in every forward pass: the other ranks would wait for it.
    yield "sync_bn", "--micro-batch-size", run.sync_bn and run.micro_batch_size
    yield "fsdp", "--micro-batch-size", run.fsdp and run.micro_batch_size
    # GradScaler looks for overflow in one rank's shard and would scale every rank by
    # another factor.
    yield "fsdp", "--precision fp16 (take bf16)", run.fsdp and run.precision == "fp16"
    yield "fsdp", "--compile", run.fsdp and run.compile
    yield "ema", "--fsdp", optim.ema and run.fsdp
    yield "ema", "the objective cca, which takes no steps", optim.ema and name == "cca"
    for key in loss.overrides():
        yield key, "the objective cca, which has no loss", name == "cca"
        yield key, "the objective auto, which tries several", name == "auto"
    yield "beta", f"{name}, which has no retrieval", loss.beta and not retrieves
    yield (
        "retrieval_from",
        f"{name}: it has no retrieval",
        loss.retrieval_from and not retrieves,
    )
    yield (
        "learnable_beta",
        "--retrieval-from: it would have no part",
        loss.retrieval_from and loss.learnable_beta,
    )
    yield "scale", name, sigmoid and paper
    yield (
        "bias",
        f"{name}, in which it would cancel",
        loss.bias is not None and not sigmoid,
    )
    yield (
        "learnable_inv_tau",
        "the scale paper: it would rise to its bound",
        loss.learnable_inv_tau and paper,
    )
    yield "val_split", "--val-data", pairs.val_split and pairs.val_data
    yield "val_split", "--val-a", pairs.val_split and files.val_a
    yield "ids", "--a-ids and --b-ids", files.ids and files.a_ids and files.b_ids
    if config.given.given_towers is not None:
        alone = "towers=: it knows the layers of cloob's towers alone"
        for part, keys, other in (
            (config.towers, ("init", "freeze"), "towers=, which gives both towers"),
            (
                config.align,
                ("image_encoder", "text_encoder"),
                "towers=, which gives both towers",
            ),
            (run, ("fsdp", "grad_checkpointing", "channels_last"), alone),
            (optim, ("layer_decay",), alone),
        ):
            for key in keys:
                yield key, other, getattr(part, key) != getattr(type(part), key)


def _check_run(config: TrainConfig) -> None:
    run, optim, towers, pairs = config.run, config.optim, config.towers, config.pairs
    save, given = config.save, config.given
    lengths = [
        f"{name} is {value}"
        for name in LENGTHS
        if (value := getattr(run, name)) is not None
    ]
    if len(lengths) > 1:
        raise InputError(
            f"{' and '.join(lengths)}; give one of them: all are the length of the run"
        )
    if run.fsdp and _processes() == 1:
        raise InputError(
            "fsdp is True, but there is one process; start several with torchrun, or"
            " leave it out"
        )
    if save.best not in ("val_loss", "val_recall") and given.given_metrics is None:
        raise InputError(
            f"best is {save.best!r}; it must be one of val_loss, val_recall, or a"
            " metric of cloob.train(…, metrics=…)"
        )
    if optim.restarts != OptimConfig.restarts and optim.schedule != "cosine-restarts":
        schedule = f"the schedule is {optim.schedule!r}; add --schedule cosine-restarts"
        raise InputError(f"restarts is {optim.restarts}, but {schedule}")
    if towers.average_with_start is not None and towers.init is None:
        raise InputError(
            "average_with_start needs the trained weights of a start; give --init"
        )
    if (
        config.loss.retrieval_from
        and config.holds_out
        and config.save.best == "val_loss"
    ):
        raise InputError(
            "--retrieval-from changes the loss, by which epochs cannot be compared"
            " then; use --best val_recall"
        )
    if pairs.val_split and any(map(is_remote, pairs.data)):
        fetched = (
            "but streamed pairs would all be fetched to hold some out; give --val-data"
            " in its place"
        )
        raise InputError(f"val_split is {pairs.val_split}, {fetched}")
    no_pairs = (
        "but there are no held-out pairs; give"
        f" {'--val-a' if config.has_vectors else '--val-data'} or --val-split"
    )
    if run.patience and not config.holds_out and config.loss.objective != "cca":
        raise InputError(f"patience is {run.patience}, {no_pairs}, or --patience 0")
    if pairs.val_every > 1 and not config.holds_out:
        raise InputError(f"val_every is {pairs.val_every}, {no_pairs}")
    if not (config.has_vectors or config.align.encoders()):
        headless = {
            "cca": (
                "which is for `cloob train vectors` and `cloob train align`; name"
                " another"
            ),
            "auto": (
                "but there are no heads; give --a and --b, or both encoders, or name an"
                " objective"
            ),
        }
        if advice := headless.get(config.loss.objective):
            raise InputError(f"objective is {config.loss.objective!r}, {advice}")
    if not pairs.data and not config.has_vectors and config.given.given_pairs is None:
        forms = (
            "a table such as pairs.csv, shards, or a folder of images with .txt files"
            " next to them"
        )
        others = (
            "--data demo for the set that comes along, or of `cloob train vectors` --a"
            " and --b"
        )
        raise InputError(
            f"data is missing; give --data with your pairs ({forms}), or {others}"
        )


def check_with_heads(config: TrainConfig) -> None:
    """Refuses settings that make no sense where nothing but heads is trained."""
    auto, members = config.loss.objective == "auto", config.align.members or 1
    if auto or members > 1:
        requested = "objective is 'auto'" if auto else f"members is {members}"
        if not config.holds_out:
            other = f"; {'name an objective' if auto else 'leave it out'}, or give"
            raise InputError(
                f"{requested}, but there are no held-out pairs to choose by{other}"
                " --val-split"
            )
        if _processes() > 1:
            raise InputError(
                f"{requested}, which needs one process; choose with one, then train"
                " with what it chose"
            )
        if config.save.best == "val_loss":
            raise InputError(
                f"best is 'val_loss', but {requested}, which goes by recall; leave"
                " --best out"
            )
    small, once = (
        "heads on frozen encoders are too small for it",
        "heads train on features made once",
    )
    for part, keys, reason in (
        (config.run, ("fsdp", "compile", "grad_checkpointing"), small),
        (config.pairs, ("shuffle_buffer", "flip", "crop_scale"), once),
        (config.optim, ("layer_decay",), once),
        (config.towers, ("freeze",), "both encoders are frozen anyway"),
    ):
        for key in keys:
            if (value := getattr(part, key)) != getattr(type(part), key):
                raise InputError(f"{key} is {value!r}, but {reason}; leave it out")


def check_without_heads(align: AlignConfig) -> None:
    """Refuses settings of heads where there are none, but for those that a config.json
    of a run has filled in.
    """
    advice = (
        "but there are no heads; give --image-encoder and --text-encoder, or --a and"
        " --b, or leave it out"
    )
    refuse(
        {
            f"{key} is {value}, {advice}": value not in (None, HEADS.get(key))
            for key, value in vars(align).items()
        }
    )


def _processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))
