"""What can be refused before torch is imported: what does not go together, and models that are not there."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator

from cloob.data.shards.spec import is_remote
from cloob.errors import InputError
from cloob.family import CONTRASTS, FAMILY
from cloob.models.source import check_name, check_packages
from cloob.training.config import TrainConfig
from cloob.training.config.parts import HEADS, LENGTHS, AlignConfig, OptimConfig

_NEEDS = (
    *("a needs b", "b needs a", "ids needs a", "a_ids needs b_ids", "b_ids needs a_ids", "a_ids needs a"),
    *("val_a needs val_b", "val_b needs val_a", "val_ids needs val_a", "val_a needs a"),
)
Conflict = tuple[object, str]  # whether a combination is there, and the error that it is


def preflight(config: TrainConfig) -> None:
    """Refuses a run that cannot begin, as far as its words say; what is about files is said by what opens them."""
    check_combination(config)
    if _processes() > 1:  # one that ended alone would leave the others waiting for it
        return
    check_packages(config.align.encoders())
    if config.towers.model is not None and config.towers.init is None:
        check_name(config.towers.model)


def check_combination(config: TrainConfig) -> None:
    """Refuses values that exclude each other, or need others that are missing; InputError names the first."""
    conflicts = [_of_running(config), _of_objective(config), _of_pairs(config)]
    if any(vars(config.vectors).values()):
        conflicts += [_of_vectors(config), _beside_heads(config)]
    elif config.align.encoders():
        conflicts += [_of_encoders(config), _beside_heads(config)]
    elif config.towers.init is None:  # which may hold heads
        conflicts.append(_without_heads(config.align))
    refuse(itertools.chain.from_iterable(conflicts))


def check_start(config: TrainConfig, *, aligned: bool) -> None:
    """Refuses settings that do not suit what ``init`` holds: two towers, or heads on frozen encoders."""
    refuse(_beside_heads(config) if aligned else _without_heads(config.align))


def refuse(conflicts: Iterable[Conflict]) -> None:
    """InputError for the first combination that is there."""
    for is_there, error in conflicts:
        if is_there:
            raise InputError(error)


def _excluded(part: object, key: str, there: object, beside: str) -> Conflict:
    return there, f"{key} is {getattr(part, key)!r}; it must be left out with {beside}"


def _of_running(config: TrainConfig) -> Iterator[Conflict]:
    run, save, optim, towers = config.run, config.save, config.optim, config.towers
    given = [f"{name} is {value}" for name in LENGTHS if (value := getattr(run, name)) is not None]
    yield len(given) > 1, f"{' and '.join(given)}; give one of them, each is the length of the run"
    yield _excluded(save, "overwrite", save.overwrite and save.resume != "none", f"--resume {save.resume}")
    # A rank whose batch lost samples has fewer micro-batches, and both of these communicate in each forward pass: the
    # other ranks would wait for it.
    for key in ("sync_bn", "fsdp"):
        yield _excluded(run, key, getattr(run, key) and run.micro_batch_size, "--micro-batch-size")
    # GradScaler looks for overflow in one rank's shard and would scale each rank by another factor.
    yield _excluded(run, "fsdp", run.fsdp and run.precision == "fp16", "--precision fp16 (take bf16)")
    yield _excluded(run, "fsdp", run.fsdp and run.compile, "--compile")
    alone = run.fsdp and _processes() == 1
    yield alone, "fsdp is True, but there is one process; start several with torchrun, or leave it out"
    restarts, schedule = optim.restarts, optim.schedule
    cycles = restarts != OptimConfig.restarts and schedule != "cosine-restarts"
    yield cycles, f"restarts is {restarts}, but the schedule is {schedule!r}; add --schedule cosine-restarts"
    average = towers.average_with_start is not None and towers.init is None
    yield average, "average_with_start needs the trained weights of a start; give --init"


def _of_objective(config: TrainConfig) -> Iterator[Conflict]:
    loss, name = config.loss, config.loss.objective
    for key in loss.overrides() if name == "cca" else ():
        yield _excluded(loss, key, True, "the objective cca, which has no loss")
    member, paper = FAMILY.get(name), loss.scale == "paper"
    sigmoid, plain = member and not CONTRASTS[member.contrast].softmax, not (member and member.hopfield)
    yield _excluded(loss, "beta", plain and loss.beta, f"{name}, which has no retrieval")
    yield _excluded(loss, "retrieval_from", plain and loss.retrieval_from, f"{name}: it has no retrieval")
    no_part = "--retrieval-from: it would have no part"
    yield _excluded(loss, "learnable_beta", loss.retrieval_from and loss.learnable_beta, no_part)
    by_loss = loss.retrieval_from and config.holds_out and config.save.best == "val_loss"
    yield by_loss, "--retrieval-from changes the loss, by which epochs cannot be compared then; use --best val_recall"
    yield _excluded(loss, "scale", sigmoid and paper, name)
    yield _excluded(loss, "bias", loss.bias is not None and not sigmoid, f"{name}, in which it would cancel")
    rises = "the scale paper: it would rise to its bound"
    yield _excluded(loss, "learnable_inv_tau", loss.learnable_inv_tau and paper, rises)


def _of_pairs(config: TrainConfig) -> Iterator[Conflict]:
    pairs, run, vectors = config.pairs, config.run, any(vars(config.vectors).values())
    yield _excluded(pairs, "val_split", pairs.val_split and pairs.val_data, "--val-data")
    fetched = "but streamed pairs would all be fetched to hold some out; give --val-data in its place"
    yield pairs.val_split and any(map(is_remote, pairs.data)), f"val_split is {pairs.val_split}, {fetched}"
    none = "but there are no held-out pairs; give --val-data or --val-split"
    yield run.patience and not config.holds_out, f"patience is {run.patience}, {none}, or --patience 0"
    yield pairs.val_every > 1 and not config.holds_out, f"val_every is {pairs.val_every}, {none}"
    heads = vectors or config.align.encoders()
    closed = config.loss.objective == "cca" and not heads
    yield closed, "objective is 'cca', which is for `cloob train vectors` and `cloob train align`; name another"
    auto = config.loss.objective == "auto" and not vectors
    yield auto, "objective is 'auto', which is for `cloob train vectors`; name one"
    forms = "a table such as pairs.csv, shards, or a folder of images with .txt files beside them"
    others = "--data demo for the set that comes along, or of `cloob train vectors` --a and --b"
    yield not pairs.data and not vectors, f"data is missing; give --data with your pairs ({forms}), or {others}"


def _of_vectors(config: TrainConfig) -> Iterator[Conflict]:
    files, pairs = config.vectors, config.pairs
    for one, other in (pair.split(" needs ") for pair in _NEEDS):
        missing = getattr(files, one) and getattr(files, other) is None
        yield missing, f"{other} is missing: --{one.replace('_', '-')} needs --{other.replace('_', '-')}"
    yield _excluded(files, "ids", files.ids and files.a_ids, "--a-ids and --b-ids")
    yield _excluded(pairs, "val_split", pairs.val_split and files.val_a, "--val-a")
    if config.loss.objective == "auto":
        blind = "objective is 'auto', but there are no held-out pairs to choose by; give --val-split"
        yield not config.holds_out, blind
        several = "objective is 'auto', which needs one process; choose with one, then train with what it chose"
        yield _processes() > 1, several
        for key in config.loss.overrides():
            yield _excluded(config.loss, key, True, "the objective auto, which tries several")
    others = {"data": pairs.data, "val_data": pairs.val_data, **vars(config.towers), **vars(config.align)}
    for key in ("data", "val_data", "model", "init", "image_size", "image_encoder", "text_encoder"):
        yield others[key], f"{key} is {others[key]!r}, but --a and --b give vectors; leave it out"


def _of_encoders(config: TrainConfig) -> Iterator[Conflict]:
    align, towers = config.align, config.towers
    missing = "image_encoder" if align.image_encoder is None else "text_encoder"
    yield len(align.encoders()) < 2, f"{missing} is missing: heads need both --image-encoder and --text-encoder"
    for key, value in (("model", towers.model), ("init", towers.init)):
        yield value, f"{key} is {value!r}, but the encoders are given by --image-encoder and --text-encoder"


def _beside_heads(config: TrainConfig) -> Iterator[Conflict]:
    """What makes no sense where nothing but heads is trained."""
    for key in ("fsdp", "compile", "grad_checkpointing"):
        too_small = f"{key} is True, but heads on frozen encoders are too small for it; leave it out"
        yield getattr(config.run, key), too_small
    pairs, optim = config.pairs, config.optim
    for part, key in ((pairs, "shuffle_buffer"), (pairs, "flip"), (pairs, "crop_scale"), (optim, "layer_decay")):
        value = getattr(part, key)
        unused = f"{key} is {value}, but heads train on features made once; leave it out"
        yield value != getattr(type(part), key), unused
    freeze = config.towers.freeze
    yield freeze != "none", f"freeze is {freeze!r}, but both encoders are frozen anyway; leave it out"


def _without_heads(align: AlignConfig) -> Iterator[Conflict]:
    """Settings of heads where there are none, but for those that an earlier run's config.json has filled in."""
    for key, value in vars(align).items():
        advice = "but there are no heads; give --image-encoder and --text-encoder, or --a and --b, or leave it out"
        yield value not in (None, HEADS.get(key)), f"{key} is {value}, {advice}"


def _processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))
