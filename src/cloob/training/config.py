"""What a training run of towers is made of: one flat dataclass. No torch here.

A field's docstring is its help on the command line. What a value may be stands in its
annotation; what does not go together is in ``preflight``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Self

from annotated_types import Interval

from cloob.errors import InputError
from cloob.family import ObjectiveName
from cloob.machine import check_device_name
from cloob.settings import (
    AtLeastOne,
    Count,
    Decay,
    NotNegative,
    ObjectiveSettings,
    Pixels,
    Positive,
    Share,
)

DEFAULT_EPOCHS = 30


@dataclass(frozen=True)
class TrainConfig(ObjectiveSettings):
    """All settings of a training run of towers.

    Example:
        >>> from cloob import TrainConfig
        >>> config = TrainConfig(data=["demo"], model="tiny-vit", epochs=3)
        >>> config.override(lr=5e-4, steps=7).epochs is None
        True
        >>> TrainConfig(**config.to_dict()) == config
        True
    """

    objective: Literal[ObjectiveName, "dcl"] = "cloob"
    """The objective; dcl: another name of infoloob."""
    retrieval_from: Decay = 0.0
    """Share of the run after which the Hopfield retrieval begins; before, the plain
    embeddings are contrasted. 0: from the first step, as published, with which short
    runs do badly.
    """
    mask_duplicates: bool = False
    """Pairs with the same caption are no negatives of one another."""

    data: tuple[str, ...] = ()
    """Training pairs: a table (.csv, .tsv, .parquet, .jsonl), WebDataset tars (path,
    pattern, folder, or streamed by s3://, https://), a Hugging Face datasets
    folder, a folder of images with .txt files next to them, or "demo"; several are read
    as one. See the page “Data”.
    """
    val_data: tuple[str, ...] = ()
    """Held-out pairs for a validation loss at the end of an epoch; the same forms as
    --data.
    """
    val_split: Decay = 0.0
    """Hold this share of --data out in place of --val-data, say 0.1: always the same
    pairs, none with a picture or caption that is trained on. All pairs are read once
    for it.
    """
    image_column: str = "filepath"
    """Column of a table that holds the image path."""
    caption_column: str = "title"
    """Column of a table that holds the caption."""
    shuffle_buffer: Count | None = None
    """Shuffle within a window of this many pairs a process; 0: all.

    Left out: 10,000 for streamed shards, else 0.
    """
    crop_scale: tuple[
        Annotated[float, Interval(gt=0, le=1)], Annotated[float, Interval(gt=0, le=1)]
    ] = (0.9, 1.0)
    """Range of the area kept by the random crop of the training images."""
    flip: bool = False
    """Mirror training images at random (not for captions that say left or right)."""
    workers: Count = 2
    """Processes that decode images, per rank; 0 decodes in the training process."""
    max_bad_fraction: Share = 0.05
    """Stop when more than this fraction of an epoch's samples cannot be used."""

    model: str | None = None
    """Name of the towers, as `cloob train --list` prints them; RN50 when neither this
    nor --init is given.
    """
    init: str | None = None
    """Start from these weights: a run or checkpoint folder, an open_clip NAME/TAG,
    hf-hub:… or local-dir:…
    """
    image_size: Pixels | None = None
    """Side of the square input in pixels; the model's when left out."""
    freeze: Literal["none", "image", "text"] = "none"
    """Tower that keeps its weights and statistics; image with trained weights is LiT.
    """

    optimizer: str = "adamw"
    """adamw, or a name of timm's factory (muon, lion, lamb, …), with timm's defaults
    but for lr and weight_decay.
    """
    lr: Positive = 1e-3
    """Peak learning rate."""
    weight_decay: NotNegative = 0.1
    """Decoupled weight decay of weight matrices and kernels; norms, biases and
    temperatures have none.
    """
    beta1: Decay = 0.9
    """Decay of AdamW's first moment; like beta2 and eps of no effect on other
    optimisers.
    """
    beta2: Decay = 0.999
    """Decay of AdamW's second moment."""
    eps: Positive = 1e-8
    """AdamW's epsilon."""
    clip_grad_norm: NotNegative = 0.0
    """Scale gradients down to this global norm; 0 does not."""
    schedule: Literal["constant", "cosine", "cosine-restarts"] = "cosine"
    """Learning rate after the warm-up."""
    warmup: Count | None = None
    """Steps of linear warm-up; left out, a tenth of the run, at most 2000."""
    restarts: AtLeastOne = 10
    """Cosine cycles of the cosine-restarts schedule."""
    ema: Annotated[float, Interval(gt=0, lt=1)] | None = None
    """Decay of an exponential moving average of the weights, such as 0.999: validated,
    and saved as ema/.
    """

    epochs: AtLeastOne | None = None
    """Length of the run: passes over the training pairs; 30 where --steps is left out.
    """
    steps: AtLeastOne | None = None
    """Length of the run in place of --epochs: steps."""
    patience: Count = 0
    """Stop early after this many validations without improvement in --best; 0 never
    stops early.
    """
    batch_size: Count = 0
    """Pairs per step over all ranks together; 0: 256, of fewer than 4,096 pairs a power
    of two that makes 16 steps or more of an epoch, 8 at least.
    """
    micro_batch_size: Count = 0
    """Pairs of a rank whose activations are in memory at a time (gradient caching: the
    loss stays that of the full batch, for a second forward pass); 0: all.
    """
    precision: Literal["auto", "fp32", "bf16"] = "fp32"
    """Arithmetic of the towers; weights and loss stay in float32. auto: bf16 on a GPU
    that has it, else fp32.
    """
    compile: bool = False
    """Compile the towers with torch.compile: the first steps take longer, the others
    less.
    """
    fsdp: bool = False
    """Shard weights, gradients and optimiser state over the ranks (FSDP2) instead of a
    copy on each (DDP).
    """
    seed: Annotated[int, Interval(ge=0, lt=2**63)] = 0
    """Seed of the initial weights, the order of the pairs and their augmentation."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""

    out: Path = Path("runs/train")
    """Run folder: config.json, metrics.jsonl, epochs.jsonl, checkpoints."""
    save_every: Count = 0
    """Steps between checkpoints; 0 writes one at the end of every epoch."""
    keep: Count = 3
    """Newest checkpoints to keep, next to the best one; 0 keeps all."""
    best: str = "val_loss"
    """What makes a checkpoint the best, which RUN then means: val_loss, the held-out
    pairs' loss, or val_recall, their mean recall at 1, 5 and 10 in both directions; in
    Python also a metric of yours.
    """
    resume: Literal["none", "auto"] = "none"
    """auto: go on from the newest complete checkpoint in --out, if any."""
    overwrite: bool = False
    """Replace the run that --out already holds."""

    # the classes of the parts that Python code gave to ``train``; they stand in the
    # place of what is named above
    given_pairs: str | None = None
    given_held_out: str | None = None
    given_towers: str | None = None
    given_objective: str | None = None
    given_optimizer: str | None = None
    given_sampler: str | None = None
    given_batch_sampler: str | None = None
    given_metrics: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_device_name(self.device)
        if self.batch_size == 1:
            raise InputError("batch_size is 1; it must be 2 or more, or 0 to fit it")
        if self.crop_scale[0] > self.crop_scale[1]:
            raise InputError(
                f"crop_scale is {self.crop_scale}; it must be low <= high in (0, 1]"
            )
        if self.epochs is self.steps is None:
            object.__setattr__(self, "epochs", DEFAULT_EPOCHS)

    def override(self, **changes: object) -> Self:
        """A copy with some settings changed: ``config.override(lr=1e-4, epochs=3)``.

        ``epochs`` and ``steps`` replace each other, and so do ``val_data`` and
        ``val_split``; another objective begins with its own scales, another model with
        its picture size.

        Raises:
            InputError: There is no such setting, or the value is not right for it.
        """
        if changes.get("epochs") is not None or changes.get("steps") is not None:
            changes = {"epochs": None, "steps": None, **changes}
        if self.model is not None and changes.get("model", self.model) != self.model:
            changes = {"image_size": None, **changes}
        if "val_split" in changes:
            changes = {"val_data": (), **changes}
        elif "val_data" in changes:
            changes = {"val_split": 0.0, **changes}
        return super().override(**changes)

    @property
    def holds_out(self) -> bool:
        return bool(self.val_data or self.val_split or self.given_held_out)

    def total_steps(self, steps_per_epoch: int) -> int:
        """The length of the run in steps."""
        if self.steps is not None:
            return self.steps
        return (self.epochs or 0) * steps_per_epoch
