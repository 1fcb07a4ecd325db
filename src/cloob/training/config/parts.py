"""The ten parts of a training configuration: fields with default, rule and help text.

A field's docstring is its help on the command line. A rule of one field stands in its
annotation; what does not go together is in ``checks``. No torch is imported here.
"""

import functools
import math
import re
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from cloob.errors import InputError
from cloob.family import ObjectiveName

SCALES = (
    "inv_tau",
    "beta",
    "bias",
    "learnable_inv_tau",
    "learnable_beta",
    "scale",
    "exclude_above",
)
LENGTHS = (
    "epochs",
    "samples",
    "steps",
)  # the three ways to give the length of a run; exactly one of them has a value
VAL_SPLIT = 0.1  # the share of the pairs that is held out by default
DEFAULT_EPOCHS = 30


class Rule(NamedTuple):
    """What a value must be, in words and as a test."""

    expected: str
    holds: Callable[[Any], object]


def at_least(least: float, expected: str | None = None) -> Rule:
    return Rule(
        expected or f"{least} or more",
        lambda value: value >= least and math.isfinite(value),
    )


POSITIVE = Rule("a positive number", lambda value: math.isfinite(value) and value > 0)
SHARE = Rule("between 0 and 1", lambda value: 0 <= value <= 1)
RANGE = Rule("low <= high in (0, 1]", lambda ends: 0 < ends[0] <= ends[1] <= 1)
NAMED = Rule("a name, not empty", bool)
DECAY = Rule("in [0, 1)", lambda value: 0 <= value < 1)
_DEVICE = re.compile(r"auto|cpu|mps|cuda(:\d+)?")
_KINDS = {
    int: "an integer",
    float: "a number",
    str: "a text",
    bool: "true or false",
    tuple: "a list",
}


class Checked:
    """Converts fields to their types, a list to a tuple say, and checks them by the
    rules in its annotation.
    """

    def __post_init__(self) -> None:
        kind: Any = type(self)
        for name, hint in _annotations(kind).items():
            plain, *rules = (
                typing.get_args(hint) if hasattr(hint, "__metadata__") else (hint,)
            )
            value = _converted(getattr(self, name), plain, name)
            object.__setattr__(self, name, value)
            for rule in rules if value is not None else ():
                if not rule.holds(value):
                    raise InputError(f"{name} is {value!r}; it must be {rule.expected}")


_annotations = functools.cache(
    functools.partial(typing.get_type_hints, include_extras=True)
)


def _converted(value: Any, hint: Any, name: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return None if value is None else _converted(value, args[0], name)
    if origin is tuple and isinstance(value, list | tuple):
        kinds = args[:1] * len(value) if Ellipsis in args else args
        if len(kinds) == len(value):
            return tuple(
                _converted(item, kind, name)
                for item, kind in zip(value, kinds, strict=True)
            )
    if hint is Path and isinstance(value, str | Path) and value != "":
        return Path(value)
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if origin is Literal and value in args:
        return value
    if (
        isinstance(hint, type)
        and isinstance(value, hint)
        and not (hint is int and isinstance(value, bool))
    ):
        return value
    options = (
        f"one of {', '.join(args)}"
        if origin is Literal
        else "the path of a file or folder"
    )
    raise InputError(
        f"{name} is {value!r}; it must be {_KINDS.get(origin or hint, options)}"
    )


@dataclass(frozen=True)
class PairsConfig(Checked):
    """The image-caption pairs and how they are read."""

    data: Annotated[tuple[str, ...], Rule("sources without empty names", all)] = ()
    """Training pairs: a table (.csv, .tsv, .parquet, .jsonl), WebDataset tars (path,
    pattern, folder, or streamed by pipe:…, s3://, https://), a Hugging Face datasets
    folder, a folder of images with .txt files next to them, or "demo"; several are read
    as one. See the page “Data”.
    """
    val_data: Annotated[tuple[str, ...], Rule("sources without empty names", all)] = ()
    """Held-out pairs for a validation loss at the end of an epoch; the same forms as
    --data.

    Of a recipe, demo:val goes with --data demo alone: of other data a tenth is held
    out, unless this or --val-split is given.
    """
    val_split: Annotated[
        float, Rule("a share of the pairs below 1, or 0 for none", DECAY.holds)
    ] = 0.0
    """Hold this share of --data out in place of --val-data, say 0.1: always the same
    pairs, none with a picture or caption that is trained on. All pairs are read once
    for it.
    """
    val_every: Annotated[int, at_least(1, "a number of epochs, 1 or more")] = 1
    """Validate every N epochs, and at the end of the run."""
    image_column: Annotated[str, NAMED] = "filepath"
    """Column of a table that holds the image path."""
    caption_column: Annotated[str, NAMED] = "title"
    """Column of a table that holds the caption."""
    shuffle_buffer: Annotated[
        int | None, at_least(0, "a number of pairs, or 0 for a full shuffle")
    ] = None
    """Shuffle within a window of this many pairs a process; 0: all.

    Left out: 10,000 for streamed shards, else 0.
    """
    cache_dir: Path | None = None
    """Where fetched shards, features and the like are kept; left out, $CLOOB_CACHE or
    the user's cache folder.
    """
    cache_gb: Annotated[float | None, POSITIVE] = None
    """Room for it in GiB; what was used longest ago goes first.

    Left out, $CLOOB_CACHE_BYTES or 50.
    """
    crop_scale: Annotated[tuple[float, float], RANGE] = (0.9, 1.0)
    """Range of the area kept by the random crop of the training images."""
    flip: bool = False
    """Mirror training images at random (not for captions that say left or right)."""
    workers: Annotated[int, at_least(0)] = 2
    """Processes that decode images, per rank; 0 decodes in the training process."""
    max_bad_fraction: Annotated[float, SHARE] = 0.05
    """Stop when more than this fraction of an epoch's samples cannot be used."""


@dataclass(frozen=True)
class TowersConfig(Checked):
    """The two towers."""

    model: Annotated[str | None, NAMED] = None
    """Name of the towers, as `cloob train --list` prints them; RN50 when neither this
    nor --init is given.
    """
    init: Annotated[str | None, NAMED] = None
    """Start from these weights: a run or checkpoint folder, an open_clip NAME/TAG,
    hf-hub:… or local-dir:…
    """
    image_size: Annotated[int | None, at_least(8, "8 or more pixels")] = None
    """Side of the square input in pixels; the model's when left out."""
    freeze: Literal["none", "image", "text"] = "none"
    """Tower that keeps its weights and statistics; image with trained weights is LiT.
    """
    average_with_start: Annotated[float | None, SHARE] = None
    """Also write OUT/averaged: the weights between those of --init (0) and those at the
    end (1), as in WiSE-FT.
    """


@dataclass(frozen=True)
class LossConfig(Checked):
    """The objective. What is left out takes the objective's default."""

    objective: Literal[ObjectiveName, "dcl"] = "cloob"
    """The objective; dcl: another name of infoloob."""
    inv_tau: Annotated[float | None, POSITIVE] = None
    """Inverse temperature of the contrast (its start when it is learned)."""
    beta: Annotated[float | None, POSITIVE] = None
    """Inverse temperature of the Hopfield retrieval."""
    bias: Annotated[float | None, Rule("a finite number", math.isfinite)] = None
    """Start of the bias that the sigmoid loss learns; siglip alone."""
    retrieval_from: Annotated[
        float, Rule("a share of the run, from 0 to below 1", DECAY.holds)
    ] = 0.0
    """Share of the run after which the Hopfield retrieval begins; before, the plain
    embeddings are contrasted. 0: from the first step, as published, with which short
    runs do badly.
    """
    learnable_inv_tau: bool | None = None
    """Learn the contrast's inverse temperature (with the scale unit, which is then the
    default).
    """
    learnable_beta: bool | None = None
    """Learn the retrieval's inverse temperature."""
    scale: Literal["paper", "unit"] | None = None
    """paper: tau times the sum of both directions; unit: their mean."""
    exclude_above: Annotated[float | None, Rule("a finite number", math.isfinite)] = (
        None
    )
    """A caption whose similarity to a picture exceeds that of its caption by more than
    this is no negative of it.
    """
    mask_duplicates: bool = False
    """Pairs with the same caption are no negatives of one another."""

    def overrides(self) -> dict[str, Any]:
        """The objective's arguments that were given: what ``make_objective(name,
        **overrides)`` takes.
        """
        return {
            name: value for name in SCALES if (value := getattr(self, name)) is not None
        }


@dataclass(frozen=True)
class OptimConfig(Checked):
    """The optimiser and the course of its learning rate."""

    optimizer: Annotated[str, NAMED] = "adamw"
    """adamw, or a name of timm's factory (muon, lion, lamb, …), with timm's defaults
    but for lr and weight_decay.
    """
    lr: Annotated[float, POSITIVE] = 1e-3
    """Peak learning rate."""
    weight_decay: Annotated[float, at_least(0)] = 0.1
    """Decoupled weight decay of weight matrices and kernels; norms, biases and
    temperatures have none.
    """
    beta1: Annotated[float, DECAY] = 0.9
    """Decay of AdamW's first moment; like beta2 and eps of no effect on other
    optimisers.
    """
    beta2: Annotated[float, DECAY] = 0.999
    """Decay of AdamW's second moment."""
    eps: Annotated[float, POSITIVE] = 1e-8
    """AdamW's epsilon."""
    clip_grad_norm: Annotated[
        float, at_least(0, "a positive number, or 0 for no clipping")
    ] = 0.0
    """Scale gradients down to this global norm; 0 does not."""
    schedule: Literal["constant", "constant-cooldown", "cosine", "cosine-restarts"] = (
        "cosine"
    )
    """Learning rate after the warm-up; constant-cooldown falls linearly to 0 over the
    last fifth of the run.
    """
    warmup: Annotated[int | None, at_least(0, "a number of steps, 0 or more")] = None
    """Steps of linear warm-up; left out, a tenth of the run, at most 2000."""
    restarts: Annotated[int, at_least(1)] = 10
    """Cosine cycles of the cosine-restarts schedule."""
    layer_decay: Annotated[
        float, Rule("above 0 and at most 1", lambda factor: 0 < factor <= 1)
    ] = 1.0
    """Factor of the learning rate from a layer to the one below it, in every tower; 1
    treats all alike.
    """
    like_ml_jku: bool = False
    """Weight decay by the parameters' names and a warm-up that begins at 0, as in the
    authors' program.
    """
    ema: Annotated[
        float | None, Rule("above 0 and below 1", lambda decay: 0 < decay < 1)
    ] = None
    """Decay of an exponential moving average of the weights, such as 0.999: validated,
    and saved as ema/.
    """


@dataclass(frozen=True)
class RunConfig(Checked):
    """Length, batch, numbers and place of the run."""

    epochs: Annotated[int | None, at_least(1)] = None
    """Length of the run: passes over the training pairs; 30 where neither samples nor
    --steps is given.
    """
    samples: Annotated[int | None, at_least(1)] = None
    """Length of the run in place of --epochs: pairs seen, rounded up to full batches.
    """
    steps: Annotated[int | None, at_least(1)] = None
    """Length of the run in place of --epochs: steps."""
    patience: Annotated[
        int, at_least(0, "a number of validations, or 0 for no early stopping")
    ] = 0
    """Stop early after this many validations without improvement in --best; 0 never
    stops early.
    """
    batch_size: Annotated[
        int,
        Rule("2 or more, or 0 to fit the number of pairs", lambda n: n == 0 or n > 1),
    ] = 0
    """Pairs per step over all ranks together; 0: 256, of fewer than 4,096 pairs a power
    of two that makes 16 steps or more of an epoch, 8 at least.
    """
    micro_batch_size: Annotated[
        int, at_least(0, "1 or more, or 0 for the full batch")
    ] = 0
    """Pairs of a rank whose activations are in memory at a time (gradient caching: the
    loss stays that of the full batch, for a second forward pass); 0: all.
    """
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of the towers; weights and loss stay in float32. auto: bf16 on a GPU
    that has it, else fp32. fp16 scales the loss, and lowers the scale after an
    overflow.
    """
    tf32: bool | None = None
    """Round the inputs of float32 matrix products to TF32 on a GPU; left out, with
    precision auto alone.
    """
    channels_last: bool | None = None
    """Keep image towers in the channels-last memory layout, in which convolutions are
    faster.

    Left out, all but those with batch norm on a CPU, whose statistics it costs three
    digits.
    """
    grad_checkpointing: bool = False
    """Recompute the towers' blocks in the backward pass: less memory, about a third
    more time.
    """
    compile: bool = False
    """Compile the towers with torch.compile: the first steps take longer, the others
    less.
    """
    sync_bn: bool = False
    """Batch normalisation over the batches of all ranks (CUDA only) instead of one
    rank's.
    """
    fsdp: bool = False
    """Shard weights, gradients and optimiser state over the ranks (FSDP2) instead of a
    copy on each (DDP).
    """
    seed: Annotated[int, Rule("0 or more", lambda seed: 0 <= seed < 2**63)] = 0
    """Seed of the initial weights, the order of the pairs and their augmentation."""
    device: Annotated[
        str, Rule("auto, cpu, cuda, cuda:N or mps", _DEVICE.fullmatch)
    ] = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    max_nonfinite: Annotated[int, at_least(1)] = 10
    """Stop after this many steps in a row whose loss or gradient is not finite; such
    steps are skipped.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.epochs is self.samples is self.steps is None:
            object.__setattr__(self, "epochs", DEFAULT_EPOCHS)

    def total_steps(self, steps_per_epoch: int) -> int:
        if self.epochs is not None:
            return self.epochs * steps_per_epoch
        return (
            self.steps
            if self.steps is not None
            else math.ceil((self.samples or 0) / self.batch_size)
        )


@dataclass(frozen=True)
class SaveConfig(Checked):
    """The run folder and its checkpoints."""

    out: Path = Path("runs/train")
    """Run folder: config.json, metrics.jsonl, epochs.jsonl, checkpoints."""
    save_every: Annotated[
        int, at_least(0, "a number of steps, or 0 for every epoch")
    ] = 0
    """Steps between checkpoints; 0 writes one at the end of every epoch."""
    keep: Annotated[int, at_least(0, "1 or more, or 0 to keep all")] = 3
    """Newest checkpoints to keep, next to the best one; 0 keeps all."""
    best: Annotated[str, NAMED] = "val_loss"
    """What makes a checkpoint the best, which RUN then means: val_loss, the held-out
    pairs' loss, or val_recall, their mean recall at 1, 5 and 10 in both directions; in
    Python also a metric of yours.
    """
    resume: Annotated[str, Rule("none, auto or a path", bool)] = "none"
    """none; auto: go on from the newest complete checkpoint in --out, if any; or a
    checkpoint or run.
    """
    overwrite: bool = False
    """Replace the run that --out already holds."""


@dataclass(frozen=True)
class LogConfig(Checked):
    """What is written down while training."""

    log_every: Annotated[int, at_least(1)] = 50
    """Steps between measurements of the batch's effective eigenvalues and, but for
    siglip, saturation.
    """
    tensorboard: bool = True
    """Also write TensorBoard events, when TensorBoard is installed."""
    wandb: Annotated[str | None, NAMED] = None
    """Also log to this Weights & Biases project."""


@dataclass(frozen=True)
class GivenConfig(Checked):
    """The classes of the parts that Python code gave to ``train``; they stand in the
    place of what is named above.
    """

    given_pairs: Annotated[str | None, NAMED] = None
    given_held_out: Annotated[str | None, NAMED] = None
    given_towers: Annotated[str | None, NAMED] = None
    given_objective: Annotated[str | None, NAMED] = None
    given_optimizer: Annotated[str | None, NAMED] = None
    given_sampler: Annotated[str | None, NAMED] = None
    given_batch_sampler: Annotated[str | None, NAMED] = None
    given_metrics: Annotated[str | None, NAMED] = None
