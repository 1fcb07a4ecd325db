"""What a training run is made of: one frozen dataclass per component, nested in ``TrainConfig``.

The docstring under each field is its help text on the command line, where the fields appear by their leaf
names (``--lr``, not ``--optim.lr``), so leaf names are unique across components. No torch is imported here.
"""

from __future__ import annotations

import dataclasses
import json
import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from cloob.errors import InputError, nearest
from cloob.train.strict import build, check, check_choice, convert, hints, leaf_homes, plain

ObjectiveName = Literal["clip", "infoloob", "infonce-hopfield", "cloob"]
ScheduleName = Literal["constant", "cosine", "cosine-restarts"]


def _positive(value: float) -> bool:
    return math.isfinite(value) and value > 0


@dataclass(frozen=True)
class PairsConfig:
    """The image-caption pairs and how they are read."""

    data: tuple[str, ...] = ("demo",)
    """Training pairs: a table (.csv, .tsv, .parquet, .jsonl), WebDataset tars (path, pattern or folder), a
    folder of images with .txt files beside them, or "demo"; several are read as one."""
    val_data: tuple[str, ...] = ()
    """Held-out pairs for a validation loss at the end of each epoch; the same forms as --data."""
    image_column: str = "filepath"
    """Column of a table that holds the image path."""
    caption_column: str = "title"
    """Column of a table that holds the caption."""
    crop_scale: tuple[float, float] = (0.9, 1.0)
    """Range of the area kept by the random crop of the training images."""
    flip: bool = False
    """Mirror training images at random (not for captions that say left or right)."""
    workers: int = 2
    """Processes that decode images, per rank; 0 decodes in the training process."""
    max_bad_fraction: float = 0.05
    """Stop when more than this fraction of an epoch's samples cannot be used."""

    def __post_init__(self) -> None:
        check(len(self.data) > 0 and all(self.data), "data", self.data, "one source or more")
        check(all(self.val_data), "val_data", self.val_data, "sources without empty names")
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

    def __post_init__(self) -> None:
        check(self.model != "", "model", self.model, "the name of a model")
        check(self.init != "", "init", self.init, "where the weights are")
        check(self.image_size is None or self.image_size >= 8, "image_size", self.image_size, "8 or more pixels")


@dataclass(frozen=True)
class LossConfig:
    """The objective. What is left out takes the objective's own default."""

    objective: ObjectiveName = "cloob"
    """cloob: InfoLOOB with Hopfield retrieval; clip: InfoNCE without; and the two between them."""
    inv_tau: float | None = None
    """Inverse temperature of the contrast (its start when it is learned)."""
    beta: float | None = None
    """Inverse temperature of the Hopfield retrieval."""
    learnable_inv_tau: bool | None = None
    """Learn the contrast's inverse temperature."""
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
        if self.scale is not None:
            check_choice("scale", self.scale, Literal["paper", "unit"])

    def overrides(self) -> dict[str, Any]:
        """The objective's arguments that were given: what ``make_objective(name, **overrides)`` takes."""
        names = ("inv_tau", "beta", "learnable_inv_tau", "learnable_beta", "scale")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


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
    schedule: ScheduleName = "cosine"
    """Learning rate after the warm-up."""
    warmup: int | None = None
    """Steps of linear warm-up; left out, a tenth of the run, at most 2000."""
    restarts: int = 10
    """Cosine cycles of the cosine-restarts schedule."""

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
        check_choice("schedule", self.schedule, ScheduleName)
        check(self.warmup is None or self.warmup >= 0, "warmup", self.warmup, "a number of steps, 0 or more")
        check(self.restarts >= 1, "restarts", self.restarts, "1 or more")


@dataclass(frozen=True)
class RunConfig:
    """Length, batch, numbers and place of the run."""

    epochs: int = 30
    """Passes over the training pairs."""
    batch_size: int = 256
    """Pairs per step over all ranks together."""
    micro_batch_size: int = 0
    """Pairs whose activations are held at a time on each rank (gradient caching: the loss is still that of the whole
    batch, at the price of a second forward pass); 0 holds all."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the towers; weights and loss stay in float32."""
    seed: int = 0
    """Seed of the initial weights, the order of the pairs and their augmentation."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    max_nonfinite: int = 10
    """Stop after this many steps in a row whose loss or gradient is not finite; such steps are skipped."""

    def __post_init__(self) -> None:
        check(self.epochs >= 1, "epochs", self.epochs, "1 or more")
        check(
            self.batch_size >= 2,
            "batch_size",
            self.batch_size,
            "2 or more (the others in a batch are the negatives)",
        )
        check(
            self.micro_batch_size >= 0, "micro_batch_size", self.micro_batch_size, "1 or more, or 0 for the whole batch"
        )
        check_choice("precision", self.precision, Literal["fp32", "bf16"])
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


@dataclass(frozen=True)
class SaveConfig:
    """The run folder and its checkpoints."""

    out: Path = Path("runs/train")
    """Run folder: config.json, metrics.jsonl, epochs.jsonl, checkpoints."""
    save_every: int = 0
    """Steps between checkpoints; 0 writes one at the end of each epoch."""
    keep: int = 3
    """Checkpoints to keep; 0 keeps all."""
    resume: str = "none"
    """none; auto: go on from the newest whole checkpoint in --out, if any; or a checkpoint or run."""
    overwrite: bool = False
    """Replace the run that --out already holds."""

    def __post_init__(self) -> None:
        check(self.save_every >= 0, "save_every", self.save_every, "a number of steps, or 0 for every epoch")
        check(self.keep >= 0, "keep", self.keep, "1 or more, or 0 to keep all")
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
    """Steps between measurements of the batch's saturation and effective eigenvalues."""
    tensorboard: bool = True
    """Also write TensorBoard events, when TensorBoard is installed."""

    def __post_init__(self) -> None:
        check(self.log_every >= 1, "log_every", self.log_every, "1 or more")


@dataclass(frozen=True)
class TrainConfig:
    """A whole training run."""

    pairs: PairsConfig = field(default_factory=PairsConfig)
    towers: TowersConfig = field(default_factory=TowersConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)
    save: SaveConfig = field(default_factory=SaveConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def override(self, **leaves: Any) -> TrainConfig:
        """A copy with some leaves changed, wherever they sit: ``config.override(lr=1e-4, epochs=3)``.

        Raises:
            InputError: No component has such a leaf, or the value is not right for it.
        """
        homes = leaf_homes(TrainConfig)
        changes: dict[str, dict[str, Any]] = {}
        for name, value in leaves.items():
            if name not in homes:
                raise InputError(f"config: unknown key {name!r}; {nearest(name, homes)}")
            part = homes[name]
            changes.setdefault(part, {})[name] = convert(value, hints(type(getattr(self, part)))[name], name)
        parts = {part: dataclasses.replace(getattr(self, part), **values) for part, values in changes.items()}
        return dataclasses.replace(self, **parts)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Plain nested values, ready for JSON: ``{"optim": {"lr": 0.001, …}, …}``."""
        return typing.cast("dict[str, dict[str, Any]]", plain(self))

    def to_json(self) -> str:
        """The text of ``config.json``."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, source: str = "config") -> TrainConfig:
        """The inverse of ``to_dict``; what is left out takes its default.

        Args:
            values: Nested values, e.g. read from JSON.
            source: What to call them in an error, e.g. the file's name.

        Raises:
            InputError: A key is unknown (the nearest is named), or a value has a wrong type or range.
        """
        try:
            return typing.cast(TrainConfig, build(cls, values))
        except InputError as error:
            raise InputError(f"{source}: {error}") from None

    @classmethod
    def from_json(cls, path: Path | str) -> TrainConfig:
        """Reads a ``config.json``.

        Raises:
            InputError: The file cannot be read or is not JSON, or as ``from_dict``.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror}); give a run's config.json") from None
        except ValueError as error:
            raise InputError(f"{path}: is not JSON ({error})") from None
        return cls.from_dict(values, source=str(path))
